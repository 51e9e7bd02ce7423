// How CUDA factors a transform of fftconv, and what its spectrum buffer holds. Plain C++: host, kernels and binding read it.
//
// Every mode is one negacyclic product. A row of L real samples is a polynomial of the ring R[x] / (x^2M + 1), which is
// C[z] / (z^M - i) with z[n] = v[n] + i v[n + M]: M complex points hold a product of 2 M real ones. With L <= M the row is
// purely real and so is what is wanted of the result: no two rows share a transform, no padding is stored, the first
// contraction takes half of the products and the last one gives half. The modes differ in the filter's ring element g only:
//   causal          g[j] = k[j]                                                       2 M = n_fft (promoted to 2^a)
//   bidirectional   g[j] = k[j] for lags j >= 0,  g[2M - j] = -k[n_fft - j] for -j    2 M = n_fft (promoted to 2^a)
//   circular        g[j] = k[j],  g[2M - j] = -k[n_fft - j]: both periods             M = n_fft (promoted to 2^a)
// Bin f of the transform is X[f] = sum_n z[n] exp(-2 pi i n (f + 3/4) / M), a point where z^M = i; the three quarters enter the first
// stage alone.
//
// Stages run over factors, n = n_1 M/N_1 + ...; position (k_1, ..., k_p), row-major, holds f = k_1 + N_1 k_2 + N_1 N_2 k_3 ...
// A second plan of the same M keeps the order as long as it has the same factors; it is fixed when a filter is prepared.
#pragma once
#include <cstdint>

#include "formats/spectrum.h"

