// The product of csrc/cuda/gemm.h for 16-bit operands on tensor cores: one block a tile of the result, a ring of stages
// filled by cp.async, one barrier a stage of 32 k. K is the concatenation of the segments, each filled up with zeros to
// a multiple of 32, so that a result is the same sum in the same order whatever the shape of the tiles and the other
// rows.
//
//   grid     classes · tiles · blocks · outs, in the order of Problem (cuda/gemm_problem.h): every block of DYAD in one
//            launch
//   ring     stages of a tile (bm x 32) and b tile (bn x 32)
//   end      the fp32 sums through shared memory: bias, activation, one rounding, whole lines of memory
//
// Bound: tensor cores; per block and stage bm · bn · 64 flops for (bm + bn) · 64 bytes from L2. Predicted for an H100
// (mma.sync about 600 Tflop/s, L2 about 28 bytes a clock and multiprocessor): the 128 x 256 tile needs 33 bytes a clock
// at that rate, 64 x 64 needs 88, so the first should come near 85 % of what mma.sync reaches and the second to a
// third: it is for small problems. Not run on a GPU.
#pragma once
#include "cuda/cu.h"
#include "cuda/gemm_problem.h"
#include "cuda/mma_tile.h"

namespace effk::cuda {

// Registers: 128 of sums and 48 of fragments in the large one, hence one block of eight warps; shared memory 96 KiB (99
// on 8.6, 8.9, 12.0).
using LargeTile = MmaShape<128, 256, 64, 64, 4, 1>;
using MiddleTile = MmaShape<64, 64, 32, 32, 4, 4>;
using FewRowsTile = MmaShape<16, 64, 16, 16, 8, 4>;  // up to 16 rows: bytes of the weights bound it, so many stages

template <class S>
constexpr int stage_bytes() { return (S::bm + S::bn) * kTileK * 2; }
// Results wait for their bias and activation as fp32, 64 rows at a time; eight floats more a row, so that the pairs
// that a quarter of a warp writes lie in different banks.
template <class S>
constexpr int kResultRows = S::bm < 64 ? S::bm : 64;
template <class S>
constexpr int kResultPitch = S::bn + 8;
template <class S>
constexpr int smem_bytes() {
  constexpr int ring = S::stages * stage_bytes<S>(), results = kResultRows<S> * kResultPitch<S> * 4;
  return ring > results ? ring : results;
}

namespace {

template <class T, class S, bool kAAlongK, bool kBAlongK>
__global__ void __launch_bounds__(S::threads, S::blocks) mma_gemm_kernel(const Gemm p) {
  EFFK_DYN_SMEM(smem);
  const Problem problem(p, S::bm, S::bn);
  if (problem.empty) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_m = warp / S::warps_n, warp_n = warp % S::warps_n;

  const bool second = p.outs > 0 && problem.out == 1;  // a product of its own starts at segment `out`
  const T* const a_base[2] = {static_cast<const T*>(p.a[0].p) + problem.at(p.a[0].at), static_cast<const T*>(p.a[1].p) + problem.at(p.a[1].at)};
  const T* const b_base[2] = {static_cast<const T*>(p.b[0].p) + problem.at(p.b[0].at), static_cast<const T*>(p.b[1].p) + problem.at(p.b[1].at)};
  const int per_segment = (p.k + kTileK - 1) / kTileK, stages = (p.outs > 0 ? 1 : p.segments) * per_segment;
  const auto load = [&](int stage) {
    unsigned char* const to = smem + stage % S::stages * stage_bytes<S>();
    const bool next = stage >= per_segment, other = next || second;
    const int k0 = (next ? stage - per_segment : stage) * kTileK;
    // Field by field: a choice between two structures would put both on the stack.
    const auto source = [&](const T* base, const Operand& first, const Operand& last, int rows) {
      const int64_t ld = other ? last.ld : first.ld;
      const int step = other ? last.step : first.step;
      return TileSource<T>{base, ld, step, rows, p.k, is_wide(base, ld, step)};
    };
    load_tile<S::bm, kAAlongK, S::threads>(to, source(other ? a_base[1] : a_base[0], p.a[0], p.a[1], problem.m), problem.m0, k0);
    load_tile<S::bn, kBAlongK, S::threads>(to + S::bm * kTileK * 2, source(other ? b_base[1] : b_base[0], p.b[0], p.b[1], problem.n), problem.n0, k0);
  };

#pragma unroll
  for (int i = 0; i < S::stages - 1; ++i) {
    if (i < stages) load(i);
    ptx::cp_async_commit();
  }
  const bool known = header_ok(p);
  float sums[S::tiles_m][S::tiles_n][4] = {};
  for (int stage = 0; stage < stages; ++stage) {
    ptx::cp_async_wait<S::stages - 2>();
    __syncthreads();  // every thread's part of the stage has landed, and the stage that the next load replaces has been read
    if (stage + S::stages - 1 < stages) load(stage + S::stages - 1);
    ptx::cp_async_commit();
    const unsigned char* const tile = smem + stage % S::stages * stage_bytes<S>();
    multiply_tiles<T, S, kAAlongK, kBAlongK>(sums, tile, tile + S::bm * kTileK * 2, warp_m, warp_n, lane);
  }
  ptx::cp_async_wait<0>();

  float* const results = reinterpret_cast<float*>(smem);
  const int g = lane / 4, t = lane % 4;
#pragma unroll 1
  for (int row0 = 0; row0 < S::bm; row0 += kResultRows<S>) {
    __syncthreads();  // results take the place of the ring, then of the rows before
    if (warp_m * S::wm / kResultRows<S> * kResultRows<S> == row0) {
#pragma unroll
      for (int i = 0; i < S::tiles_m; ++i)
#pragma unroll
        for (int j = 0; j < S::tiles_n; ++j)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row = warp_m * S::wm - row0 + 16 * i + 8 * half + g, column = warp_n * S::wn + 8 * j + 2 * t;
            *reinterpret_cast<float2*>(results + row * kResultPitch<S> + column) = {sums[i][j][2 * half], sums[i][j][2 * half + 1]};
          }
    }
    __syncthreads();
    finish_tile<kResultRows<S>, S::bn, kResultPitch<S>, S::threads>(p, problem, results, row0, known);
    __syncthreads();
    store_tile<kResultRows<S>, S::bn, kResultPitch<S>, S::threads>(p, problem, results, row0);
  }
}

template <class T, class S, bool kAAlongK, bool kBAlongK>
cudaError_t launch_tile(const Gemm& p, cudaStream_t stream) {
  const int64_t blocks = grid_blocks(p, S::bm, S::bn);
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  Launch at;
  at.grid = dim3(unsigned(blocks));
  at.block = dim3(S::threads);
  at.smem = smem_bytes<S>();
  at.stream = stream;
  return launch(mma_gemm_kernel<T, S, kAAlongK, kBAlongK>, at, p);
}

// The tile with the least predicted time: waves of blocks times flops of a tile over the share of the peak that the
// bytes allow.
inline int choose_tile(const Gemm& p, int sms) {
  if (p.shape) return p.shape;
  if (p.a_along_k && p.b_along_k && p.m <= FewRowsTile::bm) return 3;
  const auto cost = [&](int bm, int bn, int resident, double share) {
    const int64_t slots = int64_t(sms) * resident;
    return double((grid_blocks(p, bm, bn) + slots - 1) / slots) * bm * bn * resident / share;
  };
  return cost(LargeTile::bm, LargeTile::bn, LargeTile::blocks, 0.85) <= cost(MiddleTile::bm, MiddleTile::bn, MiddleTile::blocks, 0.35) ? 1 : 2;
}

template <class T, bool kAAlongK, bool kBAlongK>
cudaError_t launch_tiles(const Gemm& p, int sms, cudaStream_t stream) {
  const int tile = choose_tile(p, sms);
  if constexpr (kAAlongK && kBAlongK)
    if (tile == 3) return launch_tile<T, FewRowsTile, true, true>(p, stream);
  if (tile == 1) return launch_tile<T, LargeTile, kAAlongK, kBAlongK>(p, stream);
  return launch_tile<T, MiddleTile, kAAlongK, kBAlongK>(p, stream);
}

}  // namespace

// a along rows and b along k does not occur: the caller may exchange the sides.
template <class T>
cudaError_t launch_mma_gemm(const Gemm& p, int sms, cudaStream_t stream) {
  if (p.a_along_k) return p.b_along_k ? launch_tiles<T, true, true>(p, sms, stream) : launch_tiles<T, true, false>(p, sms, stream);
  return launch_tiles<T, false, false>(p, sms, stream);
}

}  // namespace effk::cuda
