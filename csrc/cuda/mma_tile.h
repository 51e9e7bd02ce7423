// Pieces of a tensor-core GEMM for 16-bit operands: tiles in shared memory, filled by cp.async or, where an operand has
// a stride or no alignment, element by element; fragments by ldmatrix; mma.sync m16n8k16 with fp32 sums. A kernel owns
// its loop over stages (ops/dense_linear/cuda_mma.h); what lies here knows one tile.
//
// A tile has rows (m or n) and k. It lies in shared memory as it lies in memory: lines along k (64 bytes for kTileK =
// 32), or lines along the rows (128 bytes and more, one for each k), read transposed. Chunks of 16 bytes exchange
// places in a line so that the eight lines that an ldmatrix phase reads at one chunk fill all 32 banks, and so do the
// chunks that eight threads write:
//   along k        place = chunk ^ (line / 2) % 4      two lines fill the banks once, four pairs take the four places
//   along rows     place = chunk ^ line % 8
// Residues: elements n apart are gathered on the way in (eight loads of two bytes a chunk) and not out of shared
// memory. To pick them there, a stage would have to hold n tiles; a warp that owns 64 x 32 of the result would need 32
// two-byte reads for 16 mma instead of 4 ldmatrix, with n / 2 conflicts each (stride n halves: n = 4 two, n = 8 four
// ways), which costs more time than the mma. Where a call is large, ops/dyad_linear/cuda.cu puts the residues in order
// first, and every load here is a cp.async.
#pragma once
#include "cuda/cu.h"
#include "cuda/ptx.h"

namespace effk::cuda {

// BM x BN of the result a block, WM x WN a warp, Stages of kTileK deep; Blocks: of a multiprocessor.
template <int BM, int BN, int WM, int WN, int Stages, int Blocks>
struct MmaShape {
  static constexpr int bm = BM, bn = BN, wm = WM, wn = WN, stages = Stages, blocks = Blocks;
  static constexpr int warps_m = BM / WM, warps_n = BN / WN, threads = warps_m * warps_n * 32;
  static constexpr int tiles_m = WM / 16, tiles_n = WN / 8;  // mma of a warp
};

constexpr int kTileK = 32;

// Element (row, k) at base[row * ld + k * step] (along k) or base[k * ld + row * step]; what is outside rows and depth
// is zero.
template <class T>
struct TileSource {
  const T* base;
  int64_t ld;
  int step, rows, depth;
  bool wide;  // 16 bytes of a line at once: step 1, lines aligned
};

namespace {

template <class T>
__device__ __forceinline__ bool is_wide(const T* base, int64_t ld, int step) {
  return step == 1 && ld % 8 == 0 && reinterpret_cast<uintptr_t>(base) % 16 == 0;
}

template <int kChunks>
__device__ __forceinline__ int tile_place(int line, int chunk) {
  static_assert(kChunks == 4 || kChunks % 8 == 0, "a line is 64 bytes or a multiple of 128");
  return (line * kChunks + (chunk ^ (kChunks == 4 ? line >> 1 & 3 : line & 7))) * 16;
}

// All threads fill a tile of kRows x kTileK. The caller commits; elements that were stored directly are visible after
// the same barrier.
template <int kRows, bool kAlongK, int kThreads, class T>
__device__ __forceinline__ void load_tile(unsigned char* to, const TileSource<T>& s, int row0, int k0) {
  constexpr int kLine = (kAlongK ? kTileK : kRows) / 8, kChunks = kRows * kTileK / 8;
  const int fast_end = kAlongK ? s.depth : s.rows, slow_end = kAlongK ? s.rows : s.depth;
#pragma unroll
  for (int j = 0; j < (kChunks + kThreads - 1) / kThreads; ++j) {
    const int i = int(threadIdx.x) + j * kThreads, line = i / kLine, chunk = i % kLine;
    if (kChunks % kThreads != 0 && i >= kChunks) break;
    const int slow = (kAlongK ? row0 : k0) + line, fast = (kAlongK ? k0 : row0) + 8 * chunk;
    const int count = slow < slow_end ? max(0, min(8, fast_end - fast)) : 0;
    const T* const from = s.base + (int64_t(slow) * s.ld + int64_t(fast) * s.step);
    unsigned char* const at = to + tile_place<kLine>(line, chunk);
    if (s.wide) {
      ptx::cp_async16(at, count ? from : s.base, 2 * count);
    } else {
      alignas(16) uint16_t v[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) v[e] = e < count ? reinterpret_cast<const uint16_t*>(from)[e * int64_t(s.step)] : uint16_t(0);
      *reinterpret_cast<uint4*>(at) = *reinterpret_cast<const uint4*>(v);
    }
  }
}

// The left operand of mma for 16 rows from `row` on, k from 16 * step on.
template <int kRows, bool kAlongK>
__device__ __forceinline__ void left_fragment(uint32_t (&a)[4], const unsigned char* tile, int row, int step, int lane) {
  const int r = lane % 8, upper = lane >> 3 & 1, right = lane >> 4;  // matrix of the lane: rows + 8 upper, k + 8 right
  if constexpr (kAlongK) ptx::ldmatrix_x4(a, tile + tile_place<kTileK / 8>(row + 8 * upper + r, 2 * step + right));
  else ptx::ldmatrix_x4_trans(a, tile + tile_place<kRows / 8>(16 * step + 8 * right + r, row / 8 + upper));
}
// The right operands of two mma: columns from `row` on and from row + 8 on, in b[0], b[1] and b[2], b[3].
template <int kRows, bool kAlongK>
__device__ __forceinline__ void right_fragments(uint32_t (&b)[4], const unsigned char* tile, int row, int step, int lane) {
  const int r = lane % 8, right = lane >> 3 & 1, upper = lane >> 4;
  if constexpr (kAlongK) ptx::ldmatrix_x4(b, tile + tile_place<kTileK / 8>(row + 8 * upper + r, 2 * step + right));
  else ptx::ldmatrix_x4_trans(b, tile + tile_place<kRows / 8>(16 * step + 8 * right + r, row / 8 + upper));
}

__device__ __forceinline__ void mma_16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) { ptx::mma_f16(c, a, b0, b1); }
__device__ __forceinline__ void mma_16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) { ptx::mma_bf16(c, a, b0, b1); }

// sums += the warp's part of one stage: a tile of bm rows and one of bn.
template <class T, class S, bool kAAlongK, bool kBAlongK>
__device__ __forceinline__ void multiply_tiles(float (&sums)[S::tiles_m][S::tiles_n][4], const unsigned char* a_tile, const unsigned char* b_tile,
                                               int warp_m, int warp_n, int lane) {
#pragma unroll
  for (int step = 0; step < kTileK / 16; ++step) {
    uint32_t a[S::tiles_m][4], b[S::tiles_n / 2][4];
#pragma unroll
    for (int i = 0; i < S::tiles_m; ++i) left_fragment<S::bm, kAAlongK>(a[i], a_tile, warp_m * S::wm + 16 * i, step, lane);
#pragma unroll
    for (int j = 0; j < S::tiles_n / 2; ++j) right_fragments<S::bn, kBAlongK>(b[j], b_tile, warp_n * S::wn + 16 * j, step, lane);
#pragma unroll
    for (int i = 0; i < S::tiles_m; ++i)
#pragma unroll
      for (int j = 0; j < S::tiles_n; ++j) mma_16(sums[i][j], a[i], b[j / 2][2 * (j % 2)], b[j / 2][2 * (j % 2) + 1], T{});
  }
}

}  // namespace
}  // namespace effk::cuda
