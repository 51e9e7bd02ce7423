// The kernel of wq_linear for M <= 64 on CUDA: tensor cores with the weights as the 16-row operand and the tokens as the
// 8-wide one, so that one kernel is the GEMV and the small-batch GEMM: at M = 1 seven of eight columns are empty, and the
// tensor cores are still idle most of the time.
//
//   grid    x: panels of kTiles tiles (16 kTiles rows)      y: ranks, blocks of one cluster that split K
//   block   warps that split the rank's K again: part = rank * warps + warp owns the stages [part S / parts, ...)
//   warp    a private ring of kStages stages in shared memory, filled by cp.async: no block barrier in the main loop
//   stage   64 k: codes of kTiles tiles | scales and zero points | x, m rows
//
// Bound: bytes of the packed weight at small M. Codes are widened in registers (cuda_decode.h), about 9 instructions per 8
// codes for fp16 and 11 for bf16 at 4 bits. Sums of a group stay in the tensor core's fp32 accumulator; the group's scale
// multiplies them as they are added to the fp32 totals, so that weights are never rounded.
// Every sum has a fixed order, and none depends on the other rows of x.
#pragma once
#include <algorithm>

#include "cuda/cu.h"
#include "cuda/ptx.h"
#include "ops/wq_linear/cuda_decode.h"
#include "ops/wq_linear/cuda_plan.h"

