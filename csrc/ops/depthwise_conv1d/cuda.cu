// depthwise_conv1d on CUDA. Bound: bytes of x and y for a few taps; fp32 multiply-adds for many.
//
//   rows_kernel      bhl: a block has 2048 outputs of a row, 8 in succession a thread; the x they meet lies in shared memory as
//                    fp32, 256 taps at a time, 8 values in 9 places so that the threads' eights lie in different banks
//   channels_kernel  blh: a thread has one or two channels and 32 outputs in time; neighbours share lines of memory
//   taps_kernel      gradient of 8 taps of a channel (of 32 channels in layout blh), batch entries in `slices` parts
// In the first two, 8 outputs and 8 taps meet 16 values in registers: 64 multiply-adds for 8 or 16 loads.
#include "ops/depthwise_conv1d/cuda.h"

#include <algorithm>

#include "cuda/cu.h"

namespace effk::cuda::depthwise {
namespace {

constexpr int kThreads = 256, kOutputs = 8, kTile = kThreads * kOutputs, kTapChunk = 256;
constexpr int kChannelThreads = 128, kChannelOutputs = 32;
constexpr int kTapGroup = 8, kMaxSlices = 32;

__device__ __forceinline__ float load(const void* p, DType type, int64_t i) {
  if (type == DType::f32) return static_cast<const float*>(p)[i];
  if (type == DType::f16) return __half2float(static_cast<const __half*>(p)[i]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
}
__device__ __forceinline__ void store(void* p, DType type, int64_t i, float v) {
  if (type == DType::f32) static_cast<float*>(p)[i] = v;
  else if (type == DType::f16) static_cast<__half*>(p)[i] = __float2half_rn(v);
  else static_cast<__nv_bfloat16*>(p)[i] = __float2bfloat16_rn(v);
}
__device__ __forceinline__ uint32_t bits_of(float v, DType type) {
  return type == DType::f16 ? __half_as_ushort(__float2half_rn(v)) : __bfloat16_as_ushort(__float2bfloat16_rn(v));
}
__device__ __forceinline__ float value_of(uint32_t bits, DType type) {
  return type == DType::f16 ? __half2float(__ushort_as_half((unsigned short)(bits))) : __uint_as_float(bits << 16);
}

// Eight values p[i ..] of which those in [0, length) exist: 16 bytes at a time where they are on alignment.
__device__ __forceinline__ void load8(float (&v)[8], const void* p, DType type, int64_t row, int64_t i, int64_t length) {
  const int64_t at = row + i;
  const bool whole = i >= 0 && i + 8 <= length;
  if (type == DType::f32) {
    const float* const x = static_cast<const float*>(p) + at;
    if (whole && reinterpret_cast<uintptr_t>(x) % 16 == 0) {
      const float4 a = reinterpret_cast<const float4*>(x)[0], b = reinterpret_cast<const float4*>(x)[1];
      v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
      return;
    }
  } else {
    const uint16_t* const x = static_cast<const uint16_t*>(p) + at;
    if (whole && reinterpret_cast<uintptr_t>(x) % 16 == 0) {
      const uint4 w = *reinterpret_cast<const uint4*>(x);
      v[0] = value_of(w.x & 0xffffu, type), v[1] = value_of(w.x >> 16, type), v[2] = value_of(w.y & 0xffffu, type);
      v[3] = value_of(w.y >> 16, type), v[4] = value_of(w.z & 0xffffu, type), v[5] = value_of(w.z >> 16, type);
      v[6] = value_of(w.w & 0xffffu, type), v[7] = value_of(w.w >> 16, type);
      return;
    }
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) v[j] = i + j >= 0 && i + j < length ? load(p, type, at + j) : 0.0f;
}

// Eight results from t on of row `at`.
__device__ __forceinline__ void store8(void* p, DType type, int64_t row, int64_t t, int64_t length, const float (&v)[8]) {
  const int64_t at = row + t;
  if (type != DType::f32 && t + 8 <= length) {
    uint16_t* const y = static_cast<uint16_t*>(p) + at;
    if (reinterpret_cast<uintptr_t>(y) % 16 == 0) {
      *reinterpret_cast<uint4*>(y) = {bits_of(v[0], type) | bits_of(v[1], type) << 16, bits_of(v[2], type) | bits_of(v[3], type) << 16,
                                      bits_of(v[4], type) | bits_of(v[5], type) << 16, bits_of(v[6], type) | bits_of(v[7], type) << 16};
      return;
    }
  }
#pragma unroll
  for (int j = 0; j < 8; ++j)
    if (t + j < length) store(p, type, at + j, v[j]);
}

__device__ __forceinline__ float finish(const Convolution& p, float sum, int64_t at) {
  if (p.a.act == Activation::none && !p.gy) return sum;
  const float s = 1.0f / (1.0f + expf(-sum));
  if (!p.gy) return sum * s;
  return load(p.gy, p.a.x_dtype, at) * s * (1.0f + sum * (1.0f - s));
}

__device__ __forceinline__ float tap(const Convolution& p, int64_t h, int64_t j) {
  return p.a.taps[h * p.a.k + (p.reversed ? p.a.k - 1 - j : j)];
}

// sums[q] += sum over `count` <= 8 taps of w[r] x[q + r] with x = now, next.
__device__ __forceinline__ void eight_taps(float (&sums)[8], const float (&w)[8], const float (&now)[8], const float (&next)[8], int count) {
#pragma unroll
  for (int r = 0; r < 8; ++r)
    if (r < count) {  // a value beyond the taps may be infinite: it must not meet a zero
#pragma unroll
      for (int q = 0; q < 8; ++q) sums[q] = fmaf(w[r], q + r < 8 ? now[q + r] : next[q + r - 8], sums[q]);
    }
}

// grid: (tiles of a row, channels, batch). Taps are walked from the last to the first, so that x is walked upwards.
__global__ void __launch_bounds__(kThreads, 4) rows_kernel(const Convolution p) {
  __shared__ float window[(kTile + kTapChunk + 16) / 8 * 9], taps[kTapChunk];
  const int64_t t0 = int64_t(blockIdx.x) * kTile, h = blockIdx.y, b = blockIdx.z, row = (b * p.a.h + h);
  const int thread = threadIdx.x;
  float sums[8] = {};
  for (int64_t end = p.a.k; end > 0; end -= kTapChunk) {  // taps [begin, end)
    const int64_t begin = end > kTapChunk ? end - kTapChunk : 0;
    const int count = int(end - begin);
    __syncthreads();  // the chunk before has been read
    if (thread < count) taps[thread] = tap(p, h, end - 1 - thread);
    const int64_t first = t0 + p.a.offset - (end - 1);  // x of window place 0
    const int64_t from = first & ~int64_t(7);           // on alignment where rows are
    const int lead = int(first - from), places = (kTile + count + 7) / 8 * 8;
    for (int c = thread; c * 8 < places + lead; c += kThreads) {
      float v[8];
      load8(v, p.a.x, p.a.x_dtype, row * p.a.l_in, from + c * 8, p.a.l_in);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int at = c * 8 + i - lead;
        if (at >= 0 && at < places) window[at + at / 8] = v[i];
      }
    }
    __syncthreads();
    float now[8], next[8], w[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) now[i] = window[thread * 9 + i];
    for (int j = 0; j < count; j += 8) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        next[i] = window[(thread + j / 8 + 1) * 9 + i];
        w[i] = taps[min(j + i, count - 1)];
      }
      eight_taps(sums, w, now, next, count - j);
#pragma unroll
      for (int i = 0; i < 8; ++i) now[i] = next[i];
    }
  }
  const int64_t t = t0 + thread * kOutputs, at = row * p.a.l_out + t;
  if (t >= p.a.l_out) return;
  const float bias = p.a.bias ? p.a.bias[h] : 0.0f;
#pragma unroll
  for (int q = 0; q < 8; ++q)
    if (t + q < p.a.l_out) sums[q] = finish(p, sums[q] + bias, at + q);
  store8(p.a.y, p.a.y_dtype, row * p.a.l_out, t, p.a.l_out, sums);
}

