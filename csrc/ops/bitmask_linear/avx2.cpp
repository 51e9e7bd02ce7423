// 256-bit tier. The loops are in body.h. Eight columns at a time through a table of shuffles, 2 KB, which stays in a first-level cache.
#define EFFK_TIER avx2
#include "simd/avx2.h"

#include "ops/bitmask_linear/kernels.h"

namespace effk::avx2 {
namespace {

using effk::bitmask::Values;

constexpr int kTileRows = 2, kTileTokens = 3;
constexpr int64_t kAheadBytes = 1024;

// Byte l of entry m: how many bits of m lie below l, or 0x80 where bit l is not set.
struct Shuffles { uint8_t of[256][8]; };
constexpr Shuffles make_shuffles() {
  Shuffles s{};
  for (int m = 0; m < 256; ++m)
    for (int l = 0, next = 0; l < 8; ++l) s.of[m][l] = m >> l & 1 ? uint8_t(next++) : uint8_t(0x80);
  return s;
}
constexpr Shuffles kShuffles = make_shuffles();

EFFK_INLINE vi load_half(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p)), _mm256_setzero_si256()}; }
EFFK_INLINE __m128i load8(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
template <Values V> EFFK_INLINE __m256 expand8(const uint8_t* at, uint32_t bits) {
  const __m128i shuffle = load8(kShuffles.of[bits]);
  if constexpr (V == Values::i8) return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_shuffle_epi8(load8(at), shuffle)));
  __m256i packed;
  if constexpr (V == Values::bf16) packed = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))), 16);
  else packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  const __m256i index = _mm256_cvtepi8_epi32(shuffle);  // negative where there is no value
  return _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_srai_epi32(index, 31), _mm256_permutevar8x32_epi32(packed, index)));
}
template <Values V> EFFK_INLINE vf expand16(const uint8_t* at, uint32_t bits) {
  const uint32_t low = bits & 255;
  return {expand8<V>(at, low), expand8<V>(at + __builtin_popcount(low) * effk::bitmask::bytes_of(V), bits >> 8)};
}
EFFK_INLINE vi bytes64(const uint8_t*& at, const uint64_t* word) {
  const uint64_t mask = *word;
  const auto sixteen = [&](int i) {
    const uint32_t low = uint32_t(mask >> (16 * i)) & 255, high = uint32_t(mask >> (16 * i + 8)) & 255;
    const __m128i a = _mm_shuffle_epi8(load8(at), load8(kShuffles.of[low]));
    at += __builtin_popcount(low);
    const __m128i b = _mm_shuffle_epi8(load8(at), load8(kShuffles.of[high]));
    at += __builtin_popcount(high);
    return _mm_unpacklo_epi64(a, b);
  };
  const __m128i a = sixteen(0), b = sixteen(1), c = sixteen(2), d = sixteen(3);
  return {_mm256_set_m128i(b, a), _mm256_set_m128i(d, c)};
}
template <int R> EFFK_INLINE void fold(const vi (&acc)[R], int32_t* out) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) out[r] = reduce_add_i(acc[r]);
}

}  // namespace
}  // namespace effk::avx2

#include "ops/bitmask_linear/sixteen.h"

#include "ops/bitmask_linear/body.h"

namespace effk::bitmask {
namespace tier = effk::avx2;

extern const Kernel kAvx2{isa::Tier::avx2, "avx2:bitmask", EFFK_BITMASK_KERNEL};

}  // namespace effk::bitmask
