"""Planted bugs in the kernels of wq_linear and in what simd/ gives them."""

from __future__ import annotations

from mutant import Mutant

WQ = "ops/wq_linear"


def packing(name: str, old: str, new: str) -> Mutant:
    return Mutant(f"packing: {name}", f"{WQ}/pack.cpp", old, new, f"{WQ}/pack.cpp")


def dispatch(name: str, old: str, new: str) -> Mutant:
    return Mutant(f"dispatch: {name}", f"{WQ}/driver.cpp", old, new, f"{WQ}/driver.cpp")


def kernel(name: str, file: str, old: str, new: str) -> Mutant:
    """In the code that all tiers share; the portable tier compiles fastest."""
    return Mutant(f"kernel: {name}", f"{WQ}/{file}", old, new, f"{WQ}/scalar.cpp")


def tier(name: str, tier: str, old: str, new: str) -> Mutant:
    return Mutant(f"{tier}: {name}", f"simd/{tier}.h", old, new, f"{WQ}/{tier}.cpp")


MUTANTS = (
    packing("code mask one bit short", "return v & ((1 << bits) - 1);", "return v & ((1 << bits) - 2);"),
    packing("code across two bytes loses its upper part", "if (at % 8 + bits > 8) v |=", "if (at % 8 + bits > 9) v |="),
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
