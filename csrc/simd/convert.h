// Storage types to fp32 vectors and back, whole and in part. Included by a tier after its vector header.
#pragma once
#include <cstring>

#include "common/dtype.h"
#include "common/half.h"

namespace effk::EFFK_TIER {
namespace {

EFFK_INLINE size_t bytes_of(DType t) { return t == DType::f32 ? 4 : 2; }
template <DType T> EFFK_INLINE vf load_as(const void* p, int64_t i) {
  const char* at = static_cast<const char*>(p) + i * int64_t(bytes_of(T));
  if constexpr (T == DType::f32) return load_f32(at);
  else if constexpr (T == DType::bf16) return load_bf16(at);
  else return load_f16(at);
}
template <DType T> EFFK_INLINE void store_as(void* p, int64_t i, vf v) {
  char* at = static_cast<char*>(p) + i * int64_t(bytes_of(T));
  if constexpr (T == DType::f32) store_f32(at, v);
  else if constexpr (T == DType::bf16) store_bf16(at, v);
  else store_f16(at, v);
}
// The first `count` of 16 values; nothing beyond is read or written.
template <DType T> EFFK_INLINE vf load_part(const void* p, int64_t i, int count) {
  char part[64] = {};
  std::memcpy(part, static_cast<const char*>(p) + i * int64_t(bytes_of(T)), size_t(count) * bytes_of(T));
  return load_as<T>(part, 0);
}
template <DType T> EFFK_INLINE void store_part(void* p, int64_t i, int count, vf v) {
  char part[64];
  store_as<T>(part, 0, v);
  std::memcpy(static_cast<char*>(p) + i * int64_t(bytes_of(T)), part, size_t(count) * bytes_of(T));
}
template <DType T> EFFK_INLINE vf load_some(const void* p, int count) { return count == 16 ? load_as<T>(p, 0) : load_part<T>(p, 0, count); }
template <DType T> EFFK_INLINE void store_some(void* p, int count, vf v) { count == 16 ? store_as<T>(p, 0, v) : store_part<T>(p, 0, count, v); }
EFFK_INLINE vf load_floats(const void* p, DType t, int count) {
  switch (t) {
    case DType::bf16: return load_some<DType::bf16>(p, count);
    case DType::f16: return load_some<DType::f16>(p, count);
    default: return load_some<DType::f32>(p, count);
  }
}
EFFK_INLINE void store_floats(void* p, DType t, int count, vf v) {
  switch (t) {
    case DType::bf16: return store_some<DType::bf16>(p, count, v);
    case DType::f16: return store_some<DType::f16>(p, count, v);
    default: return store_some<DType::f32>(p, count, v);
  }
}
EFFK_INLINE float float_at(const void* p, DType t, int64_t i) {
  if (t == DType::f32) { float f; std::memcpy(&f, static_cast<const char*>(p) + 4 * i, 4); return f; }
  uint16_t h;
  std::memcpy(&h, static_cast<const char*>(p) + 2 * i, 2);
  return t == DType::bf16 ? bf16_to_float(h) : f16_to_float(h);
}

// to[i] = p[begin + i] for i < count, a multiple of 16, and 0 where begin + i is outside [0, length).
[[maybe_unused]] void read_floats(const void* p, DType t, int64_t length, int64_t begin, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t n = begin + i, lo = n < 0 ? 0 : n, hi = n + 16 < length ? n + 16 : length;
    vf v = zero_f();
    if (lo < hi) v = load_floats(static_cast<const char*>(p) + lo * int64_t(bytes_of(t)), t, int(hi - lo));
    if (lo > n && lo < hi) {  // the row begins inside these 16
      float part[16], moved[16] = {};
      store_f32(part, v);
      std::memcpy(moved + (lo - n), part, size_t(hi - lo) * 4);
      v = load_f32(moved);
    }
    store_f32(to + i, v);
  }
}
[[maybe_unused]] void write_floats(void* p, DType t, int64_t count, const float* from) {
  for (int64_t i = 0; i < count; i += 16) {
    const int part = int(count - i < 16 ? count - i : 16);
    store_floats(static_cast<char*>(p) + i * int64_t(bytes_of(t)), t, part, load_f32_part(from + i, part));
  }
}

}  // namespace
}  // namespace effk::EFFK_TIER
