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

__device__ __forceinline__ int64_t residue_place(const Gemm& p, int64_t row, int64_t feature) {
  return row * p.residue_ld + feature % p.residue_count * (p.residue_ld / p.residue_count) + feature / p.residue_count;
}

}  // namespace
}  // namespace effk::cuda
