"""Planted bugs in the kernels of quik_linear and sp24."""

from __future__ import annotations

from mutant import Mutant

INT8 = "gemm/int8"
QUIK = "ops/quik_linear"
SP24 = "ops/sp24"


def quik(name: str, file: str, old: str, new: str, unit: str | None = None) -> Mutant:
    return Mutant(f"quik_linear: {name}", file, old, new, unit or file)


def quik_body(name: str, old: str, new: str) -> Mutant:
    return quik(name, f"{QUIK}/body.h", old, new, f"{QUIK}/scalar.cpp")


def quik_driver(name: str, old: str, new: str) -> Mutant:
    return quik(name, f"{QUIK}/driver.cpp", old, new)


MUTANTS = (
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