// Two neighbouring channels in one access, or one.
template <int kPair>
__device__ __forceinline__ void load_channels(float (&v)[kPair], const void* p, DType type, int64_t i) {
  if constexpr (kPair == 1) {
    v[0] = load(p, type, i);
  } else if (type == DType::f32) {
    const float2 w = *reinterpret_cast<const float2*>(static_cast<const float*>(p) + i);
    v[0] = w.x, v[1] = w.y;
  } else {
    const uint32_t w = *reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(p) + i);
    v[0] = value_of(w & 0xffffu, type), v[1] = value_of(w >> 16, type);
  }
}

// grid: (steps in time, channels, batch).
template <int kPair>
__global__ void __launch_bounds__(kChannelThreads, 4) channels_kernel(const Convolution p) {
  const int64_t h = (int64_t(blockIdx.y) * kChannelThreads + threadIdx.x) * kPair, b = blockIdx.z;
  if (h >= p.a.h) return;
  const int64_t x0 = b * p.a.l_in * p.a.h + h;
  const auto read = [&](float(&to)[kPair][8], int64_t s) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float v[kPair] = {};
      if (s + i >= 0 && s + i < p.a.l_in) load_channels<kPair>(v, p.a.x, p.a.x_dtype, x0 + (s + i) * p.a.h);
#pragma unroll
      for (int c = 0; c < kPair; ++c) to[c][i] = v[c];
    }
  };
  for (int step = 0; step < kChannelOutputs; step += kOutputs) {
    const int64_t t = int64_t(blockIdx.x) * kChannelOutputs + step;
    if (t >= p.a.l_out) return;
    float sums[kPair][8] = {}, now[kPair][8], next[kPair][8], w[8];
    const int64_t first = t + p.a.offset - (p.a.k - 1);
    read(now, first);
    for (int64_t j = 0; j < p.a.k; j += 8) {
      const int count = int(min(int64_t(8), p.a.k - j));
      read(next, first + j + 8);
#pragma unroll
      for (int c = 0; c < kPair; ++c) {
#pragma unroll
        for (int i = 0; i < 8; ++i) w[i] = i < count ? tap(p, h + c, p.a.k - 1 - j - i) : 0.0f;
        eight_taps(sums[c], w, now[c], next[c], count);
#pragma unroll
        for (int i = 0; i < 8; ++i) now[c][i] = next[c][i];
      }
    }
#pragma unroll
    for (int c = 0; c < kPair; ++c) {
      const float bias = p.a.bias ? p.a.bias[h + c] : 0.0f;
#pragma unroll
      for (int q = 0; q < 8; ++q) {
        const int64_t at = (b * p.a.l_out + t + q) * p.a.h + h + c;
        if (t + q < p.a.l_out) store(p.a.y, p.a.y_dtype, at, finish(p, sums[c][q] + bias, at));
      }
    }
  }
}