namespace effk::cuda {

enum class Kind { symmetric, zeros, codebook };

// What is fixed at compile time for a range of m.
template <int Columns, int Tiles, int Stages, int MaxWarps, int Blocks = 1>
struct Shape {
  static constexpr int columns = Columns;     // groups of 8 tokens
  static constexpr int tiles = Tiles;
  static constexpr int stages = Stages;
  static constexpr int max_warps = MaxWarps;
  static constexpr int blocks = Blocks;       // of a multiprocessor; left to itself, ptxas spills to hold one more
};
using Shape8 = Shape<1, 2, 4, 16, 2>;
using Shape16 = Shape<2, 4, 4, 8, 2>;
using Shape32 = Shape<4, 4, 3, 8>;
using Shape64 = Shape<8, 2, 2, 8>;
// Lookups take more registers: fewer warps, fewer tiles, and nothing of its own for 17 to 32 tokens.
using Shape8Codebook = Shape<1, 2, 4, 8, 2>;
using Shape16Codebook = Shape<2, 2, 4, 8, 2>;

constexpr int kStageSteps = 2, kStageK = kStageSteps * kStepK;
constexpr int kMetaScales = 16 * 4, kMetaZeros = 16;                      // bytes a tile and group, at most
constexpr int kMetaBytes = kStageSteps * (kMetaScales + kMetaZeros);      // of one tile in a stage: two groups if G = 32
constexpr int kXBytes = kStageK * 2;                                      // of one token in a stage

template <int kBits, class S>
constexpr int kCodeBytes = S::tiles * kStageSteps * kStepBytes<kBits>;
template <int kBits, class S>
constexpr int stage_bytes(int m) { return kCodeBytes<kBits, S> + S::tiles * kMetaBytes + m * kXBytes; }
// Bytes at the start of shared memory: the lookup tables, then the outlier sums.
template <int kBits, class S>
constexpr int table_bytes(bool codebook, bool per_row) {
  return !codebook ? 0 : (per_row ? S::tiles * t16::kTileRows : 1) * (4 << kBits);
}
template <class S>
constexpr int sparse_bytes(int m, bool outliers) { return outliers ? S::tiles * t16::kTileRows * m * 4 : 0; }
// The rings, or the sums of all warps, which take their place after the main loop.
template <int kBits, class S>
constexpr int ring_bytes(int m, int warps) {
  const int rings = S::stages * stage_bytes<kBits, S>(m), sums = S::tiles * t16::kTileRows * m * 4;
  return warps * (rings > sums ? rings : sums);
}

namespace {

// Where byte `offset` of a tile's stage lies in shared memory. The lanes of a half-warp read 8 bytes each at strides of 64
// (4 bits) or 128 (8 bits): exchanging address bits spreads them over the banks.
template <int kBits>
__device__ __forceinline__ int stage_offset(int offset) {
  if constexpr (kBits == 4) return offset ^ (offset >> 7 & 1) << 5;
  if constexpr (kBits == 8) return offset ^ (offset >> 7 & 1) << 5 ^ (offset >> 8 & 1) << 6;
  return offset;
}

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) { ptx::mma_f16(c, a, b0, b1); }
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) { ptx::mma_bf16(c, a, b0, b1); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ void from_float(__half& to, float v) { to = __float2half_rn(v); }
__device__ __forceinline__ void from_float(__nv_bfloat16& to, float v) { to = __float2bfloat16_rn(v); }

__device__ __forceinline__ float load_float(const void* p, DType type, int64_t i) {
  if (type == DType::f16) return to_float(static_cast<const __half*>(p)[i]);
  if (type == DType::bf16) return to_float(static_cast<const __nv_bfloat16*>(p)[i]);
  return static_cast<const float*>(p)[i];
}

// Fills one stage of a warp's ring; what lies beyond N, K or the last group becomes zero.
template <class T, int kBits, class S>
struct Loader {
  static constexpr int kPieces = kCodeBytes<kBits, S> / S::tiles / 16;            // of 16 bytes, a tile
  static constexpr int kCopies = (S::tiles * kPieces + 31) / 32, kMetaCopies = (S::tiles * kMetaBytes / 16 + 31) / 32;

  const MmaArgs& p;
  int lane, tile0;
  const uint8_t* codes;  // of the panel

  __device__ __forceinline__ Loader(const MmaArgs& args, int lane_, int tile)
      : p(args), lane(lane_), tile0(tile), codes(args.w.packed + tile * args.tile_bytes) {}

  // Brings the first stages that the warp will load to L2. Weights may be asked for before the kernel ahead has ended,
  // since nothing is read yet.
  __device__ __forceinline__ void prefetch(int stage, int end) const {
    constexpr int kLine = 128, kStage = kPieces * 16;
    const int64_t from = int64_t(stage) * kStage;
    const int64_t to = min(int64_t(min(stage + S::stages - 1, end)) * kStage, p.tile_bytes);
    for (int r = 0; r < S::tiles && tile0 + r < p.tiles; ++r)
      for (int64_t at = from + lane * kLine; at < to; at += 32 * kLine) ptx::prefetch_l2(codes + r * p.tile_bytes + at);
  }

  __device__ __forceinline__ void load(unsigned char* to, int stage) const {
#pragma unroll
    for (int j = 0; j < kCopies; ++j) {
      const int i = lane + 32 * j;
      if (S::tiles * kPieces % 32 != 0 && i >= S::tiles * kPieces) break;
      const int tile = i / kPieces, offset = i % kPieces * 16;
      const int64_t from = int64_t(stage) * (kPieces * 16) + offset;
      const bool inside = from < p.tile_bytes && tile0 + tile < p.tiles;
      ptx::cp_async16(to + tile * (kPieces * 16) + stage_offset<kBits>(offset),
                      inside ? codes + tile * p.tile_bytes + from : codes, inside ? 16 : 0);
    }
    load_meta(to + kCodeBytes<kBits, S>, stage);
    load_x(to + kCodeBytes<kBits, S> + S::tiles * kMetaBytes, stage * kStageK);
  }

  // Per tile: scales of the stage's first group and, if groups are shorter than a stage, of its second; then zeros.
  __device__ __forceinline__ void load_meta(unsigned char* to, int stage) const {
    const int scale_pieces = p.w.scales_f32 ? 4 : 2, slots = p.group_shift == 5 ? 2 : 1;
    const int pieces = scale_pieces + (p.w.zeros != nullptr);
    const int first = stage * kStageK >> p.group_shift;
#pragma unroll
    for (int j = 0; j < kMetaCopies; ++j) {
      const int i = lane + 32 * j, tile = i % S::tiles, part = i / S::tiles;
      const int slot = part >= pieces, piece = part - slot * pieces, group = first + slot;
      if (slot >= slots || piece >= pieces || group >= p.groups || tile0 + tile >= p.tiles) continue;
      const int64_t at = int64_t(tile0 + tile) * p.groups + group;
      if (piece < scale_pieces)
        ptx::cp_async16(to + tile * kMetaBytes + slot * kMetaScales + piece * 16,
                        static_cast<const uint8_t*>(p.w.scales) + at * scale_pieces * 16 + piece * 16, 16);
      else
        ptx::cp_async16(to + tile * kMetaBytes + kStageSteps * kMetaScales + slot * kMetaZeros, p.w.zeros + at * kMetaZeros, 16);
    }
  }

  // Token i at i * kXBytes, its two halves exchanged for odd i, so that 16-byte reads of neighbouring tokens do not collide.
  __device__ __forceinline__ void load_x(unsigned char* to, int k0) const {
    const T* const x = static_cast<const T*>(p.x);
    for (int i = lane; i < p.m * (kXBytes / 16); i += 32) {
      const int token = i / (kXBytes / 16), piece = i % (kXBytes / 16), k = k0 + 8 * piece;
      unsigned char* const at = to + token * kXBytes + x_offset(token, piece / 4) + piece % 4 * 16;
      const T* const from = x + token * p.ldx + k;
      const int count = max(0, min(8, p.k - k));
      if (p.x_aligned) {
        ptx::cp_async16(at, count ? from : x, 2 * count);
      } else {
        for (int e = 0; e < 8; ++e) reinterpret_cast<T*>(at)[e] = e < count ? from[e] : T{};
      }
    }
  }
  static __device__ __forceinline__ int x_offset(int token, int step) { return (step ^ (token & 1)) * (kXBytes / 2); }
};

// Tables of (main part, remainder) halves that sum to an entry, [row][2^kBits] or one for all rows.
template <class T, int kBits, class S>
__device__ void build_tables(uint32_t* table, const WqWeight& w, int tile0, int tiles) {
  constexpr int kEntries = 1 << kBits;
  const int rows = w.codebook_per_row ? S::tiles * t16::kTileRows : 1;
  for (int i = int(threadIdx.x); i < rows * kEntries; i += int(blockDim.x)) {
    const int row = i / kEntries, entry = i % kEntries, tile = tile0 + row / t16::kTileRows;
    const int64_t at = w.codebook_per_row ? (int64_t(tile) * kEntries + entry) * t16::kTileRows + row % t16::kTileRows : entry;
    const float value = w.codebook_per_row && tile >= tiles ? 0.0f : w.codebook[at];
    T pair[2];
    from_float(pair[0], value);
    from_float(pair[1], value - to_float(pair[0]));
    table[i] = reinterpret_cast<const uint32_t&>(pair);
  }
}

// sparse[token][row] = sum over the row's outliers of v x[token, c], in a fixed order: lane i takes the entries i, i + 32,
// ... and the lanes are added in a tree. An entry that lies or points outside makes the sum NaN: indices on the device cannot
// be checked without waiting for it, and must not be trusted either.
template <class T, class S>
__device__ void sum_outliers(float* sparse, const MmaArgs& p, int row0, int first, int last) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const T* const x = static_cast<const T*>(p.x);
  for (int row = first + int(threadIdx.x) / 32; row < last; row += warps) {
    const int n = row0 + row;
    const int length = n < p.w.n ? min(p.w.out_ptr[n + 1] - p.w.out_ptr[n], p.outliers) : 0;
    for (int token = 0; token < p.m; ++token) {
      float sum = 0.0f;
      for (int rank = lane; rank < length; rank += 32) {
        const int64_t j = t16::entry_place(p.w.out_ptr, p.w.n, n, rank);
        if (j < 0 || j >= p.outliers) {
          sum = __uint_as_float(0x7fc00000u);
          break;
        }
        const int64_t c = p.w.col32 ? static_cast<const int32_t*>(p.w.out_col)[j] : static_cast<const uint16_t*>(p.w.out_col)[j];
        const float v = to_float(reinterpret_cast<const __half*>(p.w.out_val)[j]);
        sum += c >= 0 && c < p.k ? v * to_float(x[token * p.ldx + c]) : __uint_as_float(0x7fc00000u);
      }
      for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      if (lane == 0) sparse[token * S::tiles * t16::kTileRows + row] = sum;
    }
  }
}

