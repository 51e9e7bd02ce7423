// Portable tier. The loops are in body.h.
#define EFFK_TIER scalar
#include "simd/scalar.h"

#include "ops/bitmask_linear/kernels.h"

namespace effk::scalar {
namespace {

using effk::bitmask::Values;

constexpr int kTileRows = 1, kTileTokens = 1;
constexpr int64_t kAheadBytes = 0;

template <Values V> EFFK_INLINE vf expand16(const uint8_t* at, uint32_t bits) {
  vf out = zero_f();
  for (int l = 0; l < 16; ++l) {
    if (!(bits >> l & 1)) continue;
    if constexpr (V == Values::f32) std::memcpy(&out.v[l], at, 4);
    else if constexpr (V == Values::bf16) out.v[l] = bf16_to_float(half_at(at, 0));
    else out.v[l] = float(static_cast<int8_t>(*at));
    at += effk::bitmask::bytes_of(V);
  }
  return out;
}
EFFK_INLINE vi load_half(const void* p) {
  vi v = zero_i();
  std::memcpy(v.v, p, 32);
  return v;
}
EFFK_INLINE vi bytes64(const uint8_t*& at, const uint64_t* mask) {
  uint8_t out[64] = {};
  for (int i = 0; i < 64; ++i)
    if (*mask >> i & 1) out[i] = *at++;
  return load_unit(out);
}
template <int R> EFFK_INLINE void fold(const vi (&acc)[R], int32_t* out) {
  for (int r = 0; r < R; ++r) out[r] = reduce_add_i(acc[r]);
}

}  // namespace
}  // namespace effk::scalar

#include "ops/bitmask_linear/sixteen.h"

#include "ops/bitmask_linear/body.h"

namespace effk::bitmask {
namespace tier = effk::scalar;

extern const Kernel kScalar{isa::Tier::scalar, "scalar:bitmask", EFFK_BITMASK_KERNEL};

}  // namespace effk::bitmask