// partial[slice][h][0 .. k] = sums over the slice's batch entries: k taps, then the bias. grid: (channels, groups of taps,
// slices); in layout blh a block has 32 channels, a warp a moment in time.
__global__ void __launch_bounds__(kThreads, 3) taps_kernel(const DepthwiseTapsArgs p, float* partial, int slices) {
  __shared__ float shared[kTapGroup + 1][kThreads];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t h = p.channels_last ? int64_t(blockIdx.x) * 32 + lane : blockIdx.x, j0 = int64_t(blockIdx.y) * kTapGroup;
  const int64_t t0 = p.channels_last ? warp : threadIdx.x, step = p.channels_last ? kThreads / 32 : kThreads;
  const int64_t per = p.channels_last ? p.h : 1, slice = blockIdx.z;
  float sums[kTapGroup + 1] = {};
  if (h < p.h)
    for (int64_t b = p.b * slice / slices; b < p.b * (slice + 1) / slices; ++b) {
      const int64_t g0 = p.channels_last ? b * p.l_out * p.h + h : (b * p.h + h) * p.l_out;
      const int64_t x0 = p.channels_last ? b * p.l_in * p.h + h : (b * p.h + h) * p.l_in;
      for (int64_t t = t0; t < p.l_out; t += step) {
        const float g = load(p.g, p.g_dtype, g0 + t * per);
        sums[kTapGroup] += g;
#pragma unroll
        for (int j = 0; j < kTapGroup; ++j) {
          const int64_t s = t + p.offset - j0 - j;
          if (s >= 0 && s < p.l_in) sums[j] = fmaf(g, load(p.x, p.x_dtype, x0 + s * per), sums[j]);
        }
      }
    }
#pragma unroll
  for (int j = 0; j <= kTapGroup; ++j) shared[j][threadIdx.x] = sums[j];
  // A tree over threads, or over the warps of a channel.
  for (int width = kThreads / 2; width >= (p.channels_last ? 32 : 1); width /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < width)
#pragma unroll
      for (int j = 0; j <= kTapGroup; ++j) shared[j][threadIdx.x] += shared[j][threadIdx.x + width];
  }
  if (threadIdx.x >= (p.channels_last ? 32u : 1u) || h >= p.h) return;
  float* const to = partial + (slice * p.h + h) * (p.k + 1);
  for (int j = 0; j < kTapGroup; ++j)
    if (j0 + j < p.k) to[j0 + j] = shared[j][threadIdx.x];
  if (j0 == 0) to[p.k] = shared[kTapGroup][threadIdx.x];
}