template <class T, int kBits, Kind kKind, class S>
__global__ void __launch_bounds__(S::max_warps * 32, S::blocks) mma_kernel(const MmaArgs p) {
  constexpr int kRows = S::tiles * t16::kTileRows;
  EFFK_DYN_SMEM(smem);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, g = lane / 4, t = lane % 4;
  const int rank = blockIdx.y, ranks = gridDim.y, tile0 = blockIdx.x * S::tiles;
  const int stages = (p.k + kStageK - 1) / kStageK, parts = ranks * warps, part = rank * warps + warp;
  const int begin = int(int64_t(part) * stages / parts), end = int(int64_t(part + 1) * stages / parts);

  uint32_t* const table = reinterpret_cast<uint32_t*>(smem);
  float* const sparse = reinterpret_cast<float*>(smem + table_bytes<kBits, S>(kKind == Kind::codebook, p.w.codebook_per_row));
  unsigned char* const rings = reinterpret_cast<unsigned char*>(sparse) + sparse_bytes<S>(p.m, p.w.out_ptr != nullptr);
  const int stage_size = stage_bytes<kBits, S>(p.m);
  unsigned char* const ring = rings + warp * S::stages * stage_size;

  const Loader<T, kBits, S> loader(p, lane, tile0);
  loader.prefetch(begin, end);
  ptx::grid_wait();
  ptx::grid_release();

#pragma unroll
  for (int i = 0; i < S::stages - 1; ++i) {
    if (begin + i < end) loader.load(ring + i * stage_size, begin + i);
    ptx::cp_async_commit();
  }
  if constexpr (kKind == Kind::codebook) {
    build_tables<T, kBits, S>(table, p.w, tile0, p.tiles);
    __syncthreads();
  }
  // While the first stages are on their way. A rank finishes the rows [first, last) of the panel.
  const int first = kRows * rank / ranks, last = kRows * (rank + 1) / ranks;
  if (p.w.out_ptr) sum_outliers<T, S>(sparse, p, tile0 * t16::kTileRows, first, last);

  float group[S::tiles][S::columns][4] = {}, total[S::tiles][S::columns][4] = {};
  const int group_mask = (1 << p.group_shift) - 1, stop = min(end * kStageK, p.k);
  int slot = 0;
  for (int stage = begin; stage < end; ++stage) {
    ptx::cp_async_wait<S::stages - 2>();
    __syncwarp();  // all lanes' copies have landed, and all lanes have read the stage that the next load replaces
    const int ahead = stage + S::stages - 1, free_slot = slot == 0 ? S::stages - 1 : slot - 1;
    if (ahead < end) loader.load(ring + free_slot * stage_size, ahead);
    ptx::cp_async_commit();

    const unsigned char* const codes = ring + slot * stage_size;
    const unsigned char* const meta = codes + kCodeBytes<kBits, S>;
    const unsigned char* const x = meta + S::tiles * kMetaBytes;
#pragma unroll
    for (int step = 0; step < kStageSteps; ++step) {
      const int k_end = stage * kStageK + (step + 1) * kStepK;
      if (k_end - kStepK >= p.k) break;
      const int meta_slot = p.group_shift == 5 ? step : 0;

      uint32_t b[S::columns][4];
#pragma unroll
      for (int c = 0; c < S::columns; ++c) {
        const int token = 8 * c + g;
        uint4 v = {0, 0, 0, 0};
        if (token < p.m) v = *reinterpret_cast<const uint4*>(x + token * kXBytes + loader.x_offset(token, step) + t * 16);
        b[c][0] = __byte_perm(v.x, v.y, 0x5410u);
        b[c][1] = __byte_perm(v.x, v.y, 0x7632u);
        b[c][2] = __byte_perm(v.z, v.w, 0x5410u);
        b[c][3] = __byte_perm(v.z, v.w, 0x7632u);
      }
#pragma unroll
      for (int r = 0; r < S::tiles; ++r) {
        const unsigned char* const tile = codes + r * kStageSteps * kStepBytes<kBits>;
        Codes row[2];
        read_codes<kBits>(row, t, g, [&](int unit) {
          return tile + step * kStepBytes<kBits> + stage_offset<kBits>(unit * t16::kUnitBytes + 8 * g) - 8 * g;
        });
        // One of the two mma of a step: registers of the rows 2g and 2g + 1, k pairs 2 half and 2 half + 1.
        const auto multiply = [&](int half, const uint32_t* upper, const uint32_t* lower) {
          const uint32_t a[4] = {upper[0], lower[0], upper[1], lower[1]};
#pragma unroll
          for (int c = 0; c < S::columns; ++c) mma(group[r][c], a, b[c][2 * half], b[c][2 * half + 1], T{});
        };
        if constexpr (kKind == Kind::codebook) {
          const int stride = p.w.codebook_per_row ? 1 << kBits : 0, at = (r * t16::kTileRows + 2 * g) * stride;
#pragma unroll
          for (int half = 0; half < 2; ++half) {  // one after the other: sixteen registers at once would not fit
            uint32_t upper[2], lower[2], upper_rest[2], lower_rest[2];
            look_up_half<kBits>(upper, upper_rest, row[0], half, table + at);
            look_up_half<kBits>(lower, lower_rest, row[1], half, table + at + stride);
            multiply(half, upper, lower);
            multiply(half, upper_rest, lower_rest);
          }
        } else {
          uint32_t zero[2] = {1u << (kBits - 1), 1u << (kBits - 1)}, upper[4], lower[4];
          if constexpr (kKind == Kind::zeros) {
            const unsigned char* const z = meta + r * kMetaBytes + kStageSteps * kMetaScales + meta_slot * kMetaZeros + 2 * g;
            zero[0] = z[0];
            zero[1] = z[1];
          }
          dequantize_row<T, kBits>(upper, row[0], zero[0]);
          dequantize_row<T, kBits>(lower, row[1], zero[1]);
          multiply(0, upper, lower);
          multiply(1, upper + 2, lower + 2);
        }
      }
      if ((k_end & group_mask) == 0 || k_end >= stop) {
#pragma unroll
        for (int r = 0; r < S::tiles; ++r) {
          const unsigned char* const scales = meta + r * kMetaBytes + meta_slot * kMetaScales;
          const float2 s = p.w.scales_f32 ? reinterpret_cast<const float2*>(scales)[g]
                                          : __half22float2(reinterpret_cast<const __half2*>(scales)[g]);
#pragma unroll
          for (int c = 0; c < S::columns; ++c)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              total[r][c][e] = fmaf(e < 2 ? s.x : s.y, group[r][c][e], total[r][c][e]);
              group[r][c][e] = 0.0f;
            }
        }
      }
    }
    slot = slot == S::stages - 1 ? 0 : slot + 1;
  }
  ptx::cp_async_wait<0>();
  __syncthreads();

  // sums[warp][token][row], then over the warps and the ranks in order.
  float* const sums = reinterpret_cast<float*>(rings);
  const int panel = kRows * p.m;
