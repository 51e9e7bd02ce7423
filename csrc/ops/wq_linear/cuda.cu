// wq_linear on CUDA: device properties, the choice of a kernel, and dequantisation for what has no kernel of its own.
#include "ops/wq_linear/cuda.h"

#include <algorithm>

#include "ops/wq_linear/cuda_decode.h"
#include "ops/wq_linear/cuda_plan.h"

namespace effk::cuda {
namespace {

// Properties of the current device, asked once a thread and device.
cudaError_t current_device(Device& out) {
#ifdef EFFK_CUEMU
  out = {8, 227 * 1024, 8, true};  // few multiprocessors: small tests then cover one panel and many, one rank and several
  return cudaSuccess;
#else
  thread_local int known = -1;
  thread_local Device device;
  int current;
  cudaError_t e = cudaGetDevice(&current);
  if (e == cudaSuccess && current != known) {
    int major = 0;
    const auto ask = [&](int& value, cudaDeviceAttr what) {
      if (e == cudaSuccess) e = cudaDeviceGetAttribute(&value, what, current);
    };
    ask(device.sms, cudaDevAttrMultiProcessorCount);
    ask(device.smem, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    ask(major, cudaDevAttrComputeCapabilityMajor);
    device.cluster = major >= 9 ? 8 : 1;
    device.overlap = major >= 9;
    if (e == cudaSuccess) known = current;
  }
  out = device;
  return e;
#endif
}

__device__ __forceinline__ void store(float* to, float v) { *to = v; }
__device__ __forceinline__ void store(__half* to, float v) { *to = __float2half_rn(v); }
__device__ __forceinline__ void store(__nv_bfloat16* to, float v) { *to = __float2bfloat16_rn(v); }

// One warp a step of 32 k of a tile; lanes own the codes that they own in the product (cuda_decode.h). Bound: bytes written.
template <class Out, int kBits>
__global__ void __launch_bounds__(256) dequantize_kernel(const WqWeight w, Out* out, int64_t tile_bytes, int steps) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int step = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  const int64_t tile = blockIdx.y + int64_t(gridDim.y) * blockIdx.z;
  if (step >= steps || tile >= t16::tiles(w.n)) return;

  const uint8_t* const base = w.packed + tile * tile_bytes;
  Codes codes[2];
  // A last step may lack units: their codes belong to k beyond K, and are not needed.
  read_codes<kBits>(codes, t, g, [&](int unit) {
    const int64_t at = int64_t(step) * kStepBytes<kBits> + unit * t16::kUnitBytes;
    return base + (at < tile_bytes ? at : 0);
  });
  const int64_t k0 = int64_t(step) * kStepK + 8 * t;
  if (k0 >= w.k) return;
  const int64_t groups = t16::groups(w.k, w.group), group = w.group ? k0 / w.group : 0;
  const bool whole = k0 + 8 <= w.k && w.k % 8 == 0;  // then rows of out, and the lane's eight, start at 16-byte multiples
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t n = tile * t16::kTileRows + 2 * g + r, at = (tile * groups + group) * t16::kTileRows + 2 * g + r;
    if (n >= w.n) continue;
    const float scale = w.scales_f32 ? static_cast<const float*>(w.scales)[at] : __half2float(static_cast<const __half*>(w.scales)[at]);
    const float zero = w.zeros ? float(w.zeros[at]) : float(1 << (kBits - 1));
    alignas(16) Out values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t word = i < 4 ? codes[r].low >> (8 * i) : codes[r].high >> (8 * (i - 4) + kHighShift<kBits>);
      const uint32_t q = word & ((1u << kBits) - 1u);
      float value = float(q) - zero;
      if (w.codebook)
        value = w.codebook[w.codebook_per_row ? ((tile << kBits) + q) * t16::kTileRows + 2 * g + r : q];
      store(values + i, scale * value);
    }
    Out* const to = out + n * w.k + k0;
    if (whole) {
#pragma unroll
      for (int i = 0; i < int(sizeof(values) / 16); ++i)
        reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(values)[i];
    } else {
      for (int i = 0; i < 8; ++i)
        if (k0 + i < w.k) to[i] = values[i];
    }
  }
}

