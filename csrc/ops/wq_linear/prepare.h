// x as the kernels want it: operands in the order of their use, activation scales and sums (wq::Rows). Part of body.h.
#pragma once
#include <cstring>

#include "ops/wq_linear/forms.h"
#include "simd/convert.h"

namespace effk::EFFK_TIER {
namespace {

EFFK_INLINE vf load_any(const void* p, DType t, int64_t i) {
  const char* c = static_cast<const char*>(p);
  return t == DType::f32 ? load_f32(c + 4 * i) : t == DType::bf16 ? load_bf16(c + 2 * i) : load_f16(c + 2 * i);
}
EFFK_INLINE void store_any(void* p, DType t, int64_t i, vf v) {
  char* c = static_cast<char*>(p);
  if (t == DType::f32) store_f32(c + 4 * i, v);
  else if (t == DType::bf16) store_bf16(c + 2 * i, v);
  else store_f16(c + 2 * i, v);
}
EFFK_INLINE int64_t width(DType t) { return t == DType::f32 ? 4 : 2; }

// x[0 .. count) as fp32, zero-padded to a multiple of 32.
inline int load_span(const char* x, DType t, int count, float* out) {
  const int padded = (count + wq::kPadK - 1) / wq::kPadK * wq::kPadK;
  int i = 0;
  for (; i + 16 <= count; i += 16) store_f32(out + i, load_any(x, t, i));
  if (i < padded) {
    alignas(64) char tail[64] = {};
    if (i < count) std::memcpy(tail, x + i * width(t), size_t((count - i) * width(t)));
    store_f32(out + i, load_any(tail, t, 0));
    if (i + 16 < padded) store_f32(out + i + 16, zero_f());
  }
  return padded;
}

struct Quantised { float scale; int32_t sum; };
// v = max|x|, q = rint(x * (127 / v)): |q| <= 127 follows, -128 never occurs. Maxima are taken over the bit patterns, in
// which NaN and infinity are larger than every finite number.
inline Quantised quantise_span(const float* x, int padded, int8_t* q) {
  const vi magnitude = set_i(0x7fffffff);
  vi top = zero_i();
  for (int i = 0; i < padded; i += 16) top = max_i(top, bits_and(as_int(load_f32(x + i)), magnitude));
  const int32_t bits = reduce_max_i(top);
  const float v = bits_float(uint32_t(bits));
  const bool finite = bits < 0x7f800000;
  if (!finite || bits < 0x04000000) {  // 0x04000000 is 2^-119: below it 127 / v is not finite
    std::memset(q, 0, t16::kMaxActGroup);
    return {finite ? 0.0f : bits_float(0x7fc00000u), 0};
  }
  const vf inverse = set_f(127.0f / v);
  alignas(64) int8_t whole[t16::kMaxActGroup] = {};
  for (int i = 0; i < padded; i += 16) store_s8(whole + i, round_to_int(mul_f(load_f32(x + i), inverse)));
  vi sum = zero_i();
  for (int i = 0; i < padded; i += 64) sum = add_i(sum, sum_s8(load_unit(whole + i)));
  std::memcpy(q, whole, size_t(padded));
  return {v / 127.0f, reduce_add_i(sum)};
}

template <Form F> void prepare(const void* x, DType dtype, int block, const Rows& r) {
  const int rows = r.rows_in(block);
  const int64_t row0 = r.first_row(block);
  for (int64_t h = 0; h < r.spans; ++h) {
    for (int m = 0; m < rows; ++m) {
      const char* row = static_cast<const char*>(x) + (row0 + m) * r.k * width(dtype);
      const int64_t k0 = h * r.span, at = r.scale_at(block, h) + m;
      const int count = int(r.k - k0 < r.span ? r.k - k0 : r.span);
      alignas(64) float value[t16::kMaxActGroup];
      const int padded = load_span(row + k0 * width(dtype), dtype, count, value);
      int32_t* out = r.data + r.data_at(block, h, wq::steps_per_unit(F)) + m;
      if constexpr (F == Form::int8) {
        alignas(64) int32_t word[t16::kMaxActGroup / 4];
        const Quantised q = quantise_span(value, padded, reinterpret_cast<int8_t*>(word));
        r.scale[at] = q.scale;
        r.sum[at] = q.sum;
        for (int i = 0; i < padded / 4; ++i) out[i * rows] = word[i];
      } else {
        float sum = 0;
        for (int i = 0; i < padded; ++i) sum += value[i];
        r.sum[at] = int32_t(float_bits(sum));
        if constexpr (F == Form::fp32) {
          for (int i = 0; i < padded; ++i) out[i * rows] = int32_t(float_bits(value[i]));
        } else {
          for (int i = 0; i < padded; i += 4) {
            const uint32_t a = float_bits(value[i]) >> 16, b = float_bits(value[i + 1]) >> 16;
            out[(i / 2) * rows] = int32_t(a | (float_bits(value[i + 2]) & 0xffff0000u));
            out[(i / 2 + 1) * rows] = int32_t(b | (float_bits(value[i + 3]) & 0xffff0000u));
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace effk::EFFK_TIER
