// Contract of wq_linear: y = x W^T + sparse(x) + bias for low-bit weights, shared by the CPU tiers and CUDA.
//
//   W[n, k]   = s[n, g] * (q[n, k] - z[n, g])      integer codes (z = 2^(b-1) when there are no zeros)
//             = s[n, g] * T[q[n, k]]               codebook; int8 form: shared T only, as rint(T * 127 / max|T|)
// K is cut into blocks h of t16::act_group(group) <= 128 columns, each inside one group g(h):
//   float:  y[m, n] = sum_h s[n, g(h)] * ( sum_{k in h} (q - z) x[m, k] )       fp32 accumulation, k ascending
//   int8:   per row m and block h: v = max|x|, a = v / 127, xq = rint(x * (127 / v)), all fp32, ties to even;
//           v < 2^-119 counts as zero (a = 0, xq = 0)
//           y[m, n] = sum_h (a[m, h] s[n, g(h)]) * ( sum_{k in h} q xq - z * sum_{k in h} xq ),  h ascending, one fma each
//   sparse: y[m, n] += sum_j v[j] x[m, c[j]], j over the row's entries, columns ascending, one fma each from 0, fp32; then
//           + bias; then one rounding.
//
// Integer sums are exact, and the order of every floating-point sum is fixed: a result depends on neither the tier (int8
// form), nor the thread count, nor the other rows of the batch. A row of x with a non-finite value gives a row of NaN
// in the int8 form, and whatever IEEE arithmetic gives in the float form.
// Nothing here allocates, starts threads or throws: arguments are checked by the caller. No buffer needs to be aligned;
// 64-byte alignment of `packed` is faster. y must not overlap any input. M = 0 and N = 0 are legal.
#pragma once
#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "common/parallel.h"
#include "formats/t16.h"

namespace effk {

enum class Compute : int32_t { fp = 0, int8 = 1 };

struct WqWeight {
  const uint8_t* packed;     // t16
  const void* scales;        // t16, fp16 or fp32
  const uint8_t* zeros;      // t16, or null: symmetric
  const float* codebook;     // or null: integers
  const int32_t* out_ptr;    // outliers, t16: [N + 1], or null
  const void* out_col;       // [nnz] uint16, or int32 when K > 65536
  const uint16_t* out_val;   // [nnz] fp16
  const void* bias;          // [N] of bias_dtype, or null
  int64_t n, k;
  int32_t bits;              // 2, 3, 4, 8
  int32_t group;             // 32, 64, 128, 256, or 0: one group per row
  bool scales_f32, codebook_per_row, col32;
  DType bias_dtype;
  int64_t bias_row;          // CPU: elements between the biases of neighbouring rows of x; 0: all rows share them
};

// Several weights may share one x (q, k, v; gate, up): they are quantised once and run as one parallel region.
struct WqLinearArgs {
  const void* x;             // [m, k], rows contiguous
  DType x_dtype;             // y has it too
  int64_t m, k;
  const WqWeight* weights;
  void* const* y;            // y[i]: [m, weights[i].n]
  int n_weights;
  Compute compute;
};

size_t wq_linear_workspace(const WqLinearArgs&);  // bytes; the caller allocates, 64-byte aligned
void wq_linear(const WqLinearArgs&, void* workspace, const ParallelFor&);

// The kernels that a call would use, e.g. "avx512vnni:int8:gemv". For `effk info`, tests and bench.
const char* wq_linear_kernel_name(const WqLinearArgs&);

// Packing, portable: canonical rows (little-endian bit stream, qweight[N, ceil(K*bits/8)]) <-> t16, and W as fp32 [N, K].
// scale_bytes is 2 or 4; zeros may be null; codebook_row is fp32 [N, 2^bits] or null.
void wq_pack(const uint8_t* qweight, const void* scales, const uint8_t* zeros, int64_t n, int64_t k, int bits, int64_t group,
             int scale_bytes, uint8_t* packed, void* scales_p, uint8_t* zeros_p);
void wq_unpack(const uint8_t* packed, const void* scales_p, const uint8_t* zeros_p, int64_t n, int64_t k, int bits, int64_t group,
               int scale_bytes, uint8_t* qweight, void* scales, uint8_t* zeros);
WqWeight wq_cut(WqWeight, int64_t begin, int64_t end);  // its rows [16 begin, 16 end), a view: the outer index of every array is the tile
void wq_dequantize(const WqWeight&, float* w);  // includes outliers: the dense code under one is its zero point

}  // namespace effk
