// dense_linear on CUDA: the choice of a product kernel, packing, sums of columns.
#include "ops/dense_linear/cuda.h"

#include <algorithm>

#include "cuda/cu.h"
#include "cuda/gemm_problem.h"

namespace effk::cuda {

template <class T>
cudaError_t launch_mma_gemm(const Gemm& p, int sms, cudaStream_t stream);
extern template cudaError_t launch_mma_gemm<__half>(const Gemm&, int, cudaStream_t);
extern template cudaError_t launch_mma_gemm<__nv_bfloat16>(const Gemm&, int, cudaStream_t);
cudaError_t launch_ffma_gemm(const Gemm& p, int sms, cudaStream_t stream);

namespace {

constexpr int kThreads = 256;

// Multiprocessors of the current device, asked once a thread and device.
cudaError_t multiprocessors(int& sms) {
#ifdef EFFK_CUEMU
  sms = 4;
  return cudaSuccess;
#else
  thread_local int known = -1, count = 0;
  int current;
  cudaError_t e = cudaGetDevice(&current);
  if (e == cudaSuccess && current != known) {
    e = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, current);
    if (e == cudaSuccess) known = current;
  }
  sms = count;
  return e;
#endif
}

struct PackArgs {
  const void *first, *second;
  DType from, to;
  int64_t rows, d_in, ld;  // rows of each source
  uint32_t words[8];
};

__global__ void __launch_bounds__(kThreads, 6) pack_rows_kernel(const PackArgs p, void* to, int64_t elements) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < kPackHeader / 4) {
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (i == j) word = p.words[j];  // an index into the arguments would put them on the stack
    static_cast<uint32_t*>(to)[i] = word;
  }
  if (i >= elements) return;
  const int64_t row = i / p.ld, column = i % p.ld;
  float v = 0.0f;
  if (column < p.d_in && row < 2 * p.rows) {
    const bool upper = row >= p.rows;
    const void* const from = upper ? p.second : p.first;
    if (from) v = load_scalar(from, p.from, (upper ? row - p.rows : row) * p.d_in + column);
  }
  store_scalar(static_cast<char*>(to) + kPackHeader, p.to, i, v);
}

__global__ void __launch_bounds__(kThreads, 6) unpack_rows_kernel(const Gemm p, DType type, int64_t d_in, int64_t ld, float* out, int64_t elements) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= elements) return;
  const char* const rows = reinterpret_cast<const char*>(p.header) + kPackHeader;
  out[i] = header_ok(p) ? load_scalar(rows, type, i / d_in * ld + i % d_in) : __uint_as_float(0x7fc00000u);
}

// 32 columns a block, eight threads a column.
__global__ void __launch_bounds__(kThreads, 5) column_sums_kernel(const void* x, DType type, int64_t rows, int64_t columns, int64_t ld, int64_t step,
                                                               float* sums) {
  __shared__ float shared[kThreads];
  // Neighbouring threads read neighbours in memory: along the columns, or, where those are far apart, along the rows.
  const bool turned = step > ld;
  const int column_in_block = turned ? threadIdx.x / 8 : threadIdx.x % 32, part = turned ? threadIdx.x % 8 : threadIdx.x / 32;
  const int64_t column = int64_t(blockIdx.x) * 32 + column_in_block;
  float sum = 0.0f;
  if (column < columns)
    for (int64_t i = part; i < rows; i += 8) sum += load_scalar(x, type, i * ld + column * step);
  shared[part * 32 + column_in_block] = sum;
  for (int width = 4; width >= 1; width /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < 32 * width) shared[threadIdx.x] += shared[threadIdx.x + 32 * width];
  }
  const int64_t own = int64_t(blockIdx.x) * 32 + threadIdx.x;
  if (threadIdx.x < 32 && own < columns) sums[own] = shared[threadIdx.x];
}

dim3 blocks_for(int64_t elements) { return dim3(unsigned((elements + kThreads - 1) / kThreads)); }

}  // namespace

