"""Planted bugs: each must make the emulated driver fail in at least one order of threads.

A mutant is one edit of one file of the kernels, compiled in place of the original. `python tests/cuda/mutants.py` plants all
of them, with their names as arguments only those; test_mutants.py plants the ones marked `ci`. A mutant that no order
catches means that the emulation or the driver's cases are blind there: add what sees it, never drop the mutant.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]
from cuda_emulation import (  # noqa: E402
    BITMASK,
    DENSE,
    DYAD,
    FFTCONV,
    OP,
    ORDERS,
    QUIK,
    RELU,
    ROOT,
    SANITIZE,
    Build,
    CompileError,
    missing,
    run,
)

MMA, DECODE, CUDA = f"{OP}/cuda_mma.h", f"{OP}/cuda_decode.h", f"{OP}/cuda.cu"
FUSED, OUTER, FFT32, TABLES, ROWS, FFT = (
    f"{FFTCONV}/{name}"
    for name in ("cuda_mma.h", "cuda_outer.h", "cuda_fft32.h", "cuda_tables.h", "cuda_rows.h", "cuda.cu")
)
PROBLEM, TILE = "csrc/cuda/gemm_problem.h", "csrc/cuda/mma_tile.h"
GEMM, FFMA, DENSE_CU, DYAD_CU = f"{DENSE}/cuda_mma.h", f"{DENSE}/cuda_ffma.cu", f"{DENSE}/cuda.cu", f"{DYAD}/cuda.cu"
QUIK_MMA, QUIK_CU, QUIK_FLOAT = f"{QUIK}/cuda_mma.h", f"{QUIK}/cuda.cu", f"{QUIK}/cuda_float.cu"
QUIK_FILES = [f"{QUIK}/cuda_mma_{name}.cu" for name in ("w8", "w4", "int4")]
RELU_CU, RELU_ROWS, NEURONS = f"{RELU}/cuda.cu", f"{RELU}/cuda_rows.h", f"{RELU}/cuda_neurons.h"
BITMASK_CU = f"{BITMASK}/cuda.cu"
RELU_FILES = [f"{RELU}/cuda_{name}.cu" for name in ("f32", "bf16", "f16", "i8", "i4")]
MMA_FILES = [f"{DENSE}/cuda_mma_{name}.cu" for name in ("f16", "bf16")]


@dataclass(frozen=True)
class Mutant:
    """``old``, which occurs once in ``file``, becomes ``new``."""

    name: str
    file: str
    old: str
    new: str
    bits: int = 4  # width of the kernels and cases that are run
    sanitized: bool = False  # reads or writes that only ASan and UBSan see for certain
    ci: bool = False

    @property
    def fftconv(self) -> bool:
        """Whether it is that op's; its driver has no widths."""
        return self.file.startswith(FFTCONV)

    @property
    def dyad(self) -> bool:
        """Whether it is dense_linear's and dyad_linear's, which share a driver."""
        return self.file.startswith((DENSE, DYAD, "csrc/cuda/"))

    @property
    def quik(self) -> bool:
        """Whether it is quik_linear's; its driver has no widths either."""
        return self.file.startswith(QUIK)

    @property
    def relu(self) -> bool:
        """Whether it is relu_ffn's; the same."""
        return self.file.startswith(RELU)

    @property
    def bitmask(self) -> bool:
        """Whether it is bitmask_linear's; the same."""
        return self.file.startswith(BITMASK)

    @property
    def changed(self) -> list[str]:
        """The sources that contain the file."""
        if self.bitmask:
            return [self.file]
        if self.relu:
            # Two types of rows are enough for what does not look at them.
            return {RELU_CU: [RELU_CU], NEURONS: RELU_FILES[:2]}.get(self.file, [RELU_CU, *RELU_FILES])
        if self.quik:
            return QUIK_FILES if self.file == QUIK_MMA else [self.file]
        if self.dyad:
            kernels = {PROBLEM: [*MMA_FILES, FFMA], TILE: MMA_FILES, GEMM: MMA_FILES}
            return kernels.get(self.file, [self.file])
        if self.fftconv:
            fused = [f"{FFTCONV}/cuda_mma_small.cu", f"{FFTCONV}/cuda_mma_large.cu"]
            return [*fused, FFT] if self.file in (FUSED, ROWS) else [FFT]
        kernels = f"{OP}/cuda_mma_{self.bits}.cu"
        return {MMA: [kernels], DECODE: [kernels, CUDA], CUDA: [CUDA]}[self.file]


