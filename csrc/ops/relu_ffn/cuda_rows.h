// Rows of neurons as a warp sees them: 32 lanes with 8 columns each share 256 columns of a row, whatever its type, so that the
// registers of sums do not grow with the bytes saved.
//
//   fp32         columns 4 l .. 4 l + 3 and 128 more: two loads of 16 bytes
//   bf16, fp16   columns 8 l .. 8 l + 7: 16 bytes
//   int8         the same: 8 bytes
//   int4         word l % 16 of unit l / 16: columns 16 apart, 4 bytes
//
// Activations that meet them lie in shared memory in that order: [half][lane][4] for each 256 columns.
#pragma once
#include "cuda/cu.h"
#include "cuda/gemm_problem.h"
#include "cuda/ptx.h"
#include "ops/relu_ffn/cuda.h"

namespace effk::cuda::relu_ffn {

using effk::relu_ffn::kMaxTokens;
using effk::relu_ffn::NeuronRows;
using neuron::Rows;

constexpr int kChunk = 256;    // columns of a warp
constexpr int kBlock = 16;     // neurons of a block of threads, places of its list
constexpr int kLists = 4;      // blocks whose lists are one warp's in down
constexpr int kSlice = 8 * kLists;

// One set of launches.
struct Step {
  NeuronRows gate, up, down;
  neuron::Rows type;
  int group_shift;             // log2 of the group of scales; 31: the whole row
  int64_t row_bytes, groups;   // of gate and up; scales of a row
  int64_t out_bytes, out_groups;
  Gate kind;
  const float* param;
  bool param_each, dense;
  const uint8_t* mask;
  int64_t mask_rows, mask_bytes, mask_group, first;  // first: token of this step in the call
  const void* x;
  DType dtype;
  bool quads;                  // four neighbours of x can be loaded at once
  int tokens, sets, width;     // sets of at most kMaxTokens tokens; tokens that the kernels are compiled for
  int64_t d, f, d_out;
  int blocks, chunks, out_chunks, slices, panel;  // panel: chunks of x in shared memory
  void* y;
  int32_t* nnz;
  // Workspace.
  float* gates;                // [tokens, f] or null: gates are not looked at first
  float* cut;                  // [tokens]
  uint8_t* kept;               // [tokens, f]
  bool only_gates;             // this launch fills `gates`
  int32_t *index, *counts, *active;  // [sets, blocks, 16], [sets, blocks], [sets, blocks, 8]
  float* h;                    // [sets, blocks, 16, width]
  float* partial;              // [sets, slices, width, 256 out_chunks], columns in the order of lanes
};

template <Rows R>
cudaError_t launch_gates(const Step& p, bool overlap, cudaStream_t stream);
template <Rows R>
cudaError_t launch_down(const Step& p, bool overlap, cudaStream_t stream);

namespace {

constexpr int lane_words(Rows r) { return r == Rows::f32 ? 8 : r == Rows::i8 ? 2 : r == Rows::i4 ? 1 : 4; }

// Column e of a lane, from the first of 256.
__device__ __forceinline__ int column_of(Rows r, int lane, int e) {
  if (r == Rows::f32) return (e / 4) * 128 + 4 * lane + e % 4;
  if (r == Rows::i4) return lane / 16 * 128 + 16 * e + lane % 16;
  return 8 * lane + e;
}

template <Rows R>
struct Raw {
  uint32_t w[lane_words(R)];
};

// What a lane has of 256 columns of a row; zeros beyond the row.
template <Rows R>
__device__ __forceinline__ Raw<R> load_raw(const uint8_t* row, int64_t row_bytes, int chunk, int lane, bool there) {
  constexpr int kPieces = R == Rows::f32 ? 2 : 1, kWords = lane_words(R) / kPieces;
  Raw<R> raw;
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    const int64_t at = (int64_t(chunk) * kPieces + piece) * 32 * kWords * 4 + lane * kWords * 4;
    uint32_t* const to = raw.w + piece * kWords;
    const bool inside = there && at < row_bytes;
    if constexpr (kWords == 4) {
      const uint4 v = inside ? __ldg(reinterpret_cast<const uint4*>(row + at)) : uint4{0, 0, 0, 0};
      to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    } else if constexpr (kWords == 2) {
      const uint2 v = inside ? __ldg(reinterpret_cast<const uint2*>(row + at)) : uint2{0, 0};
      to[0] = v.x, to[1] = v.y;
    } else {
      to[0] = inside ? __ldg(reinterpret_cast<const uint32_t*>(row + at)) : 0;
    }
  }
  return raw;
}

// The scales of a lane's columns: int8 one; int4 four, of two columns each.
template <Rows R>
struct Scales {
  float s[R == Rows::i4 ? 4 : 1];
};
template <Rows R>
__device__ __forceinline__ Scales<R> load_scales(const float* row, int64_t groups, int shift, int chunk, int lane, bool there) {
  Scales<R> scales;
  if constexpr (!neuron::quantised(R)) {
    scales.s[0] = 1.0f;
  } else {
    constexpr int kCount = R == Rows::i4 ? 4 : 1;
#pragma unroll
    for (int q = 0; q < kCount; ++q) {
      const int group = (chunk * kChunk + (R == Rows::i4 ? lane / 16 * 128 + 32 * q : 8 * lane)) >> shift;
      scales.s[q] = there && group < groups ? __ldg(row + group) : 0.0f;
    }
  }
  return scales;
}

// Weights in fp32. A byte or nibble in the low bits of 2^23 is that float plus its number.
template <Rows R>
__device__ __forceinline__ void widen(const Raw<R>& raw, const Scales<R>& scales, float (&w)[8]) {
  (void)scales;
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    if constexpr (R == Rows::f32) {
      w[e] = __uint_as_float(raw.w[e]);
    } else if constexpr (R == Rows::bf16) {
      w[e] = __uint_as_float(e % 2 ? raw.w[e / 2] & 0xffff0000u : raw.w[e / 2] << 16);
    } else if constexpr (R == Rows::f16) {
      const __half2 pair = reinterpret_cast<const __half2&>(raw.w[e / 2]);
      w[e] = e % 2 ? __high2float(pair) : __low2float(pair);
    } else if constexpr (R == Rows::i8) {
      const uint32_t biased = raw.w[e / 4] ^ 0x80808080u;
      w[e] = (__uint_as_float(__byte_perm(biased, 0x4b000000u, 0x7540u + e % 4)) - 8388736.0f) * scales.s[0];
    } else {
      w[e] = (__uint_as_float((raw.w[0] >> 4 * e & 15u) | 0x4b000000u) - 8388616.0f) * scales.s[e / 2];
    }
  }
}

