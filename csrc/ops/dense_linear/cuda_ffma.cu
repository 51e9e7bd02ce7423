// The product of csrc/cuda/gemm.h for fp32 and mixed operands: fp32 multiply-adds of the ordinary cores, k ascending,
// so that fp32 results hold the CPU's tolerance. Three tensor-core products of TF32 parts would be up to 1.5 times
// faster on an H100 (67 against about 300 / 3 Tflop/s), but tensor cores cut their sums instead of rounding them: the
// error would grow with K, unless every 8 k were added up outside them, which costs most of the gain.
//
// A block of 256 threads has a bm x bn tile, a thread tm x tn of it in quarters (rows 4 ty .. and bm / 2 + 4 ty ..), so
// that the 16-byte reads of a k row are conflict-free; tiles of 16 k, k-major, two of them in turn, the next one in
// registers while the present one is multiplied. Writes of an operand along k meet two ways: rows of the tile are bm +
// 4 floats.
#include <algorithm>

#include "cuda/cu.h"
#include "cuda/gemm_problem.h"

namespace effk::cuda {
namespace {

constexpr int kThreads = 256;

template <int BM, int BN, int Depth, int TM, int TN, int Blocks>
struct FmaShape {
  static constexpr int bm = BM, bn = BN, depth = Depth, tm = TM, tn = TN, blocks = Blocks;
  static_assert((BM / TM) * (BN / TN) == kThreads, "one piece a thread");
};
using LargeTile = FmaShape<128, 128, 16, 8, 8, 1>;
using SmallTile = FmaShape<64, 64, 16, 4, 4, 2>;

struct Source {
  const void* p;
  int64_t base, ld;
  int step, rows, depth;
  DType type;
  bool wide;
};

template <int kRows>
constexpr int kPitch = kRows + 4;

// Four elements of a line a piece; kRows * kDepth / 4 / kThreads pieces a thread.
template <int kRows, int kDepth, bool kAlongK>
struct Staged {
  static constexpr int kPieces = kRows * kDepth / 4 / kThreads;
  float v[kPieces][4];

  __device__ __forceinline__ void load(const Source& s, int row0, int k0) {
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      constexpr int kLine = (kAlongK ? kDepth : kRows) / 4;
      const int i = int(threadIdx.x) + j * kThreads;
      const int slow = (kAlongK ? row0 : k0) + i / kLine, fast = (kAlongK ? k0 : row0) + i % kLine * 4;
      const int count = slow < (kAlongK ? s.rows : s.depth) ? min(4, (kAlongK ? s.depth : s.rows) - fast) : 0;
      const int64_t at = s.base + int64_t(slow) * s.ld + int64_t(fast) * s.step;
      if (s.wide && count == 4) {
        const float4 w = *reinterpret_cast<const float4*>(static_cast<const float*>(s.p) + at);
        v[j][0] = w.x, v[j][1] = w.y, v[j][2] = w.z, v[j][3] = w.w;
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) v[j][e] = e < count ? load_scalar(s.p, s.type, at + int64_t(e) * s.step) : 0.0f;
      }
    }
  }
  __device__ __forceinline__ void store(float* tile) const {
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      const int i = int(threadIdx.x) + j * kThreads;
      if constexpr (kAlongK) {
        const int row = i / (kDepth / 4), k = i % (kDepth / 4) * 4;
#pragma unroll
        for (int e = 0; e < 4; ++e) tile[(k + e) * kPitch<kRows> + row] = v[j][e];
      } else {
        *reinterpret_cast<float4*>(tile + i / (kRows / 4) * kPitch<kRows> + i % (kRows / 4) * 4) = {v[j][0], v[j][1], v[j][2], v[j][3]};
      }
    }
  }
};

template <class S>
constexpr int tile_floats() {
  static_assert(S::bm / (S::tm / 4) * (S::bn + 4) <= 2 * S::depth * (S::bm + 4 + S::bn + 4), "results fit in place of the tiles");
  return S::depth * (S::bm + 4 + S::bn + 4);
}