// out[n, c] += v for the outliers of each row; one warp a row. Columns of a row differ, so that no two lanes meet.
template <class Out>
__global__ void __launch_bounds__(256) add_outliers_kernel(const WqWeight w, Out* out, int outliers) {
  const int64_t n = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (n >= w.n) return;
  const int length = min(w.out_ptr[n + 1] - w.out_ptr[n], outliers);
  for (int rank = int(threadIdx.x % 32); rank < length; rank += 32) {
    const int64_t j = t16::entry_place(w.out_ptr, w.n, n, rank);
    if (j < 0 || j >= outliers) continue;
    const int64_t c = w.col32 ? static_cast<const int32_t*>(w.out_col)[j] : static_cast<const uint16_t*>(w.out_col)[j];
    if (c < 0 || c >= w.k) continue;
    Out* const at = out + n * w.k + c;
    store(at, float(*at) + __half2float(reinterpret_cast<const __half*>(w.out_val)[j]));
  }
}

template <class Out, int kBits>
cudaError_t dequantize(const WqWeight& w, int outliers, Out* out, cudaStream_t stream) {
  constexpr int kWarps = 8;
  const int steps = int(t16::ceil_div(w.k, kStepK));
  const int64_t tiles = t16::tiles(w.n), row = std::min<int64_t>(tiles, 32768);
  Launch at;
  at.grid = dim3(unsigned(t16::ceil_div(steps, kWarps)), unsigned(row), unsigned(t16::ceil_div(tiles, row)));
  at.block = dim3(kWarps * 32);
  at.stream = stream;
  const int64_t tile_bytes = t16::chunks(w.k, kBits) * t16::chunk_bytes(kBits);
  cudaError_t e = launch(dequantize_kernel<Out, kBits>, at, w, out, tile_bytes, steps);
  if (e != cudaSuccess || !w.out_ptr) return e;
  at.grid = dim3(unsigned(t16::ceil_div(w.n, kWarps)));
  return launch(add_outliers_kernel<Out>, at, w, out, outliers);
}

template <class Out>
cudaError_t dequantize_to(const WqWeight& w, int outliers, void* out, cudaStream_t stream) {
  Out* const to = static_cast<Out*>(out);
  switch (w.bits) {
    case 2: return dequantize<Out, 2>(w, outliers, to, stream);
    case 3: return dequantize<Out, 3>(w, outliers, to, stream);
    case 4: return dequantize<Out, 4>(w, outliers, to, stream);
    default: return dequantize<Out, 8>(w, outliers, to, stream);
  }
}

int log2_group(int group) { return group == 0 ? 30 : group == 32 ? 5 : group == 64 ? 6 : group == 128 ? 7 : 8; }

}  // namespace

int wq_linear(const WqWeight& w, int outliers, const void* x, void* y, DType dtype, int m, Stream stream, int64_t ldx, const float* y_in) {
  Device device;
  const cudaError_t e = current_device(device);
  if (e != cudaSuccess) return int(e);
  MmaArgs args{};
  args.w = w;
  args.x = x;
  args.y = y;
  args.m = m;
  args.k = int(w.k);
  args.tiles = int(t16::tiles(w.n));
  args.groups = int(t16::groups(w.k, w.group));
  args.tile_bytes = t16::chunks(w.k, w.bits) * t16::chunk_bytes(w.bits);
  args.outliers = outliers;
  args.ldx = ldx ? ldx : w.k;
  args.y_in = y_in;
  args.group_shift = log2_group(w.group);
  args.x_aligned = reinterpret_cast<uintptr_t>(x) % kAlignment == 0 && args.ldx % (kAlignment / 2) == 0;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (w.bits) {
    case 2: return int(launch_mma<2>(args, dtype, device, s));
    case 3: return int(launch_mma<3>(args, dtype, device, s));
    case 4: return int(launch_mma<4>(args, dtype, device, s));
    default: return int(launch_mma<8>(args, dtype, device, s));
  }
}

int wq_dequantize(const WqWeight& w, int outliers, void* out, DType dtype, Stream stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (dtype == DType::f32) return int(dequantize_to<float>(w, outliers, out, s));
  if (dtype == DType::f16) return int(dequantize_to<__half>(w, outliers, out, s));
  return int(dequantize_to<__nv_bfloat16>(w, outliers, out, s));
}

const char* error_text(int error) {
#ifdef EFFK_CUEMU
  (void)error;
  return "the emulation has no CUDA errors";
#else
  return cudaGetErrorString(static_cast<cudaError_t>(error));
#endif
}

}  // namespace effk::cuda
