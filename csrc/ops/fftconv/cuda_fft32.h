// fp32 transforms of fftconv on CUDA: butterflies in registers, one kernel a factor, complex fp32 points in global memory,
// few enough rows at a time to stay in L2. The way of fp32 rows, of the filter and of its gradient, which keep fp32 accuracy.
// Bound: a pass reads and writes 8 bytes a point of L2. Factors are those of the plan, so that the order of bins is too.
#pragma once
#include "ops/fftconv/cuda_tables.h"

namespace effk::cuda::fftconv {

struct PassArgs {
  float2* z;        // [rows][m]
  int64_t m, n;     // blocks of n points are transformed over factor R: elements n / R apart
  bool shifted;     // the first factor: frequencies k + 3/4
};

namespace {

// DFT of R points in registers, natural order in and out; by two halves. Sign -1: forward.
template <int R, int kSign>
struct Butterfly {
  static __device__ __forceinline__ void run(float2 (&x)[R]) {
    float2 even[R / 2], odd[R / 2];
#pragma unroll
    for (int i = 0; i < R / 2; ++i) even[i] = x[2 * i], odd[i] = x[2 * i + 1];
    Butterfly<R / 2, kSign>::run(even);
    Butterfly<R / 2, kSign>::run(odd);
#pragma unroll
    for (int i = 0; i < R / 2; ++i) {
      constexpr float kCos[9] = {1.0f, 0.98078528040323044913f, 0.92387953251128675613f, 0.83146961230254523708f, 0.70710678118654752440f,
                                 0.55557023301960222474f, 0.38268343236508977173f, 0.19509032201612826785f, 0.0f};
      const int j = i * (32 / R);  // of 32: 0 .. 15
      const float2 w{j <= 8 ? kCos[j] : -kCos[16 - j], kSign * (j <= 8 ? kCos[8 - j] : kCos[j - 8])};
      const float2 o = multiply(odd[i], w);
      x[i] = {even[i].x + o.x, even[i].y + o.y};
      x[i + R / 2] = {even[i].x - o.x, even[i].y - o.y};
    }
  }
};
template <int kSign>
struct Butterfly<1, kSign> {
  static __device__ __forceinline__ void run(float2 (&)[1]) {}
};

// exp(-2 pi i numerator / denominator), numerator < denominator <= 2^25, denominator a power of two.
__device__ __forceinline__ float2 root(int numerator, int denominator) {
  float2 w;
  sincospif(2.0f * float(numerator) / float(denominator), &w.y, &w.x);
  w.y = -w.y;
  return w;
}

// One thread one butterfly. grid: (m / R, rows).
template <int R, bool kInverse>
__global__ void __launch_bounds__(128, 3) pass_kernel(const PassArgs p) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= p.m / R) return;
  const int stride = int(p.n / R), j = int(i % stride);
  float2* const z = p.z + blockIdx.y * p.m + i / stride * p.n + j;
  const int shift = p.shifted ? kQuarters : 0, turn = int(4 * p.n);
  float2 x[R];
#pragma unroll
  for (int a = 0; a < R; ++a) {
    x[a] = z[int64_t(a) * stride];
    // The shift of the first factor is exp(-2 pi i 3 (a stride + j) / (4 n)), before the butterfly and after it.
    if (kInverse) x[a] = multiply_conj(x[a], root(int(int64_t(4 * a + shift) * j % turn), turn));
    else if (shift) x[a] = multiply(x[a], root(kQuarters * a, 4 * R));
  }
  Butterfly<R, kInverse ? 1 : -1>::run(x);
#pragma unroll
  for (int a = 0; a < R; ++a) {
    if (!kInverse) x[a] = multiply(x[a], root(int(int64_t(4 * a + shift) * j % turn), turn));
    else if (shift) x[a] = multiply_conj(x[a], root(kQuarters * a, 4 * R));
    z[int64_t(a) * stride] = x[a];
  }
}

struct PointArgs {
  RowArgs r;
  float2* z;               // [rows][m]
  int64_t m;
  const float2* spectrum;  // of the filter
  const float* scale;
  float direction, gain;
};