#pragma unroll
  for (int r = 0; r < S::tiles; ++r)
#pragma unroll
    for (int c = 0; c < S::columns; ++c)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int token = 8 * c + 2 * t + e;
        if (token < p.m)
          *reinterpret_cast<float2*>(sums + warp * panel + token * kRows + r * t16::kTileRows + 2 * g) =
              {total[r][c][e], total[r][c][2 + e]};
      }
  __syncthreads();
  for (int i = int(threadIdx.x); i < panel; i += int(blockDim.x)) {
    float sum = 0.0f;
    for (int w = 0; w < warps; ++w) sum += sums[w * panel + i];
    sums[i] = sum;
  }
  if (ranks > 1) ptx::cluster_sync();  // one rank: a thread reads back only what it wrote

  T* const y = static_cast<T*>(p.y);
  const int own = last - first;
  for (int i = int(threadIdx.x); i < own * p.m; i += int(blockDim.x)) {
    const int token = i / own, row = first + i % own, n = tile0 * t16::kTileRows + row;
    if (n >= p.w.n) continue;
    float sum = sums[token * kRows + row];
    if (ranks > 1) {
      sum = 0.0f;
      for (int q = 0; q < ranks; ++q) sum += ptx::cluster_peer(sums, q)[token * kRows + row];
    }
    if (p.w.out_ptr) sum += sparse[token * kRows + row];
    if (p.y_in) sum += p.y_in[int64_t(token) * p.w.n + n];
    if (p.w.bias) sum += load_float(p.w.bias, p.w.bias_dtype, n);
    from_float(y[int64_t(token) * p.w.n + n], sum);
  }
  if (ranks > 1) ptx::cluster_sync();  // peers may still read this block's sums
}

}  // namespace

