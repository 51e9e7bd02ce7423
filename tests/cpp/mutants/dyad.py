"""Planted bugs in the kernels of dense_linear and dyad_linear."""

from __future__ import annotations

from mutant import Mutant

GEMM = "gemm"
DYAD = "ops/dyad_linear"


def gemm(name: str, file: str, old: str, new: str, unit: str = f"{GEMM}/scalar.cpp") -> Mutant:
    return Mutant(f"dyad_linear: {name}", file, old, new, unit)


MUTANTS = (
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
