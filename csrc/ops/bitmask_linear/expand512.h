// Expansion by a mask in 512 bits. Included by the AVX-512 tiers after their vector header.
//
// In assembly, because g++ folds the load into the expansion, which is microcoded on Zen 4 and 5 and has to suppress faults elsewhere,
// and because the target has to be the source: else the expansion waits for the former owner of its target on those CPUs.
// Together 2.3x slower.
#pragma once
#include "ops/bitmask_linear/kernels.h"

namespace effk::EFFK_TIER {
namespace {

using effk::bitmask::Values;

constexpr int kTileRows = 8, kTileTokens = 3;
constexpr int64_t kAheadBytes = 8192;  // 4096 reaches 85 to 100 % of its speed, 2048 80 to 88 %, none 50 to 95 % (Zen 5, from memory)

EFFK_INLINE vf expand_lanes(vf v, __mmask16 mask) {
  __asm__("vexpandps %0, %0%{%1%}%{z%}" : "+v"(v) : "Yk"(mask));
  return v;
}
EFFK_INLINE vi load_half(const void* p) {
  vi v;
  __asm__("vmovdqu64 %1, %t0" : "=v"(v) : "m"(*static_cast<const __m256i_u*>(p)));
  return v;
}
#ifdef __AVX512VBMI2__
constexpr int kStreamTokens = 8;
constexpr int kFewValues = 21;  // of 64: beyond, branches are mispredicted too often

// In 64 bits: a count in 16 waits for the former owner of its register.
template <class T> EFFK_INLINE int64_t popcount(const T* at) {
  uint64_t bits = *at;
  __asm__("" : "+r"(bits));
  return __builtin_popcountll(bits);
}
EFFK_INLINE vi expand_bytes(vi v, __mmask64 mask) {
  __asm__("vpexpandb %0, %0%{%1%}%{z%}" : "+v"(v) : "Yk"(mask));
  return v;
}
EFFK_INLINE vi bytes64(const uint8_t*& at, const uint64_t* mask) {
  uint64_t bits = *mask;
  __asm__("" : "+r"(bits));  // read once: g++ reads a mask a second time for its count
  const vi v = expand_bytes(load_unit(at), bits);
  at += __builtin_popcountll(bits);
  return v;
}
// Nearly every load of 64 bytes lies in two lines and takes the time of two; one of 32 bytes does every other time. Where words have few
// bits it is all they need, nearly always.
template <bool Few> EFFK_INLINE vi dot64(vi acc, vi x, const uint8_t*& at, const uint64_t* mask) {
  if constexpr (!Few) return dot_u8s8<true>(acc, x, bytes64(at, mask));
  __mmask64 k;
  __asm__("kmovq %1, %0" : "=k"(k) : "m"(*mask));
  const int64_t count = __builtin_popcountll(*mask);
  acc = dot_u8s8<true>(acc, x, expand_bytes(load_half(at), k));
  if (__builtin_expect(count > 32, 0)) acc = dot_u8s8<true>(acc, x, expand_bytes(_mm512_maskz_loadu_epi8(~uint64_t(0) << 32, at), k));
  at += count;
  return acc;
}
typedef uint32_t __attribute__((may_alias)) Bits32;  // parts of a word
typedef uint16_t __attribute__((may_alias)) Bits16;
template <Values V, bool Few> EFFK_INLINE void floats64(const uint8_t*& at, const uint64_t* mask, vf (&w)[4]) {
  if constexpr (V == Values::i8) {
    const vi v = bytes64(at, mask);
    const auto part = [](__m128i b) { return to_float(_mm512_cvtepi8_epi32(b)); };
    w[0] = part(_mm512_castsi512_si128(v));
    w[1] = part(_mm512_extracti32x4_epi32(v, 1));
    w[2] = part(_mm512_extracti32x4_epi32(v, 2));
    w[3] = part(_mm512_extracti32x4_epi32(v, 3));
  } else if constexpr (V == Values::bf16) {  // the high halves of the lanes are odd columns, the low ones even
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const auto* bits = reinterpret_cast<const Bits32*>(mask) + j;
      __mmask32 k;
      __asm__("kmovd %1, %0" : "=k"(k) : "m"(*bits));
      const int64_t count = popcount(bits);
      vi v = Few && __builtin_expect(count <= 16, 1) ? load_half(at) : load_unit(at);
      __asm__("vpexpandw %0, %0%{%1%}%{z%}" : "+v"(v) : "Yk"(k));
      at += 2 * count;
      w[2 * j] = as_float(shift_left<16>(v));
      w[2 * j + 1] = as_float(bits_and(v, set_i(int32_t(0xffff0000))));
    }
  } else {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const auto* bits = reinterpret_cast<const Bits16*>(mask) + j;
      __mmask16 k;
      __asm__("kmovw %1, %0" : "=k"(k) : "m"(*bits));
      const int64_t count = popcount(bits);
      w[j] = expand_lanes(as_float(Few && __builtin_expect(count <= 8, 1) ? load_half(at) : load_unit(at)), k);
      at += 4 * count;
    }
  }
}
// bf16: of 32 columns the even ones first.
template <Values V> EFFK_INLINE void order_columns(float* x, int64_t n) {
  static_assert(V == Values::bf16, "others are in their own order");
  const vi even = _mm512_slli_epi32(lane_index(), 1), odd = add_i(even, set_i(1));
  for (int64_t i = 0; i < n; i += 32) {
    const vf a = load_f32(x + i), b = load_f32(x + i + 16);
    store_f32(x + i, _mm512_permutex2var_ps(a, even, b));
    store_f32(x + i + 16, _mm512_permutex2var_ps(a, odd, b));
  }
}
#else  // there is no expansion of bytes and words: through 32 bits
template <Values V> EFFK_INLINE vf expand16(const uint8_t* at, uint32_t bits) {
  const __mmask16 mask = __mmask16(bits);
  if constexpr (V == Values::f32) return expand_lanes(load_f32(at), mask);
  else if constexpr (V == Values::bf16) return expand_lanes(load_bf16(at), mask);
  else return to_float(as_int(expand_lanes(as_float(load_s8(at)), mask)));
}
EFFK_INLINE vi bytes64(const uint8_t*& at, const uint64_t* mask) {
  const auto sixteen = [&](int i) {
    const uint32_t bits = uint32_t(*mask >> (16 * i)) & 0xffffu;
    const __m128i out = _mm512_cvtepi32_epi8(as_int(expand_lanes(as_float(load_s8(at)), __mmask16(bits))));
    at += __builtin_popcount(bits);
    return out;
  };
  const __m128i a = sixteen(0), b = sixteen(1), c = sixteen(2), d = sixteen(3);
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set_m128i(b, a)), _mm256_set_m128i(d, c), 1);
}
#endif
// Eight registers at a third of the instructions of eight sums: pairs of lanes, then quarters of the register.
template <int R> EFFK_INLINE void fold(const vi (&v)[R], int32_t* out) {
  static_assert(R == 8, "rows of a panel");
  const auto pairs = [](vi a, vi b) { return add_i(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)); };
  const auto fours = [](vi a, vi b) { return add_i(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b)); };
  const vi a = fours(pairs(v[0], v[1]), pairs(v[2], v[3])), b = fours(pairs(v[4], v[5]), pairs(v[6], v[7]));
  const vi halves = add_i(_mm512_shuffle_i32x4(a, b, 0x44), _mm512_shuffle_i32x4(a, b, 0xEE));  // a: quarters 0, 1; b: 2, 3
  const vi sums = add_i(halves, _mm512_shuffle_i32x4(halves, halves, 0xB1));
  const __m256i all = _mm256_set_m128i(_mm512_extracti32x4_epi32(sums, 2), _mm512_castsi512_si128(sums));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), all);
}

}  // namespace
}  // namespace effk::EFFK_TIER
