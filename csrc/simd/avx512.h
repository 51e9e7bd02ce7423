// The vector vocabulary of the kernels, in 512-bit registers: one register holds a t16 unit (16 rows x 4 bytes) or one
// fp32 value for each of 16 rows. Included by the AVX-512 tiers inside their own namespace; what a tier lacks (VNNI,
// BF16) is chosen by the compiler's feature macros, which only cmake/EffkIsa.cmake sets.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace effk::EFFK_TIER {
namespace {

using vi = __m512i;  // 64 bytes, or 16 x int32
using vf = __m512;   // 16 x fp32
#define EFFK_INLINE inline __attribute__((always_inline))

EFFK_INLINE vi load_unit(const void* p) { return _mm512_loadu_si512(p); }
EFFK_INLINE void store_unit(void* p, vi v) { _mm512_storeu_si512(p, v); }
EFFK_INLINE vi zero_i() { return _mm512_setzero_si512(); }
EFFK_INLINE vf zero_f() { return _mm512_setzero_ps(); }
EFFK_INLINE vi set_i(int32_t v) { return _mm512_set1_epi32(v); }
EFFK_INLINE vf set_f(float v) { return _mm512_set1_ps(v); }
EFFK_INLINE vi broadcast(const int32_t* p) { return _mm512_set1_epi32(*p); }
EFFK_INLINE vi as_int(vf v) { return _mm512_castps_si512(v); }
EFFK_INLINE vf as_float(vi v) { return _mm512_castsi512_ps(v); }

EFFK_INLINE vi bits_and(vi a, vi b) { return _mm512_and_si512(a, b); }
EFFK_INLINE vi bits_or(vi a, vi b) { return _mm512_or_si512(a, b); }
// (a & mask) | b in one instruction.
EFFK_INLINE vi and_or(vi a, vi mask, vi b) { return _mm512_ternarylogic_epi32(a, mask, b, 0xEA); }
template <int S> EFFK_INLINE vi shift_right(vi v) { if constexpr (S == 0) return v; else return _mm512_srli_epi32(v, S); }
template <int S> EFFK_INLINE vi shift_left(vi v) { if constexpr (S == 0) return v; else return _mm512_slli_epi32(v, S); }
// W bits from bit S on of every byte: a bit matrix does in one instruction what else are a shift and a mask.
template <int S, int W> EFFK_INLINE vi bits_of_bytes(vi v) {
#ifdef __GFNI__
  if constexpr (S > 0 && S + W <= 8) {
    constexpr uint64_t row = uint64_t(1) << S;  // of the lowest bit; matrices are stored with that in the highest byte
    constexpr uint64_t matrix = row << 56 | (W > 1 ? row << 1 << 48 : 0) | (W > 2 ? row << 2 << 40 : 0) | (W > 3 ? row << 3 << 32 : 0);
    return _mm512_gf2p8affine_epi64_epi8(v, _mm512_set1_epi64(int64_t(matrix)), 0);
  }
#endif
  return bits_and(shift_right<S>(v), set_i(((1 << W) - 1) * 0x01010101));
}
EFFK_INLINE vi shuffle_bytes(vi table, vi index) { return _mm512_shuffle_epi8(table, index); }
EFFK_INLINE vi load_table(const void* p16) { return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p16))); }