MUTANTS = [
    # barriers and asynchronous copies
    Mutant("no barrier of the warp after its copies", MMA, "    __syncwarp();  // all lanes'", "    // all lanes'"),
    Mutant("wait one group too weak", MMA, "cp_async_wait<S::stages - 2>()", "cp_async_wait<S::stages - 1>()", ci=True),
    Mutant("one stage too few in use", MMA, "slot = slot == S::stages - 1 ? 0", "slot = slot == S::stages - 2 ? 0"),
    Mutant("copies into the stage that is being read", MMA, "ring + free_slot * stage_size", "ring + slot * stage_size", ci=True),
    Mutant("rings of neighbouring warps overlap", MMA, "rings + warp * S::stages * stage_size", "rings + warp * (S::stages - 1) * stage_size"),
    Mutant("no barrier after the lookup tables", MMA, "    __syncthreads();\n  }\n  // While", "  }\n  // While"),
    Mutant("no barrier before the sums replace the rings", MMA, "wait<0>();\n  __syncthreads();", "wait<0>();", ci=True),
    Mutant("no barrier before the reduction", MMA, "  __syncthreads();\n  for (int i = int(threadIdx.x); i < panel", "  for (int i = int(threadIdx.x); i < panel"),
    Mutant("no cluster barrier before peers are read", MMA, "  if (ranks > 1) ptx::cluster_sync();  // one", "  __syncthreads();  // one", ci=True),
    Mutant("block leaves while peers read its sums", MMA, "  if (ranks > 1) ptx::cluster_sync();  // peers", "  // peers"),
    Mutant("half of the block misses a barrier", MMA, "wait<0>();\n  __syncthreads();", "wait<0>();\n  if (warp % 2 == 0) __syncthreads();"),
    # who adds what
    Mutant("stages of a part end one early", MMA, "(part + 1) * stages / parts)", "(part + 1) * stages / parts) - (part + 1 < parts)"),
    Mutant("sums of the first warp dropped", MMA, "for (int w = 0; w < warps; ++w) sum +=", "for (int w = 1; w < warps; ++w) sum +="),
    Mutant("sums of the last rank dropped", MMA, "for (int q = 0; q < ranks; ++q)", "for (int q = 0; q < ranks - 1; ++q)"),
    Mutant("bias on the first rank only", MMA, "if (p.w.bias) sum +=", "if (p.w.bias && rank == 0) sum +="),
    Mutant("bias of every rank", MMA, "load_float(p.w.bias, p.w.bias_dtype, n)", "ranks * load_float(p.w.bias, p.w.bias_dtype, n)", ci=True),
    Mutant("rows of x taken as k apart", MMA, "x + token * p.ldx + k;", "x + int64_t(token) * p.k + k;"),
    Mutant("what is added taken from the first token", MMA, "sum += p.y_in[int64_t(token) * p.w.n + n];", "sum += p.y_in[n];"),
    Mutant("outliers on the first rank only", MMA, "  if (p.w.out_ptr) sum_outliers", "  if (p.w.out_ptr && rank == 0) sum_outliers"),
    Mutant("outliers of a row end one early", MMA, "rank < length; rank += 32", "rank < length - 1; rank += 32", ci=True),
    Mutant("shuffles start at distance 8", MMA, "int distance = 16; distance;", "int distance = 8; distance;"),
    Mutant("half a warp shuffles", MMA, "      for (int distance = 16;", "      if (lane < 16) for (int distance = 16;"),
    # guards and tails
    Mutant("row guard off by one", MMA, "if (n >= p.w.n) continue;", "if (n > p.w.n) continue;", sanitized=True),
    Mutant("token guard of the sums missing", MMA, "        if (token < p.m)\n          *reinterpret_cast<float2*>(sums", "          *reinterpret_cast<float2*>(sums", sanitized=True),
    Mutant("x beyond K not masked", MMA, "const int count = max(0, min(8, p.k - k));", "const int count = 8;", sanitized=True),
    Mutant("codes beyond the last chunk not masked", MMA, "from < p.tile_bytes && tile0", "tile0", sanitized=True),
    Mutant("tiles beyond N not masked", MMA, "p.tile_bytes && tile0 + tile < p.tiles;", "p.tile_bytes;", sanitized=True),
    Mutant("shared memory 64 bytes short", MMA, "plan.smem = smem(plan.warps);", "plan.smem = smem(plan.warps) - 64;", sanitized=True),
    Mutant("one panel short", MMA, "int(t16::ceil_div(p.tiles, S::tiles));", "std::max(1, p.tiles / S::tiles);"),
    Mutant("rows of x off alignment copied as if on it", CUDA, " && args.ldx % (kAlignment / 2) == 0;", ";"),
    Mutant("x off alignment copied as if on it", CUDA, "reinterpret_cast<uintptr_t>(x) % kAlignment == 0 && ", "", ci=True),
    # fragments, codes, scales
    Mutant("registers of a swapped", MMA, "{upper[0], lower[0], upper[1], lower[1]}", "{upper[0], upper[1], lower[0], lower[1]}", ci=True),
    Mutant("k of x paired as it lies", MMA, "b[c][0] = __byte_perm(v.x, v.y, 0x5410u);", "b[c][0] = v.x;"),
    Mutant("halves of the step swapped", MMA, "b[c][2 * half], b[c][2 * half + 1]", "b[c][2 - 2 * half], b[c][3 - 2 * half]"),
    Mutant("codes read without the exchange of address bits", MMA, "stage_offset<kBits>(unit * t16::kUnitBytes + 8 * g) - 8 * g", "unit * t16::kUnitBytes"),
    Mutant("scale of the next group", MMA, "const int first = stage * kStageK >> p.group_shift;", "const int first = min(p.groups - 1, (stage * kStageK >> p.group_shift) + 1);"),
    Mutant("scale of the stage's first group twice", MMA, "p.group_shift == 5 ? step : 0", "0", ci=True),
    Mutant("groups not kept apart", MMA, "(k_end & group_mask) == 0 || k_end >= stop", "k_end >= stop"),
    Mutant("last, short group not added", MMA, "(k_end & group_mask) == 0 || k_end >= stop", "(k_end & group_mask) == 0"),
    Mutant("zero point of the neighbouring row", MMA, "zero[1] = z[1];", "zero[1] = z[0];"),
    Mutant("symmetric zero point off by one", MMA, "zero[2] = {1u << (kBits - 1), 1u", "zero[2] = {(1u << (kBits - 1)) - 1u, 1u"),
    Mutant("zero point not shifted with the code", DECODE, "(zero << kShift)", "zero"),
    Mutant("remainder of codebook entries dropped", MMA, "            multiply(half, upper_rest, lower_rest);\n", ""),
    Mutant("codebook of the panel's first tile", MMA, "tile = tile0 + row / t16::kTileRows;", "tile = tile0;"),
    Mutant("wrong half of the byte, 2 bits", DECODE, "const int half = 4 * (t & 1);", "const int half = 4 * (t >> 1);", bits=2),
    Mutant("high bit of the next code, 3 bits", DECODE, "h0 = __funnelshift_r(h.x, h.x, 2 * t + 30)", "h0 = __funnelshift_r(h.x, h.x, 2 * t + 31)", bits=3, ci=True),
    Mutant("high bits of the other row, 3 bits", DECODE, "h1 = __funnelshift_r(h.y, h.y", "h1 = __funnelshift_r(h.x, h.x", bits=3),
    Mutant("wrong byte widened, 8 bits", DECODE, "0x7442u + first", "0x7441u + first", bits=8),
    # dequantisation
    Mutant("dequantise: row guard off by one", CUDA, "if (n >= w.n) continue;", "if (n > w.n) continue;", sanitized=True),
    Mutant("dequantise: wide stores to rows off alignment", CUDA, "k0 + 8 <= w.k && w.k % 8 == 0;", "k0 + 8 <= w.k;", sanitized=True),
    Mutant("dequantise: one group for all of K", CUDA, "group = w.group ? k0 / w.group : 0;", "group = 0;"),
    Mutant("dequantise: every 33rd outlier left out", CUDA, "j < end; j += 32) {", "j < end; j += 33) {"),
    # fftconv: barriers and what lies where
    Mutant("fftconv: no barrier after the rows", FUSED, "  }\n  __syncthreads();\n  if constexpr (S::n1 > 1) {\n    strips<S, false>", "  }\n  if constexpr (S::n1 > 1) {\n    strips<S, false>"),
    Mutant("fftconv: no barrier between strips and tiles", FUSED, "    strips<S, false>(planes, p, rows);\n    __syncthreads();", "    strips<S, false>(planes, p, rows);"),
    Mutant("fftconv: no barrier between tiles and strips", FUSED, "  if (p.spectra) return;\n  __syncthreads();\n  if constexpr", "  if (p.spectra) return;\n  if constexpr"),
    Mutant("fftconv: no barrier before the results", FUSED, "    strips<S, true>(planes, p, rows);\n    __syncthreads();", "    strips<S, true>(planes, p, rows);"),
    Mutant("fftconv: no barrier before the largest of a row", FUSED, "shared[warp] = largest;\n    __syncthreads();", "shared[warp] = largest;"),
    Mutant("fftconv: swizzle that is not linear in its high bits", FUSED, "(chunk >> 3 ^ chunk >> 6 ^ chunk >> 9)", "(chunk + (chunk >> 3))"),
    Mutant("fftconv: shared memory 64 bytes short", FUSED, "at.smem = S::points * 4 + kReduceBytes;", "at.smem = S::points * 4 + kReduceBytes - 64;", sanitized=True),
    Mutant("fftconv: outer strip one plane short", FFT, "at.smem = size_t(2 + o.parts) *", "at.smem = size_t(1 + o.parts) *", sanitized=True),
    Mutant("fftconv: no barrier after an outer strip", OUTER, "    }\n  __syncthreads();\n\n  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;\n  const int groups = p.columns / 16, group = warp % groups, step = kOuterThreads / 32 / groups;\n  // Rows", "    }\n\n  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;\n  const int groups = p.columns / 16, group = warp % groups, step = kOuterThreads / 32 / groups;\n  // Rows"),
    # fftconv: signs, twiddles, halves
    Mutant("fftconv: sign of the imaginary parts", FUSED, "negated[i] = (inverse ? re[k][i] : im[k][i]) ^ kSigns", "negated[i] = (inverse ? re[k][i] : im[k][i])"),
    Mutant("fftconv: halves of an operand swapped", FUSED, "xre[kTiles2 - 1][kTiles3 - 1][2 * n + half] =", "xre[kTiles2 - 1][kTiles3 - 1][n + 2 * half] ="),
    Mutant("fftconv: twiddle not conjugated on the way back", FUSED, "a = multiply_conj(a, multiply(u, {v.x, v.y}));", "a = multiply(a, multiply(u, {v.x, v.y}));", ci=True),
    Mutant("fftconv: columns of the second half of a split stage", FUSED, "+ (S::split ? half * kRows2 : 0)", ""),
    Mutant("fftconv: imaginary rows dropped", FUSED, "      if (kInverse || p.parts == 2) ptx::ldmatrix_x4_trans(im[k], at + kPlane);", "      if (kInverse || p.parts == 2) ptx::ldmatrix_x4_trans(im[k], at);"),
    Mutant("fftconv: spectrum of the first channel", FUSED, "(p.r.first_row + (block >> p.log_outer)) / p.r.batch", "p.r.first_row / p.r.batch"),
    Mutant("fftconv: correlation taken for convolution", FFT, "f.direction = correlate ? -1.0f : 1.0f;", "f.direction = 1.0f;"),
    Mutant("fftconv: scale of the neighbouring row", FUSED, "shared[S::warps + row_in_block];", "shared[S::warps + row_in_block / 2];"),
    Mutant("fftconv: largest of the block instead of the row", FUSED, "S::row_threads < 32 ? S::row_threads : 32, kRowWarps", "32, kRowWarps"),
    Mutant("fftconv: rows scaled into overflow", ROWS, "target - (biased - 127)", "target + 12 - (biased - 127)"),
    Mutant("fftconv: shift of the ring", FFT, "const bool inside = plan.log_outer == 0;", "const bool inside = true;"),
    Mutant("fftconv: order of outer frequencies", TABLES, "return i / low + n / low * (i % low);", "return i;"),
    Mutant("fftconv: taps of negative lags keep their sign", TABLES, "    sign = -1.0f;", "    sign = 1.0f;"),
    Mutant("fftconv: gradient of one period only", TABLES, "    sum -= ring_coefficient", "    sum -= 0.0f * ring_coefficient"),
    Mutant("fftconv: butterflies without the shift", FFT32, "const int shift = p.shifted ? kQuarters : 0", "const int shift = 0"),
    # fftconv: guards and sums
    Mutant("fftconv: samples beyond L not masked", ROWS, "const int count = min(8, a.length - n);\n  at += n;\n  if (kWide && a.type == DType::f32) {\n    const float* const x", "const int count = 8;\n  at += n;\n  if (kWide && a.type == DType::f32) {\n    const float* const x", sanitized=True),
    Mutant("fftconv: results beyond L stored", ROWS, "const int count = min(8, a.length - n);\n  at += n;\n  if (kWide && a.type == DType::f32) {\n    float* const y", "const int count = 8;\n  at += n;\n  if (kWide && a.type == DType::f32) {\n    float* const y", sanitized=True),
    Mutant("fftconv: rows off alignment read as if on it", FFT, "a.aligned = a.aligned && aligned(q);", "a.aligned = a.aligned || aligned(q);", sanitized=True),
    Mutant("fftconv: rows of the last block not guarded", FUSED, "min(S::rows, (p.r.rows << p.log_outer) - first)", "S::rows", sanitized=True),
    Mutant("fftconv: sum of a channel starts again", FFT32, "if (begin > h * p.batch) sum = ", "if (false) sum = "),
    Mutant("fftconv: batch entry left out of a sum", FFT32, "for (int64_t row = begin; row < end; ++row) {", "for (int64_t row = begin; row < end - (end - begin > 2); ++row) {", ci=True),
    Mutant("fftconv: skip of the first channel", ROWS, "a.s.skip[row / a.batch]", "a.s.skip[0]"),
    Mutant("fftconv: half of a row in its dot product", FFT32, "  sum = block_sum(sum, shared);", "  if (threadIdx.x % 2) sum = 0.0f;\n  sum = block_sum(sum, shared);"),
    Mutant("fftconv: largest of a part of the row", OUTER, "n < p.length; n += gridDim.x", "n < p.length / 2; n += gridDim.x"),
    Mutant("fftconv: rows of zeros multiplied away", OUTER, "/ int64_t(p.inner)) + 15) / 16;", "/ int64_t(p.inner))) / 16;"),
    # dense_linear and dyad_linear: barriers, copies and what lies where
    Mutant("dyad: wait one group too weak", GEMM, "cp_async_wait<S::stages - 2>()", "cp_async_wait<S::stages - 1>()"),
    Mutant("dyad: no barrier before a stage is replaced", GEMM, "    __syncthreads();  // every thread's part", "    // every thread's part"),
    Mutant("dyad: copies into the stage that is being read", GEMM, "load(stage + S::stages - 1);\n    ptx", "load(stage + S::stages - 1 - (stage + S::stages - 1 >= S::stages ? S::stages - 1 : 0));\n    ptx"),
    Mutant("dyad: no barrier before results replace the ring", GEMM, "    __syncthreads();  // results take", "    // results take"),
    Mutant("dyad: no barrier before results are finished", GEMM, "    }\n    __syncthreads();\n    finish_tile", "    }\n    finish_tile", ci=True),
    Mutant("dyad: no barrier before results are written out", GEMM, "    __syncthreads();\n    store_tile", "    store_tile"),
    Mutant("dyad: shared memory 64 bytes short", GEMM, "at.smem = smem_bytes<S>();", "at.smem = smem_bytes<S>() - 64;", sanitized=True),
    Mutant("dyad: rows of results overlap", GEMM, "kResultPitch = S::bn + 8;", "kResultPitch = S::bn - 8;"),
    Mutant("dyad: swizzle of writes and reads apart", TILE, "tile_place<kTileK / 8>(row + 8 * upper + r, 2 * step + right));\n  else ptx::ldmatrix_x4_trans(b", "tile_place<kTileK / 8>(row + r, 2 * step + right));\n  else ptx::ldmatrix_x4_trans(b"),
    Mutant("dyad: halves of k swapped in the left operand", TILE, "16 * step + 8 * right + r, row / 8 + upper));\n}\n// The right", "16 * step + 8 * upper + r, row / 8 + right));\n}\n// The right"),
    Mutant("dyad: right operands of the other tile", TILE, "b[j / 2][2 * (j % 2)], b[j / 2][2 * (j % 2) + 1]", "b[j / 2][j % 2], b[j / 2][j % 2 + 2]"),
    Mutant("dyad: no barrier between fp32 tiles", FFMA, "barrier of the stage before\n    __syncthreads();", "barrier of the stage before"),
    Mutant("dyad: no barrier after the first fp32 tile", FFMA, "  store(0);\n  __syncthreads();", "  store(0);"),
    Mutant("dyad: fp32 tile overwritten while it is read", FFMA, "tiles + stage % 2 * tile_floats<S>();\n    a.store", "tiles + 0 * tile_floats<S>();\n    a.store"),
    Mutant("dyad: no barrier before residues are read", DYAD_CU, "  }\n  __syncthreads();\n  for", "  }\n  for"),
    Mutant("dyad: no barrier in the sums of columns", DENSE_CU, "    __syncthreads();\n    if (int(threadIdx.x) < 32 * width)", "    if (int(threadIdx.x) < 32 * width)"),
    # dyad_linear: which element belongs where
    Mutant("dyad: second half of K takes the first operand", GEMM, "other ? a_base[1] : a_base[0]", "a_base[0]"),
    Mutant("dyad: stride of the first half kept", GEMM, "const int step = other ? last.step : first.step;", "const int step = first.step;"),
    Mutant("dyad: residue for contiguous block", DYAD_CU, "distance = strided ? 1 : d;", "distance = d;"),
    Mutant("dyad: residues of features-first rows one apart", DYAD_CU, "distance = residue ? tokens : d * tokens;", "distance = d * tokens;", ci=True),
    Mutant("dyad: class taken for block", DYAD_CU, "(&o == &v[1] && !l.gathers ? o.at.cls : o.at.block) = block;", "o.at.block = block;"),
    Mutant("dyad: rows of wu start at the block, not the class", DYAD_CU, "v[1].at.quotient = unit;", "v[1].at.quotient = 0;"),
    Mutant("dyad: first feature of a class for n that divides the side", PROBLEM, "first = (cls - from % p.classes + p.classes) % p.classes;", "first = cls;"),
    Mutant("dyad: last feature of a class left out", PROBLEM, "(side - first + p.classes - 1) / p.classes) : 0", "(side - first) / p.classes) : 0"),
    Mutant("dyad: bias of the neighbouring class", PROBLEM, "+ first + int64_t(j) * p.classes;", "+ int64_t(j) * p.classes;"),
    Mutant("dyad: header not compared", PROBLEM, "same = same && p.header[i] == p.expected[i];", "same = same && p.header[i] == p.header[i];"),
    Mutant("dyad: gradient of wu from the block, not the residue", DYAD_CU, "i == 1 && s.kind != Kind::ot, false, r.x", "false, false, r.x"),
    Mutant("dyad: gradient of wu alone is written as wl's", GEMM, "const bool second = p.outs > 0 && problem.out == 1;", "const bool second = p.outs > 1 && problem.out == 1;"),
    Mutant("dyad: copy of the results in the wrong residue", PROBLEM, "f % p.residue_count * (p.residue_ld / p.residue_count) + f / p.residue_count", "f"),
    Mutant("dyad: overlap of the components counted once", DYAD_CU, "v += load_scalar(w.wu", "v = load_scalar(w.wu"),
    Mutant("dyad: order of copied residues", DYAD_CU, "= part[j * n + c];", "= part[c * per + j];"),
    # dyad_linear: guards and tails
    Mutant("dyad: k beyond the segment not masked", TILE, "const int fast_end = kAlongK ? s.depth : s.rows, slow_end", "const int fast_end = 1 << 30, slow_end", sanitized=True),
    Mutant("dyad: rows beyond the tile not masked", TILE, "const int count = slow < slow_end ? max(0", "const int count = slow < (1 << 30) ? max(0", sanitized=True),
    Mutant("dyad: lines off alignment copied as if on it", TILE, "return step == 1 && ld % 8 == 0 && reinterpret_cast<uintptr_t>(base) % 16 == 0;", "return step == 1;"),
    Mutant("dyad: columns beyond the result stored", PROBLEM, "if (column + 4 > columns) {", "if (column + 4 > columns + 4) {", sanitized=True),
    Mutant("dyad: rows beyond the result stored", PROBLEM, "      if (row >= rows || column >= columns) continue;", "      if (column >= columns) continue;", sanitized=True),
    Mutant("dyad: column guard of strided results off by one", PROBLEM, "if (row < rows && column < columns)", "if (row < rows && column <= columns)", sanitized=True),
    Mutant("dyad: fp32 tail of a line not masked", FFMA, "(kAlongK ? s.depth : s.rows) - fast) : 0;", "4) : 0;", sanitized=True),
    Mutant("dyad: one tile short", PROBLEM, "return {(m + bm - 1) / bm, (n + bn - 1) / bn};", "return {m > bm ? m / bm : 1, (n + bn - 1) / bn};"),
    Mutant("dyad: last tiles of a group of eight", PROBLEM, "min(kGroup, tiles.m - group * kGroup)", "kGroup"),
    Mutant("dyad: activation before the bias", PROBLEM, "v += load_scalar(p.bias", "v = activate(v, p.act) + load_scalar(p.bias"),
    # quik_linear: barriers and copies
    Mutant("quik: wait one group too weak", QUIK_MMA, "cp_async_wait<S::stages - 2>()", "cp_async_wait<S::stages - 1>()", ci=True),
    Mutant("quik: no barrier after a stage's copies", QUIK_MMA, "    __syncthreads();  // every thread's", "    // every thread's"),
    Mutant("quik: results replace the ring too early", QUIK_MMA, "      __syncthreads();\n      const int own", "      const int own"),
    Mutant("quik: rows leave before they are complete", QUIK_MMA, "lane);\n      __syncthreads();\n      store_rows", "lane);\n      store_rows"),
    Mutant("quik: no barrier after the staged rows", QUIK_CU, "    __syncthreads();\n    x = to", "    x = to"),
    Mutant("quik: no barrier before the warps' ranges are read", QUIK_CU, "wrong[warp] = any;\n  __syncthreads();", "wrong[warp] = any;"),
    # quik_linear: operands
    Mutant("quik: sign of 8-bit codes", QUIK_MMA, "? 0x80808080u : 0x88888888u;", "? 0x80808000u : 0x88888888u;"),
    Mutant("quik: sign of 4-bit codes as they are", QUIK_MMA, "? 0x80808080u : 0x88888888u;", "? 0x80808080u : 0x88888880u;"),
    Mutant("quik: sign of widened codes", QUIK_MMA, "second[r] = (v[r] & 0xf0f0f0f0u) ^ 0x80808080u;", "second[r] = v[r] & 0xf0f0f0f0u;"),
    Mutant("quik: halves of a byte exchanged", QUIK_MMA, "first[r] = (v[r] << 4 & 0xf0f0f0f0u)", "first[r] = (v[r] & 0xf0f0f0f0u)"),
    Mutant("quik: steps of a stage exchanged", QUIK_MMA, "rows(2 * t + step, v);", "rows(2 * t + 1 - step, v);"),
    Mutant("quik: chunks read where they do not lie", QUIK_MMA, "tile + unit_place<kOperands>(4 * unit + g % 4)", "tile + (4 * unit + g % 4) * 16"),
    Mutant("quik: sixteen times the integers", QUIK_MMA, "kOperands == Operands::w4 ? 4 : 0;", "0;"),
    Mutant("quik: first pair of tiles twice", QUIK_MMA, "(S::wm / 16) + 2 * pair + g / 4)", "(S::wm / 16) + g / 4)"),
    Mutant("quik: lines of outliers as they lie", QUIK_MMA, "return line / 32 * 32 + g / 4 * 16 + g % 4 * 4 + 2 * second + half;", "return line;"),
    Mutant("quik: order of nibbles", QUIK_CU, "word = low | high << 4;", "word = low << 4 | high;"),
    Mutant("quik: order of nibbles when repacked", QUIK_CU, "(code & 15) << 4 * (e % 4 * 2 + e / 4)", "(code & 15) << 4 * e"),
    Mutant("quik: nibbles not extended when repacked", QUIK_CU, "(((code & 15) ^ 8) - 8) & 255", "code & 15"),
    # quik_linear: ranges, scales and sums
    Mutant("quik: range of the block instead of the row", QUIK_CU, "for (int w = team * warps; w < (team + 1) * warps; ++w)", "for (int w = 0; w < kThreads / 32; ++w)"),
    Mutant("quik: range of one warp of the row", QUIK_CU, "w < (team + 1) * warps; ++w)", "w <= team * warps; ++w)", ci=True),
    Mutant("quik: shuffles start at distance 8", QUIK_CU, "int distance = 16; distance;", "int distance = 8; distance;"),
    Mutant("quik: outliers not asked whether they are finite", QUIK_CU, "      bad = bad || !(fabsf(widen(v)) < INFINITY);\n      static_cast", "      static_cast"),
    Mutant("quik: index out of range followed", QUIK_CU, "widen(x[inside ? c : 0])", "widen(x[c])", sanitized=True),
    Mutant("quik: index out of range forgiven", QUIK_CU, "bad = bad || !inside || ", "bad = bad || "),
    Mutant("quik: zero point not an integer", QUIK_CU, "shift = rintf(-lo / scale);", "shift = -lo / scale;"),
    Mutant("quik: code of the largest value wraps", QUIK_CU, "fminf(fmaxf(u, 0.0f), levels) + kRound", "fmaxf(u, 0.0f) + kRound"),
    Mutant("quik: codes cut, not rounded", QUIK_CU, "inverse) + kRound + back;", "inverse) - 0.5f + kRound + back;"),
    Mutant("quik: zero point added before the rounding", QUIK_CU, "inverse) + kRound + back;", "inverse) + shift + kRound - kRound;"),
    Mutant("quik: no correction", QUIK_MMA, "offset * reduced[r]);", "0.0f * reduced[r]);"),
    Mutant("quik: correction without the half range", QUIK_MMA, "fmaf(p.half, s, p.zero[row])", "p.zero[row]"),
    Mutant("quik: the epilogue alone without the half range", QUIK_CU, "fmaf(d.half, s, d.zero[row])", "d.zero[row]"),
    Mutant("quik: bias of the first columns", QUIK_MMA, "p.bias_type, feature0 + column + e)", "p.bias_type, column + e)"),
    Mutant("quik: words of packed outliers not compared", QUIK_MMA, "known = known && p.header[i] == p.expected[i];", "known = known && p.header[i] == p.header[i];"),
    Mutant("quik: last tiles of a group of eight", QUIK_MMA, "const int columns = min(kGroup, tiles_n - group * kGroup);", "const int columns = kGroup;"),
    Mutant("quik: every 33rd outlier left out", QUIK_FLOAT, "j < o.split.n_out; j += 32) {", "j < o.split.n_out; j += 33) {"),
    Mutant("quik: the first eight rows again", QUIK_FLOAT, "token0 = int64_t(blockIdx.y) * kTokens;", "token0 = 0;"),
    Mutant("quik: outliers of the written weight one off", QUIK_FLOAT, "row * a.ld + j - a.n_base);", "row * (a.ld - 1) + j - a.n_base);"),
    # quik_linear: guards and tails
    Mutant("quik: tiles beyond N not masked", QUIK_MMA, "j < tiles && left > 0 ? 16 : 0", "left > 0 ? 16 : 0", sanitized=True),
    Mutant("quik: units beyond K not masked", QUIK_MMA, "j < tiles && left > 0 ? 16 : 0", "j < tiles ? 16 : 0", sanitized=True),
    Mutant("quik: tokens beyond M not masked", QUIK_MMA, "j < tokens ? 16 : 0", "16", sanitized=True),
    Mutant("quik: outliers of tokens beyond M not masked", QUIK_MMA, "a.p.x_out, token, token < a.p.m);", "a.p.x_out, token, true);", sanitized=True),
    Mutant("quik: outliers of features beyond N not masked", QUIK_MMA, "a.p.w_out, feature, feature < a.p.n);", "a.p.w_out, feature, true);", sanitized=True),
    Mutant("quik: outliers beyond the last not masked", QUIK_MMA, "const bool there = inside && k < a.p.out_ld;", "const bool there = inside;"),
    Mutant("quik: rows beyond M stored", QUIK_MMA, "int(min(int64_t(kResultRows<S>), p.m - token0))", "kResultRows<S>", sanitized=True),
    Mutant("quik: columns beyond N stored", QUIK_MMA, "        if (column + e >= columns) continue;\n", "", sanitized=True),
    Mutant("quik: wide stores to rows off alignment", QUIK_MMA, "p.n % 4 == 0 && ", "", sanitized=True),
    Mutant("quik: scale beyond N read", QUIK_MMA, "const bool inside = first + r < p.n;", "const bool inside = true;", sanitized=True),
    Mutant("quik: shared memory 64 bytes short", QUIK_MMA, "at.smem = S::stages * kSlot<S>;", "at.smem = S::stages * kSlot<S> - 64;", sanitized=True),
    Mutant("quik: staged rows 16 bytes short", QUIK_CU, "at.smem = staged ? size_t(bytes(rows)) : 0;", "at.smem = staged ? size_t(bytes(rows)) - 16 : 0;", sanitized=True),
    Mutant("quik: rows off alignment staged as if on it", QUIK_CU, "int(reinterpret_cast<uintptr_t>(from) % 16 / sizeof(T));", "0;"),
    Mutant("quik: codes of columns behind the last", QUIK_CU, "        if (j + e < base) use(e,", "        use(e,", sanitized=True),
    Mutant("quik: words stored to rows off alignment", QUIK_CU, "% 4 == 0 && q.row_bytes % 4 == 0;", "% 4 == 0;", sanitized=True),
    Mutant("dyad: rows of a packed weight not padded", DENSE_CU, "row = i / p.ld, column = i % p.ld;", "row = i / p.d_in, column = i % p.d_in;"),
    # relu_ffn: barriers
    Mutant("relu: no barrier after the panel of x", NEURONS, "      stage<R, T>(p, set, first, count, xs);\n      __syncthreads();", "      stage<R, T>(p, set, first, count, xs);", ci=True),
    Mutant("relu: panel replaced while it is read", NEURONS, "      if (first) __syncthreads();  // everybody is done with the panel before\n", ""),
    Mutant("relu: no barrier before the gates are looked at", NEURONS, "  __syncthreads();\n\n  // A thread a token", "\n  // A thread a token"),
    Mutant("relu: no barrier before the union", NEURONS, "  __syncthreads();\n  uint32_t any = 0;", "  uint32_t any = 0;"),
    Mutant("relu: no barrier after the list", NEURONS, "__popc(active[threadIdx.x]);\n  __syncthreads();", "__popc(active[threadIdx.x]);"),
    Mutant("relu: no barrier before the parts of u are added", NEURONS, "parts[warp][lane / kLanes] = sum;\n    __syncthreads();", "parts[warp][lane / kLanes] = sum;"),
    Mutant("relu: parts of u replaced while they are read", NEURONS, "takes nothing from it\n    }\n    __syncthreads();", "takes nothing from it\n    }"),
    Mutant("relu: no barrier after the panel that u reads", NEURONS, "        stage<R, T>(p, set, first, part, xs);\n        __syncthreads();", "        stage<R, T>(p, set, first, part, xs);"),
    Mutant("relu: no barrier before the warps' sums are added", NEURONS, "acc[t][7]};\n    __syncthreads();", "acc[t][7]};", ci=True),
    Mutant("relu: warps' sums replaced while they are read", NEURONS, "    to[int64_t(t) * p.out_chunks * kChunk] = sum;\n    __syncthreads();", "    to[int64_t(t) * p.out_chunks * kChunk] = sum;"),
    Mutant("relu: no barrier of the warp after its list", NEURONS, "  __syncwarp();\n\n  float acc", "\n  float acc"),
    Mutant("relu: totals of a block read before they are there", RELU_CU, "shared[threadIdx.x / 32] = v;\n  __syncthreads();", "shared[threadIdx.x / 32] = v;"),
    Mutant("relu: totals of a block replaced while they are read", RELU_CU, "  __syncthreads();  // the sum before has been read\n", ""),
    # relu_ffn: who adds what
    Mutant("relu: a list ends one early", NEURONS, "lane % kBlock < p.counts[run];", "lane % kBlock < p.counts[run] - 1;", ci=True),
    Mutant("relu: lists of a warp overlap", NEURONS, "slice * kSlice + warp * kLists +", "slice * kSlice + warp * (kLists - 1) +"),
    Mutant("relu: place in a list not counted from its start", NEURONS, "const int to = count + __popc", "const int to = __popc"),
    Mutant("relu: the last slice is not added", RELU_CU, "slice < p.slices; ++slice", "slice < p.slices - 1; ++slice"),
    Mutant("relu: neurons dealt to the wrong block", NEURONS, "int64_t(j) * p.blocks + block; };", "int64_t(block) * kBlock + j; };"),
    Mutant("relu: every row is the list's first", NEURONS, "? int(neuron(list[first_row + r])) : -1;", "? int(neuron(list[first_row])) : -1;"),
    Mutant("relu: u of the first four rows again", NEURONS, "const int t = threadIdx.x % T, k = first_row + threadIdx.x / T;", "const int t = threadIdx.x % T, k = threadIdx.x / T;"),
    Mutant("relu: chunks of u begin at the panel's first", NEURONS, "first, part, warp, kGateWarps, lane, sums);", "first, part, 0, kGateWarps, lane, sums);"),
    Mutant("relu: totals in the lanes of another value", RELU_ROWS, "mine = upper ? v[i + n] : v[i], other = upper ? v[i] : v[i + n];", "mine = upper ? v[i] : v[i + n], other = upper ? v[i + n] : v[i];"),
    Mutant("relu: bias of the gate of another neuron", NEURONS, "sum + p.gate.bias[neuron(j)] : sum;", "sum + p.gate.bias[neuron(own / T)] : sum;"),
    Mutant("relu: no bias of up", NEURONS, "u += p.up.bias[neuron(j)];", "u += 0.0f;"),
    Mutant("relu: bias of every slice", RELU_CU, "sum += from[slice * p.width * ld];", "sum += from[slice * p.width * ld] + (slice && p.down.bias ? p.down.bias[column] : 0.0f);"),
    Mutant("relu: a token takes what another one has active", NEURONS, "gates[t][j] = on ? a : 0.0f;", "gates[t][j] = a;", ci=True),
    Mutant("relu: union of the first two tokens", NEURONS, "  for (int t = 0; t < T; ++t) any |= active[t];", "  for (int t = 0; t < (T < 2 ? T : 2); ++t) any |= active[t];"),
    Mutant("relu: nnz of the union", NEURONS, "__popc(active[threadIdx.x]);", "count;"),
    Mutant("relu: votes of the other half of the warp", NEURONS, "votes >> (lane & kBlock) & 0xffffu;", "votes & 0xffffu;"),
    Mutant("relu: active at the threshold's other side", NEURONS, "case Gate::fatrelu: return !(g <= param);", "case Gate::fatrelu: return g <= param;"),
    Mutant("relu: max of drelu left out", NEURONS, "if (p.kind == Gate::drelu && u <= 0.0f) u = 0.0f;", ""),
    Mutant("relu: threshold of the first neuron", NEURONS, "p.param[p.param_each ? i : 0]", "p.param[0]"),
    Mutant("relu: mask of the first token", RELU_ROWS, "(p.mask_rows == 1 ? 0 : p.first + token) * p.mask_bytes", "0 * p.mask_bytes"),
    Mutant("relu: mask of whole neurons", RELU_ROWS, "const int64_t bit = i / p.mask_group;", "const int64_t bit = i;", sanitized=True),
    Mutant("relu: the cut counts masked gates as nothing", NEURONS, "p.mask && p.kind != Gate::gelu_gauss;", "p.mask != nullptr;"),
    Mutant("relu: top_k ranks masked gates", RELU_CU, "if (p.mask && !in_mask(p, int(blockIdx.x), i)) return -1;", ""),
    Mutant("relu: top_k keeps one more", RELU_CU, "(s == cut && before < ties)", "(s == cut && before <= ties)"),
    Mutant("relu: sums of the cut without the last warp", RELU_CU, "for (int w = 1; w < kAllThreads / 32; ++w) sum += shared[w];", "for (int w = 1; w < kAllThreads / 32 - 1; ++w) sum += shared[w];"),
    Mutant("relu: deviation without the root", RELU_CU, "sqrt(squares / double(p.f))", "(squares / double(p.f))"),
    Mutant("relu: inputs of the first set again", RELU_CU, "load_scalar(p.x, p.dtype, (int64_t(set) * kMaxTokens + t) * p.f + i)", "load_scalar(p.x, p.dtype, int64_t(t) * p.f + i)"),
    Mutant("relu: inputs at the threshold kept", RELU_CU, "!(fabsf(v[t]) <= least);", "!(fabsf(v[t]) < -least);"),
    Mutant("relu: columns of a lane as they lie, int4", RELU_ROWS, "if (r == Rows::i4) return lane / 16 * 128 + 16 * e + lane % 16;", "if (r == Rows::i4) return 8 * lane + e;"),
    Mutant("relu: nibbles are not signed", RELU_ROWS, "- 8388616.0f) * scales.s[e / 2]", "- 8388608.0f) * scales.s[e / 2]"),
    Mutant("relu: one scale for a lane of int4", RELU_ROWS, "* scales.s[e / 2];", "* scales.s[0];"),
    Mutant("relu: bytes are not signed", RELU_ROWS, "raw.w[e / 4] ^ 0x80808080u;", "raw.w[e / 4];"),
    # relu_ffn: guards and tails
    Mutant("relu: rows read beyond their end", RELU_ROWS, "const bool inside = there && at < row_bytes;", "const bool inside = there;", sanitized=True),
    Mutant("relu: scales read beyond the last", RELU_ROWS, "there && group < groups ? __ldg", "there ? __ldg", sanitized=True),
    Mutant("relu: neurons behind the last", NEURONS, "      bool wanted = i < p.f;", "      bool wanted = true;", sanitized=True),
    Mutant("relu: x read beyond its end", NEURONS, "            if (own < p.d) v[e] =", "            v[e] =", sanitized=True),
    Mutant("relu: x off alignment loaded as if on it", RELU_CU, "a.d % 4 == 0 && reinterpret_cast<uintptr_t>(p.x) % (4 * size) == 0;", "a.d % 4 == 0;", sanitized=True),
    Mutant("relu: x of tokens behind the last", NEURONS, "    if (token < tokens) {\n      const int64_t row", "    {\n      const int64_t row", sanitized=True),
    Mutant("relu: results behind the last column", RELU_CU, "  if (column >= p.d_out) return;\n", "", sanitized=True),
    Mutant("relu: shared memory 64 bytes short", NEURONS, "* kChunk * 4;", "* kChunk * 4 - 64;", sanitized=True),
    # bitmask_linear
    Mutant("bitmask: no barrier after the counts of the warps", BITMASK_CU, "  if (lane == 0) counts[warp] = count;\n  __syncthreads();", "  if (lane == 0) counts[warp] = count;", ci=True),
    Mutant("bitmask: no barrier before the parts are added", BITMASK_CU, "parts[warp][r * T + t] = sum; });\n  __syncthreads();", "parts[warp][r * T + t] = sum; });"),
    Mutant("bitmask: no barrier before the largest is known", BITMASK_CU, "largest[threadIdx.x / 32] = most;\n  __syncthreads();", "largest[threadIdx.x / 32] = most;"),
    Mutant("bitmask: values of the panel's start", BITMASK_CU, "  for (int w = 0; w < warp; ++w) s.at += counts[w];", ""),
    Mutant("bitmask: words of a run not counted", BITMASK_CU, "    at += all;", ""),
    Mutant("bitmask: the upper half counts only its own bits", BITMASK_CU, "(lane < 16 ? 0 : __popc(low)) + ", ""),
    Mutant("bitmask: own bit counted", BITMASK_CU, "(1u << place) - 1));", "(2u << place) - 1));"),
    Mutant("bitmask: second value where the first is", BITMASK_CU, "values[index + one] : E(0);", "values[index] : E(0);", ci=True),
    Mutant("bitmask: columns of the other block", BITMASK_CU, "const int64_t column = block * kBlock + 2 * lane;", "const int64_t column = (block ^ 1) % p.blocks * kBlock + 2 * lane;"),
    Mutant("bitmask: parts of the last warp left out", BITMASK_CU, "for (int part = 1; part < kWarps; ++part) sum +=", "for (int part = 1; part < kWarps - 1; ++part) sum +="),
    Mutant("bitmask: scale of the first group", BITMASK_CU, "block * kBlock / w.group] : 1.0f", "0] : 1.0f"),
    Mutant("bitmask: groups end at every block", BITMASK_CU, "p.unit = a.w.group ? int(a.w.group / kBlock) : 1;", "p.unit = 1;"),
    Mutant("bitmask: the last group is not added", BITMASK_CU, "group < p.groups; ++group", "group < p.groups - 1; ++group"),
    Mutant("bitmask: sums of a group are kept", BITMASK_CU, "        sums[r][t] = 0;", ""),
    Mutant("bitmask: codes cut, not rounded", BITMASK_CU, "int8_t(rintf(", "int8_t(("),
    Mutant("bitmask: what a code is worth, of the first token", BITMASK_CU, "__fmul_rn(y, p.scale[token])", "__fmul_rn(y, p.scale[0])"),
    Mutant("bitmask: no bias", BITMASK_CU, "if (p.a.bias) y = ", "if (p.a.bias && row < 0) y = "),
    Mutant("bitmask: rows behind the last stored", BITMASK_CU, "if (r >= kRows || row >= w.n || token >= p.a.m) return;", "if (r >= kRows || token >= p.a.m) return;", sanitized=True),
    Mutant("bitmask: tokens behind the last read", BITMASK_CU, "      if (token0 + t >= p.a.m) continue;\n", "", sanitized=True),
    Mutant("bitmask: words behind the last read", BITMASK_CU, "b + lane / kRows < share.last ? masks", "true ? masks", sanitized=True),
    Mutant("bitmask: shared memory of one group short", BITMASK_CU, "p.groups * kRows * tokens * 4 : 0", "(p.groups - 1) * kRows * tokens * 4 : 0", sanitized=True),
]  # fmt: skip


