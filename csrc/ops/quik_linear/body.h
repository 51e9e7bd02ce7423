// Splitting, quantising and dequantising, over the vector vocabulary of csrc/simd. A tier file defines EFFK_TIER, includes its
// vocabulary and this file. Formulas: quik_linear.h.
//
//   quantize    a row: base columns widened and put beside each other run by run (16 at a time, no gather; what a run's last vector
//               writes too much the next run overwrites), minimum, maximum and a sum that only finite values leave at zero, then
//               codes and their sum. Four passes of 16 KB in the first-level cache, about 1 % of a product with 4096 columns.
//   dequantize  three fused multiply-adds a result, beside the product's results in the first-level cache.
#pragma once
#include <cmath>
#include <cstring>
#include <limits>

#include "ops/quik_linear/kernels.h"
#include "simd/convert.h"

namespace effk::EFFK_TIER {
namespace {

using quik::Columns;

template <DType T> void gather_base(const Columns& c, const void* x, float* to) {
  for (int64_t i = 0; i < c.count; ++i) {
    const int64_t from = c.runs[i].from, length = c.runs[i].length;
    int64_t j = 0;
    for (; j < length && from + j + 16 <= c.split.k; j += 16) store_f32(to + j, load_as<T>(x, from + j));
    if (j < length) store_f32(to + j, load_part<T>(x, from + j, int(length - j)));
    to += length;
  }
}
template <class Word> void copy_columns(const Columns& c, const Word* x, Word* base, Word* out) {
  const QuikSplit& s = c.split;
  if (base)
    for (int64_t i = 0; i < c.count; ++i) {
      std::memcpy(base, x + c.runs[i].from, size_t(c.runs[i].length) * sizeof(Word));
      base += c.runs[i].length;
    }
  if (s.n_out == 0) return;
  if (!s.outlier) std::memcpy(out, x + s.n_base, size_t(s.n_out) * sizeof(Word));
  else
    for (int64_t i = 0; i < s.n_out; ++i) out[i] = x[s.outlier[i]];
}
void split_row(const Columns& c, const void* x, DType dtype, void* base, void* x_out) {
  if (dtype == DType::f32) copy_columns(c, static_cast<const uint32_t*>(x), static_cast<uint32_t*>(base), static_cast<uint32_t*>(x_out));
  else copy_columns(c, static_cast<const uint16_t*>(x), static_cast<uint16_t*>(base), static_cast<uint16_t*>(x_out));
}

struct Range { float scale, zero, inverse, shift; };
Range range_of(float lo, float hi, int bits, bool sim) {
  const float top = float((1 << bits) - 1);
  if (!sim) {
    const float s = std::fmax((hi - lo) / top, 1e-6f);
    return {s, lo, 1.0f / s, lo};
  }
  lo = std::fmin(lo, 0.0f);
  hi = std::fmax(hi, 0.0f);
  if (lo == 0.0f && hi == 0.0f) lo = -1.0f, hi = 1.0f;
  const float s = std::fmax((hi - lo) / top, std::numeric_limits<float>::min()), zi = std::nearbyint(-lo / s);
  return {s, -s * zi, 1.0f / s, zi};
}

// The stored codes of 16 values.
template <bool Sim> EFFK_INLINE vi codes_of(vf x, vf inverse, vf shift, vf top, vi half) {
  vf q;
  if constexpr (Sim) q = add_f(to_float(round_to_int(mul_f(x, inverse))), shift);
  else q = mul_f(sub_f(x, shift), inverse);
  return sub_i(round_to_int(min_f(max_f(q, zero_f()), top)), half);
}
template <bool Sim> int32_t quantize_values(const float* x, int64_t n, const Range& range, int bits, int8_t* to, int64_t unit_step) {
  const vf inverse = set_f(range.inverse), shift = set_f(range.shift), top = set_f(float((1 << bits) - 1));
  const vi half = set_i(1 << (bits - 1));
  vi sum = zero_i();
  int64_t i = 0;
  for (; i + 64 <= n; i += 64, to += unit_step)
#pragma GCC unroll 4
    for (int j = 0; j < 64; j += 16) {
      const vi q = codes_of<Sim>(load_f32(x + i + j), inverse, shift, top, half);
      sum = add_i(sum, q);
      store_s8(to + j, q);
    }
  int32_t total = reduce_add_i(sum);
  if (i == n) return total;
  alignas(64) int8_t last[64];
  for (int j = 0; j < 64; j += 16) store_s8(last + j, codes_of<Sim>(load_f32(x + i + j), inverse, shift, top, half));
  for (int64_t j = n - i; j < 64; ++j) last[j] = 0;
  for (int j = 0; j < 64; ++j) total += last[j];
  std::memcpy(to, last, 64);
  return total;
}

void quantize_row(const Columns& c, int bits, bool sim, const quik::Row& row) {
  const int64_t n = c.split.n_base;
  float* x = row.room;
  switch (row.dtype) {
    case DType::bf16: gather_base<DType::bf16>(c, row.x, x); break;
    case DType::f16: gather_base<DType::f16>(c, row.x, x); break;
    default: gather_base<DType::f32>(c, row.x, x);
  }
  split_row(c, row.x, row.dtype, nullptr, row.x_out);
  for (int64_t i = n; i < quik::padded(n); ++i) x[i] = x[0];
  vf lo = set_f(x[0]), hi = lo, other = zero_f();  // 0 * x is not 0 where x is NaN or infinite
  for (int64_t i = 0; i < n; i += 16) {
    const vf v = load_f32(x + i);
    lo = min_f(v, lo);
    hi = max_f(v, hi);
    other = mac(v, zero_f(), other);
  }
  for (int64_t i = 0; i < c.split.n_out; i += 16) {
    const int64_t left = c.split.n_out - i;
    other = mac(load_floats(static_cast<const char*>(row.x_out) + i * int64_t(bytes_of(row.dtype)), row.dtype, int(left < 16 ? left : 16)), zero_f(), other);
  }
  alignas(64) float least[16], greatest[16];
  store_f32(least, lo), store_f32(greatest, hi);
  for (int i = 1; i < 16; ++i) least[0] = std::fmin(least[0], least[i]), greatest[0] = std::fmax(greatest[0], greatest[i]);
  const Range range = range_of(least[0], greatest[0], bits, sim);
  int32_t sum = 0;
  if (!(reduce_add_f(other) == 0.0f) || !std::isfinite(range.scale)) {
    for (int64_t u = 0; u < quik::padded(n) / 64; ++u) std::memset(row.codes + u * row.unit_step, 0, 64);
    *row.scale = *row.zero = std::numeric_limits<float>::quiet_NaN();
  } else {
    sum = sim ? quantize_values<true>(x, n, range, bits, row.codes, row.unit_step) : quantize_values<false>(x, n, range, bits, row.codes, row.unit_step);
    *row.scale = range.scale;
    *row.zero = range.zero;
  }
  if (row.sum) *row.sum = sum;
}

void dequantize_rows(const quik::Dequantize& d) {
  for (int64_t r = 0; r < d.rows; ++r) {
    const vf scale = set_f(d.scale[r]), zero = set_f(std::fmaf(d.half, d.scale[r], d.zero[r]));
    const int32_t* acc = d.acc + r * d.lda;
    float* to = d.to + r * d.lda;
    const char* add = static_cast<const char*>(d.add) + r * d.add_row * int64_t(bytes_of(d.add_dtype));
    for (int64_t j = 0; j < d.columns; j += 16) {
      const int count = int(d.columns - j < 16 ? d.columns - j : 16);
      vf y = mul_f(zero, load_f32_part(d.w_reduced + j, count));
      y = fma(to_float(load_unit(acc + j)), mul_f(scale, load_f32(d.w_scale + j)), y);
      if (d.add) y = add_f(y, load_floats(add + j * int64_t(bytes_of(d.add_dtype)), d.add_dtype, count));
      store_f32(to + j, y);
    }
  }
}

}  // namespace
}  // namespace effk::EFFK_TIER
