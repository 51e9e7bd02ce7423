// One token on its way into attention: rotary positions, the query in the form that meets the keys, key and value into the cache.
#pragma once
#include "ops/attention/products.h"

namespace effk::EFFK_TIER {
namespace {

using attention::Turn;

// to = x with the channels (i, i + half) turned.
EFFK_INLINE void turned(const float* x, int64_t d, const Turn& t, float* to) {
  for (int64_t i = 2 * t.half; i < d; i += 16) {
    const int n = int(d - i < 16 ? d - i : 16);
    store_some<DType::f32>(to + i, n, load_some<DType::f32>(x + i, n));
  }
  for (int64_t i = 0; i < t.half; i += 16) {
    const int n = int(t.half - i < 16 ? t.half - i : 16);
    const auto load = [&](const float* p) { return load_some<DType::f32>(p + i, n); };
    const vf c = load(t.cosine), s = load(t.sine), a = load(x), b = load(x + t.half);
    store_some<DType::f32>(to + i, n, sub_f(mul_f(a, c), mul_f(b, s)));
    store_some<DType::f32>(to + t.half + i, n, add_f(mul_f(b, c), mul_f(a, s)));
  }
}

// The largest magnitude; NaN where one value is no number or infinite.
EFFK_INLINE float largest(const float* x, int64_t d) {
  vf most = zero_f(), poison = zero_f();
  for (int64_t i = 0; i < d; i += 16) {
    const vf v = load_f32(x + i);
    most = max_f(most, max_f(v, sub_f(zero_f(), v)));
    poison = mac(v, zero_f(), poison);
  }
  return reduce_max_f(most) + reduce_add_f(poison);
}
constexpr float kTiny = 1e-30f;  // what is no larger is stored as zero: its reciprocal might be infinite
EFFK_INLINE float over(float range, float most) { return most > kTiny ? range / most : 0.0f; }

constexpr float kQueryRange = 127 * 128;

[[maybe_unused]] void prepare(const float* x, int64_t d, const Turn& turn, float scale, Type type, float* to) {
  alignas(64) float q[kv::kMaxHeadDim];
  turned(x, d, turn, q);
  if (type != Type::i8) {
    for (int64_t i = 0; i < d; i += 16) store_f32(to + i, mul_f(load_f32(q + i), set_f(scale)));
    return;
  }
  auto* bytes = reinterpret_cast<int8_t*>(to);
  const float most = largest(q, d), unit = most * (scale / kQueryRange);
  const vf by = set_f(over(kQueryRange, most));
  vi sum = zero_i();
  for (int64_t i = 0; i < d; i += 16) {
    const vi code = round_to_int(mul_f(load_f32(q + i), by));
    const vi high = round_to_int(mul_f(to_float(code), set_f(1.0f / 128)));
    sum = add_i(sum, code);
    store_s8(bytes + i, high);
    store_s8(bytes + d + i, sub_i(code, shift_left<7>(high)));
  }
  const int32_t offset = int32_t(128u * uint32_t(reduce_add_i(sum)));
  std::memcpy(bytes + 2 * d, &unit, 4);
  std::memcpy(bytes + 2 * d + 4, &offset, 4);
}

// Codes of 8 bits, plus `offset`, and their scale.
EFFK_INLINE float quantise(const float* x, int64_t d, int32_t offset, uint8_t* to) {
  const float most = largest(x, d);
  const vf by = set_f(over(127, most));
  alignas(64) int32_t codes[16];
  for (int64_t i = 0; i < d; i += 16) {
    store_unit(codes, add_i(round_to_int(mul_f(load_f32(x + i), by)), set_i(offset)));
    for (int l = 0; l < 16; ++l) to[i + l] = uint8_t(codes[l]);
  }
  return most > kTiny || most != most ? most / 127 : 0.0f;
}

// Elements of `size` bytes, `group` of them together, to lane p % 16 of a tile.
template <int kBytes> EFFK_INLINE void scatter(const uint8_t* from, int64_t count, uint8_t* to) {
  for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * kv::kTile * kBytes, from + i * kBytes, kBytes);
}

[[maybe_unused]] void append(const float* k, const float* v, int64_t d, const Turn& turn, Type type, int64_t p, uint8_t* keys, uint8_t* values,
                             float* k_scale, float* v_scale) {
  alignas(64) float key[kv::kMaxHeadDim];
  alignas(64) uint8_t row[kv::kMaxHeadDim * 4];
  turned(k, d, turn, key);
  uint8_t *key_at = keys + kv::key_byte(type, d, p, 0), *value_at = values + kv::value_byte(type, d, p, 0);
  switch (type) {
    case Type::f32:
      std::memcpy(row, key, size_t(d) * 4);
      std::memcpy(value_at, v, size_t(d) * 4);
      return scatter<4>(row, d, key_at);
    case Type::f16:
      for (int64_t i = 0; i < d; i += 16) store_f16(row + 2 * i, load_f32(key + i)), store_f16(value_at + 2 * i, load_f32(v + i));
      return scatter<2>(row, d, key_at);
    case Type::i8:
      k_scale[p] = quantise(key, d, 128, row);
      scatter<4>(row, d / 4, key_at);
      v_scale[p] = quantise(v, d, 0, value_at);
  }
}

}  // namespace
}  // namespace effk::EFFK_TIER
