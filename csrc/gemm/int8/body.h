// The kernels of csrc/gemm/int8 over the vector vocabulary of csrc/simd. A tier file defines EFFK_TIER and the size of a block,
// includes its vocabulary and this file.
#pragma once
#include <cstring>

#include "simd/gemm_int8.h"

namespace effk::EFFK_TIER {
namespace {

void multiply_int8(const gemm8::Product& p) {
  if (p.bits == 8) return int8_rows<8, EFFK_INT8_ROWS, EFFK_INT8_TILES>(p);
  int8_rows<4, EFFK_INT8_ROWS, EFFK_INT8_TILES>(p);
}

// 64 codes from `count` of them; those behind are zero.
template <int Bits> EFFK_INLINE vi codes_of_unit(const uint8_t* from, int64_t count) {
  if (Bits == 8 && count == 64) return load_unit(from);
  alignas(64) int8_t codes[64] = {};
  if constexpr (Bits == 8) {
    std::memcpy(codes, from, size_t(count));
  } else {
    uint8_t pairs[32] = {};
    if (count == 64) std::memcpy(pairs, from, 32);
    else std::memcpy(pairs, from, size_t((count + 1) / 2));
    for (int i = 0; i < 32; ++i) {
      codes[2 * i] = int8_t(uint8_t(pairs[i] << 4)) >> 4;
      codes[2 * i + 1] = int8_t(pairs[i]) >> 4;
    }
    if (count < 64) codes[count] = 0;  // the other half of the last byte means nothing
  }
  return load_unit(codes);
}
template <int Bits> void pack_codes_of(const uint8_t* a, int64_t row_bytes, int rows, int64_t k, int8_t* to, int32_t* sum) {
  for (int r = 0; r < rows; ++r) {
    vi total = zero_i();
    for (int64_t k0 = 0; k0 < k; k0 += 64) {
      const vi codes = codes_of_unit<Bits>(a + r * row_bytes + k0 * Bits / 8, k - k0 < 64 ? k - k0 : 64);
      total = add_i(total, sum_s8(codes));
      store_unit(to + (k0 / 64 * rows + r) * 64, codes);
    }
    sum[r] = reduce_add_i(total);
  }
}
void pack_codes(const uint8_t* a, int64_t row_bytes, int rows, int64_t k, int bits, int8_t* to, int32_t* sum) {
  bits == 8 ? pack_codes_of<8>(a, row_bytes, rows, k, to, sum) : pack_codes_of<4>(a, row_bytes, rows, k, to, sum);
}

}  // namespace
}  // namespace effk::EFFK_TIER
