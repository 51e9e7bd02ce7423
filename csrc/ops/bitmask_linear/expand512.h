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
template <Values V> EFFK_INLINE vf expand16(const uint8_t* at, uint32_t bits) {
  const __mmask16 mask = __mmask16(bits);
  if constexpr (V == Values::f32) return expand_lanes(load_f32(at), mask);
  else if constexpr (V == Values::bf16) return expand_lanes(load_bf16(at), mask);
  else return to_float(as_int(expand_lanes(as_float(load_s8(at)), mask)));
}
EFFK_INLINE vi expand64(const uint8_t* at, uint64_t mask) {
#ifdef __AVX512VBMI2__
  vi v = load_unit(at);
  __asm__("vpexpandb %0, %0%{%1%}%{z%}" : "+v"(v) : "Yk"(__mmask64(mask)));
  return v;
#else
  const auto sixteen = [&](int i) {  // there is no expansion of bytes: through 32 bits
    const uint32_t bits = uint32_t(mask >> (16 * i)) & 0xffffu;
    const __m128i out = _mm512_cvtepi32_epi8(as_int(expand_lanes(as_float(load_s8(at)), __mmask16(bits))));
    at += __builtin_popcount(bits);
    return out;
  };
  const __m128i a = sixteen(0), b = sixteen(1), c = sixteen(2), d = sixteen(3);
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set_m128i(b, a)), _mm256_set_m128i(d, c), 1);
#endif
}
// Eight registers at a third of the instructions of eight sums: pairs of lanes, then quarters of the register.
template <int R> EFFK_INLINE void fold(const vi (&v)[R], int32_t* out) {
  static_assert(R == 8, "rows of a panel");
  const auto pairs = [](vi a, vi b) { return add_i(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)); };
  const auto fours = [](vi a, vi b) { return add_i(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b)); };
  const vi a = fours(pairs(v[0], v[1]), pairs(v[2], v[3])), b = fours(pairs(v[4], v[5]), pairs(v[6], v[7]));
  const vi halves = add_i(_mm512_shuffle_i32x4(a, b, 0x44), _mm512_shuffle_i32x4(a, b, 0xEE));  // a: quarters 0, 1; b: 2, 3
  const vi sums = add_i(halves, _mm512_shuffle_i32x4(halves, halves, 0xB1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_castsi512_si128(sums));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 4), _mm512_extracti32x4_epi32(sums, 2));
}

}  // namespace
}  // namespace effk::EFFK_TIER