EFFK_INLINE vi add_i(vi a, vi b) { return _mm512_add_epi32(a, b); }
EFFK_INLINE vi sub_i(vi a, vi b) { return _mm512_sub_epi32(a, b); }
EFFK_INLINE vi mul_i(vi a, vi b) { return _mm512_mullo_epi32(a, b); }
EFFK_INLINE vi max_i(vi a, vi b) { return _mm512_max_epi32(a, b); }
EFFK_INLINE vf to_float(vi v) { return _mm512_cvtepi32_ps(v); }
EFFK_INLINE vi round_to_int(vf v) { return _mm512_cvtps_epi32(v); }
EFFK_INLINE vf round_f(vf v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// v 2^n for whole n up to 127; 0 for n = kZeroPower and v below 2.
constexpr float kZeroPower = -160;
EFFK_INLINE vf times_power(vf v, vf n) { return _mm512_scalef_ps(v, n); }
EFFK_INLINE vf add_f(vf a, vf b) { return _mm512_add_ps(a, b); }
EFFK_INLINE vf sub_f(vf a, vf b) { return _mm512_sub_ps(a, b); }
EFFK_INLINE vf mul_f(vf a, vf b) { return _mm512_mul_ps(a, b); }
EFFK_INLINE vf div_f(vf a, vf b) { return _mm512_div_ps(a, b); }
EFFK_INLINE vf min_f(vf a, vf b) { return _mm512_min_ps(a, b); }  // of min and max: b, if one is NaN
EFFK_INLINE vf max_f(vf a, vf b) { return _mm512_max_ps(a, b); }
EFFK_INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
EFFK_INLINE vf fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }
EFFK_INLINE vf mac(vf a, vf b, vf c) { return fma(a, b, c); }  // a b + c, rounded as is fastest: once, or twice on the portable tier
EFFK_INLINE int32_t reduce_max_i(vi v) { return _mm512_reduce_max_epi32(v); }
EFFK_INLINE float reduce_max_f(vf v) { return _mm512_reduce_max_ps(v); }
// Folded by halves: lane i + 8 to lane i, then 4, 2, 1.
EFFK_INLINE float reduce_add_f(vf v) {
  const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
// Lane r is reduce_add_f(row(r)), for all 16 rows at a third of the instructions.
template <int I> struct RowIndex { constexpr operator int() const { return I; } };
template <class F> EFFK_INLINE vf reduce_rows(const F& row) {
  const auto halves = [](vf a, vf b) { return add_f(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE)); };
  const auto quarters = [&](vf a, vf b, vf c, vf d) {
    const vf ab = halves(a, b), cd = halves(c, d);
    return add_f(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
  };
  const auto pairs = [](vf a, vf b) {
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return add_f(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  };
  const vf a = quarters(row(RowIndex<0>()), row(RowIndex<4>()), row(RowIndex<8>()), row(RowIndex<12>()));
  const vf b = quarters(row(RowIndex<1>()), row(RowIndex<5>()), row(RowIndex<9>()), row(RowIndex<13>()));
  const vf ab = pairs(a, b);
  const vf c = quarters(row(RowIndex<2>()), row(RowIndex<6>()), row(RowIndex<10>()), row(RowIndex<14>()));
  const vf d = quarters(row(RowIndex<3>()), row(RowIndex<7>()), row(RowIndex<11>()), row(RowIndex<15>()));
  const vf cd = pairs(c, d);
  return add_f(_mm512_shuffle_ps(ab, cd, 0x88), _mm512_shuffle_ps(ab, cd, 0xDD));
}
EFFK_INLINE int32_t reduce_add_i(vi v) { return _mm512_reduce_add_epi32(v); }

// acc + the four-term dot product of unsigned and signed bytes in each 32-bit lane, exact in int32. `Wide` says that the
// unsigned bytes may exceed 15: without VNNI the pair sums of 16-bit multiply-adds would saturate, so they are cut into
// nibbles there (2 * 15 * 127 = 3810 fits).
#ifdef __AVX512VNNI__
// In assembly because g++ 12 copies every accumulator once per step around the intrinsic (2.5x slower in a register block).
template <bool Wide> EFFK_INLINE vi dot_u8s8(vi acc, vi u, vi s) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u), "vm"(s));
  return acc;
}
#else
template <bool Wide> EFFK_INLINE vi dot_u8s8(vi acc, vi u, vi s) {
  const vi one = _mm512_set1_epi16(1);
  if constexpr (!Wide) return add_i(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(u, s), one));
  const vi low = _mm512_set1_epi8(15);
  const vi lo = _mm512_maddubs_epi16(bits_and(u, low), s), hi = _mm512_maddubs_epi16(bits_and(shift_right<4>(u), low), s);
  return add_i(acc, add_i(_mm512_madd_epi16(lo, one), _mm512_madd_epi16(hi, _mm512_set1_epi16(16))));
}
#endif
// Sum over a lane's four signed bytes.
EFFK_INLINE vi sum_s8(vi s) { return dot_u8s8<false>(zero_i(), _mm512_set1_epi8(1), s); }

