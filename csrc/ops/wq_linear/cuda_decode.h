// From t16 bytes to tensor-core fragments.
//
// A step is 32 consecutive k of one tile. Lane 4g + t of a warp owns rows 2g and 2g + 1 and the eight k = 8t .. 8t + 7 of
// it, at every width: two mma.m16n8k16 instructions. Their row g is the tile's row 2g and their row g + 8 the row 2g + 1,
// so that a lane's two rows are neighbouring words; and as codes four k apart share a byte, a register of the first mma
// pairs k = (0, 2) and (1, 3) of the lane's eight, one of the second (4, 6) and (5, 7). The x fragments are paired alike.
//
//   byte offsets in a step      2 bits: unit t/2 (lanes 2i, 2i+1 take its halves)      3 bits: unit t/2, high bits unit 2
//                               4 bits: unit t                                         8 bits: units 2t and 2t + 1
#pragma once
#include "cuda/cu.h"
#include "formats/t16.h"

namespace effk::cuda {
namespace {

constexpr int kStepK = 32;
template <int kBits>
constexpr int kStepBytes = t16::kTileRows * kStepK * kBits / 8;

// The eight codes of one row: code i < 4 at bit 8 i of `low`, code i >= 4 at bit 8 (i - 4) + kHighShift of `high`. The
// bits around a code are arbitrary.
struct Codes { uint32_t low, high; };
template <int kBits>
constexpr int kHighShift = kBits == 4 ? 4 : kBits == 8 ? 0 : 2;

// Codes of the lane's two rows, from a step whose 64-byte units lie at unit(i) (see stage_offset in cuda_mma.h).
template <int kBits, class Unit>
__device__ __forceinline__ void read_codes(Codes (&row)[2], int t, int g, Unit unit) {
  const auto rows = [&](int i) { return *reinterpret_cast<const uint2*>(unit(i) + 8 * g); };
  if constexpr (kBits == 8) {
    const uint2 low = rows(2 * t), high = rows(2 * t + 1);
    row[0] = {low.x, high.x};
    row[1] = {low.y, high.y};
  } else if constexpr (kBits == 4) {
    const uint2 w = rows(t);
    row[0] = {w.x, w.x};
    row[1] = {w.y, w.y};
  } else {
    const uint2 w = rows(t / 2);
    const int half = 4 * (t & 1);  // bytes hold four codes of 2 bits; odd lanes own the upper two
    row[0] = {w.x >> half, w.x >> half};
    row[1] = {w.y >> half, w.y >> half};
    if constexpr (kBits == 3) {
      // High bits 2t and 2t + 1 of every byte go to bits 2 and 3, beside the low bits of the first code; one bit further
      // up they stand beside those of the second. What wraps around lands in bits that are masked off.
      const uint2 h = rows(2);
      const uint32_t h0 = __funnelshift_r(h.x, h.x, 2 * t + 30), h1 = __funnelshift_r(h.y, h.y, 2 * t + 30);
      constexpr uint32_t kLow = 0x03030303u, kHigh = 0x0c0c0c0cu;
      row[0] = {(row[0].low & kLow) | (h0 & ~kLow), (row[0].low & kHigh) | (h0 << 1 & ~kHigh)};
      row[1] = {(row[1].low & kLow) | (h1 & ~kLow), (row[1].low & kHigh) | (h1 << 1 & ~kHigh)};
    }
  }
}

__device__ __forceinline__ uint32_t twice(uint32_t half) { return half * 0x00010001u; }

// The two 16-bit types, by their bit patterns.
template <class T>
struct Bits16;
template <>
struct Bits16<__half> {
  static constexpr int mantissa = 10;
  static constexpr uint32_t one = 0x3c00, base = 0x6400;  // base = 2^mantissa: its last place is 1
  static __device__ __forceinline__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    const __half2 r = __hfma2(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b), reinterpret_cast<const __half2&>(c));
    return reinterpret_cast<const uint32_t&>(r);
  }
};
template <>
struct Bits16<__nv_bfloat16> {
  static constexpr int mantissa = 7;
  static constexpr uint32_t one = 0x3f80, base = 0x4300;
  static __device__ __forceinline__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    const __nv_bfloat162 r = __hfma2(reinterpret_cast<const __nv_bfloat162&>(a), reinterpret_cast<const __nv_bfloat162&>(b),
                                     reinterpret_cast<const __nv_bfloat162&>(c));
    return reinterpret_cast<const uint32_t&>(r);
  }
};