@cache
def originals(folder: Path, sanitized: bool) -> Build:
    """The unchanged objects."""
    return Build(folder / ("sanitized" if sanitized else "plain"), SANITIZE if sanitized else ())


def prepare(folder: Path, mutants: list[Mutant]) -> str:
    """Builds and runs what the mutants stem from; says what failed, or nothing."""
    if any(m.fftconv for m in mutants):
        for sanitized in sorted({m.sanitized for m in mutants if m.fftconv}):
            program = originals(folder, sanitized).fftconv_driver()
            for order in ORDERS:
                if (result := run(program, "quick", order=order)).returncode != 0:
                    return f"fftconv without a planted bug, order {order}:\n{result.stdout}{result.stderr}"
    for sanitized in sorted({m.sanitized for m in mutants if m.dyad}):
        program = originals(folder, sanitized).dyad_driver()
        for order in ORDERS:
            if (result := run(program, "quick", order=order)).returncode != 0:
                return f"dyad without a planted bug, order {order}:\n{result.stdout}{result.stderr}"
    for sanitized in sorted({m.sanitized for m in mutants if m.quik}):
        program = originals(folder, sanitized).quik_driver()
        for order in ORDERS:
            if (result := run(program, "quick", order=order)).returncode != 0:
                return f"quik without a planted bug, order {order}:\n{result.stdout}{result.stderr}"
    for sanitized in sorted({m.sanitized for m in mutants if m.relu}):
        program = originals(folder, sanitized).relu_driver()
        for order in ORDERS:
            if (result := run(program, "quick", order=order)).returncode != 0:
                return f"relu without a planted bug, order {order}:\n{result.stdout}{result.stderr}"
    for sanitized in sorted({m.sanitized for m in mutants if m.bitmask}):
        program = originals(folder, sanitized).bitmask_driver()
        for order in ORDERS:
            if (result := run(program, "quick", order=order)).returncode != 0:
                return f"bitmask without a planted bug, order {order}:\n{result.stdout}{result.stderr}"
    others = [m for m in mutants if not (m.fftconv or m.dyad or m.quik or m.relu or m.bitmask)]
    for bits, sanitized in sorted({(m.bits, m.sanitized) for m in others}):
        program = originals(folder, sanitized).driver([bits])
        for order in ORDERS:
            if (result := run(program, bits, order=order)).returncode != 0:
                return f"without a planted bug, {bits} bits, order {order}:\n{result.stdout}{result.stderr}"
    return ""


