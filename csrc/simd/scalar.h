// The vector vocabulary of avx512.h as plain loops over 16 lanes: the portable tier, and the readable definition of each
// operation. Needs nothing but C++17.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/half.h"

namespace effk::EFFK_TIER {
namespace {

struct vi { int32_t v[16]; };
struct vf { float v[16]; };
#define EFFK_INLINE inline __attribute__((always_inline))

template <class F> EFFK_INLINE vi make_i(const F& f) { vi r; for (int l = 0; l < 16; ++l) r.v[l] = int32_t(f(l)); return r; }
template <class F> EFFK_INLINE vf make_f(const F& f) { vf r; for (int l = 0; l < 16; ++l) r.v[l] = f(l); return r; }

EFFK_INLINE vi load_unit(const void* p) { vi r; std::memcpy(r.v, p, 64); return r; }
EFFK_INLINE void store_unit(void* p, vi v) { std::memcpy(p, v.v, 64); }
EFFK_INLINE vi set_i(int32_t x) { return make_i([=](int) { return x; }); }
EFFK_INLINE vf set_f(float x) { return make_f([=](int) { return x; }); }
EFFK_INLINE vi zero_i() { return set_i(0); }
EFFK_INLINE vf zero_f() { return set_f(0.0f); }
EFFK_INLINE vi broadcast(const int32_t* p) { int32_t x; std::memcpy(&x, p, 4); return set_i(x); }
EFFK_INLINE vi as_int(vf a) { vi r; std::memcpy(r.v, a.v, 64); return r; }
EFFK_INLINE vf as_float(vi a) { vf r; std::memcpy(r.v, a.v, 64); return r; }

EFFK_INLINE vi bits_and(vi a, vi b) { return make_i([&](int l) { return a.v[l] & b.v[l]; }); }
EFFK_INLINE vi bits_or(vi a, vi b) { return make_i([&](int l) { return a.v[l] | b.v[l]; }); }
EFFK_INLINE vi and_or(vi a, vi m, vi b) { return make_i([&](int l) { return (a.v[l] & m.v[l]) | b.v[l]; }); }
template <int S> EFFK_INLINE vi shift_right(vi a) { return make_i([&](int l) { return uint32_t(a.v[l]) >> S; }); }
template <int S> EFFK_INLINE vi shift_left(vi a) { return make_i([&](int l) { return uint32_t(a.v[l]) << S; }); }
EFFK_INLINE vi load_table(const void* p16) { vi r; for (int i = 0; i < 4; ++i) std::memcpy(r.v + 4 * i, p16, 16); return r; }
// W bits from bit S on of every byte.
template <int S, int W> EFFK_INLINE vi bits_of_bytes(vi v) { return bits_and(shift_right<S>(v), set_i(((1 << W) - 1) * 0x01010101)); }
EFFK_INLINE vi shuffle_bytes(vi t, vi index) {
  uint8_t table[64], i[64], r[64];
  std::memcpy(table, t.v, 64);
  std::memcpy(i, index.v, 64);
  for (int j = 0; j < 64; ++j) r[j] = table[i[j] & 15];
  vi out;
  std::memcpy(out.v, r, 64);
  return out;
}

EFFK_INLINE vi add_i(vi a, vi b) { return make_i([&](int l) { return uint32_t(a.v[l]) + uint32_t(b.v[l]); }); }
EFFK_INLINE vi sub_i(vi a, vi b) { return make_i([&](int l) { return uint32_t(a.v[l]) - uint32_t(b.v[l]); }); }
EFFK_INLINE vi mul_i(vi a, vi b) { return make_i([&](int l) { return uint32_t(a.v[l]) * uint32_t(b.v[l]); }); }
EFFK_INLINE vi max_i(vi a, vi b) { return make_i([&](int l) { return a.v[l] > b.v[l] ? a.v[l] : b.v[l]; }); }
EFFK_INLINE vf to_float(vi a) { return make_f([&](int l) { return float(a.v[l]); }); }
EFFK_INLINE vi round_to_int(vf a) { return make_i([&](int l) { return int32_t(std::nearbyintf(a.v[l])); }); }
EFFK_INLINE vf round_f(vf a) { return make_f([&](int l) { return std::nearbyintf(a.v[l]); }); }
constexpr float kZeroPower = -127;
EFFK_INLINE vf times_power(vf a, vf n) { return make_f([&](int l) { return a.v[l] * bits_float(uint32_t(int32_t(n.v[l]) + 127) << 23); }); }
EFFK_INLINE vf add_f(vf a, vf b) { return make_f([&](int l) { return a.v[l] + b.v[l]; }); }
EFFK_INLINE vf sub_f(vf a, vf b) { return make_f([&](int l) { return a.v[l] - b.v[l]; }); }
EFFK_INLINE vf mul_f(vf a, vf b) { return make_f([&](int l) { return a.v[l] * b.v[l]; }); }
EFFK_INLINE vf div_f(vf a, vf b) { return make_f([&](int l) { return a.v[l] / b.v[l]; }); }
EFFK_INLINE vf min_f(vf a, vf b) { return make_f([&](int l) { return a.v[l] < b.v[l] ? a.v[l] : b.v[l]; }); }
EFFK_INLINE vf max_f(vf a, vf b) { return make_f([&](int l) { return a.v[l] > b.v[l] ? a.v[l] : b.v[l]; }); }
EFFK_INLINE vf fma(vf a, vf b, vf c) { return make_f([&](int l) { return std::fmaf(a.v[l], b.v[l], c.v[l]); }); }
EFFK_INLINE vf fnma(vf a, vf b, vf c) { return make_f([&](int l) { return std::fmaf(-a.v[l], b.v[l], c.v[l]); }); }
EFFK_INLINE vf mac(vf a, vf b, vf c) { return make_f([&](int l) { return a.v[l] * b.v[l] + c.v[l]; }); }
EFFK_INLINE int32_t reduce_max_i(vi a) { int32_t m = a.v[0]; for (int l = 1; l < 16; ++l) m = a.v[l] > m ? a.v[l] : m; return m; }
EFFK_INLINE float reduce_max_f(vf a) { float m = a.v[0]; for (int l = 1; l < 16; ++l) m = a.v[l] > m ? a.v[l] : m; return m; }
EFFK_INLINE float reduce_add_f(vf a) {
  for (int half = 8; half; half /= 2) for (int l = 0; l < half; ++l) a.v[l] += a.v[l + half];
  return a.v[0];
}
template <class F> EFFK_INLINE vf reduce_rows(const F& row) { return make_f([&](int l) { return reduce_add_f(row(l)); }); }  // lane r: of row(r)
EFFK_INLINE int32_t reduce_add_i(vi a) { int32_t s = 0; for (int l = 0; l < 16; ++l) s += a.v[l]; return s; }

EFFK_INLINE int32_t dot_lane(uint32_t u, uint32_t s) {
  int32_t d = 0;
  for (int i = 0; i < 4; ++i) d += int32_t((u >> (8 * i)) & 255u) * int32_t(int8_t((s >> (8 * i)) & 255u));
  return d;
}
template <bool Wide> EFFK_INLINE vi dot_u8s8(vi acc, vi u, vi s) {
  return make_i([&](int l) { return acc.v[l] + dot_lane(uint32_t(u.v[l]), uint32_t(s.v[l])); });
}
EFFK_INLINE vi sum_s8(vi s) { return dot_u8s8<false>(zero_i(), set_i(0x01010101), s); }

struct Table { float t[16]; };
EFFK_INLINE Table load_float_table(const float* p) { Table t; std::memcpy(t.t, p, 64); return t; }
EFFK_INLINE vf lookup(vi index, const Table& t) { return make_f([&](int l) { return t.t[index.v[l] & 15]; }); }

EFFK_INLINE vf gather(const float* base, vi index) { return make_f([&](int l) { return base[index.v[l]]; }); }
EFFK_INLINE vi lane_index() { return make_i([](int l) { return l; }); }

EFFK_INLINE uint16_t half_at(const void* p, int l) { uint16_t h; std::memcpy(&h, static_cast<const char*>(p) + 2 * l, 2); return h; }
EFFK_INLINE void put_half(void* p, int l, uint16_t h) { std::memcpy(static_cast<char*>(p) + 2 * l, &h, 2); }
EFFK_INLINE vf load_f32(const void* p) { vf r; std::memcpy(r.v, p, 64); return r; }
EFFK_INLINE void store_f32(void* p, vf a) { std::memcpy(p, a.v, 64); }
EFFK_INLINE vf load_f16(const void* p) { return make_f([=](int l) { return f16_to_float(half_at(p, l)); }); }
EFFK_INLINE vf load_f16_part(const void* p, int count) {
  uint16_t part[16] = {};
  std::memcpy(part, p, size_t(count < 0 ? 0 : count < 16 ? count : 16) * 2);
  return load_f16(part);
}
EFFK_INLINE vf load_f32_part(const void* p, int count) {
  float part[16] = {};
  std::memcpy(part, p, size_t(count < 0 ? 0 : count < 16 ? count : 16) * 4);
  return load_f32(part);
}
EFFK_INLINE vf load_bf16(const void* p) { return make_f([=](int l) { return bf16_to_float(half_at(p, l)); }); }
EFFK_INLINE vi load_u8(const void* p) { return make_i([=](int l) { return static_cast<const uint8_t*>(p)[l]; }); }
EFFK_INLINE vi load_s8(const void* p) { return make_i([=](int l) { return static_cast<const int8_t*>(p)[l]; }); }
EFFK_INLINE uint32_t not_below(vf a, vf b) { uint32_t m = 0; for (int l = 0; l < 16; ++l) m |= uint32_t(!(a.v[l] <= b.v[l])) << l; return m; }
EFFK_INLINE uint32_t above(vi a, vi b) { uint32_t m = 0; for (int l = 0; l < 16; ++l) m |= uint32_t(a.v[l] > b.v[l]) << l; return m; }
EFFK_INLINE void fma8(float a, const float* x, float* y) { for (int l = 0; l < 8; ++l) y[l] = std::fmaf(a, x[l], y[l]); }
EFFK_INLINE vf expand_f32(const float* p, uint32_t mask) { return make_f([&](int l) { return mask >> l & 1 ? *p++ : 0.0f; }); }
EFFK_INLINE void store_f16(void* p, vf a) { for (int l = 0; l < 16; ++l) put_half(p, l, float_to_f16(a.v[l])); }
EFFK_INLINE vi bf16_bits(vf a) { return make_i([&](int l) { return float_to_bf16(a.v[l]); }); }
EFFK_INLINE void store_bf16(void* p, vf a) { for (int l = 0; l < 16; ++l) put_half(p, l, float_to_bf16(a.v[l])); }
EFFK_INLINE void store_s8(void* p, vi a) { for (int l = 0; l < 16; ++l) static_cast<int8_t*>(p)[l] = int8_t(a.v[l]); }
EFFK_INLINE void prefetch(const void*) {}
EFFK_INLINE void prefetch_far(const void*) {}
EFFK_INLINE void prefetch_write(const void*) {}
EFFK_INLINE void prefetch_once(const void*) {}

template <class T> EFFK_INLINE void unzip_as(vi a, vi b, vi& even, vi& odd) {
  constexpr int kCount = 64 / sizeof(T);
  T in[2 * kCount], out[2][kCount];
  std::memcpy(in, a.v, 64), std::memcpy(in + kCount, b.v, 64);
  for (int i = 0; i < kCount; ++i) out[0][i] = in[2 * i], out[1][i] = in[2 * i + 1];
  std::memcpy(even.v, out[0], 64), std::memcpy(odd.v, out[1], 64);
}
EFFK_INLINE void unzip32(vi a, vi b, vi& even, vi& odd) { unzip_as<int32_t>(a, b, even, odd); }
EFFK_INLINE void unzip16(vi a, vi b, vi& even, vi& odd) { unzip_as<int16_t>(a, b, even, odd); }
EFFK_INLINE void zip32(vf even, vf odd, vf& a, vf& b) {
  for (int i = 0; i < 16; ++i) (i < 8 ? a : b).v[2 * i % 16] = even.v[i], (i < 8 ? a : b).v[2 * i % 16 + 1] = odd.v[i];
}

// One register of floats (see avx512.h): the compiler's own vectors of 4, on whatever the CPU has. Products and sums round apart,
// a fused one would be a library call.
typedef float vr __attribute__((vector_size(16)));
constexpr int kLanes = 4;
EFFK_INLINE vr set_r(float x) { return vr{} + x; }
EFFK_INLINE vr load_r(const float* p) { vr r; std::memcpy(&r, p, 16); return r; }
EFFK_INLINE void store_r(float* p, vr a) { std::memcpy(p, &a, 16); }
EFFK_INLINE vr add_f(vr a, vr b) { return a + b; }
EFFK_INLINE vr sub_f(vr a, vr b) { return a - b; }
EFFK_INLINE vr mul_f(vr a, vr b) { return a * b; }
EFFK_INLINE vr fma(vr a, vr b, vr c) { return a * b + c; }
EFFK_INLINE vr fnma(vr a, vr b, vr c) { return c - a * b; }
EFFK_INLINE vr fms(vr a, vr b, vr c) { return a * b - c; }
EFFK_INLINE void transpose_quads(vr& r0, vr& r1, vr& r2, vr& r3) {
  vr* const r[4] = {&r0, &r1, &r2, &r3};
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < i; ++j) { const float t = (*r[i])[j]; (*r[i])[j] = (*r[j])[i]; (*r[j])[i] = t; }
}
// Column j + 4 i of rows [g, g + 4) is quad i of row g + j.
EFFK_INLINE void load_columns(const float* rows, int stride, int g, int j, vr (&r)[4]) {
  for (int i = 0; i < 4; ++i) r[i] = load_r(rows + (g + j) * stride + 4 * i);
}
EFFK_INLINE void store_columns(float* rows, int stride, int g, int j, vr (&r)[4]) {
  for (int i = 0; i < 4; ++i) store_r(rows + (g + j) * stride + 4 * i, r[i]);
}

}  // namespace
}  // namespace effk::EFFK_TIER
