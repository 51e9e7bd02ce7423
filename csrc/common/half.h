// Storage conversions between fp32 and the two 16-bit floating formats, bit by bit and without hardware help. The scalar
// tier, the packers and the tests use them; the SIMD tiers have instructions of their own that return the same bits.
#pragma once
#include <cstdint>
#include <cstring>

namespace effk {

static inline uint32_t float_bits(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }
static inline float bits_float(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }

static inline float bf16_to_float(uint16_t h) { return bits_float(uint32_t(h) << 16); }

// Round to nearest, ties to even; NaN stays NaN (made quiet).
static inline uint16_t float_to_bf16(float f) {
  const uint32_t u = float_bits(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t((u >> 16) | 0x40u);
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

static inline float f16_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, exp = (h >> 10) & 31u, man = h & 0x3ffu;
  if (exp == 31) return bits_float(sign | 0x7f800000u | (man << 13) | (man ? 0x400000u : 0u));
  if (exp) return bits_float(sign | ((exp + 112u) << 23) | (man << 13));
  const float sub = float(man) * 5.9604644775390625e-8f;  // subnormal: man * 2^-24, exact
  return bits_float(sign | float_bits(sub));
}

static inline uint16_t float_to_f16(float f) {
  const uint32_t u = float_bits(f), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return uint16_t(sign | 0x7e00u | ((a >> 13) & 0x3ffu));
  if (a >= 0x477ff000u) return uint16_t(sign | 0x7c00u);            // rounds to infinity
  if (a < 0x38800000u) {                                            // subnormal or zero: let fp32 addition round
    const float magic = bits_float(0x3f000000u);                    // 0.5: its ulp is 2^-24, the subnormal step
    return uint16_t(sign | (float_bits(bits_float(a) + magic) - 0x3f000000u));
  }
  return uint16_t(sign | ((a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13));
}

}  // namespace effk
