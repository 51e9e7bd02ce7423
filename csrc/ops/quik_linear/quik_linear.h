// Contract of quik_linear: y = x W^T + bias for low-bit weights and activations, with some columns of x and W in 16 bits. Shared
// by the CPU tiers and CUDA. Names as in Ashkboos et al., "QUIK", 2023, arXiv:2310.09259, algorithm 1.
//
// Columns of x are cut into K_b base columns and n_o outliers (QuikSplit). Of a row of base columns, fp32, b = bits_a:
//   h = 2^(b-1), L = 2^b - 1, lo and hi the least and the greatest value
//   kernel:  s = max((hi - lo) / L, 1e-6),  z = lo,      qx = clip(rint((x - lo) * (1 / s)), 0, L) - h
//   sim:     lo = min(lo, 0), hi = max(hi, 0), both 0: -1 and 1;  s = (hi - lo) / L,  zi = rint(-lo / s),
//            qx = clip(rint(x * (1 / s)) + zi, 0, L) - h,  z = -s zi
// all in fp32, each operation rounded, ties to even. NaN or infinity anywhere in the row, outliers included, or an s that is
// not finite: s = z = NaN, qx = 0, so that the row of y is NaN.
//
//   A[m, n] = sum_k qx[m, k] (u[n, k] - 2^(bits_w-1))       exact int32; u: codes of the weight, t16 (formats/t16.h)
//   y[m, n] = fma(float(A), s[m] sw[n], (z[m] + h s[m]) R[n]) + bias[n] + sum_o x_out[m, o] W_out[n, o]
// fp32, z + h s is one fma, o ascending in one chain behind the bias (csrc/gemm), then one rounding. R[n] = sw[n] sum_k q[n, k].
// Integers are exact and every floating-point sum has a fixed order: a row's result depends neither on the other rows nor on the
// number of threads.
//
// Weight-only: bits_a = 16, or few rows (QuikLinearArgs::weight_only) in mode "kernel". The same bytes through the kernels of
// wq_linear: no activation is rounded, so results are nearer to those of the float layer.
//
// Nothing here checks, allocates or throws; buffers need no alignment; m = 0 is legal; y overlaps nothing.
// Cost: M N (K_b + 2 n_o) multiply-adds of bytes with x in bf16 (M N (K_b + 4 n_o) in fp32), 4 passes over x that stay in a
// first-level cache, and M N (5 fp32 operations) at the end, while results are there.
#pragma once
#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "common/parallel.h"

namespace effk {

constexpr int64_t kQuikMaxBase = 131071;  // columns: 128 * 128 * K_b < 2^31

struct QuikSplit {
  const int32_t* base;      // [n_base] columns of x, in the order of the weight's columns; or null: 0, 1, ..
  const int32_t* outlier;   // [n_out], or null: n_base, n_base + 1, ..
  int64_t k, n_base, n_out; // n_base + n_out = k
};

struct QuikWeight {
  const uint8_t* packed;    // t16 of [n, n_base], symmetric
  const float* scales;      // t16 with one group a row: [tiles][16], so scale n lies at n
  const float* reduced;     // [n]: R
  const void* outliers;     // CPU: panels of [n, n_out] (formats/panel.h), behind their header; null when n_out = 0
  DType out_dtype;          // of the panels
  const void* bias;         // [n] of bias_dtype, or null
  DType bias_dtype;
  int64_t n;
  int32_t bits;             // 4, 8
};

enum class QuikMode : int32_t { kernel = 0, sim = 1 };

// bits: of the activations, 4 or 8.
struct QuikQuantizeArgs {
  const void* x;            // [m, split.k]
  DType x_dtype;
  int64_t m;
  QuikSplit split;
  int32_t bits;
  QuikMode mode;
  uint8_t* qx;              // 8: int8 [m, n_base]; 4: [m, ceil(n_base / 2)], column 2j in the low nibble, two's complement
  float *scale, *zero;      // [m]
  void* x_out;              // [m, n_out] of x_dtype
};
size_t quik_quantize_workspace(const QuikQuantizeArgs&, int threads);
void quik_quantize(const QuikQuantizeArgs&, void* workspace, const ParallelFor&);

struct QuikIntMatmulArgs {
  const uint8_t* qx;        // as above
  int64_t m, k;
  int32_t bits_a;
  const uint8_t* packed;
  int64_t n;
  int32_t bits_w;
  int32_t* acc;             // [m, n]
};
size_t quik_int_matmul_workspace(const QuikIntMatmulArgs&, int threads);
void quik_int_matmul(const QuikIntMatmulArgs&, void* workspace, const ParallelFor&);

struct QuikDequantizeArgs {
  const int32_t* acc;       // [m, n]
  const float *scale, *zero, *w_scale, *w_reduced;
  const void* y_in;         // [m, n] of y_in_dtype, added in fp32; or null
  DType y_in_dtype;
  int64_t m, n;
  int32_t bits_a;
  void* y;                  // [m, n] of y_dtype
  DType y_dtype;
};
void quik_dequantize(const QuikDequantizeArgs&, const ParallelFor&);

// Several weights may share one x: it is quantised once.
struct QuikLinearArgs {
  const void* x;            // [m, split.k]
  DType x_dtype;            // y has it too
  int64_t m;
  QuikSplit split;
  const QuikWeight* weights;
  void* const* y;           // y[i]: [m, weights[i].n]
  int n_weights;
  int32_t bits_a;           // 4, 8, 16
  QuikMode mode;
};
// Up to this many rows mode "kernel" multiplies weights that are expanded, not activations that are rounded.
constexpr int64_t kQuikFewRows = 8;
inline bool quik_weight_only(const QuikLinearArgs& a) { return a.bits_a == 16 || (a.mode == QuikMode::kernel && a.m <= kQuikFewRows); }

size_t quik_linear_workspace(const QuikLinearArgs&, int threads);
void quik_linear(const QuikLinearArgs&, void* workspace, const ParallelFor&);

}  // namespace effk