template <class S, bool kAAlongK, bool kBAlongK>
__global__ void __launch_bounds__(kThreads, S::blocks) ffma_gemm_kernel(const Gemm p) {
  EFFK_DYN_SMEM(smem);
  float* const tiles = reinterpret_cast<float*>(smem);
  const Problem problem(p, S::bm, S::bn);
  if (problem.empty) return;
  const bool second = p.outs > 0 && problem.out == 1;
  const int64_t a_base[2] = {problem.at(p.a[0].at), problem.at(p.a[1].at)}, b_base[2] = {problem.at(p.b[0].at), problem.at(p.b[1].at)};
  const int per_segment = (p.k + S::depth - 1) / S::depth, stages = (p.outs > 0 ? 1 : p.segments) * per_segment;

  Staged<S::bm, S::depth, kAAlongK> a;
  Staged<S::bn, S::depth, kBAlongK> b;
  const auto load = [&](int stage) {
    const bool next = stage >= per_segment, other = next || second;
    const int k0 = (next ? stage - per_segment : stage) * S::depth;
    // Field by field: a choice between two structures would put both on the stack.
    const auto source = [&](int64_t base, const Operand& first, const Operand& last, DType type, int rows) {
      const void* const from = other ? last.p : first.p;
      const int64_t ld = other ? last.ld : first.ld;
      const int step = other ? last.step : first.step;
      const bool wide = type == DType::f32 && step == 1 && ld % 4 == 0 && reinterpret_cast<uintptr_t>(static_cast<const float*>(from) + base) % 16 == 0;
      return Source{from, base, ld, step, rows, p.k, type, wide};
    };
    a.load(source(other ? a_base[1] : a_base[0], p.a[0], p.a[1], p.a_type, problem.m), problem.m0, k0);
    b.load(source(other ? b_base[1] : b_base[0], p.b[0], p.b[1], p.b_type, problem.n), problem.n0, k0);
  };
  const auto store = [&](int stage) {
    float* const to = tiles + stage % 2 * tile_floats<S>();
    a.store(to);
    b.store(to + S::depth * kPitch<S::bm>);
  };

  const bool known = header_ok(p);
  const int tx = threadIdx.x % (S::bn / S::tn), ty = threadIdx.x / (S::bn / S::tn);
  float sums[S::tm][S::tn] = {};
  load(0);
  store(0);
  __syncthreads();
  for (int stage = 0; stage < stages; ++stage) {
    if (stage + 1 < stages) load(stage + 1);
    const float* const at = tiles + stage % 2 * tile_floats<S>();
#pragma unroll
    for (int k = 0; k < S::depth; ++k) {
      float x[S::tm], w[S::tn];
#pragma unroll
      for (int q = 0; q < S::tm / 4; ++q) {
        const float4 v = *reinterpret_cast<const float4*>(at + k * kPitch<S::bm> + q * (S::bm / 2) + 4 * ty);
        x[4 * q] = v.x, x[4 * q + 1] = v.y, x[4 * q + 2] = v.z, x[4 * q + 3] = v.w;
      }
#pragma unroll
      for (int q = 0; q < S::tn / 4; ++q) {
        const float4 v =
            *reinterpret_cast<const float4*>(at + S::depth * kPitch<S::bm> + k * kPitch<S::bn> + q * (S::bn / 2) + 4 * tx);
        w[4 * q] = v.x, w[4 * q + 1] = v.y, w[4 * q + 2] = v.z, w[4 * q + 3] = v.w;
      }
#pragma unroll
      for (int i = 0; i < S::tm; ++i)
#pragma unroll
        for (int j = 0; j < S::tn; ++j) sums[i][j] = fmaf(x[i], w[j], sums[i][j]);
    }
    if (stage + 1 < stages) store(stage + 1);  // the other tile: read last before the barrier of the stage before
    __syncthreads();
  }

#pragma unroll
  for (int q = 0; q < S::tm / 4; ++q) {  // bm / 2 rows, or all of them, in place of the tiles
    constexpr int kRows = S::bm / (S::tm / 4);
    if (q > 0) __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < S::tn / 4; ++j)
        *reinterpret_cast<float4*>(tiles + (4 * ty + i) * kPitch<S::bn> + j * (S::bn / 2) + 4 * tx) = {
            sums[4 * q + i][4 * j], sums[4 * q + i][4 * j + 1], sums[4 * q + i][4 * j + 2], sums[4 * q + i][4 * j + 3]};
    __syncthreads();
    finish_tile<kRows, S::bn, kPitch<S::bn>, kThreads>(p, problem, tiles, q * kRows, known);
    __syncthreads();
    store_tile<kRows, S::bn, kPitch<S::bn>, kThreads>(p, problem, tiles, q * kRows);
  }
}

template <class S>
cudaError_t launch_tile(const Gemm& p, cudaStream_t stream) {
  const int64_t blocks = grid_blocks(p, S::bm, S::bn);
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  Launch at;
  at.grid = dim3(unsigned(blocks));
  at.block = dim3(kThreads);
  at.smem = 2 * tile_floats<S>() * sizeof(float);
  at.stream = stream;
  if (p.a_along_k) return p.b_along_k ? launch(ffma_gemm_kernel<S, true, true>, at, p) : launch(ffma_gemm_kernel<S, true, false>, at, p);
  return launch(ffma_gemm_kernel<S, false, false>, at, p);
}

}  // namespace

// The large tile where it fills the device.
cudaError_t launch_ffma_gemm(const Gemm& p, int sms, cudaStream_t stream) {
  const bool large = p.shape ? p.shape == 1 : grid_blocks(p, LargeTile::bm, LargeTile::bn) >= sms;
  return large ? launch_tile<LargeTile>(p, stream) : launch_tile<SmallTile>(p, stream);
}

}  // namespace effk::cuda
