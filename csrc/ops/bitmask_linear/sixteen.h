// What body.h asks for, for tiers that have bytes64(at, mask), and in fp32 expand16<V>(at, bits) for 16 columns at a time.
#pragma once
#include "ops/bitmask_linear/kernels.h"

namespace effk::EFFK_TIER {
namespace {

constexpr int kFewValues = 0, kStreamTokens = 1;

template <bool> EFFK_INLINE vi dot64(vi acc, vi x, const uint8_t*& at, const uint64_t* mask) { return dot_u8s8<true>(acc, x, bytes64(at, mask)); }
template <Values V, bool> EFFK_INLINE void floats64(const uint8_t*& at, const uint64_t* mask, vf (&w)[4]) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const uint32_t bits = uint32_t(*mask >> (16 * j)) & 0xffffu;
    w[j] = expand16<V>(at, bits);
    at += __builtin_popcount(bits) * effk::bitmask::bytes_of(V);
  }
}
template <Values> EFFK_INLINE void order_columns(float*, int64_t) {}

}  // namespace
}  // namespace effk::EFFK_TIER