int gemm(const Gemm& g, Stream stream) {
  if (g.m <= 0 || g.n <= 0) return 0;
  int sms;
  const cudaError_t e = multiprocessors(sms);
  if (e != cudaSuccess) return int(e);
  const auto s = static_cast<cudaStream_t>(stream);
  const bool mma = g.a_type == g.b_type && g.a_type == g.out_type && g.a_type != DType::f32 && (g.a_along_k || !g.b_along_k);
  if (!mma) return int(launch_ffma_gemm(g, sms, s));
  return int(g.a_type == DType::f16 ? launch_mma_gemm<__half>(g, sms, s) : launch_mma_gemm<__nv_bfloat16>(g, sms, s));
}

bool packed_of_size(int64_t bytes, bool dense, int64_t f_out, int64_t f_in, Packed& out) {
  const int64_t tag = bytes % kPackUnit;
  if (dense) {
    if (tag < 1 || tag > 3) return false;
    out = {panel::Kind::dense, DType(tag - 1), 1, f_out, f_in};
  } else {
    const int64_t n = tag / 9;
    if (n < 1 || n > kMaxPackedBlocks || f_out % n || f_in % n) return false;
    out = {panel::Kind(1 + tag % 9 / 3), DType(tag % 3), n, f_out / n, f_in / n};
  }
  return out.bytes() == bytes;
}

int dense_linear(const Packed& what, const void* packed, const void* x, DType x_type, int64_t tokens, const void* bias, DType bias_type, Activation act,
                 void* y, Stream stream, int shape) {
  Gemm g;
  g.a[0].p = x, g.a[0].ld = what.d_in, g.a_type = g.out_type = x_type;
  g.b[0].p = static_cast<const char*>(packed) + kPackHeader, g.b[0].ld = what.ld(), g.b_type = what.dtype;
  g.m = int(tokens), g.n = int(what.d_out), g.k = int(what.d_in);
  g.out[0] = y, g.out_ld = what.d_out;
  g.bias = bias, g.bias_type = bias_type, g.act = act;
  g.header = static_cast<const uint32_t*>(packed);
  what.words(g.expected);
  g.shape = shape;
  return gemm(g, stream);
}

int pack(const Packed& what, const void* first, const void* second, DType from, void* to, Stream stream) {
  PackArgs p{first, second, from, what.dtype, what.n * what.d_out, what.d_in, what.ld(), {}};
  what.words(p.words);
  const int64_t elements = (what.bytes() / kPackUnit * kPackUnit - kPackHeader) / what.element();
  Launch at;
  at.grid = blocks_for(elements);
  at.block = dim3(kThreads);
  at.stream = static_cast<cudaStream_t>(stream);
  return int(launch(pack_rows_kernel, at, p, to, elements));
}

int dense_unpack(const Packed& what, const void* packed, float* out, Stream stream) {
  Gemm p;
  p.header = static_cast<const uint32_t*>(packed);
  what.words(p.expected);
  const int64_t elements = what.d_out * what.d_in;
  if (elements == 0) return 0;
  Launch at;
  at.grid = blocks_for(elements);
  at.block = dim3(kThreads);
  at.stream = static_cast<cudaStream_t>(stream);
  return int(launch(unpack_rows_kernel, at, p, what.dtype, what.d_in, what.ld(), out, elements));
}

int column_sums(const void* x, DType type, int64_t rows, int64_t columns, int64_t ld, int64_t step, float* sums, Stream stream) {
  if (columns == 0) return 0;
  Launch at;
  at.grid = dim3(unsigned((columns + 31) / 32));
  at.block = dim3(kThreads);
  at.stream = static_cast<cudaStream_t>(stream);
  return int(launch(column_sums_kernel, at, x, type, rows, columns, ld, step, sums));
}

const char* gemm_error_text(int error) {
#ifdef EFFK_CUEMU
  (void)error;
  return "the emulation has no CUDA errors";
#else
  return cudaGetErrorString(static_cast<cudaError_t>(error));
#endif
}

}  // namespace effk::cuda