__global__ void __launch_bounds__(kThreads) sum_slices_kernel(const DepthwiseTapsArgs p, const float* partial, int slices) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x, width = p.k + 1;
  if (i >= p.h * width) return;
  float sum = 0.0f;
  for (int slice = 0; slice < slices; ++slice) sum += partial[slice * p.h * width + i];
  const int64_t h = i / width, j = i % width;
  if (j == p.k) {
    if (p.bias_sum) p.bias_sum[h] = sum;
  } else if (p.taps_sum) {
    p.taps_sum[h * p.k + j] = sum;
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int slices_of(const DepthwiseTapsArgs& p) { return int(std::clamp<int64_t>(p.b, 1, kMaxSlices)); }

}  // namespace

int convolve(const Convolution& p, Stream stream) {
  Launch at;
  at.stream = static_cast<cudaStream_t>(stream);
  if (!p.a.channels_last) {
    at.grid = dim3(unsigned(ceil_div(p.a.l_out, kTile)), unsigned(p.a.h), unsigned(p.a.b));
    at.block = dim3(kThreads);
    return int(launch(rows_kernel, at, p));
  }
  const bool pair = p.a.h % 2 == 0 && reinterpret_cast<uintptr_t>(p.a.x) % 8 == 0;
  at.grid = dim3(unsigned(ceil_div(p.a.l_out, kChannelOutputs)), unsigned(ceil_div(p.a.h, kChannelThreads * (pair ? 2 : 1))), unsigned(p.a.b));
  at.block = dim3(kChannelThreads);
  return int(pair ? launch(channels_kernel<2>, at, p) : launch(channels_kernel<1>, at, p));
}

int64_t taps_workspace(const DepthwiseTapsArgs& p) { return slices_of(p) * p.h * (p.k + 1); }

int sum_taps(const DepthwiseTapsArgs& p, float* partial, Stream stream) {
  const int slices = slices_of(p);
  Launch at;
  at.stream = static_cast<cudaStream_t>(stream);
  at.grid = dim3(unsigned(p.channels_last ? ceil_div(p.h, 32) : p.h), unsigned(ceil_div(p.k, kTapGroup)), unsigned(slices));
  at.block = dim3(kThreads);
  const cudaError_t e = launch(taps_kernel, at, p, partial, slices);
  if (e != cudaSuccess) return int(e);
  at.grid = dim3(unsigned(ceil_div(p.h * (p.k + 1), kThreads)));
  return int(launch(sum_slices_kernel, at, p, static_cast<const float*>(partial), slices));
}

const char* error_text(int error) {
#ifdef EFFK_CUEMU
  (void)error;
  return "the emulation has no CUDA errors";
#else
  return cudaGetErrorString(static_cast<cudaError_t>(error));
#endif
}

}  // namespace effk::cuda::depthwise
