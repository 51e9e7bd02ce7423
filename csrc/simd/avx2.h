// The vector vocabulary of avx512.h in pairs of 256-bit registers: rows 0-7 and rows 8-15 of a tile. Same names, same
// results; see avx512.h for what each one means.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace effk::EFFK_TIER {
namespace {

struct vi { __m256i a, b; };
struct vf { __m256 a, b; };
#define EFFK_INLINE inline __attribute__((always_inline))

EFFK_INLINE vi load_unit(const void* p) {
  const auto* q = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
EFFK_INLINE void store_unit(void* p, vi v) {
  auto* q = static_cast<__m256i*>(p);
  _mm256_storeu_si256(q, v.a);
  _mm256_storeu_si256(q + 1, v.b);
}
EFFK_INLINE vi both(__m256i v) { return {v, v}; }
EFFK_INLINE vi zero_i() { return both(_mm256_setzero_si256()); }
EFFK_INLINE vf zero_f() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
EFFK_INLINE vi set_i(int32_t v) { return both(_mm256_set1_epi32(v)); }
EFFK_INLINE vf set_f(float v) { const __m256 t = _mm256_set1_ps(v); return {t, t}; }
EFFK_INLINE vi broadcast(const int32_t* p) { return both(_mm256_set1_epi32(*p)); }
EFFK_INLINE vi as_int(vf v) { return {_mm256_castps_si256(v.a), _mm256_castps_si256(v.b)}; }
EFFK_INLINE vf as_float(vi v) { return {_mm256_castsi256_ps(v.a), _mm256_castsi256_ps(v.b)}; }

EFFK_INLINE vi bits_and(vi a, vi b) { return {_mm256_and_si256(a.a, b.a), _mm256_and_si256(a.b, b.b)}; }
EFFK_INLINE vi bits_or(vi a, vi b) { return {_mm256_or_si256(a.a, b.a), _mm256_or_si256(a.b, b.b)}; }
EFFK_INLINE vi and_or(vi a, vi mask, vi b) { return bits_or(bits_and(a, mask), b); }
template <int S> EFFK_INLINE vi shift_right(vi v) {
  if constexpr (S == 0) return v; else return {_mm256_srli_epi32(v.a, S), _mm256_srli_epi32(v.b, S)};
}
template <int S> EFFK_INLINE vi shift_left(vi v) {
  if constexpr (S == 0) return v; else return {_mm256_slli_epi32(v.a, S), _mm256_slli_epi32(v.b, S)};
}
// W bits from bit S on of every byte.
template <int S, int W> EFFK_INLINE vi bits_of_bytes(vi v) { return bits_and(shift_right<S>(v), set_i(((1 << W) - 1) * 0x01010101)); }
EFFK_INLINE vi shuffle_bytes(vi t, vi i) { return {_mm256_shuffle_epi8(t.a, i.a), _mm256_shuffle_epi8(t.b, i.b)}; }
EFFK_INLINE vi load_table(const void* p16) {
  return both(_mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p16))));
}

