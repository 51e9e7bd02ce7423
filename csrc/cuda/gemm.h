// A family of matrix products in one launch, as dense_linear and dyad_linear need them on CUDA: what the kernels of
// ops/dense_linear/cuda_*.cu take. Plain C++; every pointer is device memory.
//
//   out[m, n] = act(sum over segments and k of a[m, k] b[n, k] + bias)        for each problem; fp32 sums, k ascending
//
// A problem is a block and, where the outputs of a block belong to `classes` interleaved groups, one of those: class c
// of block d has the features f = d * side + first + j * classes, j = 0, 1, ..., which are those with f % classes == c;
// side is the number of features of a block, and quotient = f(j = 0) / classes. So a product whose second half is
// scattered with a stride (DYAD's output transpose) is n * n ordinary products with K = 2 k, each complete in one
// place: bias and activation fit the epilogue.
#pragma once
#include <cstdint>

#include "common/activation.h"
#include "common/dtype.h"

namespace effk::cuda {

using Stream = void*;

// Elements from the start of an array to the first one of a problem: the sum of these times its numbers.
struct Offset {
  int64_t block = 0, cls = 0, first = 0, quotient = 0;
};

// Element (row, k) lies at row * ld + k * step (along k) or k * ld + row * step.
struct Operand {
  const void* p = nullptr;
  Offset at;
  int64_t ld = 0;
  int step = 1;
};

struct Gemm {
  Operand a[2], b[2];             // of each segment of K
  DType a_type{}, b_type{}, out_type{};
  bool a_along_k = true, b_along_k = true;
  int m = 0, n = 0, k = 0;        // of a block; k of a segment
  int segments = 1;
  int blocks = 1, classes = 1;
  bool features_on_m = false;     // where features lie, which classes split and to which bias is added; else on n
  int first_out = 0, outs = 0;    // outs > 0: segment s is a product of its own, written to out[s], for s in [first_out, + outs)

  void* out[2] = {};
  Offset out_at;
  int64_t out_ld = 0;             // of m
  int out_step = 1;               // of n
  const void* bias = nullptr;
  DType bias_type{};
  Activation act = Activation::none;
  // Not null (features on n only): a second copy of the results in the order of residues, as the next layer takes them:
  // feature f of row i at i * ld + f % count * (ld / count) + f / count.
  void* residues = nullptr;
  int residue_count = 1;
  int64_t residue_ld = 0;

  // Not null: eight words that must be these; the results are NaN where they are not. Weights that were packed on the
  // device start with such words, which the host cannot look at without waiting.
  const uint32_t* header = nullptr;
  uint32_t expected[8] = {};

  int shape = 0;                  // 0: chosen; else its number, for tests and timing
};

constexpr int kGemmMaxSide = 1 << 30;

// Both operands and the result of one 16-bit type: tensor cores. Everything else: fp32 multiply-adds, operands widened.
int gemm(const Gemm& g, Stream stream);

const char* gemm_error_text(int error);

}  // namespace effk::cuda