namespace effk::cuda::fftconv {

using spectrum::Mode;
using spectrum::Scheme;

constexpr int kMinLog = 8, kMaxInnerLog = 15, kMaxOuterLog = 8;  // 256 .. 32K points in one kernel, 256 of them outside
constexpr int kMaxLog = kMaxInnerLog + kMaxOuterLog;             // 8M complex points: n_fft = 2^24

// Bytes of shared memory of the kernel for 2^log points; kernels with fewer than 4096 points take several rows a block.
constexpr int kBlockPoints = 8192;
constexpr int points_of(int log) { return (1 << log) < kBlockPoints ? kBlockPoints : 1 << log; }
constexpr int kReduceBytes = 192;  // a float a warp, a float a row
constexpr int smem_of(int log) { return points_of(log) * 4 + kReduceBytes; }

// Factors of 2^log inside one kernel; n1 = 1: two stages.
struct Factors { int n1, n2, n3; };
constexpr Factors factors_of(int log) {
  switch (log) {
    case 8: return {1, 16, 16};
    case 9: return {1, 32, 16};
    case 10: return {1, 32, 32};
    case 11: return {8, 16, 16};
    case 12: return {16, 16, 16};
    case 13: return {32, 16, 16};
    case 14: return {32, 32, 16};
    default: return {32, 32, 32};
  }
}

struct Plan {
  int log_m = 0;            // M complex points
  int log_outer = 0;        // of which a kernel of its own does 2^log_outer; 0: one kernel
  constexpr int64_t m() const { return int64_t(1) << log_m; }
  constexpr int outer() const { return 1 << log_outer; }
  constexpr int log_inner() const { return log_m - log_outer; }
  constexpr int inner() const { return 1 << log_inner(); }
  constexpr Factors factors() const { return factors_of(log_inner()); }
  // Row i of the outer matrix holds frequency (i / low) + high (i mod low): 64 to 256 are two factors, 16 and the rest.
  constexpr int outer_low() const { return log_outer > 5 ? 1 << (log_outer - 4) : 1; }
};

constexpr int log2_ceil(int64_t n) {
  int log = 0;
  while ((int64_t(1) << log) < n) ++log;
  return log;
}

// log_limit: what fits the device's shared memory.
constexpr Plan make_plan(int64_t n_fft, Mode mode, int log_limit) {
  Plan plan;
  plan.log_m = log2_ceil(n_fft) - (mode == Mode::circular ? 0 : 1);
  if (plan.log_m < kMinLog) plan.log_m = kMinLog;
  if (plan.log_m > log_limit) {
    plan.log_outer = 4;
    while (plan.log_m - plan.log_outer > log_limit) ++plan.log_outer;
  }
  return plan;
}

// Offsets of the tables and coefficients in a spectrum buffer, in floats (multiples of 4). The tables depend on the plan.
struct Layout {
  int64_t first, first_inverse, second, second_inverse, third;  // DFT matrices, fp16, as the fragments of an mma
  int64_t u, v, w;                                              // twiddles: stage 1 = u[k1][n2] v[k1][n3], stage 2 = w[k2][n3]
  int64_t outer, outer_inverse, outer_u, outer_v;               // the same for the outer stage: u[k][c / 32] v[k][c mod 32]
  int64_t scale, spectrum, tables_end, total;                   // scale[H]; spectrum[H][M] complex, largest in [1, 2)
};

constexpr int kQuarters = 3;  // of a bin, by which all frequencies are shifted
constexpr int kHeader = spectrum::kHeaderFloats;
constexpr int64_t matrix_floats(int n) { return n < 16 ? 512 : int64_t(n) * n; }  // re and im, 2 bytes each

// The last few floats are padding, whose number tells what the spectrum was prepared for: a size can be checked without
// waiting for the device, a header cannot.
constexpr int code_of(int64_t n_fft, Mode mode, Scheme scheme) {
  int64_t odd = n_fft;
  while (odd % 2 == 0) odd /= 2;
  const int log = log2_ceil(n_fft) - (mode == Mode::circular ? 0 : 1), promoted = log < kMinLog ? kMinLog - log : 0;
  return ((promoted * 3 + int(mode)) * 4 + int(scheme)) * 3 + (odd == 1 ? 0 : odd == 3 ? 1 : 2);
}

constexpr Layout make_layout(const Plan& plan, int64_t channels) {
  Layout at{};
  const Factors f = plan.factors();
  int64_t next = kHeader;
  const auto take = [&](int64_t floats) {
    const int64_t here = next;
    next += (floats + 3) / 4 * 4;
    return here;
  };
  at.first = take(f.n1 > 1 ? matrix_floats(f.n1) : 0);
  at.first_inverse = take(f.n1 > 1 ? matrix_floats(f.n1) : 0);
  at.second = take(matrix_floats(f.n2));
  at.second_inverse = take(matrix_floats(f.n2));
  at.third = take(matrix_floats(f.n3));
  at.u = take(f.n1 > 1 ? 2 * f.n1 * f.n2 : 0);
  at.v = take(f.n1 > 1 ? 2 * f.n1 * f.n3 : 0);
  at.w = take(2 * f.n2 * f.n3);
  const int outer = plan.log_outer ? plan.outer() : 0;
  at.outer = take(outer ? matrix_floats(outer) : 0);
  at.outer_inverse = take(outer ? matrix_floats(outer) : 0);
  at.outer_u = take(int64_t(2) * outer * (plan.inner() / 32));
  at.outer_v = take(int64_t(2) * outer * 32);
  at.tables_end = next;
  at.scale = take(channels);
  at.spectrum = take(2 * plan.m() * channels);
  at.total = next;
  return at;
}

// Radices with an odd exponent of two leave a factor of 2 each, because DFT matrices carry the power of two below 1/sqrt(N).
constexpr int log2_exact(int n) { return log2_ceil(n); }
constexpr int matrix_shift(int n) { return log2_exact(n) / 2; }  // matrices are scaled by 2^-shift
constexpr int odd_stages(const Plan& plan) {
  const Factors f = plan.factors();
  return (plan.log_outer & 1) + (log2_exact(f.n1) & 1) + (log2_exact(f.n2) & 1) + (log2_exact(f.n3) & 1);
}
// Rows are scaled by a power of two so that their largest |v| lies in [2^t, 2^(t+1)): whatever the row and the filter, no
// intermediate passes 2^16 then, because the 2-norm bounds every element of every stage.
constexpr int target_exponent(const Plan& plan) { return 13 - (plan.log_m + 1) / 2 - odd_stages(plan); }

// Words of the header, formats/spectrum.h's with a plan of their own: a spectrum of one device is refused by the other.
enum HeaderWord { kMagic = 0, kVersion, kDevicePlan, kNfft, kMode, kScheme, kChannels, kTaps, kPoints, kStride, kHeaderWords };

}  // namespace effk::cuda::fftconv
