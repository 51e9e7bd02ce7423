// quik_linear on CUDA where activations are not quantised: what goes in and out of the kernels of wq_linear and of torch's
// product. Bound: bytes.
#include "cuda/gemm_problem.h"
#include "ops/quik_linear/cuda.h"

namespace effk::cuda::quik {
namespace {

constexpr int kThreads = 256, kTokens = 8;

template <class A>
__device__ __forceinline__ bool header_is(const A& a) {
  bool same = true;
  if (a.header)
#pragma unroll
    for (int i = 0; i < 8; ++i) same = same && a.header[i] == a.expected[i];
  return same;
}

// Column j of the split as one of x; -1: an index out of range.
__device__ __forceinline__ int64_t column_of(const QuikSplit& s, int64_t j) {
  int64_t c = j;
  if (j < s.n_base) c = s.base ? s.base[j] : j;
  else if (s.outlier) c = s.outlier[j - s.n_base];
  return c < 0 || c >= s.k ? -1 : c;
}

__global__ void __launch_bounds__(kThreads, 6) split_columns_kernel(const Split s) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= s.m * s.ld) return;
  const int64_t row = i / s.ld, j = i % s.ld, c = j < s.columns ? column_of(s.split, j) : 0;
  float v = __uint_as_float(0x7fc00000u);
  if (j >= s.columns) v = 0.0f;
  else if (c >= 0) v = load_scalar(s.x, s.dtype, row * s.split.k + c);
  store_scalar(s.out, s.dtype, i, v);
}

// A warp a row of the weight, for eight rows of x.
__global__ void __launch_bounds__(kThreads, 4) outlier_sums_kernel(const Outliers o) {
  const int lane = threadIdx.x % 32;
  const int64_t n = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32, token0 = int64_t(blockIdx.y) * kTokens;
  if (n >= o.n) return;
  float sums[kTokens] = {};
  for (int64_t j = lane; j < o.split.n_out; j += 32) {
    const float w = load_scalar(o.w_out, o.out_type, n * o.ld + j);
    const int64_t c = column_of(o.split, o.split.n_base + j);
#pragma unroll
    for (int token = 0; token < kTokens; ++token)
      if (token0 + token < o.m)
        sums[token] = fmaf(w, c < 0 ? __uint_as_float(0x7fc00000u) : load_scalar(o.x, o.dtype, (token0 + token) * o.split.k + c), sums[token]);
  }
  const bool known = header_is(o);
#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
#pragma unroll
    for (int distance = 16; distance; distance /= 2) sums[token] += __shfl_xor_sync(0xffffffffu, sums[token], distance);
    if (lane == 0 && token0 + token < o.m) o.y[(token0 + token) * o.n + n] = known ? sums[token] : __uint_as_float(0x7fc00000u);
  }
}

__global__ void __launch_bounds__(kThreads, 6) assemble_kernel(const Assemble a) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x, columns = a.n_base + a.n_out;
  if (i >= a.n * columns) return;
  const int64_t row = i / columns, j = i % columns;
  float v = __uint_as_float(0x7fc00000u);
  if (j < a.n_base) {
    const t16::Place at = t16::place(row, j, a.n_base, a.bits);
    const int code = a.packed[at.byte] >> at.shift & ((1 << a.bits) - 1);
    v = a.w_scale[row] * float(code - (1 << (a.bits - 1)));
  } else if (header_is(a)) {
    v = load_scalar(a.w_out, a.out_type, row * a.ld + j - a.n_base);
  }
  store_scalar(a.out, a.dtype, i, v);
}

Launch blocks(int64_t x, int64_t y, Stream stream) {
  Launch at;
  at.grid = dim3(unsigned(x), unsigned(y));
  at.block = dim3(kThreads);
  at.stream = static_cast<cudaStream_t>(stream);
  return at;
}
int64_t blocks_for(int64_t elements) { return (elements + kThreads - 1) / kThreads; }

}  // namespace

int split_columns(const Split& s, Stream stream) {
  if (s.m == 0) return 0;
  return int(launch(split_columns_kernel, blocks(blocks_for(s.m * s.ld), 1, stream), s));
}

int outlier_sums(const Outliers& o, Stream stream) {
  if (o.m == 0) return 0;
  return int(launch(outlier_sums_kernel, blocks((o.n + kThreads / 32 - 1) / (kThreads / 32), (o.m + kTokens - 1) / kTokens, stream), o));
}

int assemble(const Assemble& a, Stream stream) {
  return int(launch(assemble_kernel, blocks(blocks_for(a.n * (a.n_base + a.n_out)), 1, stream), a));
}

}  // namespace effk::cuda::quik