#ifdef __AVX512BF16__
EFFK_INLINE vf dot_bf16(vf acc, vi a, vi b) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "vm"(b));
  return acc;
}
EFFK_INLINE vi lookup16(vi index, vi table) { return _mm512_permutexvar_epi16(index, table); }  // 32 entries, low 5 bits
#endif

// 16-entry fp32 table; only the low four bits of each 32-bit index count.
struct Table { vf t; };
EFFK_INLINE Table load_float_table(const float* t16) { return {_mm512_loadu_ps(t16)}; }
EFFK_INLINE vf lookup(vi index, const Table& t) { return _mm512_permutexvar_ps(index, t.t); }

EFFK_INLINE vf gather(const float* base, vi index) { return _mm512_i32gather_ps(index, base, 4); }
EFFK_INLINE vi lane_index() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

EFFK_INLINE vf load_f32(const void* p) { return _mm512_loadu_ps(p); }
EFFK_INLINE void store_f32(void* p, vf v) { _mm512_storeu_ps(p, v); }
EFFK_INLINE vf load_f16(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
// The first min(count, 16) values, none below a count of 1, zero beyond; reads nothing beyond.
EFFK_INLINE __mmask16 first_lanes(int count) { return __mmask16(_bzhi_u32(0xffff, count < 0 ? 0u : count > 16 ? 16u : unsigned(count))); }
EFFK_INLINE vf load_f16_part(const void* p, int count) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(count), p)); }
EFFK_INLINE vf load_f32_part(const void* p, int count) { return _mm512_maskz_loadu_ps(first_lanes(count), p); }
EFFK_INLINE vf load_bf16(const void* p) {
  return as_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))), 16));
}
EFFK_INLINE vi load_u8(const void* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
EFFK_INLINE vi load_s8(const void* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
// Bit l: not a[l] <= b[l], so that NaN counts.
EFFK_INLINE uint32_t not_below(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
// Bit l: a[l] > b[l].
EFFK_INLINE uint32_t above(vi a, vi b) { return _mm512_cmpgt_epi32_mask(a, b); }
// y[0 .. 8) += a * x[0 .. 8).
EFFK_INLINE void fma8(float a, const float* x, float* y) {
  _mm256_storeu_ps(y, _mm256_fmadd_ps(_mm256_set1_ps(a), _mm256_loadu_ps(x), _mm256_loadu_ps(y)));
}
// The lanes of `mask` take p[0], p[1], ... in turn, the others 0. Reads all of p[0 .. 16).
EFFK_INLINE vf expand_f32(const float* p, uint32_t mask) { return _mm512_maskz_expand_ps(__mmask16(mask), load_f32(p)); }
EFFK_INLINE void store_f16(void* p, vf v) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
EFFK_INLINE vi bf16_bits(vf v) {  // in the low half of each lane
  const vi u = as_int(v);
  const vi even = bits_and(_mm512_srli_epi32(u, 16), set_i(1));
  const vi r = _mm512_srli_epi32(add_i(add_i(u, set_i(0x7fff)), even), 16);
  return _mm512_mask_or_epi32(r, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_srli_epi32(u, 16), set_i(0x40));
}
EFFK_INLINE void store_bf16(void* p, vf v) { _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bf16_bits(v))); }
// 16 x int32 in [-128, 127] to 16 bytes.
EFFK_INLINE void store_s8(void* p, vi v) { _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v)); }
// In assembly: g++ finds a lambda that only prefetches free of effects, and drops it. prefetch_once is for lines that are
// read once: they do not push x out of the cache.
EFFK_INLINE void prefetch(const void* p) { __asm__ volatile("prefetcht0 (%0)" : : "r"(p)); }
EFFK_INLINE void prefetch_far(const void* p) { __asm__ volatile("prefetcht1 (%0)" : : "r"(p)); }  // second-level cache
EFFK_INLINE void prefetch_write(const void* p) { __asm__ volatile("prefetchw (%0)" : : "r"(p)); }
EFFK_INLINE void prefetch_once(const void* p) { __asm__ volatile("prefetchnta (%0)" : : "r"(p)); }