// (q - z) of the codes at bits kShift and 16 + kShift of w. OR-ing a code into the mantissa of `base` makes the number
// base + q 2^kShift; one fused multiply-add scales it back and takes base and z off, exactly: all are small integers.
// Source of the trick: Kim et al., "Who Says Elephants Can't Run", section 3; the shifted field saves a shift.
template <class T, int kBits, int kShift>
__device__ __forceinline__ uint32_t dequantize_pair(uint32_t w, uint32_t zero) {
  using B = Bits16<T>;
  if constexpr (kBits + kShift > B::mantissa) {
    return dequantize_pair<T, kBits, 0>(w >> kShift, zero);
  } else {
    constexpr uint32_t mask = ((1u << kBits) - 1u) << kShift, scale = B::one - (uint32_t(kShift) << B::mantissa);
    constexpr uint32_t minus_base = 0x8000u | (B::base - (uint32_t(kShift) << B::mantissa));
    const uint32_t field = (w & (mask * 0x00010001u)) | (B::base * 0x00010001u);
    return B::fma2(field, scale * 0x00010001u, twice(minus_base + (zero << kShift)));
  }
}

// bf16 has no room for 8-bit codes above its base: through fp32, whose upper half holds any integer up to 256.
__device__ __forceinline__ uint32_t dequantize_bytes_bf16(uint32_t w, int first, float minus_zero) {
  constexpr uint32_t kTwo23 = 0x4b000000u;  // 2^23: its last place is 1
  const float a = __uint_as_float(__byte_perm(w, kTwo23, 0x7440u + first)) + minus_zero;
  const float b = __uint_as_float(__byte_perm(w, kTwo23, 0x7442u + first)) + minus_zero;
  return __byte_perm(__float_as_uint(a), __float_as_uint(b), 0x7632u);
}

// Integer codes -> the four registers of one row: pairs (0, 2), (1, 3), (4, 6), (5, 7).
template <class T, int kBits>
__device__ __forceinline__ void dequantize_row(uint32_t (&pair)[4], const Codes& c, uint32_t zero) {
  constexpr int kShift = kHighShift<kBits>;
  if constexpr (kBits < 8) {
    pair[0] = dequantize_pair<T, kBits, 0>(c.low, zero);
    pair[1] = dequantize_pair<T, kBits, 0>(c.low >> 8, zero);
    pair[2] = dequantize_pair<T, kBits, kShift>(c.high, zero);
    pair[3] = dequantize_pair<T, kBits, kShift>(c.high >> 8, zero);
  } else if constexpr (Bits16<T>::mantissa == 10) {
    constexpr uint32_t base = Bits16<T>::base * 0x00010001u;
    const uint32_t one = Bits16<T>::one * 0x00010001u, minus = twice((0x8000u | Bits16<T>::base) + zero);
    for (int i = 0; i < 2; ++i) {
      pair[i] = Bits16<T>::fma2(__byte_perm(c.low, base, 0x5250u + 0x0101u * i), one, minus);
      pair[2 + i] = Bits16<T>::fma2(__byte_perm(c.high, base, 0x5250u + 0x0101u * i), one, minus);
    }
  } else {
    const float minus = -8388608.0f - float(zero);
    for (int i = 0; i < 2; ++i) {
      pair[i] = dequantize_bytes_bf16(c.low, i, minus);
      pair[2 + i] = dequantize_bytes_bf16(c.high, i, minus);
    }
  }
}

// Codes -> half of the same registers from a table of (main part, remainder) halves, for one row: pairs (0, 2) and (1, 3),
// or in the second half (4, 6) and (5, 7).
template <int kBits>
__device__ __forceinline__ void look_up_half(uint32_t (&main)[2], uint32_t (&rest)[2], const Codes& c, int half, const uint32_t* table) {
  constexpr uint32_t mask = (1u << kBits) - 1u;
  const uint32_t word = half == 0 ? c.low : c.high >> kHighShift<kBits>;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t a = table[word >> (8 * i) & mask], b = table[word >> (8 * i + 16) & mask];
    main[i] = __byte_perm(a, b, 0x5410u);
    rest[i] = __byte_perm(a, b, 0x7632u);
  }
}

}  // namespace
}  // namespace effk::cuda