EFFK_INLINE vi add_i(vi a, vi b) { return {_mm256_add_epi32(a.a, b.a), _mm256_add_epi32(a.b, b.b)}; }
EFFK_INLINE vi sub_i(vi a, vi b) { return {_mm256_sub_epi32(a.a, b.a), _mm256_sub_epi32(a.b, b.b)}; }
EFFK_INLINE vi mul_i(vi a, vi b) { return {_mm256_mullo_epi32(a.a, b.a), _mm256_mullo_epi32(a.b, b.b)}; }
EFFK_INLINE vi max_i(vi a, vi b) { return {_mm256_max_epi32(a.a, b.a), _mm256_max_epi32(a.b, b.b)}; }
EFFK_INLINE vf to_float(vi v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
EFFK_INLINE vi round_to_int(vf v) { return {_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b)}; }
EFFK_INLINE vf round_f(vf v) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(v.a, kNearest), _mm256_round_ps(v.b, kNearest)};
}
constexpr float kZeroPower = -127;
EFFK_INLINE __m256 power_half(__m256 n) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23)); }
EFFK_INLINE vf times_power(vf v, vf n) { return {_mm256_mul_ps(v.a, power_half(n.a)), _mm256_mul_ps(v.b, power_half(n.b))}; }
EFFK_INLINE vf add_f(vf a, vf b) { return {_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }
EFFK_INLINE vf sub_f(vf a, vf b) { return {_mm256_sub_ps(a.a, b.a), _mm256_sub_ps(a.b, b.b)}; }
EFFK_INLINE vf mul_f(vf a, vf b) { return {_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }
EFFK_INLINE vf div_f(vf a, vf b) { return {_mm256_div_ps(a.a, b.a), _mm256_div_ps(a.b, b.b)}; }
EFFK_INLINE vf min_f(vf a, vf b) { return {_mm256_min_ps(a.a, b.a), _mm256_min_ps(a.b, b.b)}; }
EFFK_INLINE vf max_f(vf a, vf b) { return {_mm256_max_ps(a.a, b.a), _mm256_max_ps(a.b, b.b)}; }
EFFK_INLINE vf fma(vf a, vf b, vf c) { return {_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)}; }
EFFK_INLINE vf fnma(vf a, vf b, vf c) { return {_mm256_fnmadd_ps(a.a, b.a, c.a), _mm256_fnmadd_ps(a.b, b.b, c.b)}; }
EFFK_INLINE vf mac(vf a, vf b, vf c) { return fma(a, b, c); }
EFFK_INLINE int32_t reduce_max_i(vi v) {
  const __m256i m = _mm256_max_epi32(v.a, v.b);
  __m128i n = _mm_max_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
  n = _mm_max_epi32(n, _mm_shuffle_epi32(n, 0x4E));
  return _mm_cvtsi128_si32(_mm_max_epi32(n, _mm_shuffle_epi32(n, 0xB1)));
}
EFFK_INLINE float reduce_max_f(vf v) {
  const __m256 a = _mm256_max_ps(v.a, v.b);
  __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}
EFFK_INLINE float reduce_add_f(vf v) {
  const __m256 a = _mm256_add_ps(v.a, v.b);
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
// Lane r is reduce_add_f(row(r)), for all 16 rows.
template <int I> struct RowIndex { constexpr operator int() const { return I; } };
template <int I = 0, class F> EFFK_INLINE void reduce_rows_from(const F& row, float* out) {
  if constexpr (I < 16) { out[I] = reduce_add_f(row(RowIndex<I>())); reduce_rows_from<I + 1>(row, out); }
}
template <class F> EFFK_INLINE vf reduce_rows(const F& row) {
  alignas(32) float out[16];
  reduce_rows_from(row, out);
  return {_mm256_load_ps(out), _mm256_load_ps(out + 8)};
}
EFFK_INLINE int32_t reduce_add_i(vi v) {
  const __m256i m = _mm256_add_epi32(v.a, v.b);
  __m128i n = _mm_add_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
  n = _mm_add_epi32(n, _mm_shuffle_epi32(n, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(n, _mm_shuffle_epi32(n, 0xB1)));
}

template <bool Wide> EFFK_INLINE __m256i dot_half(__m256i acc, __m256i u, __m256i s) {
  const __m256i one = _mm256_set1_epi16(1);
  if constexpr (!Wide) return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), one));
  const __m256i low = _mm256_set1_epi8(15);
  const __m256i lo = _mm256_maddubs_epi16(_mm256_and_si256(u, low), s);
  const __m256i hi = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi32(u, 4), low), s);
  const __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(lo, one), _mm256_madd_epi16(hi, _mm256_set1_epi16(16)));
  return _mm256_add_epi32(acc, sum);
}
template <bool Wide> EFFK_INLINE vi dot_u8s8(vi acc, vi u, vi s) {
  return {dot_half<Wide>(acc.a, u.a, s.a), dot_half<Wide>(acc.b, u.b, s.b)};
}
EFFK_INLINE vi sum_s8(vi s) { return dot_u8s8<false>(zero_i(), both(_mm256_set1_epi8(1)), s); }

// 16 entries as two registers of eight: look up in both, choose by bit 3 of the index (moved to the sign for the blend).
struct Table { __m256 lo, hi; };
EFFK_INLINE Table load_float_table(const float* t) { return {_mm256_loadu_ps(t), _mm256_loadu_ps(t + 8)}; }
EFFK_INLINE __m256 lookup_half(__m256i i, const Table& t) {
  const __m256 lo = _mm256_permutevar8x32_ps(t.lo, i), hi = _mm256_permutevar8x32_ps(t.hi, i);
  return _mm256_blendv_ps(lo, hi, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
}
EFFK_INLINE vf lookup(vi i, const Table& t) { return {lookup_half(i.a, t), lookup_half(i.b, t)}; }

EFFK_INLINE vf gather(const float* p, vi i) { return {_mm256_i32gather_ps(p, i.a, 4), _mm256_i32gather_ps(p, i.b, 4)}; }
EFFK_INLINE vi lane_index() {
  return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)};
}

