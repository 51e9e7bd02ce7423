"""Plants bugs in the kernels, one at a time, and checks that the fuzz program notices each.

    python tests/cpp/mutants.py [part of a name]

A mutant changes one line of a copy of csrc, recompiles one file, links it with the objects of the last build and runs the
fuzz program of its folder, which must fail. Takes a few seconds a mutant, a minute where a tier must be recompiled. When a line that is
changed here changes for good, the script says so: bring the mutant up to date.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
CALLS = "4000"
WQ = "ops/wq_linear"
FFT = "ops/fftconv"
DEPTHWISE = "ops/depthwise_conv1d"
GEMM = "gemm"
INT8 = "gemm/int8"
QUIK = "ops/quik_linear"
SP24 = "ops/sp24"
DYAD = "ops/dyad_linear"
RELU = "ops/relu_ffn"
BITMASK = "ops/bitmask_linear"
GROUPED = "ops/wq_grouped_linear"
# The program that calls what lies in a folder.
PROGRAMS = {
    WQ: "wq_linear", INT8: "quik", QUIK: "quik", SP24: "quik", GEMM: "dyad", DYAD: "dyad", RELU: "relu_ffn", BITMASK: "bitmask",
    GROUPED: "wq_grouped", "ops/decoder": "decoder", "ops/attention": "attention",
}  # fmt: skip


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


def kernel(name: str, file: str, old: str, new: str) -> Mutant:
    """In the code that all tiers share; the portable tier compiles fastest."""
    return Mutant(f"kernel: {name}", f"{WQ}/{file}", old, new, f"{WQ}/scalar.cpp")


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
        "store_f32(to, add ? add_f(acc[r][i], load_f32(to)) : acc[r][i]);",
        "store_f32(to, acc[r][i]);",
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


def planter(op: str, folder: str) -> Callable[[str, str, str, str, str | None], Mutant]:
    """Bugs in the files of a folder; those in headers that tiers share are compiled into the portable one, the fastest to compile."""

    def plant(name: str, file: str, old: str, new: str, unit: str | None = None) -> Mutant:
        own = "scalar.cpp" if file.endswith(".h") else file
        return Mutant(f"{op}: {name}", f"{folder}/{file}", old, new, f"{folder}/{unit or own}")

    return plant


relu = planter("relu_ffn", RELU)
RELU_MUTANTS = (
    relu(
        "up's bias of the place in the list", "driver.cpp", "a.up.bias[list.index ? list.index[i] : i]", "a.up.bias[i]"
    ),
    relu("drelu forgets the second relu", "driver.cpp", "if (a.kind == Gate::drelu && up <= 0.0f) up = 0.0f;", ""),
    relu(
        "lists of blocks lose their last neuron",
        "driver.cpp",
        "const int64_t from = i * kBlock, count = l.counts[i];",
        "const int64_t from = i * kBlock, count = l.counts[i] - (l.counts[i] == kBlock);",
    ),
    relu(
        "bits of a mask in the other order",
        "driver.cpp",
        "row[bit / 8] >> (bit % 8) & 1",
        "row[bit / 8] >> (7 - bit % 8) & 1",
    ),
    relu(
        "every token has the first one's mask",
        "driver.cpp",
        "(a.mask_rows == 1 ? 0 : token) * a.mask_bytes",
        "0 * token * a.mask_bytes",
    ),
    relu(
        "parameters of a mask's neurons by place",
        "driver.cpp",
        "a.param[a.param_each ? j : 0]",
        "a.param[a.param_each ? n : 0]",
    ),
    relu(
        "ties of top_k to the higher index",
        "driver.cpp",
        "size[i] != size[j] ? size[i] > size[j] : i < j",
        "size[i] != size[j] ? size[i] > size[j] : i > j",
    ),
    relu(
        "deviation over f - 1",
        "driver.cpp",
        "std::sqrt(squares / double(a.f))",
        "std::sqrt(squares / double(a.f > 1 ? a.f - 1 : 1))",
    ),
    relu("rest of x lost", "driver.cpp", "std::copy_n(last, width % 16, to", "std::copy_n(last, width % 16 - 1, to"),
    relu("rest of x not cleared", "driver.cpp", "std::fill(to + width, to + l.x_row, 0.0f);", ""),
    relu("columns of a thread keep old sums", "driver.cpp", "std::fill(y + c0, y + c1, 0.0f);", ""),
    relu("h beyond the list not cleared in the dense form", "driver.cpp", "std::fill_n(h, a.f, 0.0f);", ""),
    relu(
        "inactive tokens take their product",
        "driver.cpp",
        "h[i] = h[i] == 0.0f ? 0.0f : h[i] * up;",
        "h[i] = (h[i] == 0.0f ? 1.0f : h[i]) * up;",
    ),
    relu(
        "nnz counted in tokens' union",
        "body.h",
        "nnz[b] += __builtin_popcount(active[b]);",
        "nnz[b] += __builtin_popcount(active[0]);",
    ),
    relu(
        "a gate beyond the last",
        "body.h",
        "const uint32_t inside = (1u << here) - 1;",
        "const uint32_t inside = (2u << here) - 1;",
    ),
    relu(
        "below the threshold of silu",
        "body.h",
        "return (~not_below(p, size) & 0xffffu) | not_below(a, a);",
        "return not_below(size, sub_f(zero, p)) | not_below(a, a);",
    ),
    relu("cut of the first token", "body.h", "cut ? cut[b] : 0.0f", "cut ? cut[0] : 0.0f"),
    relu(
        "one row of four misses its scale",
        "body.h",
        "total * at.scale[r][0] : total",
        "total * at.scale[0][0] : total",
        "avx512.cpp",
    ),
    relu(
        "scales of a later segment",
        "body.h",
        "to[g - g0] = value * scale[g < l.groups ? g : l.groups - 1];",
        "to[g - g0] = value * scale[g - g0 < l.groups ? g - g0 : l.groups - 1];",
    ),
    relu(
        "a unit's groups share a scale",
        "body.h",
        "const int64_t g = (u * K + P * G) / GC;",
        "const int64_t g = u * K / GC;",
    ),
    relu("upper nibbles not moved down", "body.h", "if constexpr (S == 4) raw[r] = shift_right<16>(raw[r]);", ""),
    relu("nibbles of a byte exchanged", "pack.cpp", "int(in / 16 % 2) * 4", "4 - int(in / 16 % 2) * 4"),
    relu(
        "largest magnitude of the first columns",
        "pack.cpp",
        "neuron::quantised(type) && c < c1; ++c",
        "neuron::quantised(type) && c < c1 - 1; ++c",
    ),
)

bitmask = planter("bitmask_linear", BITMASK)
BITMASK_MUTANTS = (
    bitmask("last panels lost", "driver.cpp", "first_panel(a.w, s + 1, slots)", "first_panel(a.w, s + 1, slots + 1)"),
    bitmask(
        "second tile of tokens from the first",
        "driver.cpp",
        "static_cast<const char*>(a.x) + t0 * a.w.k * in_bytes",
        "static_cast<const char*>(a.x)",
    ),
    bitmask(
        "room of one thread for two",
        "driver.cpp",
        "size_t(p.x_bytes + p.sx_bytes + p.slots * p.room)",
        "size_t(p.x_bytes + p.sx_bytes + p.room)",
    ),
    bitmask("zeros that are kept dropped", "pack.cpp", "a.keep || v != 0.0f", "v != 0.0f"),
    bitmask(
        "codes of 0 stored", "pack.cpp", "std::nearbyint(v / by)))), out->b != 0;", "std::nearbyint(v / by)))), true;"
    ),
    bitmask("scale of what is not kept", "pack.cpp", "if (!a.keep || a.keep[row * a.k + c]) most", "most"),
    bitmask(
        "scale of an empty group",
        "pack.cpp",
        "scale[row * scales + g] = s == 0.0f ? 1.0f : s;",
        "scale[row * scales + g] = s;",
    ),
    bitmask(
        "sum of codes in the next group",
        "pack.cpp",
        "row_sum[row * scales + c / span] += value.b;",
        "row_sum[row * scales + (c + 1) / span % scales] += value.b;",
    ),
    bitmask(
        "bits beyond the last column pass", "pack.cpp", "b == width - 1 && (mask & ~last)", "false && (mask & ~last)"
    ),
    bitmask(
        "a panel with other counts passes",
        "pack.cpp",
        "w.ptr[p + 1] - w.ptr[p] != kept",
        "false && w.ptr[p + 1] - w.ptr[p] != kept",
    ),
    bitmask("unpacked with the first scale", "pack.cpp", "w.scale[row * scales + c / span];", "w.scale[row * scales];"),
    bitmask(
        "correction by another row",
        "body.h",
        "p.w.row_sum[(p.row0 + r) * groups + g]",
        "p.w.row_sum[p.row0 * groups + g]",
    ),
    bitmask(
        "infinity not looked for",
        "body.h",
        "const bool finite = bits < 0x7f800000;",
        "const bool finite = bits <= 0x7f800000;",
    ),
    bitmask(
        "codes not limited",
        "body.h",
        "const vf by = set_f(scale), limit = set_f(127.0f)",
        "const vf by = set_f(scale), limit = set_f(126.0f)",
    ),
    bitmask("sums of a group kept for the next", "body.h", "std::memset(sums, 0, size_t(t.count * kRows) * 4);", ""),
    bitmask(
        "pieces go past their group", "body.h", "end = group_end < p.blocks ? group_end : p.blocks;", "end = p.blocks;"
    ),
    bitmask("row scale forgotten", "body.h", "if (a.w.scale && !a.w.group) {", "if (false) {"),
    bitmask(
        "scale of the panel's first row",
        "body.h",
        "p.w.scale[(p.row0 + r) * bitmask::groups(p.w.k, p.w.group) + b",
        "p.w.scale[p.row0 * bitmask::groups(p.w.k, p.w.group) + b",
    ),
    bitmask(
        "bias of the panel's first row", "body.h", "rows[r] + bias_of(a, p.row0 + r)", "rows[r] + bias_of(a, p.row0)"
    ),
    bitmask(
        "rows beyond the last written",
        "body.h",
        "if (p.rows == kRows) return store_eight",
        "if (p.rows >= kRows - 1) return store_eight",
    ),
    bitmask("a token's scale for all", "body.h", "set_f(t.sx[n])), y, n);", "set_f(t.sx[0])), y, n);"),
)

grouped = planter("wq_grouped_linear", GROUPED)
GROUPED_MUTANTS = (
    grouped(
        "bias of the first expert",
        "driver.cpp",
        "static_cast<const char*>(first.bias) + expert * first.n *",
        "static_cast<const char*>(first.bias) + 0 * expert * first.n *",
    ),
    grouped(
        "weights of the neighbour",
        "driver.cpp",
        "wq_cut(w, expert * tiles, (expert + 1) * tiles)",
        "wq_cut(w, expert / 2 * tiles, (expert / 2 + 1) * tiles)",
    ),
    grouped("prepared rows overlap", "driver.cpp", "l.data + row * r.kpad", "l.data + row / 2 * r.kpad"),
    grouped(
        "scales of rows overlap", "driver.cpp", "base + l.scale) + row * r.spans", "base + l.scale) + row / 2 * r.spans"
    ),
    grouped("sums of rows overlap", "driver.cpp", "base + l.sum) + row * r.spans", "base + l.sum) + row / 2 * r.spans"),
    grouped(
        "blocks prepared as those before",
        "driver.cpp",
        "int(b - (o->end_block - o->rows.blocks))",
        "int(b - (o->end_block - o->rows.blocks)) / 2",
    ),
    grouped(
        "an expert's last block is the next one's",
        "driver.cpp",
        "while (b >= o->end_block) ++o;",
        "while (b > o->end_block) ++o;",
    ),
    grouped(
        "last units of a part lost",
        "driver.cpp",
        "to >= p.end_cost ? p.units :",
        "to >= p.end_cost ? p.units - (p.units > 1) :",
    ),
    grouped(
        "a share begins one unit late",
        "driver.cpp",
        "from <= start ? 0 : t16::ceil_div(from - start, p.unit_cost)",
        "from < start ? 0 : t16::ceil_div(from - start + 1, p.unit_cost)",
    ),
    grouped("later blocks of an expert as the first", "driver.cpp", "t.block = part.block;", "t.block = 0;"),
    grouped("tiles beyond the last", "driver.cpp", "(end < tiles ? end : tiles) - t.tile", "end - t.tile"),
    grouped(
        "workspace for half the rows",
        "driver.cpp",
        "l.data + aligned(size_t(a.m * r.kpad)",
        "l.data + aligned(size_t(a.m / 2 * r.kpad)",
    ),
    grouped(
        "room for one part too few",
        "driver.cpp",
        "aligned(size_t(l.parts) * sizeof(Part))",
        "aligned(size_t(l.parts - 1) * sizeof(Part))",
    ),
)

decoder = planter("decoder", "ops/decoder")
DECODER_MUTANTS = (
    decoder("lanes beyond the row count in the variance", "body.h", "if (n.centred && count < 16) {", "if (false) {"),
    decoder("epsilon forgotten", "body.h", "squares / float(d) + n.eps", "squares / float(d)"),
    decoder("norm's bias forgotten", "body.h", "if (n.bias) v = add_f", "if (false) v = add_f"),
    decoder(
        "mean of another length",
        "body.h",
        "return add_f(acc, v); }) / float(d);",
        "return add_f(acc, v); }) / float((d + 15) / 16 * 16);",
    ),
    decoder(
        "gate of another activation",
        "body.h",
        "case Activation::gelu: return gate_as<Activation::gelu>",
        "case Activation::gelu: return gate_as<Activation::gelu_tanh>",
    ),
    decoder(
        "sums one value too many",
        "body.h",
        "store_some<DType::f32>(x + i, int(count - i < 16 ? count - i : 16), add_f",
        "store_some<DType::f32>(x + i, 16, add_f",
    ),
    decoder(
        "cache of the first layer for all",
        "driver.cpp",
        "static_cast<char*>(s.cache.k) + layer * s.k_layer",
        "static_cast<char*>(s.cache.k)",
    ),
    decoder(
        "scales of the first layer for all",
        "driver.cpp",
        "a.cache.v_scale += layer * s.scale_layer;",
        "a.cache.v_scale += 0;",
    ),
    decoder("joined values read as keys", "driver.cpp", "*v = joined ? k + kv_width :", "*v = joined ? k :"),
    decoder(
        "stride of joined keys",
        "driver.cpp",
        "joined ? all : kv_width, attended",
        "joined ? q_width : kv_width, attended",
    ),
    decoder(
        "second place's outputs in the first",
        "driver.cpp",
        "void* const* to = out + part.first;",
        "void* const* to = out;",
    ),
    decoder("narrow results overlap", "driver.cpp", "narrow_y += count * p.width[i];", "narrow_y += count;"),
    decoder(
        "rest of narrow results lost",
        "driver.cpp",
        "for (int64_t j = b + whole; j < e; ++j) y[i][j] =",
        "for (int64_t j = b + whole + 1; j < e; ++j) y[i][j] =",
    ),
    decoder(
        "logits of a run's first row",
        "driver.cpp",
        "(s.runs[r].row + s.runs[r].count - 1) * m.width, size_t",
        "s.runs[r].row * m.width, size_t",
    ),
    decoder("positions from the beginning", "driver.cpp", "e.positions + s.runs[r].start * m.width", "e.positions"),
    decoder(
        "row of codes of the next token",
        "driver.cpp",
        "row = token % t16::kTileRows, groups",
        "row = (token + 1) % t16::kTileRows, groups",
    ),
    decoder(
        "scale of the first group of codes",
        "driver.cpp",
        "(tile * groups + k / width) * t16::kTileRows",
        "(tile * groups) * t16::kTileRows",
    ),
    decoder("gate without its factor", "driver.cpp", "m.gated ? up + s.rows * f + b : nullptr", "nullptr"),
    decoder(
        "second residual forgotten",
        "driver.cpp",
        "feed_forward(l, x, sum);\n    add(sum, h);",
        "feed_forward(l, x, sum);",
    ),
    decoder(
        "room for the head forgotten", "driver.cpp", "size_t(logit_rows(s)) * size_t(head_out)) * 2", "size_t(0)) * 2"
    ),
    decoder(
        "counts of sparse layers in their room",
        "driver.cpp",
        "base + room.kernel + aligned(size_t(s.rows) * 4)",
        "base + room.kernel + 64 * (s.rows > 16)",
    ),
)

attention = planter("attention", "ops/attention")
ATTENTION_MUTANTS = (
    attention(
        "second channel of a pair turned back",
        "store.h",
        "add_f(mul_f(b, c), mul_f(a, s))",
        "sub_f(mul_f(b, c), mul_f(a, s))",
    ),
    attention(
        "channels that are not turned lost",
        "store.h",
        "for (int64_t i = 2 * t.half; i < d; i += 16) {",
        "for (int64_t i = 2 * t.half + 16; i < d; i += 16) {",
    ),
    attention("low part of the query forgotten", "store.h", "sub_i(code, shift_left<7>(high))", "sub_i(code, code)"),
    attention(
        "offset of the query's low part",
        "store.h",
        "128u * uint32_t(reduce_add_i(sum))",
        "127u * uint32_t(reduce_add_i(sum))",
    ),
    attention(
        "scale of the key for the value",
        "store.h",
        "v_scale[p] = quantise(v, d, 0, value_at);",
        "quantise(v, d, 0, value_at), v_scale[p] = k_scale[p];",
    ),
    attention(
        "tiny heads divided by zero",
        "store.h",
        "return most > kTiny ? range / most : 0.0f;",
        "return range / (most * 0.99f);",
    ),
    attention(
        "key beside its place in a tile",
        "store.h",
        "return scatter<2>(row, d, key_at);",
        "return scatter<2>(row, d - 1, key_at);",
    ),
    attention(
        "high bytes shifted by one bit less",
        "products.h",
        "shift_left<7>(high[r][n]), low[r][n]",
        "shift_left<6>(high[r][n]), low[r][n]",
    ),
    attention(
        "scales of the first keys for all",
        "products.h",
        "const vf by = load_f32(scale + 16 * n);",
        "const vf by = load_f32(scale);",
    ),
    attention(
        "old sums not made smaller",
        "products.h",
        "mul_f(load_f32(sum + r * d + 16 * n), set_f(alpha[r]))",
        "load_f32(sum + r * d + 16 * n)",
    ),
    attention(
        "weights of the first row",
        "products.h",
        "const vf by = set_f(w[r * kBlock + j]);",
        "const vf by = set_f(w[j]);",
    ),
    attention(
        "a token sees the next one",
        "body.h",
        "(p + 1 < b.to ? p + 1 : b.to) - b.begin",
        "(p + 2 < b.to ? p + 2 : b.to) - b.begin",
    ),
    attention(
        "window one too wide", "body.h", "t.window ? p - t.window + 1 : b.from;", "t.window ? p - t.window : b.from;"
    ),
    attention(
        "first lanes of a window not masked",
        "body.h",
        "own.to < 16 * i + 16 || own.from > 16 * i",
        "own.to < 16 * i + 16",
    ),
    attention("maximum of the last block", "body.h", "max[r] = now > before ? now : before;", "max[r] = now;"),
    attention(
        "norm of earlier blocks as it was", "body.h", "mul_f(load_f32(norm), set_f(m.alpha[r0 + r]))", "load_f32(norm)"
    ),
    attention("scales of values forgotten", "body.h", "if (t.v_scale) e = mul_f(e,", "if (false) e = mul_f(e,"),
    attention(
        "a chunk's part counts in full",
        "body.h",
        "mac(load(part.norm), more, mul_f(load(total.norm), keep))",
        "mac(load(part.norm), keep, mul_f(load(total.norm), keep))",
    ),
    attention(
        "sums of rows 16.. by the first factors",
        "body.h",
        "const float* add = part.sum + (r0 + r) * d;",
        "const float* add = part.sum + r * d;",
    ),
    attention(
        "widened values begin late",
        "body.h",
        "widen<T>(v + from * t.d * size, (to - from) * t.d, values + from * t.d,",
        "widen<T>(v + from * t.d * size, (to - from) * t.d, values,",
    ),
    attention("widened keys end early", "body.h", "k1 = (to + 15) / 16 * 16 * t.d;", "k1 = to / 16 * 16 * t.d;"),
    attention(
        "second head reads the first one's keys",
        "driver.cpp",
        "(slot * c.kv_heads + head) * kv::head_bytes",
        "(slot * c.kv_heads) * kv::head_bytes",
    ),
    attention(
        "lowest position of a tile's last query",
        "driver.cpp",
        "r.start + query - a.window + 1",
        "r.start + query - a.window + 2",
    ),
    attention(
        "last token of a tile not appended",
        "driver.cpp",
        "std::min(r.count, position + kv::kTile), h, h + 1",
        "std::min(r.count, position + kv::kTile - 1), h, h + 1",
    ),
    attention(
        "parts of pieces overlap",
        "driver.cpp",
        "if (pieces > 1) used += (last - first) *",
        "if (pieces > 1) used += (last - first - 1) *",
    ),
    attention(
        "a piece's own first chunk twice",
        "driver.cpp",
        "piece.parts + (i - piece.first) *",
        "piece.parts + 0 * (i - piece.first) *",
    ),
    attention(
        "one slot's room for all", "driver.cpp", "Room own{slots + s * slot_bytes};", "Room own{slots + s * 64};"
    ),
    attention(
        "results of a group in the first head",
        "driver.cpp",
        "(piece.head * p.group + g) * p.d);\n    }",
        "(piece.head * p.group) * p.d);\n    }",
    ),
)

MUTANTS = (
    FFT_MUTANTS
    + GEMM_MUTANTS
    + QUIK_MUTANTS
    + RELU_MUTANTS
    + BITMASK_MUTANTS
    + GROUPED_MUTANTS
    + DECODER_MUTANTS
    + ATTENTION_MUTANTS
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
        packing(
            "dequantize drops a row's last outlier",
            "rank < w.out_ptr[r + 1] - w.out_ptr[r]; ++rank",
            "rank + 1 < w.out_ptr[r + 1] - w.out_ptr[r]; ++rank",
        ),
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
            "t16::ceil_div(a.m, 16) * 16) * size_t(a.k)",
            "a.m) * size_t(a.k)",
        ),
        kernel(
            "rest of x not cleared",
            "prepare.h",
            "alignas(64) char tail[64] = {};",
            "alignas(64) char tail[64]; std::memset(tail, 0x3f, 64);",
        ),
        kernel(
            "rest of x one value short",
            "prepare.h",
            "size_t((count - i) * width(t)));\n    store_f32(out + i, load_any(tail",
            "size_t((count - i - 1) * width(t)));\n    store_f32(out + i, load_any(tail",
        ),
        kernel(
            "last span counted too long",
            "forms.h",
            "const int last = int((w.k - (r.spans - 1) * r.span + ck - 1) / ck);",
            "const int last = int((w.k - (r.spans - 1) * r.span + ck) / ck);",
        ),
        kernel("groups of 256 take the next group's scale", "forms.h", "w.group > r.span ? 1 : 0", "0"),
        kernel(
            "activation maximum of the first half",
            "prepare.h",
            "for (int i = 0; i < padded; i += 16) top = max_i",
            "for (int i = 0; i < padded; i += 32) top = max_i",
        ),
        kernel(
            "sum of codes forgets the last part",
            "prepare.h",
            "for (int i = 0; i < padded; i += 64) sum",
            "for (int i = 0; i + 64 < padded; i += 64) sum",
        ),
        kernel(
            "outlier columns of the neighbour",
            "outliers.h",
            "x_ + int64_t(cols[i]) * Width",
            "x_ + int64_t(cols[i ? i - 1 : 0]) * Width",
        ),
        kernel("outliers beyond a piece read from its start", "outliers.h", "    at_ += count_;\n", ""),
        kernel("tiles of a pair share a sum", "outliers.h", "i / 2 * 32 + i % 2", "i / 2 * 32"),
        kernel("sums of an odd last tile not cleared", "outliers.h", "Width == 8 && tiles % 2 == 1", "false"),
        kernel(
            "last outlier of one row of x not gathered",
            "outliers.h",
            "for (int q = 0; q < count; ++q) copy_float",
            "for (int q = 0; q + 1 < count; ++q) copy_float",
        ),
        kernel("lengths of the next row", "outliers.h", "p[i < lanes ? i : lanes]", "p[i + 1 < lanes ? i + 1 : lanes]"),
        kernel(
            "outliers of the second block of rows take the first's x",
            "outliers.h",
            "t.dense_x + block * w.k * 16",
            "t.dense_x + 0 * block * w.k * 16",
        ),
        kernel("whole tile stored at the edge", "finish.h", "if (n0 + 16 <= w.n) {", "if (n0 + 15 <= w.n) {"),
        kernel(
            "bias of the first tile", "finish.h", "(row * w.bias_row + tile * 16) * bytes", "(row * w.bias_row) * bytes"
        ),
        kernel(
            "zero points of the first tile",
            "forms.h",
            "zeros_at(w, (tile * groups + group) * 16, groups, z);",
            "zeros_at(w, group * 16, groups, z);",
        ),
        kernel(
            "table a row of the first tile",
            "forms.h",
            "z.codebook = w.codebook + tile * (int64_t(16) << w.bits);",
            "z.codebook = w.codebook;",
        ),
        kernel("codebook bytes off by one", "forms.h", "uint8_t(128 + (top > 0", "uint8_t(127 + (top > 0"),
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
    name = next((program for folder, program in PROGRAMS.items() if mutant.unit.startswith(folder)), "fftconv")
    main = BUILD / f"tests/cpp/CMakeFiles/fuzz_{name}.dir/fuzz_{name}.cpp.o"
    linker = next(word for word in words if Path(word).name.endswith(("++", "clang", "gcc")))  # behind a compiler cache
    subprocess.run(
        [linker, str(main), str(work / "mutant.o"), *map(str, objects), "-pthread", "-o", str(program)], check=True
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