// z = v[n] + i v[n + m]; eight a thread. grid: (m / 8, rows).
__global__ void __launch_bounds__(128) load_kernel(const PointArgs p) {
  const int n = int(blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (n >= p.m) return;
  const int64_t offset = row_offset(p.r, p.r.first_row + blockIdx.y);
  float re[8], im[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) re[i] = im[i] = 0.0f;
  if (n < p.r.length) load_input<true>(re, p.r, offset, n);
  if (n + p.m < p.r.length) load_input<true>(im, p.r, offset, int(n + p.m));
  float4* const z = reinterpret_cast<float4*>(p.z + blockIdx.y * p.m + n);
#pragma unroll
  for (int i = 0; i < 4; ++i) z[i] = {re[2 * i], im[2 * i], re[2 * i + 1], im[2 * i + 1]};
}

__global__ void __launch_bounds__(256) product_kernel(const PointArgs p) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= p.m) return;
  const int64_t h = (p.r.first_row + blockIdx.y) / p.r.batch;
  const float2 k = p.spectrum[h * p.m + i];
  float2* const z = p.z + blockIdx.y * p.m + i;
  *z = multiply(*z, {k.x, p.direction * k.y});
}

__global__ void __launch_bounds__(128) store_kernel(const PointArgs p) {
  const int n = int(blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (n >= p.m) return;
  const int row = p.r.first_row + int(blockIdx.y);
  const float4* const z = reinterpret_cast<const float4*>(p.z + blockIdx.y * p.m + n);
  const float scale = p.scale[row / p.r.batch], gain = p.gain * verdict(p.r);
  float re[8], im[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float4 w = z[i];
    re[2 * i] = w.x * gain * scale, im[2 * i] = w.y * gain * scale, re[2 * i + 1] = w.z * gain * scale, im[2 * i + 1] = w.w * gain * scale;
  }
  finish8<true>(p.r, row, n, re);
  if (n + p.m < p.r.length) finish8<true>(p.r, row, int(n + p.m), im);
}

struct AccumulateArgs {
  const void *v, *g;               // spectra of the rows of this launch: pairs of fp16 with scales, or of fp32
  const float *v_scale, *g_scale;  // null for fp32
  float2* sum;                     // [H][m]
  int64_t m, first_row;
  int rows, batch;
};

// sum[h] += over this launch's rows of h, in order: conj(V) G. The launch with row 0 of a channel starts its sum.
// grid: (points, channels that the rows touch).
__global__ void __launch_bounds__(256) accumulate_kernel(const AccumulateArgs p) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= p.m) return;
  const int64_t h = p.first_row / p.batch + blockIdx.y;
  const int64_t begin = max(p.first_row, h * p.batch), end = min(p.first_row + p.rows, (h + 1) * p.batch);
  float2 sum{0.0f, 0.0f};
  if (begin > h * p.batch) sum = p.sum[h * p.m + i];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = (row - p.first_row) * p.m + i;
    float2 v, g;
    if (p.v_scale) {
      v = unpack_half(static_cast<const uint32_t*>(p.v)[at]);
      g = unpack_half(static_cast<const uint32_t*>(p.g)[at]);
      const float sv = p.v_scale[row - p.first_row], sg = p.g_scale[row - p.first_row];
      v = {v.x * sv, v.y * sv};
      g = {g.x * sg, g.y * sg};
    } else {
      v = static_cast<const float2*>(p.v)[at];
      g = static_cast<const float2*>(p.g)[at];
    }
    const float2 product = multiply_conj(g, v);
    sum = {sum.x + product.x, sum.y + product.y};
  }
  p.sum[h * p.m + i] = sum;
}

__device__ __forceinline__ float block_sum(float sum, float* shared) {
  for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0.0f;
  for (int i = 0; i < int(blockDim.x / 32); ++i) sum += shared[i];
  return sum;
}

// partial[row] = sum_t g v; a block a row, threads strided, then a tree. r.s: v; g: the second signal.
__global__ void __launch_bounds__(256) dot_kernel(const RowArgs v, const RowArgs g, float* partial) {
  __shared__ float shared[8];
  const int64_t offset = row_offset(v, blockIdx.x);
  float sum = 0.0f;
  for (int n = threadIdx.x * 8; n < v.length; n += blockDim.x * 8) {
    float a[8], b[8];
    load_input<true>(a, v, offset, n);
    load_input<true>(b, g, offset, n);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(a[i], b[i], sum);
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// gskip[h]: a warp a channel, in order of b.
__global__ void __launch_bounds__(32) sum_rows_kernel(const float* partial, float* sums, int batch) {
  float sum = 0.0f;
  for (int b = threadIdx.x; b < batch; b += 32) sum += partial[int64_t(blockIdx.x) * batch + b];
  for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

}  // namespace
}  // namespace effk::cuda::fftconv
