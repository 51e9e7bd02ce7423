// What fftconv_prepare writes on CUDA: DFT matrices as mma fragments, twiddles, the filter as a ring element, the scale of a
// channel. Tables are made on the device, in fp64 from exact phases: nothing is copied and nothing waits.
#pragma once
#include "ops/fftconv/cuda_rows.h"

namespace effk::cuda::fftconv {

struct MatrixArgs {
  uint16_t* out;   // fragments [tile of rows][tile of columns][re, im][lane][4 words] (left) or [..][..][lane][re 2, im 2] (right)
  int n, low;      // row i is frequency i / low + (n / low) (i mod low); a size of 8 is two blocks of 8
  bool shifted, inverse, right;
};

struct TwiddleArgs {
  float2* out;     // [rows][columns]: exp(-2 pi i (row + 3/4 if shifted) column step / n)
  int rows, low, columns, step;
  int64_t n;
  bool shifted;
};

namespace {

// exp(-2 pi i numerator / denominator)
__device__ __forceinline__ double2 unit_root(int64_t numerator, int64_t denominator) {
  double2 w;
  sincospi(2.0 * double(numerator % denominator) / double(denominator), &w.y, &w.x);
  w.y = -w.y;
  return w;
}
__device__ __forceinline__ int frequency(int i, int n, int low) { return i / low + n / low * (i % low); }

// One thread an element of the matrix.
__global__ void __launch_bounds__(256) matrix_kernel(const MatrixArgs p) {
  const int side = max(p.n, 16), i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= side * side) return;
  const int row = i / side, column = i % side;
  const int block = p.n, f_place = p.inverse ? column : row, x_place = p.inverse ? row : column;
  double2 w{0.0, 0.0};
  if (f_place / block == x_place / block) {
    const int64_t f4 = 4 * int64_t(frequency(f_place % block, block, p.low)) + (p.shifted ? kQuarters : 0);
    w = unit_root(f4 * (x_place % block), 4 * int64_t(block));
    const double scale = ldexp(1.0, -matrix_shift(block));
    w.x *= scale;
    w.y *= p.inverse ? -scale : scale;
  }
  const int r = row % 16, c = column % 16;
  int at;
  if (p.right) {  // rows 2t, 2t+1 (+ 8: second word) of column g
    const int tiles = side / 8, tile = row / 16 * tiles + column / 8, lane = column % 8 * 4 + r % 8 / 2;
    at = (tile * 32 + lane) * 8 + r / 8 * 2 + r % 2;
    p.out[at] = __half_as_ushort(__double2half(w.x));
    p.out[at + 4] = __half_as_ushort(__double2half(w.y));
  } else {        // row g (+ 8: second word), columns 2t, 2t+1 (+ 8: third and fourth)
    const int tiles = side / 16, tile = row / 16 * tiles + column / 16, lane = r % 8 * 4 + c % 8 / 2;
    at = (tile * 64 + lane) * 8 + (r / 8 + c / 8 * 2) * 2 + c % 2;
    p.out[at] = __half_as_ushort(__double2half(w.x));
    p.out[at + 256] = __half_as_ushort(__double2half(w.y));
  }
}

__global__ void __launch_bounds__(256) twiddle_kernel(const TwiddleArgs p) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= int64_t(p.rows) * p.columns) return;
  const int64_t f4 = 4 * int64_t(frequency(int(i / p.columns), p.rows, p.low)) + (p.shifted ? kQuarters : 0);
  const double2 w = unit_root(f4 * (i % p.columns * p.step), 4 * p.n);
  p.out[i] = {float(w.x), float(w.y)};
}

struct HeaderArgs { float* header; float words[kHeaderWords]; float* tail; int padding; };

__global__ void __launch_bounds__(64) header_kernel(const HeaderArgs p) {
  const int i = threadIdx.x;
  p.header[i] = 0.0f;
#pragma unroll
  for (int word = 0; word < kHeaderWords; ++word)
    if (i == word) p.header[i] = p.words[word];
  for (int j = i; j < p.padding; j += kHeader) p.tail[j] = 0.0f;
}

struct RingArgs {
  const float* k;
  float* gk;          // backward: where the gradient goes
  float2* z;          // [H][m]
  int64_t n_fft, taps, m;
  Mode mode;
  float scale;
  const float* header;  // backward: of the spectrum, whose taps must be these
};

// The tap that ring coefficient j of 2 m holds, with its sign; -1: none.
__device__ __forceinline__ int64_t tap_of(const RingArgs& p, int64_t j, float& sign) {
  sign = 1.0f;
  const int64_t ahead = p.mode == Mode::bidirectional ? p.n_fft / 2 : p.n_fft;
  int64_t tap = j < ahead ? j : -1;
  if (tap < 0 && p.mode != Mode::causal && j >= 2 * p.m - ahead + (p.mode == Mode::circular)) {
    tap = j - 2 * p.m + p.n_fft;
    sign = -1.0f;
  }
  return tap < p.taps ? tap : -1;
}

// grid: (points, channels).
__global__ void __launch_bounds__(256) ring_kernel(const RingArgs p) {
  const int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n >= p.m) return;
  float part[2];
  for (int i = 0; i < 2; ++i) {
    float sign;
    const int64_t tap = tap_of(p, n + i * p.m, sign);
    part[i] = tap < 0 ? 0.0f : sign * p.k[blockIdx.y * p.taps + tap];
  }
  p.z[blockIdx.y * p.m + n] = {part[0], part[1]};
}

__device__ __forceinline__ float ring_coefficient(const RingArgs& p, int64_t j) {
  const float2 z = p.z[blockIdx.y * p.m + j % p.m];
  return p.scale * (j < p.m ? z.x : z.y);
}

// The transpose of the above. grid: (taps, channels).
__global__ void __launch_bounds__(256) ring_gradient_kernel(const RingArgs p) {
  const int64_t tap = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (tap >= p.taps) return;
  float sum = 0.0f;
  if (p.mode != Mode::bidirectional || tap < p.n_fft / 2) sum = ring_coefficient(p, tap);
  if ((p.mode == Mode::circular && tap > 0) || (p.mode == Mode::bidirectional && tap >= p.n_fft / 2))
    sum -= ring_coefficient(p, 2 * p.m - p.n_fft + tap);
  p.gk[blockIdx.y * p.taps + tap] = p.header[kTaps] == float(p.taps) ? sum : __uint_as_float(0x7fc00000u);
}

// One block a channel: scale[h] = 2^e with the largest coefficient in [1, 2) after the division.
__global__ void __launch_bounds__(256) normalize_kernel(float2* spectrum, float* scale, int64_t m) {
  __shared__ float shared[8];
  float2* const z = spectrum + blockIdx.x * m;
  float largest = 0.0f;
  for (int64_t i = threadIdx.x; i < m; i += blockDim.x) largest = fmaxf(largest, fmaxf(fabsf(z[i].x), fabsf(z[i].y)));
  for (int distance = 16; distance; distance /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = largest;
  __syncthreads();
  for (int i = 0; i < 8; ++i) largest = fmaxf(largest, shared[i]);
  const int exponent = row_exponent(largest, 0);
  const float by = power_of_two(exponent);
  for (int64_t i = threadIdx.x; i < m; i += blockDim.x) z[i] = {z[i].x * by, z[i].y * by};
  if (threadIdx.x == 0) scale[blockIdx.x] = power_of_two(-exponent);
}

}  // namespace
}  // namespace effk::cuda::fftconv
