"""Plants bugs in the kernels, one at a time, and checks that the fuzz program notices each.

    python tests/cpp/mutants.py [part of a name]

A mutant changes one line of a copy of csrc, recompiles one file, links it with the objects of the last build and runs the
fuzz program, which must fail. Takes a few seconds a mutant, a minute where a tier must be recompiled. When a line that is
changed here changes for good, the script says so: bring the mutant up to date.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
CALLS = "4000"
WQ = "ops/wq_linear"
FFT = "ops/fftconv"
DEPTHWISE = "ops/depthwise_conv1d"
GEMM = "gemm"
DYAD = "ops/dyad_linear"


class Mutant(NamedTuple):
    name: str
    file: str  # below csrc
    old: str
    new: str
    unit: str  # file below csrc that is recompiled


def packing(name: str, old: str, new: str) -> Mutant:
    return Mutant(f"packing: {name}", f"{WQ}/pack.cpp", old, new, f"{WQ}/pack.cpp")


def dispatch(name: str, old: str, new: str) -> Mutant:
    return Mutant(f"dispatch: {name}", f"{WQ}/driver.cpp", old, new, f"{WQ}/driver.cpp")


def kernel(name: str, old: str, new: str) -> Mutant:
    """In the code that all tiers share; the portable tier compiles fastest."""
    return Mutant(f"kernel: {name}", f"{WQ}/body.h", old, new, f"{WQ}/scalar.cpp")


def tier(name: str, tier: str, old: str, new: str) -> Mutant:
    return Mutant(f"{tier}: {name}", f"simd/{tier}.h", old, new, f"{WQ}/{tier}.cpp")


def fft(name: str, file: str, old: str, new: str, unit: str | None = None) -> Mutant:
    return Mutant(f"fftconv: {name}", f"{FFT}/{file}", old, new, f"{FFT}/{unit or file}")


FFT_MUTANTS = (
    fft(
        "wrong last phase of 16 points",
        "codelets.h",
        "butterfly_tan(x2, x3, -kCos16, sign * kTan16);          // w^7",
        "butterfly_tan(x2, x3, kCos16, sign * kTan16);          // w^7",
        "scalar.cpp",
    ),
    fft(
        "conjugate product is plain",
        "stages.h",
        "z[s] = Conjugate ? mul_conj(z[s], t.re, t.im) : mul(z[s], t.re, t.im);",
        "z[s] = mul(z[s], t.re, t.im);",
        "scalar.cpp",
    ),
    fft(
        "second half of a row enters with the wrong sign",
        "stages.h",
        "z[a] = {fma(b, s, mul_f(u, c)), fnma(b, c, mul_f(u, s))};",
        "z[a] = {fnma(b, s, mul_f(u, c)), fma(b, c, mul_f(u, s))};",
        "scalar.cpp",
    ),
    fft(
        "results of the second half with the wrong sign",
        "stages.h",
        "fms(z[a].re, s, mul_f(z[a].im, c))",
        "fnma(z[a].re, s, mul_f(z[a].im, c))",
        "scalar.cpp",
    ),
    fft(
        "gate of the last strip but one",
        "stages.h",
        "if constexpr (O == Out::gated) y = mul_f(y, load_r(im + at));",
        "if constexpr (O == Out::gated) y = mul_f(y, load_r(im + at - (at >= 16 ? 16 : 0)));",
        "scalar.cpp",
    ),
    Mutant(
        "depthwise: row that begins inside a vector",
        "simd/convert.h",
        "std::memcpy(moved + (lo - n), part,",
        "std::memcpy(moved, part,",
        f"{DEPTHWISE}/scalar.cpp",
    ),
    fft(
        "source row that begins inside a vector",
        "io.h",
        "std::memcpy(moved + (lo - t), part,",
        "std::memcpy(moved, part,",
        "scalar.cpp",
    ),
    fft("skip forgets the gate", "io.h", "if (s.b) w = mul_f(w, get(s.b));", "", "scalar.cpp"),
    fft(
        "cropping one late",
        "io.h",
        "if (end > s.end) end = s.end;",
        "if (end > s.end + 1) end = s.end + 1;",
        "scalar.cpp",
    ),
    fft("twiddles without the quarter", "plan.cpp", "(4 * k + (quarter ? 1 : 0)) * c", "(4 * k) * c"),
    fft(
        "lanes of two-factor twiddles",
        "plan.cpp",
        "for (int c = 0; c < 16; ++c) phase(k + from, first, c,",
        "for (int c = 0; c < 16; ++c) phase(k + from, first, c ^ 1,",
    ),
    fft(
        "overlap-save keeps one result too many",
        "driver.cpp",
        "sink.end = std::min(begin + step, a.l);",
        "sink.end = std::min(begin + step + 1, a.l + 1);",
    ),
    fft(
        "overlap-save starts late",
        "driver.cpp",
        "v.origin = sink.shift = begin - (head.taps - 1);",
        "v.origin = sink.shift = begin - std::max<int64_t>(head.taps - 2, 0);",
    ),
    fft(
        "circular fold of a correlation",
        "driver.cpp",
        "const float sign = correlation ? -1.0f : 1.0f;",
        "const float sign = 1.0f;",
    ),
    fft(
        "negative lags keep their sign",
        "driver.cpp",
        "r[2 * points - j] = -taps[n - j];",
        "r[2 * points - j] = taps[n - j];",
    ),
    fft(
        "batch sum starts from the last channel",
        "driver.cpp",
        "if (a.gk && f.b > 1) std::fill_n(sum,",
        "if (a.gk && f.b > 2) std::fill_n(sum,",
    ),
    fft(
        "gradient of the input gate takes the gate",
        "driver.cpp",
        "(a.gu ? sink.gate2 : sink.gate) = v.a;",
        "(a.gu ? sink.gate2 : sink.gate) = v.b;",
    ),
    fft(
        "decoding skips the last tile",
        "driver.cpp",
        "next = std::min(tile, a.capacity - s);",
        "next = std::min(tile, a.capacity - s - 1);",
    ),
    fft(
        "decoding adds a tile twice",
        "driver.cpp",
        "std::copy_n(a.y + at + s, next, sums);",
        "for (int64_t j = 0; j < next; ++j) sums[j] = 2 * a.y[at + s + j];",
    ),
    Mutant(
        "depthwise: taps beyond the first eight",
        "simd/fir.h",
        "for (int64_t j = 0; j < k; ++j) {\n    const vf w = set_f(taps[j]);",
        "for (int64_t j = 0; j < (k < 8 ? k : 8); ++j) {\n    const vf w = set_f(taps[j]);",
        f"{DEPTHWISE}/scalar.cpp",
    ),
    Mutant(
        "depthwise: channels last reads the next step",
        f"{DEPTHWISE}/body.h",
        "const int64_t n = t + a.offset - j;\n        if (n < 0",
        "const int64_t n = t + a.offset - j + 1;\n        if (n < 0",
        f"{DEPTHWISE}/scalar.cpp",
    ),
)


def gemm(name: str, file: str, old: str, new: str, unit: str = f"{GEMM}/scalar.cpp") -> Mutant:
    return Mutant(f"dyad_linear: {name}", file, old, new, unit)


GEMM_MUTANTS = (
    gemm(
        "last columns of a tile written whole",
        "simd/gemm.h",
        "if (i == NT - 1 && last < 16) store_part",
        "if (i == NT - 1 && last < 15) store_part",
    ),
    gemm(
        "sums of an earlier piece of k forgotten",
        "simd/gemm.h",
        "acc[r][i] = load_f32(c + r * ldc + i * 16);",
        "acc[r][i] = zero_f();",
    ),
    gemm(
        "bias of the first tile for all",
        "simd/gemm.h",
        "load_f32(p.init + i * 16)",
        "load_f32(p.init)",
        f"{GEMM}/avx512.cpp",
    ),
    gemm(
        "halves of a bf16 pair exchanged",
        "simd/gemm.h",
        "b[0] = as_float(shift_left<16>(v));\n    b[1] =",
        "b[1] = as_float(shift_left<16>(v));\n    b[0] =",
    ),
    gemm("rest of k not cleared", "gemm/body.h", "for (int l = n; l < 16; ++l) store_f32(to + l * 16, zero_f());", ""),
    gemm(
        "rows packed one value short",
        "gemm/body.h",
        "const int count = upto16(k - u * kUnit - 16 * h);",
        "const int count = upto16(k - u * kUnit - 16 * h - 1);",
    ),
    gemm(
        "activation forgotten with features first",
        "gemm/body.h",
        "i < width ? activate(load_f32_part(c + (r + i) * ldc + j, count), o.act)",
        "i < width ? load_f32_part(c + (r + i) * ldc + j, count)",
    ),
    gemm(
        "pieces of sums end early",
        "gemm/body.h",
        "for (int64_t i0 = 0; i0 < count; i0 += 64) {",
        "for (int64_t i0 = 0; i0 + 1 < count; i0 += 64) {",
    ),
    gemm(
        "residue classes in another order",
        "simd/interleave.h",
        "split<L, N / 2>(odd, out + step, 2 * step);",
        "split<L, N / 2>(even, out + step, 2 * step);",
    ),
    gemm(
        "interleaving forgets the rest",
        "simd/interleave.h",
        "for (int64_t j = i; j < d; ++j) y[j * n + r] +=",
        "for (int64_t j = i + 1; j < d; ++j) y[j * n + r] +=",
    ),
    gemm(
        "gelu of the wrong tail",
        "simd/activation.h",
        "sub_f(max_f(zero_f(), x), mul_f(a, tail))",
        "sub_f(max_f(zero_f(), x), mul_f(x, tail))",
    ),
    gemm(
        "residues of the first block for all",
        "gemm/driver.cpp",
        "Source{residues + d * s.d_in * bytes_of(a.dtype), a.dtype, p.f_in, 1}",
        "Source{residues, a.dtype, p.f_in, 1}",
        f"{GEMM}/driver.cpp",
    ),
    gemm(
        "bias twice where two sums meet",
        "gemm/driver.cpp",
        "bias && matrix < s.n ? bias + matrix *",
        "bias ? bias + matrix % s.n *",
        f"{GEMM}/driver.cpp",
    ),
    gemm(
        "packed rows of a later piece of k",
        "gemm/driver.cpp",
        "u0 * in_block * kUnitBytes",
        "u0 * k.rows * kUnitBytes",
        f"{GEMM}/driver.cpp",
    ),
    gemm(
        "second gradient from the first rows",
        "gemm/gradient.cpp",
        "a[component && p.second_gy]",
        "a[0]",
        f"{GEMM}/gradient.cpp",
    ),
    gemm(
        "chunks of tokens overwrite each other",
        "gemm/gradient.cpp",
        "nullptr, t0 > 0,",
        "nullptr, false,",
        f"{GEMM}/gradient.cpp",
    ),
    gemm(
        "overlap overwritten instead of added",
        "ops/dyad_linear/pack.cpp",
        "get(w, dtype, at) + get(wu,",
        "get(wu,",
        f"{DYAD}/pack.cpp",
    ),
    gemm(
        "quantised second halves of the first block",
        "ops/dyad_linear/driver.cpp",
        "wq_cut(rest, (a.n + d) * tiles, (a.n + d + 1) * tiles)",
        "wq_cut(rest, a.n * tiles, (a.n + 1) * tiles)",
        f"{DYAD}/driver.cpp",
    ),
)

INT8 = "gemm/int8"
QUIK = "ops/quik_linear"
SP24 = "ops/sp24"


def quik(name: str, file: str, old: str, new: str, unit: str | None = None) -> Mutant:
    return Mutant(f"quik_linear: {name}", file, old, new, unit or file)


def quik_body(name: str, old: str, new: str) -> Mutant:
    return quik(name, f"{QUIK}/body.h", old, new, f"{QUIK}/scalar.cpp")


def quik_driver(name: str, old: str, new: str) -> Mutant:
    return quik(name, f"{QUIK}/driver.cpp", old, new)


QUIK_MUTANTS = (
    quik(
        "other half of the last byte counts",
        f"{INT8}/body.h",
        "if (count < 64) codes[count] = 0;",
        "if (count < 0) codes[count] = 0;",
        f"{INT8}/scalar.cpp",
    ),
    quik(
        "last lines of a tile dropped",
        "simd/gemm_int8.h",
        "l < p.lines - whole * kLines; ++l)",
        "l < p.lines - whole * kLines - 1; ++l)",
        f"{INT8}/scalar.cpp",
    ),
    quik(
        "8-bit products saturate",
        "simd/gemm_int8.h",
        "dot_u8s8<true>(acc[r][i], line[i], broadcast(a + r * 16))",
        "dot_u8s8<false>(acc[r][i], line[i], broadcast(a + r * 16))",
        f"{INT8}/avx2.cpp",
    ),
    quik(
        "high nibbles meet the columns of the low ones",
        "simd/gemm_int8.h",
        "broadcast(a + r * 16 + 1)",
        "broadcast(a + r * 16)",
        f"{INT8}/scalar.cpp",
    ),
    quik(
        "every piece of the depth starts anew",
        f"{INT8}/int8.h",
        "u0 ? nullptr : init + r * k.rows",
        "init + r * k.rows",
        f"{QUIK}/driver.cpp",
    ),
    quik(
        "last block of rows taken for a whole one",
        f"{INT8}/int8.h",
        "const int in_block = int(std::min<int64_t>(k.rows, rows - r * k.rows));",
        "const int in_block = int(k.rows);",
        f"{QUIK}/driver.cpp",
    ),
    quik_driver("zero point of the other width", "(w.bits == 8 ? total : 0)", "(w.bits == 4 ? total : 0)"),
    quik_driver(
        "zero point off by one", "to.start[total + at + r] = -128 * sum;", "to.start[total + at + r] = -127 * sum;"
    ),
    quik_driver(
        "shared rows of the first tile for all",
        "p.multiply(r, t * p.tile, a.m, t * p.tile,",
        "p.multiply(r, 0, a.m, t * p.tile,",
    ),
    quik_driver("one row's outliers for all rows", "base.bias_row = ldc;", "base.bias_row = 0;"),
    quik_driver(
        "ascending columns taken for neighbours", "s.base[j] == s.base[j - 1] + 1", "s.base[j] > s.base[j - 1]"
    ),
    quik_driver("columns behind the last vector lost", "if (vectors < columns) {", "if (vectors + 1 < columns) {"),
    quik_driver("high nibble is the low one", "codes[2 * i + 1] << 4", "codes[2 * i] << 4"),
    quik_body("half of the range forgotten", "std::fmaf(d.half, d.scale[r], d.zero[r])", "d.zero[r]"),
    quik_body(
        "correction by another vector", "load_f32_part(d.w_reduced + j, count)", "load_f32_part(d.w_scale + j, count)"
    ),
    quik_body("NaN and infinity not looked for", "!(reduce_add_f(other) == 0.0f) || ", ""),
    quik_body("codes behind the last column", "for (int64_t j = n - i; j < 64; ++j) last[j] = 0;", ""),
    quik_body("reads behind the last row", "from + j + 16 <= c.split.k", "from + j < c.split.k"),
    quik_body(
        "sign of the zero in mode sim", "return {s, -s * zi, 1.0f / s, zi};", "return {s, s * zi, 1.0f / s, zi};"
    ),
    quik_body("outliers in the order of the base", "out[i] = x[s.outlier[i]]", "out[i] = x[s.n_base + i]"),
    quik("places of one bit", f"{SP24}/driver.cpp", "(2 * (i % 4)) & 3;", "(2 * (i % 4)) & 1;"),
    quik(
        "all rows of a chunk in its first tile",
        f"{SP24}/driver.cpp",
        "expanded + (n - n0) / t16::kTileRows * tile_bytes)",
        "expanded)",
    ),
)

MUTANTS = (
    FFT_MUTANTS
    + GEMM_MUTANTS
    + QUIK_MUTANTS
    + (
        packing("code mask one bit short", "return v & ((1 << bits) - 1);", "return v & ((1 << bits) - 2);"),
        packing(
            "code across two bytes loses its upper part", "if (at % 8 + bits > 8) v |=", "if (at % 8 + bits > 9) v |="
        ),
        packing(
            "high bits of 3-bit codes in the low plane",
            "packed[p.high_byte] | ((code >> 2)",
            "packed[p.byte] | ((code >> 2)",
        ),
        packing(
            "scales of the next group",
            "((r / 16 * groups + g) * 16 + r % 16) * size,\n                  static_cast<const char*>(from) + (r",
            "((r / 16 * groups + (g + 1) % groups) * 16 + r % 16) * size,\n                  static_cast<const char*>(from) + (r",
        ),
        packing(
            "padding rows of scales not cleared", "std::memset(to, 0, size_t(t16::tiles(n) * groups * 16 * size));", ""
        ),
        packing("packed bytes not cleared", "std::memset(packed, 0, size_t(t16::packed_bytes(n, k, bits)));", ""),
        packing("dequantize ignores zeros", "(w.zeros ? w.zeros[at] : 1 << (w.bits - 1))", "(1 << (w.bits - 1))"),
        packing("dequantize drops a row's last outlier", "j < w.out_ptr[r + 1]; ++j", "j + 1 < w.out_ptr[r + 1]; ++j"),
        dispatch(
            "codebooks to bf16 dot products", "a.x_dtype == DType::bf16 && !w.codebook ?", "a.x_dtype == DType::bf16 ?"
        ),
        dispatch("tables a row to gemv", "(k.form == Form::int8 || w.codebook_per_row)", "(k.form == Form::int8)"),
        dispatch(
            "weights of two spans share prepared rows",
            "l.kernel[i] == k && l.rows[i].span == r.span",
            "l.kernel[i] == k",
        ),
        dispatch(
            "workspace one row short",
            "size_t(r.m * r.kpad) * steps_per_unit(k->form)",
            "size_t((r.m - 1) * r.kpad) * steps_per_unit(k->form)",
        ),
        dispatch(
            "transposed x not padded to 16 rows",
            "t16::ceil_div(a.m, 16) * 16 : a.m) * size_t(a.k)",
            "a.m : a.m) * size_t(a.k)",
        ),
        dispatch(
            "fp16 read as bf16 for outliers",
            "t == DType::bf16 ? bf16_to_float(h) : f16_to_float(h)",
            "bf16_to_float(h)",
        ),
        kernel(
            "rest of x not cleared",
            "alignas(64) char tail[64] = {};",
            "alignas(64) char tail[64]; std::memset(tail, 0x3f, 64);",
        ),
        kernel(
            "rest of x one value short",
            "size_t((count - i) * width(t)));\n    store_f32(out + i, load_any(tail",
            "size_t((count - i - 1) * width(t)));\n    store_f32(out + i, load_any(tail",
        ),
        kernel(
            "last span counted too long",
            "const int last = int((w.k - (r.spans - 1) * r.span + ck - 1) / ck);",
            "const int last = int((w.k - (r.spans - 1) * r.span + ck) / ck);",
        ),
        kernel("groups of 256 take the next group's scale", "w.group > r.span ? 1 : 0", "0"),
        kernel(
            "activation maximum of the first half",
            "for (int i = 0; i < padded; i += 16) top = max_i",
            "for (int i = 0; i < padded; i += 32) top = max_i",
        ),
        kernel(
            "sum of codes forgets the last part",
            "for (int i = 0; i < padded; i += 64) sum",
            "for (int i = 0; i + 64 < padded; i += 64) sum",
        ),
        kernel("outlier columns of the neighbour", "picked[i] = x[cols[i]];", "picked[i] = x[cols[i ? i - 1 : 0]];"),
        kernel("outlier pieces overlap", "for (; j < end; j += kPiece) {", "for (; j < end; j += kPiece - 16) {"),
        kernel("whole tile stored at the edge", "if (lanes == 16) {", "if (lanes >= 15) {"),
        kernel("bias of the first tile", "+ n0 * width(w.bias_dtype);", "+ 0 * n0 * width(w.bias_dtype);"),
        kernel(
            "zero points of the first tile",
            "const uint8_t* p = w.zeros + (tile * groups + group) * 16;",
            "const uint8_t* p = w.zeros + group * 16;",
        ),
        kernel(
            "table a row of the first tile",
            "z.codebook = w.codebook + tile * (int64_t(16) << w.bits);",
            "z.codebook = w.codebook;",
        ),
        kernel("codebook bytes off by one", "uint8_t(128 + (top > 0", "uint8_t(127 + (top > 0"),
        tier(
            "upper rows multiply the lower codes",
            "avx2",
            "dot_half<Wide>(acc.b, u.b, s.b)",
            "dot_half<Wide>(acc.b, u.a, s.b)",
        ),
        tier("8-bit products saturate", "avx2", "{dot_half<Wide>(acc.a,", "{dot_half<false>(acc.a,"),
        tier("table look-up ignores bit 3", "avx2", "_mm256_slli_epi32(i, 28)", "_mm256_slli_epi32(i, 29)"),
    )
)


def compile_command(unit: Path) -> tuple[list[str], Path]:
    """How the last build compiled a file, and to which object."""
    for entry in json.loads((BUILD / "compile_commands.json").read_text()):
        if Path(entry["file"]) == unit:
            words = entry["command"].split()
            return words, Path(entry["directory"]) / words[words.index("-o") + 1]
    raise SystemExit(f"mutants: {unit} is not in the last build: make build")


def caught(mutant: Mutant, work: Path) -> bool:
    shutil.copytree(ROOT / "csrc", work / "csrc")
    target = work / "csrc" / mutant.file
    text = target.read_text()
    if text.count(mutant.old) != 1:
        raise SystemExit(
            f"mutants: {mutant.name}: expected the line once in {mutant.file}, found it {text.count(mutant.old)} times"
        )
    target.write_text(text.replace(mutant.old, mutant.new))

    command, own = compile_command(ROOT / "csrc" / mutant.unit)
    words = [word.replace(str(ROOT / "csrc"), str(work / "csrc")) for word in command]
    words = ["-O1" if word == "-O3" else word for word in words]
    words[words.index("-o") + 1] = str(work / "mutant.o")
    subprocess.run(words, check=True, cwd=BUILD, stderr=subprocess.DEVNULL)
    objects = [o for o in BUILD.glob("CMakeFiles/effk_*/csrc/**/*.o") if o != own and "/csrc/torch/" not in str(o)]
    objects = [
        o for o in objects if o.parts[len(BUILD.parts) + 1] not in ("effk_ops.dir", "effk_emu.dir", "effk_cuda.dir")
    ]
    program = work / "fuzz"
    flags = ["-std=c++17", "-O2", f"-I{ROOT / 'csrc'}"]
    families = ((WQ, "wq_linear"), (INT8, "quik"), (QUIK, "quik"), (SP24, "quik"), (GEMM, "dyad"), (DYAD, "dyad"))
    name = next((program for folder, program in families if mutant.unit.startswith(folder)), "fftconv")
    source = ROOT / "tests/cpp" / f"fuzz_{name}.cpp"
    subprocess.run(
        [words[0], *flags, str(source), str(work / "mutant.o"), *map(str, objects), "-o", str(program)], check=True
    )
    return subprocess.run([program, CALLS], capture_output=True).returncode != 0


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    survivors = []
    chosen = [m for m in MUTANTS if wanted in m.name]
    for mutant in chosen:
        with tempfile.TemporaryDirectory() as work:
            ok = caught(mutant, Path(work))
        print(f"{'caught  ' if ok else 'SURVIVED'}  {mutant.name}", flush=True)
        if not ok:
            survivors.append(mutant.name)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} planted bugs caught")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
