// Every wrapper of csrc/cuda/ptx.h and every warp intrinsic that the emulation stands in for, on fixed pseudo-random data:
// one line each, "name word word ...". Built with nvcc it records what a GPU does (tests/cuda/golden), built with g++ and
// EFFK_CUEMU what the emulation does; test_primitives.py compares.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/cu.h"
#include "cuda/ptx.h"

namespace {
using namespace effk;

constexpr int kLanes = 32;

// Words of a linear congruential generator (Numerical Recipes' constants), upper half first so that low bits vary.
std::vector<uint32_t> random_words(int count, uint32_t seed) {
  std::vector<uint32_t> words(count);
  for (uint32_t& w : words) {
    seed = seed * 1664525u + 1013904223u;
    const uint32_t high = seed >> 16;
    seed = seed * 1664525u + 1013904223u;
    w = high << 16 | seed >> 16;
  }
  return words;
}

// in, out: [lane][...]; each kernel is one warp.
template <int kType>  // 0 f16, 1 bf16
__global__ void mma_float(const uint32_t* in, uint32_t* out) {
  const int lane = threadIdx.x;
  const uint32_t* const v = in + lane * 6;
  const uint32_t a[4] = {v[0], v[1], v[2], v[3]};
  float c[4] = {1.0f, -2.0f, 3.0f, float(lane)};
  if (kType == 0) ptx::mma_f16(c, a, v[4], v[5]);
  else ptx::mma_bf16(c, a, v[4], v[5]);
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = __float_as_uint(c[i]);
}
template <int kBits>
__global__ void mma_int(const uint32_t* in, uint32_t* out) {
  const int lane = threadIdx.x;
  const uint32_t* const v = in + lane * 6;
  const uint32_t a[4] = {v[0], v[1], v[2], v[3]};
  int c[4] = {1, -2, 3, lane};
  if (kBits == 8) ptx::mma_s8(c, a, v[4], v[5]);
  else ptx::mma_s4(c, a, v[4], v[5]);
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = uint32_t(c[i]);
}
template <bool kTranspose>
__global__ void matrices(const uint32_t* in, uint32_t* out) {
  EFFK_DYN_SMEM(smem);  // 32 rows of 16 bytes
  const int lane = threadIdx.x;
  for (int i = 0; i < 4; ++i) reinterpret_cast<uint32_t*>(smem)[lane * 4 + i] = in[lane * 4 + i];
  __syncwarp();
  uint32_t r[4];
  if (kTranspose) ptx::ldmatrix_x4_trans(r, smem + 16 * lane);
  else ptx::ldmatrix_x4(r, smem + 16 * lane);
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = r[i];
}
__global__ void shuffles(const uint32_t* in, uint32_t* out) {
  const int lane = threadIdx.x;
  out[lane * 4] = __shfl_xor_sync(0xffffffffu, in[lane], 5);
  out[lane * 4 + 1] = __shfl_down_sync(0xffffffffu, in[lane], 7u);
  out[lane * 4 + 2] = __shfl_sync(0xffffffffu, in[lane], lane * 3);
  out[lane * 4 + 3] = __ballot_sync(0xffffffffu, in[lane] & 1);
}
__global__ void bits(const uint32_t* in, uint32_t* out) {
  const int lane = threadIdx.x;
  const uint32_t a = in[lane * 3], b = in[lane * 3 + 1], c = in[lane * 3 + 2];
  out[lane * 6] = ptx::lop3<0xea>(a, b, c);
  out[lane * 6 + 1] = ptx::lop3<0x96>(a, b, c);
  out[lane * 6 + 2] = ptx::lop3<0x1b>(a, b, c);
  out[lane * 6 + 3] = __byte_perm(a, b, c & 0x7777u);
  out[lane * 6 + 4] = __funnelshift_r(a, b, c);
  out[lane * 6 + 5] = __byte_perm(a, b, 0x5410u);
}
// 16-bit fused multiply-add: `in` holds pairs of small numbers, so that no result overflows.
__global__ void fma16(const uint32_t* in, uint32_t* out) {
  const int lane = threadIdx.x;
  const uint32_t* const v = in + lane * 3;
  const __half2 h = __hfma2(reinterpret_cast<const __half2&>(v[0]), reinterpret_cast<const __half2&>(v[1]), reinterpret_cast<const __half2&>(v[2]));
  const __nv_bfloat162 b = __hfma2(reinterpret_cast<const __nv_bfloat162&>(v[0]), reinterpret_cast<const __nv_bfloat162&>(v[1]),
                                   reinterpret_cast<const __nv_bfloat162&>(v[2]));
  out[lane * 2] = reinterpret_cast<const uint32_t&>(h);
  out[lane * 2 + 1] = reinterpret_cast<const uint32_t&>(b);
}
__global__ void copies(const uint32_t* in, uint32_t* out) {
  EFFK_DYN_SMEM(smem);
  const int lane = threadIdx.x;
  ptx::cp_async16(smem + 16 * lane, in + 4 * lane, lane % 17);  // from nothing to everything of the 16 bytes
  ptx::cp_async_commit();
  ptx::cp_async16(smem + 512 + 16 * lane, in + 4 * (lane ^ 1), 16);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncwarp();
  for (int i = 0; i < 8; ++i) out[lane * 8 + i] = reinterpret_cast<const uint32_t*>(smem)[(i / 4) * 128 + (lane ^ 3) * 4 + i % 4];
}
__global__ void lanes(const uint32_t* in, uint32_t* out) { out[threadIdx.x] = in[ptx::lane_id()]; }

// Two blocks of a cluster read each other's shared memory. Needs compute capability 9.0.
__global__ void cluster(const uint32_t* in, uint32_t* out) {
  EFFK_DYN_SMEM(smem);
  const int lane = threadIdx.x;
  const uint32_t rank = ptx::cluster_rank();
  uint32_t* const mine = reinterpret_cast<uint32_t*>(smem);
  mine[lane] = in[rank * kLanes + lane];
  ptx::cluster_sync();
  out[rank * kLanes + lane] = ptx::cluster_peer(mine, rank ^ 1u)[kLanes - 1 - lane] + rank;
  ptx::cluster_sync();
}

void check(cudaError_t e) {
  if (e == cudaSuccess) return;
  std::fprintf(stderr, "CUDA error %d\n", int(e));
  std::exit(1);
}

std::vector<uint32_t> run(void (*kernel)(const uint32_t*, uint32_t*), std::vector<uint32_t> in, int out_words, int blocks = 1) {
  std::vector<uint32_t> out(out_words);
  cuda::Launch at;
  at.grid = dim3(1, blocks);
  at.block = dim3(kLanes);
  at.smem = 1024;
  at.cluster = blocks;
#ifdef EFFK_CUEMU
  alignas(16) static uint32_t aligned[1024];
  std::copy(in.begin(), in.end(), aligned);
  check(cuda::launch(kernel, at, aligned, out.data()));
#else
  uint32_t *in_d, *out_d;
  check(cudaMalloc(&in_d, in.size() * 4));
  check(cudaMalloc(&out_d, out.size() * 4));
  check(cudaMemcpy(in_d, in.data(), in.size() * 4, cudaMemcpyHostToDevice));
  check(cuda::launch(kernel, at, in_d, out_d));
  check(cudaMemcpy(out.data(), out_d, out.size() * 4, cudaMemcpyDeviceToHost));
  check(cudaFree(in_d));
  check(cudaFree(out_d));
#endif
  return out;
}

void print(const char* name, const std::vector<uint32_t>& words) {
  std::printf("%s", name);
  for (uint32_t w : words) std::printf(" %08x", w);
  std::printf("\n");
}

// Random words with both halves brought to exponents around 1, so that they are finite in either 16-bit type. `integers`:
// the values -8 .. 7, whose products and sums are exact in any order.
std::vector<uint32_t> numbers(int count, uint32_t seed, bool bf16, bool integers) {
  std::vector<uint32_t> words = random_words(count, seed);
  for (uint32_t& w : words) {
    uint32_t pair = 0;
    for (int h = 0; h < 2; ++h) {
      const uint32_t r = w >> (16 * h) & 0xffffu;
      uint16_t bits;
      if (integers) {
        const float v = float(int(r & 15u)) - 8.0f;
        bits = bf16 ? __bfloat16_as_ushort(__float2bfloat16(v)) : __half_as_ushort(__float2half(v));
      } else {
        bits = uint16_t(bf16 ? (r & 0x81ffu) | 0x3e80u : (r & 0x8fffu) | 0x3000u);
      }
      pair |= uint32_t(bits) << (16 * h);
    }
    w = pair;
  }
  return words;
}

}  // namespace