// Blocks and warps for a call: K is split over warps first, then over the ranks of a cluster until the device is full,
// but never below kMinStages a warp, where filling a ring would cost more than it hides.
template <int kBits, class S>
MmaPlan make_plan(const MmaArgs& p, const Device& device) {
  constexpr int kMinStages = 2, kBlocksPerSm = 2;
  const int stages = int(t16::ceil_div(p.k, kStageK)), panels = int(t16::ceil_div(p.tiles, S::tiles));
  const auto smem = [&](int warps) {
    return size_t(table_bytes<kBits, S>(p.w.codebook != nullptr, p.w.codebook_per_row)) +
           sparse_bytes<S>(p.m, p.w.out_ptr != nullptr) + ring_bytes<kBits, S>(p.m, warps);
  };
  MmaPlan plan{panels, std::max(1, std::min(S::max_warps, stages / kMinStages)), 1, 0};
  while (plan.warps > 1 && smem(plan.warps) > size_t(device.smem)) --plan.warps;
  while (plan.ranks * 2 <= device.cluster && panels * plan.ranks * 2 <= kBlocksPerSm * device.sms &&
         stages / (plan.ranks * 2 * plan.warps) >= kMinStages)
    plan.ranks *= 2;
  plan.smem = smem(plan.warps);
  return plan;
}

