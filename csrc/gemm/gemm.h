// Contract of the shared matrix products: y = act(x W^T + bias) for dense and DYAD weights in panels, and the gradient of
// DYAD weights. dense_linear and dyad_linear are thin callers.
//
//   dense   y[t, o] = sum_i W[o, i] x[t, i]
//   it      y[t, d d_out + o] = sum_i wl[d, o, i] x[t, d d_in + i] + sum_i wu[d, o, i] x[t, i n + d]
//   ot, dt  y[t, d d_out + o] = sum_i wl[d, o, i] x[t, d d_in + i]
//           y[t, o n + d]    += sum_i wu[d, o, i] x[t, d d_in + i]  (ot)   or   x[t, i n + d]  (dt)
//
// Accumulation in fp32 (bf16 dot products where x and the panels are bf16 and the CPU has them), k ascending
// in chains of 64 products that are added up, the bias with the first (errors within 2e-6 of the results' rms), wl before wu; ot and dt add the two sums at
// the end. So a row's result depends neither on the other rows nor on
// the number of threads. Then the activation, then one rounding to the type of x.
// Nothing here checks arguments, allocates or throws; buffers need no alignment; tokens = 0 is legal.
#pragma once
#include <cstddef>
#include <cstdint>

#include "common/activation.h"
#include "common/dtype.h"
#include "common/parallel.h"
#include "formats/panel.h"

namespace effk::gemm {

struct LinearArgs {
  panel::Shape shape;
  const uint8_t* panels;      // behind the header
  const void* x;              // tokens: [tokens, f_in]; features: [f_in, tokens]
  DType dtype;                // of x and y
  bool features;
  int64_t tokens;
  const void* bias;           // [f_out] of bias_dtype, or null
  DType bias_dtype;
  Activation act;
  void* y;                    // [tokens, f_out] or [f_out, tokens]
};
constexpr int64_t f_in(const panel::Shape& s) { return s.n * s.d_in; }
constexpr int64_t f_out(const panel::Shape& s) { return s.n * s.d_out; }

size_t linear_workspace(const LinearArgs&, int threads);  // bytes, 64-byte aligned, allocated by the caller
void linear(const LinearArgs&, void* workspace, const ParallelFor&);

// second(first(x)) tile by tile over tokens: what lies between stays in a second-level cache. second.x is not read; both are
// in the layout of tokens.
size_t linear_pair_workspace(const LinearArgs& first, const LinearArgs& second, int threads);
void linear_pair(const LinearArgs& first, const LinearArgs& second, void* workspace, const ParallelFor&);

// Panels of `shape` from row-major weights [n, d_out, d_in] (transposed: [n, d_in, d_out], for the gradient of x); wu is
// null when dense.
void pack(const panel::Shape& shape, const void* wl, const void* wu, DType dtype, bool transposed, uint8_t* panels, const ParallelFor&);

// gwl[d, o, i] = sum_t gy[t, d d_out + o] x[t, d d_in + i]                        k = t ascending
// gwu[d, o, i] = the same with o n + d for the row of gy (ot, dt) and i n + d for the column of x (it, dt)
struct GradientArgs {
  panel::Kind kind;
  int64_t n, d_out, d_in;
  const void *x, *gy;
  DType dtype;                // of both
  bool features;
  int64_t tokens;
  void *gwl, *gwu;            // [n, d_out, d_in] of w_dtype, or null
  DType w_dtype;
};
size_t gradient_workspace(const GradientArgs&, int threads);
void gradient(const GradientArgs&, void* workspace, const ParallelFor&);

// sum[j] over tokens of gy[t, j].
void column_sums(const void* gy, DType dtype, bool features, int64_t tokens, int64_t columns, float* sum, const ParallelFor&);

const char* kernel_name(DType x, DType panels);  // what a call would use, e.g. "avx512:gemm:fp32"

}  // namespace effk::gemm