int main() {
  print("mma_f16_integers", run(mma_float<0>, numbers(kLanes * 6, 1, false, true), kLanes * 4));
  print("mma_bf16_integers", run(mma_float<1>, numbers(kLanes * 6, 2, true, true), kLanes * 4));
  print("mma_f16", run(mma_float<0>, numbers(kLanes * 6, 3, false, false), kLanes * 4));
  print("mma_bf16", run(mma_float<1>, numbers(kLanes * 6, 4, true, false), kLanes * 4));
  print("mma_s8", run(mma_int<8>, random_words(kLanes * 6, 5), kLanes * 4));
  print("mma_s4", run(mma_int<4>, random_words(kLanes * 6, 15), kLanes * 4));
  print("ldmatrix", run(matrices<false>, random_words(kLanes * 4, 6), kLanes * 4));
  print("ldmatrix_trans", run(matrices<true>, random_words(kLanes * 4, 7), kLanes * 4));
  print("shuffles", run(shuffles, random_words(kLanes, 8), kLanes * 4));
  print("bits", run(bits, random_words(kLanes * 3, 9), kLanes * 6));
  print("fma_f16", run(fma16, numbers(kLanes * 3, 10, false, false), kLanes * 2));
  print("fma_bf16", run(fma16, numbers(kLanes * 3, 11, true, false), kLanes * 2));
  print("lanes", run(lanes, random_words(kLanes, 14), kLanes));
  print("cp_async", run(copies, random_words(kLanes * 4, 12), kLanes * 8));
  print("cluster", run(cluster, random_words(kLanes * 2, 13), kLanes * 2, 2));
  return 0;
}
