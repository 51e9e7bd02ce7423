// Runs a CUDA kernel on the CPU, from the source that nvcc compiles. For tests only: it is slow and it is strict.
//
// Every CUDA thread is a fiber. It runs until a collective (barrier, shuffle, vote, mma, ldmatrix) and goes on when the
// last participant has arrived; in between, a warp runs as far ahead of the others as the barriers let it. So a missing
// barrier shows as a result that depends on the order of threads, which the environment chooses:
//   CUEMU_ORDER = fwd | rev | <seed>    order of lanes, warps and blocks; with a seed, warps also take turns
// Device memory is host memory and dynamic shared memory has its exact size, so that ASan and UBSan see every access;
// both shared memory and the targets of unfinished asynchronous copies hold NaN.
// Not modelled: bank conflicts, coalescing, register limits, weak memory order between collectives, wgmma, TMA, spinning
// on another block, static __shared__ in clusters.
#pragma once
#include <cuda_runtime_api.h>
#include <vector_functions.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <utility>
#include <vector>

#undef __shared__
#define __shared__ static thread_local  // the fibers of a block live on one OS thread
#undef __constant__
#define __constant__
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __forceinline__
#define __forceinline__ inline

namespace cuemu {

constexpr int kWarp = 32;

struct PendingCopy { void* to; const void* from; int bytes, group; };

struct Thread {
  uint3 index{}, block_index{};
  dim3 block_dim, grid_dim;
  int lane = 0, warp = 0;              // warp counts over the whole cluster
  int block = 0;                       // rank of the block in its cluster
  int copy_group = 0;                  // cp.async group being filled
  std::vector<PendingCopy> copies;     // not yet waited for
};
extern thread_local Thread* cur;

using Collective = void (*)(void* const* lane_args, uint32_t mask);
// Returns when all lanes of mask have called it; the last one to arrive runs `all` over the arguments of every lane.
void warp_collective(uint32_t mask, Collective all, void* arg, const char* what);
void block_barrier();
void cluster_barrier();
unsigned char* dyn_smem();
void* peer_smem(const void* mine, uint32_t rank);
void finish_copies(int keep_groups);
[[noreturn]] void fail(const char* format, ...);
void run_grid(dim3 grid, dim3 block, size_t smem, int cluster, const std::function<void()>& body);

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, int cluster, A&&... args) {
  const std::tuple<std::decay_t<P>...> saved(std::forward<A>(args)...);
  run_grid(grid, block, smem, cluster, [&] { std::apply(kernel, saved); });
  return cudaSuccess;
}

template <class T>
T shuffle(uint32_t mask, T value, int source, const char* what) {
  struct Arg { T in, out; int source; };
  Arg arg{value, value, source};
  warp_collective(mask, [](void* const* lanes, uint32_t m) {
    for (int i = 0; i < kWarp; ++i) {
      if (!(m >> i & 1)) continue;
      auto& x = *static_cast<Arg*>(lanes[i]);
      if (!(m >> x.source & 1)) fail("shuffle: lane %d reads lane %d, which is not in the mask", i, x.source);
      x.out = static_cast<Arg*>(lanes[x.source])->in;
    }
  }, &arg, what);
  return arg.out;
}

inline uint32_t ballot(uint32_t mask, bool predicate, const char* what) {
  struct Arg { uint32_t in, out; };
  Arg arg{predicate, 0};
  warp_collective(mask, [](void* const* lanes, uint32_t m) {
    uint32_t votes = 0;
    for (int i = 0; i < kWarp; ++i)
      if (m >> i & 1) votes |= static_cast<Arg*>(lanes[i])->in << i;
    for (int i = 0; i < kWarp; ++i)
      if (m >> i & 1) static_cast<Arg*>(lanes[i])->out = votes;
  }, &arg, what);
  return arg.out;
}

}  // namespace cuemu

#define threadIdx (::cuemu::cur->index)
#define blockIdx (::cuemu::cur->block_index)
#define blockDim (::cuemu::cur->block_dim)
#define gridDim (::cuemu::cur->grid_dim)

inline void __syncthreads() { ::cuemu::block_barrier(); }
inline void __syncwarp(uint32_t mask = 0xffffffffu) { ::cuemu::ballot(mask, true, "__syncwarp"); }
inline uint32_t __ballot_sync(uint32_t mask, int predicate) { return ::cuemu::ballot(mask, predicate != 0, "__ballot_sync"); }
template <class T>
T __shfl_sync(uint32_t mask, T v, int source) { return ::cuemu::shuffle(mask, v, source & 31, "__shfl_sync"); }
template <class T>
T __shfl_xor_sync(uint32_t mask, T v, int x) { return ::cuemu::shuffle(mask, v, ::cuemu::cur->lane ^ x, "__shfl_xor_sync"); }
template <class T>
T __shfl_down_sync(uint32_t mask, T v, unsigned distance) {
  const int source = ::cuemu::cur->lane + int(distance);
  return ::cuemu::shuffle(mask, v, source < ::cuemu::kWarp ? source : ::cuemu::cur->lane, "__shfl_down_sync");
}

template <class T>
T __ldg(const T* p) { return *p; }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selectors) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t s = selectors >> (4 * i) & 15;
    uint32_t byte = uint32_t(bytes >> (8 * (s & 7))) & 0xff;
    if (s & 8) byte = byte & 0x80 ? 0xff : 0;  // replicate the sign
    result |= byte << (8 * i);
  }
  return result;
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return uint32_t((uint64_t(high) << 32 | low) >> (shift & 31));
}
inline uint32_t __float_as_uint(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }
inline int __popc(uint32_t v) { return __builtin_popcount(v); }
inline int __popcll(uint64_t v) { return __builtin_popcountll(v); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __uint_as_float(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }

// What the toolkit's host headers lack: an exact product and sum in double, rounded once.
inline __half __hfma(__half a, __half b, __half c) {
  return __double2half(double(__half2float(a)) * double(__half2float(b)) + double(__half2float(c)));
}
inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
  return __double2bfloat16(double(__bfloat162float(a)) * double(__bfloat162float(b)) + double(__bfloat162float(c)));
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return __halves2half2(__hfma(__low2half(a), __low2half(b), __low2half(c)),
                        __hfma(__high2half(a), __high2half(b), __high2half(c)));
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  return __halves2bfloat162(__hfma(__low2bfloat16(a), __low2bfloat16(b), __low2bfloat16(c)),
                            __hfma(__high2bfloat16(a), __high2bfloat16(b), __high2bfloat16(c)));
}
// sin and cos of pi x, exact at multiples of 1/2.
inline void sincospi(double x, double* sine, double* cosine) {
  constexpr double kPi = 3.14159265358979323846;
  const double nearest = std::nearbyint(2.0 * x), rest = (x - 0.5 * nearest) * kPi, s = std::sin(rest), c = std::cos(rest);
  const int quarter = int(int64_t(nearest) & 3);
  *sine = quarter == 0 ? s : quarter == 1 ? c : quarter == 2 ? -s : -c;
  *cosine = quarter == 0 ? c : quarter == 1 ? -s : quarter == 2 ? -c : s;
}
inline void sincospif(float x, float* sine, float* cosine) {
  double s, c;
  sincospi(double(x), &s, &c);
  *sine = float(s);
  *cosine = float(c);
}
using std::max;
using std::min;