// Two vectors of 32-bit or 16-bit lanes, one behind the other, as their even and their odd lanes; and back.
EFFK_INLINE void unzip32(vi a, vi b, vi& even, vi& odd) {
  const vi i = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  even = _mm512_permutex2var_epi32(a, i, b);
  odd = _mm512_permutex2var_epi32(a, add_i(i, set_i(1)), b);
}
EFFK_INLINE void unzip16(vi a, vi b, vi& even, vi& odd) {
  const vi i = _mm512_add_epi32(_mm512_set1_epi32(0x00020000), mul_i(lane_index(), set_i(0x00040004)));
  even = _mm512_permutex2var_epi16(a, i, b);
  odd = _mm512_permutex2var_epi16(a, add_i(i, set_i(0x00010001)), b);
}
EFFK_INLINE void zip32(vf even, vf odd, vf& a, vf& b) {
  const vi i = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  a = _mm512_permutex2var_ps(even, i, odd);
  b = _mm512_permutex2var_ps(even, add_i(i, set_i(8)), odd);
}

// One native register of floats and its width; codelets that need many registers are written with it. Arithmetic is that
// of vf. fms(a, b, c) = a b - c.
using vr = vf;
constexpr int kLanes = 16;
EFFK_INLINE vr set_r(float v) { return _mm512_set1_ps(v); }
EFFK_INLINE vr load_r(const float* p) { return _mm512_loadu_ps(p); }
EFFK_INLINE void store_r(float* p, vr v) { _mm512_storeu_ps(p, v); }
EFFK_INLINE vr fms(vr a, vr b, vr c) { return _mm512_fmsub_ps(a, b, c); }
// A 16 x 16 transposition in two steps: 4 x 4 inside each 128-bit lane of four rows, then 4 x 4 of whole lanes.
EFFK_INLINE void transpose_quads(vr& r0, vr& r1, vr& r2, vr& r3) {
  const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(r0, r1)), b = _mm512_castps_pd(_mm512_unpackhi_ps(r0, r1));
  const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(r2, r3)), d = _mm512_castps_pd(_mm512_unpackhi_ps(r2, r3));
  r0 = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
  r1 = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
  r2 = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
  r3 = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
}
EFFK_INLINE void transpose_lanes(vr (&r)[4]) {
  const vr a = _mm512_shuffle_f32x4(r[0], r[1], 0x88), b = _mm512_shuffle_f32x4(r[0], r[1], 0xdd);
  const vr c = _mm512_shuffle_f32x4(r[2], r[3], 0x88), d = _mm512_shuffle_f32x4(r[2], r[3], 0xdd);
  r[0] = _mm512_shuffle_f32x4(a, c, 0x88);
  r[2] = _mm512_shuffle_f32x4(a, c, 0xdd);
  r[1] = _mm512_shuffle_f32x4(b, d, 0x88);
  r[3] = _mm512_shuffle_f32x4(b, d, 0xdd);
}
// From rows with transposed quads, `stride` floats apart: r[i] = column j + 4 i of rows [g, g + kLanes); and back.
EFFK_INLINE void load_columns(const float* rows, int stride, int, int j, vr (&r)[4]) {
  for (int i = 0; i < 4; ++i) r[i] = load_r(rows + (4 * i + j) * stride);
  transpose_lanes(r);
}
EFFK_INLINE void store_columns(float* rows, int stride, int, int j, vr (&r)[4]) {
  transpose_lanes(r);
  for (int i = 0; i < 4; ++i) store_r(rows + (4 * i + j) * stride, r[i]);
}

}  // namespace
}  // namespace effk::EFFK_TIER
