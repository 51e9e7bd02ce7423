// What the product kernels share: which tile of which problem a block has, scalars of any type, activations.
#pragma once
#include "cuda/cu.h"
#include "cuda/gemm.h"

namespace effk::cuda {
namespace {

__device__ __forceinline__ float load_scalar(const void* p, DType type, int64_t i) {
  if (type == DType::f32) return static_cast<const float*>(p)[i];
  if (type == DType::f16) return __half2float(static_cast<const __half*>(p)[i]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
}
__device__ __forceinline__ void store_scalar(void* p, DType type, int64_t i, float v) {
  if (type == DType::f32) static_cast<float*>(p)[i] = v;
  else if (type == DType::f16) static_cast<__half*>(p)[i] = __float2half_rn(v);
  else static_cast<__nv_bfloat16*>(p)[i] = __float2bfloat16_rn(v);
}

__device__ __forceinline__ float activate(float v, Activation act) {
  switch (act) {
    case Activation::relu: return v < 0.0f ? 0.0f : v;  // NaN stays
    case Activation::gelu: return 0.5f * v * (1.0f + erff(v * 0.70710678f));
    case Activation::gelu_tanh: return 0.5f * v * (1.0f + tanhf(0.79788456f * (v + 0.044715f * v * v * v)));
    case Activation::silu: return v / (1.0f + expf(-v));
    default: return v;
  }
}

// Tiles of the sides of a problem, and of all problems.
struct TileGrid {
  int m, n;
};
__host__ __device__ inline TileGrid tile_grid(const Gemm& p, int bm, int bn) {
  const int m = p.features_on_m ? (p.m + p.classes - 1) / p.classes : p.m;
  const int n = p.features_on_m ? p.n : (p.n + p.classes - 1) / p.classes;
  return {(m + bm - 1) / bm, (n + bn - 1) / bn};
}

__host__ __device__ inline int64_t grid_blocks(const Gemm& p, int bm, int bn) {
  const TileGrid tiles = tile_grid(p, bm, bn);
  return int64_t(tiles.m) * tiles.n * p.classes * p.blocks * (p.outs ? p.outs : 1);
}

// Classes come fastest, because their stores share lines; then eight tiles of m, whose b stays in L2 while n is walked.
struct Problem {
  int64_t block, cls, first, quotient;
  int out, m, n, m0, n0;
  bool empty;

  __device__ __forceinline__ Problem(const Gemm& p, int bm, int bn) {
    constexpr int kGroup = 8;
    const TileGrid tiles = tile_grid(p, bm, bn);
    int64_t i = blockIdx.x;
    cls = i % p.classes, i /= p.classes;
    const int64_t per = int64_t(tiles.m) * tiles.n;
    const int tile = int(i % per);
    i /= per;
    block = i % p.blocks;
    out = p.first_out + int(i / p.blocks);
    const int group = tile / (kGroup * tiles.n), in_group = tile % (kGroup * tiles.n);
    const int rows = min(kGroup, tiles.m - group * kGroup);
    m0 = (group * kGroup + in_group % rows) * bm;
    n0 = in_group / rows * bn;

    const int64_t side = p.features_on_m ? p.m : p.n, from = block * side;
    first = (cls - from % p.classes + p.classes) % p.classes;
    quotient = (from + first) / p.classes;
    const int count = first < side ? int((side - first + p.classes - 1) / p.classes) : 0;
    m = p.features_on_m ? count : p.m;
    n = p.features_on_m ? p.n : count;
    empty = m0 >= m || n0 >= n;
  }
  __device__ __forceinline__ int64_t at(const Offset& o) const {
    return block * o.block + cls * o.cls + first * o.first + quotient * o.quotient;
  }
  // The feature that row or column j of the features' side is.
  __device__ __forceinline__ int64_t feature(const Gemm& p, int j) const {
    return block * (p.features_on_m ? p.m : p.n) + first + int64_t(j) * p.classes;
  }
};

__device__ __forceinline__ bool header_ok(const Gemm& p) {
  if (!p.header) return true;
  bool same = true;
#pragma unroll
  for (int i = 0; i < 8; ++i) same = same && p.header[i] == p.expected[i];
  return same;
}

// kRows x kColumns fp32 sums in shared memory, rows kPitch floats apart, the first one row0 of the block's tile: bias
// and activation in place. In loops of one element, because six activations unrolled over every element of a thread are
// most of a kernel's code.
template <int kRows, int kColumns, int kPitch, int kThreads>
__device__ __forceinline__ void finish_tile(const Gemm& p, const Problem& problem, float* tile, int row0, bool known) {
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * kColumns; i += kThreads) {
    const int row = i / kColumns, column = i % kColumns;
    const int feature = p.features_on_m ? problem.m0 + row0 + row : problem.n0 + column;
    float v = tile[row * kPitch + column];
    if (p.bias && feature < (p.features_on_m ? problem.m : problem.n)) v += load_scalar(p.bias, p.bias_type, problem.feature(p, feature));
    tile[row * kPitch + column] = known ? activate(v, p.act) : __uint_as_float(0x7fc00000u);
  }
}

// The tile rounded to the type of the result: four neighbours at once where they are that in memory, and the copy in
// residues.
template <int kRows, int kColumns, int kPitch, int kThreads>
__device__ __forceinline__ void store_tile(const Gemm& p, const Problem& problem, const float* tile, int row0) {
  void* const out = p.outs > 0 && problem.out == 1 ? p.out[1] : p.out[0];
  const int rows = min(kRows, problem.m - problem.m0 - row0), columns = min(kColumns, problem.n - problem.n0);
  const int64_t first = problem.at(p.out_at) + (problem.m0 + row0) * p.out_ld + int64_t(problem.n0) * p.out_step;
  const int size = p.out_type == DType::f32 ? 4 : 2;
  if (p.out_step == 1 && p.out_ld % 4 == 0 && (reinterpret_cast<uintptr_t>(out) + first * size) % (4 * size) == 0) {
#pragma unroll 1
    for (int i = threadIdx.x; i < kRows * kColumns / 4; i += kThreads) {
      const int row = i / (kColumns / 4), column = i % (kColumns / 4) * 4;
      if (row >= rows || column >= columns) continue;
      const float4 v = *reinterpret_cast<const float4*>(tile + row * kPitch + column);
      const int64_t at = first + row * p.out_ld + column;
      if (column + 4 > columns) {
        for (int e = 0; e < columns - column; ++e) store_scalar(out, p.out_type, at + e, tile[row * kPitch + column + e]);
      } else if (p.out_type == DType::f32) {
        *reinterpret_cast<float4*>(static_cast<float*>(out) + at) = v;
      } else {
        uint2 w;
        if (p.out_type == DType::f16) {
          const __half2 a = __floats2half2_rn(v.x, v.y), b = __floats2half2_rn(v.z, v.w);
          w = {reinterpret_cast<const uint32_t&>(a), reinterpret_cast<const uint32_t&>(b)};
        } else {
          const __nv_bfloat162 a = __floats2bfloat162_rn(v.x, v.y), b = __floats2bfloat162_rn(v.z, v.w);
          w = {reinterpret_cast<const uint32_t&>(a), reinterpret_cast<const uint32_t&>(b)};
        }
        *reinterpret_cast<uint2*>(static_cast<uint16_t*>(out) + at) = w;
      }
    }
  } else {
#pragma unroll 1
    for (int i = threadIdx.x; i < kRows * kColumns; i += kThreads) {
      const int row = i / kColumns, column = i % kColumns;
      if (row < rows && column < columns)
        store_scalar(out, p.out_type, first + row * p.out_ld + int64_t(column) * p.out_step, tile[row * kPitch + column]);
    }
  }
  if (!p.residues) return;
  // Neighbouring threads take neighbours of the copy: columns residue_count apart, or 1 where classes already are
  // residues.
  const int apart = p.classes > 1 ? 1 : min(p.residue_count, kColumns), per = (kColumns + apart - 1) / apart;
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * per * apart; i += kThreads) {
    const int row = i / (per * apart), place = i % (per * apart), column = place % per * apart + place / per;
    if (row >= rows || column >= columns) continue;
    const int64_t f = problem.feature(p, problem.n0 + column);
    const int64_t to = (problem.m0 + row0 + row) * p.residue_ld + f % p.residue_count * (p.residue_ld / p.residue_count) + f / p.residue_count;
    store_scalar(p.residues, p.out_type, to, tile[row * kPitch + column]);
  }
}

}  // namespace
}  // namespace effk::cuda