// Sums of N values over the lanes: lane l gets value l / (32 / N). Every value is added up in the same tree, whatever N.
template <int N>
__device__ __forceinline__ float lane_totals(float (&v)[N], int lane) {
#pragma unroll
  for (int distance = 16, n = N / 2; distance; distance /= 2, n /= 2) {
    if (n == 0) {
      v[0] += __shfl_xor_sync(0xffffffffu, v[0], distance);
    } else {
      const bool upper = lane & distance;
#pragma unroll
      for (int i = 0; i < N / 2; ++i) {
        if (i >= n) continue;
        const float mine = upper ? v[i + n] : v[i], other = upper ? v[i] : v[i + n];
        v[i] = mine + __shfl_xor_sync(0xffffffffu, other, distance);
      }
    }
  }
  return v[0];
}

__device__ __forceinline__ bool in_mask(const Step& p, int token, int64_t i) {
  const uint8_t* const row = p.mask + (p.mask_rows == 1 ? 0 : p.first + token) * p.mask_bytes;
  const int64_t bit = i / p.mask_group;
  return row[bit / 8] >> (bit % 8) & 1;
}
__device__ __forceinline__ int tokens_of(const Step& p, int set) { return min(kMaxTokens, p.tokens - set * kMaxTokens); }

}  // namespace
}  // namespace effk::cuda::relu_ffn
