// CUDA side of wq_linear: the launch functions of cuda*.cu in this folder, free of torch and of CUDA headers. Layouts and
// formulas are those of wq_linear.h; every pointer is device memory. They launch on `stream` (a cudaStream_t) of the
// current device, wait for nothing, allocate nothing, and return a cudaError_t (0: launched).
//
// Only the float form exists here. The order of its sums: k inside a group by the tensor core, groups ascending inside a
// slice of K, the slices ascending, then the outliers, then the bias; always in fp32, the same for every call of a shape.
// `outliers` is the number of entries of out_col and out_val. Indices among them that point outside the matrix are not
// followed; in wq_linear they make the row NaN.
#pragma once
#include "ops/wq_linear/wq_linear.h"

namespace effk::cuda {

using Stream = void*;

constexpr int kMaxRows = 64;              // M above this: dequantise, then a library GEMM
constexpr int64_t kMaxColumns = 1 << 24;  // K: offsets inside a panel of rows fit 32 bits
constexpr int kAlignment = 16;            // of packed, scales and zeros (copies of 16 bytes); x may lie anywhere

// y = x W^T + sparse + bias for 1 <= m <= kMaxRows, n >= 1, x and y fp16 or bf16.
// Rows of x are ldx elements apart (0: k); y_in, fp32 [m, n] or null, is added before the bias.
// Integer codes are exact in 16 bits. A codebook entry is split into two parts of x's type, which leaves an error of at
// most 2^-16 of it for bf16, and of 2^-21 of it plus 2^-25 for fp16.
int wq_linear(const WqWeight& w, int outliers, const void* x, void* y, DType dtype, int m, Stream stream, int64_t ldx = 0,
              const float* y_in = nullptr);

// out[n, k] = W with its outliers, in `dtype`: one fp32 product each, rounded once; then the outlier added, rounded again.
int wq_dequantize(const WqWeight& w, int outliers, void* out, DType dtype, Stream stream);

const char* error_text(int error);

}  // namespace effk::cuda