def plant(folder: Path, mutant: Mutant, *, first: bool = False) -> str:
    """How the mutant was caught, e.g. ``rev 7``; empty: it was not. ``first``: the first order that does is enough.
    ValueError: the edit no longer fits the source."""
    place = Path(tempfile.mkdtemp(dir=folder))
    try:
        text = (ROOT / mutant.file).read_text()
        if text.count(mutant.old) != 1:
            raise ValueError(
                f"{mutant.name}: the text to replace occurs {text.count(mutant.old)} times in {mutant.file}"
            )
        copy = place / mutant.file
        copy.parent.mkdir(parents=True)
        copy.write_text(text.replace(mutant.old, mutant.new))
        base = originals(folder, mutant.sanitized)
        build = Build(place, base.flags, base)
        cases: object = "quick"
        if mutant.quik or mutant.relu:
            program = build.quik_driver(mutant.changed) if mutant.quik else build.relu_driver(mutant.changed)
        elif mutant.bitmask:
            program = build.bitmask_driver(mutant.changed)
        elif mutant.dyad or mutant.fftconv:
            program = build.dyad_driver(mutant.changed) if mutant.dyad else build.fftconv_driver(mutant.changed)
        else:
            program, cases = build.driver([mutant.bits], mutant.changed), mutant.bits
        caught = (order for order in ORDERS if run(program, cases, order=order).returncode != 0)
        return next(caught, "") if first else " ".join(caught)
    finally:
        shutil.rmtree(place)


def main(names: list[str]) -> int:
    """Plants the named mutants, or all, two at a time."""
    if reason := missing():
        sys.exit(f"mutants: {reason}")
    chosen = [m for m in MUTANTS if not names or m.name in names]
    if not chosen or len({m.name for m in MUTANTS}) != len(MUTANTS):
        sys.exit("mutants: no such name")
    with tempfile.TemporaryDirectory() as folder:
        if problem := prepare(Path(folder), chosen):
            sys.exit(f"mutants: {problem}")

        def report(mutant: Mutant) -> bool:
            try:
                caught = plant(Path(folder), mutant)
            except (ValueError, CompileError) as error:
                print(f"{mutant.name}: {error}", flush=True)
                return False
            print(f"{mutant.name:52} {'caught: ' + caught if caught else 'NOT CAUGHT'}", flush=True)
            return bool(caught)

        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(report, chosen))
    print(f"{sum(results)} of {len(results)} caught")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
