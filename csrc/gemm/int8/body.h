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

void pack_codes(const uint8_t* a, int64_t row_bytes, int rows, int64_t k, int bits, int8_t* to, int32_t* sum) {
  const int64_t units = gemm8::units(k);
  for (int r = 0; r < rows; ++r, a += row_bytes) {
    int32_t total = 0;
    for (int64_t u = 0; u < units; ++u) {
      alignas(64) int8_t codes[64] = {};
      const int64_t k0 = u * 64, count = k - k0 < 64 ? k - k0 : 64;
      if (bits == 8) {
        std::memcpy(codes, a + k0, size_t(count));
      } else {
        uint8_t pairs[32] = {};
        std::memcpy(pairs, a + k0 / 2, size_t((count + 1) / 2));
        for (int i = 0; i < 32; ++i) {
          codes[2 * i] = int8_t(uint8_t(pairs[i] << 4)) >> 4;
          codes[2 * i + 1] = int8_t(pairs[i]) >> 4;
        }
        if (count < 64) codes[count] = 0;  // the other half of the last byte means nothing
      }
      for (int i = 0; i < 64; ++i) total += codes[i];
      std::memcpy(to + (u * rows + r) * 64, codes, 64);
    }
    sum[r] = total;
  }
}

}  // namespace
}  // namespace effk::EFFK_TIER