EFFK_INLINE vf load_f32(const void* p) {
  const auto* q = static_cast<const float*>(p);
  return {_mm256_loadu_ps(q), _mm256_loadu_ps(q + 8)};
}
EFFK_INLINE void store_f32(void* p, vf v) {
  auto* q = static_cast<float*>(p);
  _mm256_storeu_ps(q, v.a);
  _mm256_storeu_ps(q + 8, v.b);
}
EFFK_INLINE vf load_f16(const void* p) {
  const auto* q = static_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
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
EFFK_INLINE vf load_bf16(const void* p) {
  const auto* q = static_cast<const __m128i*>(p);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(q)), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(q + 1)), 16))};
}
EFFK_INLINE vi load_u8(const void* p) {
  const __m128i v = _mm_loadu_si128(static_cast<const __m128i*>(p));
  return {_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8))};
}
EFFK_INLINE vi load_s8(const void* p) {
  const __m128i v = _mm_loadu_si128(static_cast<const __m128i*>(p));
  return {_mm256_cvtepi8_epi32(v), _mm256_cvtepi8_epi32(_mm_srli_si128(v, 8))};
}
EFFK_INLINE uint32_t not_below(vf a, vf b) {
  const auto bits = [](__m256 x, __m256 y) { return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(x, y, _CMP_NLE_UQ))); };
  return bits(a.a, b.a) | bits(a.b, b.b) << 8;
}
EFFK_INLINE uint32_t above(vi a, vi b) {
  const auto bits = [](__m256i x, __m256i y) { return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(x, y)))); };
  return bits(a.a, b.a) | bits(a.b, b.b) << 8;
}
EFFK_INLINE void fma8(float a, const float* x, float* y) {
  _mm256_storeu_ps(y, _mm256_fmadd_ps(_mm256_set1_ps(a), _mm256_loadu_ps(x), _mm256_loadu_ps(y)));
}
// Bits of `mask` to bytes (not by PDEP, which takes hundreds of cycles on Zen 1 and 2); their running sums are places in p.
EFFK_INLINE __m256 expand_half(const float* p, uint32_t mask) {
  const uint64_t apart = mask * 0x0101010101010101u & 0x8040201008040201u;
  const uint64_t set = (apart + 0x7f7f7f7f7f7f7f7fu) >> 7 & 0x0101010101010101u;
  const __m256i rank = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(set * 0x0101010101010100u)));
  const __m256i on = _mm256_cvtepi8_epi32(_mm_cvtsi64_si128(int64_t(set * 0xff)));
  return _mm256_and_ps(_mm256_permutevar8x32_ps(_mm256_loadu_ps(p), rank), _mm256_castsi256_ps(on));
}
EFFK_INLINE vf expand_f32(const float* p, uint32_t mask) {
  return {expand_half(p, mask & 255), expand_half(p + __builtin_popcount(mask & 255), mask >> 8)};
}
EFFK_INLINE void store_f16(void* p, vf v) {
  auto* q = static_cast<__m128i*>(p);
  _mm_storeu_si128(q, _mm256_cvtps_ph(v.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  _mm_storeu_si128(q + 1, _mm256_cvtps_ph(v.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
EFFK_INLINE __m256i to_bf16_half(__m256 v) {  // bf16 in the low half of each 32-bit lane
  const __m256i u = _mm256_castps_si256(v), even = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), even), 16);
  const __m256i q = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
  return _mm256_blendv_epi8(r, q, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
}
EFFK_INLINE vi bf16_bits(vf v) { return {to_bf16_half(v.a), to_bf16_half(v.b)}; }
EFFK_INLINE void store_bf16(void* p, vf v) {
  const __m256i w = _mm256_permute4x64_epi64(_mm256_packus_epi32(to_bf16_half(v.a), to_bf16_half(v.b)), 0xD8);
  _mm256_storeu_si256(static_cast<__m256i*>(p), w);
}
EFFK_INLINE void store_s8(void* p, vi v) {
  const __m256i w = _mm256_permute4x64_epi64(_mm256_packs_epi32(v.a, v.b), 0xD8);
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm_packs_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
}
// In assembly: g++ finds a lambda that only prefetches free of effects, and drops it. prefetch_once is for lines that are
// read once: they do not push x out of the cache.
EFFK_INLINE void prefetch(const void* p) { __asm__ volatile("prefetcht0 (%0)" : : "r"(p)); }
EFFK_INLINE void prefetch_far(const void* p) { __asm__ volatile("prefetcht1 (%0)" : : "r"(p)); }  // second-level cache
EFFK_INLINE void prefetch_write(const void* p) { __asm__ volatile("prefetchw (%0)" : : "r"(p)); }
EFFK_INLINE void prefetch_once(const void* p) { __asm__ volatile("prefetchnta (%0)" : : "r"(p)); }

EFFK_INLINE __m256i in_order(__m256i v) { return _mm256_permute4x64_epi64(v, 0xD8); }  // after an operation inside 128-bit lanes
EFFK_INLINE void unzip32(vi a, vi b, vi& even, vi& odd) {
  const auto half = [](__m256i x, __m256i y, auto& to, auto pick) { to = in_order(_mm256_castps_si256(pick(_mm256_castsi256_ps(x), _mm256_castsi256_ps(y)))); };
  const auto evens = [](__m256 x, __m256 y) { return _mm256_shuffle_ps(x, y, 0x88); };
  const auto odds = [](__m256 x, __m256 y) { return _mm256_shuffle_ps(x, y, 0xDD); };
  vi e, o;
  half(a.a, a.b, e.a, evens), half(b.a, b.b, e.b, evens);
  half(a.a, a.b, o.a, odds), half(b.a, b.b, o.b, odds);
  even = e, odd = o;
}
EFFK_INLINE void unzip16(vi a, vi b, vi& even, vi& odd) {
  const __m256i low = _mm256_set1_epi32(0xffff);
  const auto evens = [&](vi v) { return in_order(_mm256_packus_epi32(_mm256_and_si256(v.a, low), _mm256_and_si256(v.b, low))); };
  const auto odds = [&](vi v) { return in_order(_mm256_packus_epi32(_mm256_srli_epi32(v.a, 16), _mm256_srli_epi32(v.b, 16))); };
  const vi e{evens(a), evens(b)}, o{odds(a), odds(b)};
  even = e, odd = o;
}
EFFK_INLINE void zip32(vf even, vf odd, vf& a, vf& b) {
  const auto half = [](__m256 e, __m256 o) {
    const __m256 low = _mm256_unpacklo_ps(e, o), high = _mm256_unpackhi_ps(e, o);
    return vf{_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)};
  };
  const vf first = half(even.a, odd.a), second = half(even.b, odd.b);
  a = first, b = second;
}

// One native register of floats (see avx512.h).
using vr = __m256;
constexpr int kLanes = 8;
EFFK_INLINE vr set_r(float v) { return _mm256_set1_ps(v); }
EFFK_INLINE vr load_r(const float* p) { return _mm256_loadu_ps(p); }
EFFK_INLINE void store_r(float* p, vr v) { _mm256_storeu_ps(p, v); }
EFFK_INLINE vr add_f(vr a, vr b) { return _mm256_add_ps(a, b); }
EFFK_INLINE vr sub_f(vr a, vr b) { return _mm256_sub_ps(a, b); }
EFFK_INLINE vr mul_f(vr a, vr b) { return _mm256_mul_ps(a, b); }
EFFK_INLINE vr fma(vr a, vr b, vr c) { return _mm256_fmadd_ps(a, b, c); }
EFFK_INLINE vr fnma(vr a, vr b, vr c) { return _mm256_fnmadd_ps(a, b, c); }
EFFK_INLINE vr fms(vr a, vr b, vr c) { return _mm256_fmsub_ps(a, b, c); }
EFFK_INLINE void transpose_quads(vr& r0, vr& r1, vr& r2, vr& r3) {
  const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(r0, r1)), b = _mm256_castps_pd(_mm256_unpackhi_ps(r0, r1));
  const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(r2, r3)), d = _mm256_castps_pd(_mm256_unpackhi_ps(r2, r3));
  r0 = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
  r1 = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
  r2 = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
  r3 = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
}
// Columns j and j + 4 lie in the first half of a row of 16, j + 8 and j + 12 in the second.
EFFK_INLINE void load_columns(const float* rows, int stride, int g, int j, vr (&r)[4]) {
  for (int i = 0; i < 2; ++i) {
    const vr a = load_r(rows + (g + j) * stride + 8 * i), b = load_r(rows + (g + 4 + j) * stride + 8 * i);
    r[2 * i] = _mm256_permute2f128_ps(a, b, 0x20);
    r[2 * i + 1] = _mm256_permute2f128_ps(a, b, 0x31);
  }
}
EFFK_INLINE void store_columns(float* rows, int stride, int g, int j, vr (&r)[4]) {
  for (int i = 0; i < 2; ++i) {
    store_r(rows + (g + j) * stride + 8 * i, _mm256_permute2f128_ps(r[2 * i], r[2 * i + 1], 0x20));
    store_r(rows + (g + 4 + j) * stride + 8 * i, _mm256_permute2f128_ps(r[2 * i], r[2 * i + 1], 0x31));
  }
}

}  // namespace
}  // namespace effk::EFFK_TIER