template <class T, int kBits, Kind kKind, class S>
cudaError_t launch_shape(const MmaArgs& p, const Device& device, cudaStream_t stream) {
  const MmaPlan plan = make_plan<kBits, S>(p, device);
  Launch at;
  at.grid = dim3(plan.panels, plan.ranks);
  at.block = dim3(plan.warps * 32);
  at.smem = plan.smem;
  at.stream = stream;
  at.cluster = plan.ranks;
  at.overlap = device.overlap;
  return launch(mma_kernel<T, kBits, kKind, S>, at, p);
}

template <class T, int kBits, Kind kKind>
cudaError_t launch_kind(const MmaArgs& p, const Device& device, cudaStream_t stream) {
  if constexpr (kKind == Kind::codebook) {
    if (p.m <= 8) return launch_shape<T, kBits, kKind, Shape8Codebook>(p, device, stream);
    if (p.m <= 16) return launch_shape<T, kBits, kKind, Shape16Codebook>(p, device, stream);
  } else {
    if (p.m <= 8) return launch_shape<T, kBits, kKind, Shape8>(p, device, stream);
    if (p.m <= 16) return launch_shape<T, kBits, kKind, Shape16>(p, device, stream);
    if (p.m <= 32) return launch_shape<T, kBits, kKind, Shape32>(p, device, stream);
  }
  return launch_shape<T, kBits, kKind, Shape64>(p, device, stream);
}

template <class T, int kBits>
cudaError_t launch_type(const MmaArgs& p, const Device& device, cudaStream_t stream) {
  if constexpr (kBits < 8)
    if (p.w.codebook) return launch_kind<T, kBits, Kind::codebook>(p, device, stream);
  if (p.w.zeros) return launch_kind<T, kBits, Kind::zeros>(p, device, stream);
  return launch_kind<T, kBits, Kind::symmetric>(p, device, stream);
}

template <int kBits>
cudaError_t launch_mma(const MmaArgs& p, DType dtype, const Device& device, cudaStream_t stream) {
  return dtype == DType::f16 ? launch_type<__half, kBits>(p, device, stream)
                             : launch_type<__nv_bfloat16, kBits>(p, device, stream);
}

}  // namespace effk::cuda
