// The register block of the shared integer product (csrc/gemm/int8). Included by a tier after its vector header.
//
//   c[r][j] = start + sum_k a[r][k] u[j][k]       r < MR rows of signed bytes, j < NT tiles of 16 rows of unsigned codes
//
// Per step of 4 k: MR broadcasts, NT loads, MR x NT dot products. In 512 bits with VNNI 8 x 3 as in simd/gemm.h: 11 loads for 24
// dot products, two of each a cycle. Without VNNI a dot product of 4-bit codes is three instructions, of 8-bit codes six (the
// codes are cut into nibbles, whose 16-bit sums cannot saturate: 15 * 128 * 2), and blocks are smaller, 4 x 1 in 256 bits.
// Bound: dot products. Reached on Zen 5 with VNNI, of the peak measured in the same run, one core: 98 to 100 % by all blocks of a
// layer with 128 rows or more, 85 to 96 % with packing and the store of int32 results. Without VNNI the rate is a tenth to a fifth.
#pragma once
#include "gemm/int8/int8.h"

namespace effk::EFFK_TIER {
namespace {

template <int Bits, int MR, int NT> EFFK_INLINE void int8_line(vi (&acc)[MR][NT], const uint8_t* b, int64_t b_tile, const int32_t* a) {
  vi line[NT];
#pragma GCC unroll 4
  for (int i = 0; i < NT; ++i) line[i] = load_unit(b + i * b_tile);
  if constexpr (Bits == 8) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < NT; ++i) acc[r][i] = dot_u8s8<true>(acc[r][i], line[i], broadcast(a + r * 16));
  } else {
    vi w[NT];
#pragma GCC unroll 4
    for (int i = 0; i < NT; ++i) w[i] = bits_of_bytes<0, 4>(line[i]);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < NT; ++i) acc[r][i] = dot_u8s8<false>(acc[r][i], w[i], broadcast(a + r * 16));
#pragma GCC unroll 4
    for (int i = 0; i < NT; ++i) w[i] = bits_of_bytes<4, 4>(line[i]);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < NT; ++i) acc[r][i] = dot_u8s8<false>(acc[r][i], w[i], broadcast(a + r * 16 + 1));
  }
}

template <int Bits, int MR, int NT> void int8_block(const gemm8::Product& p) {
  constexpr int kSteps = Bits == 8 ? 1 : 2, kLines = 16 / kSteps;  // of a line; of a unit
  vi acc[MR][NT];
  int32_t* c = p.c;
  const int64_t ldc = p.ldc;
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < NT; ++i) acc[r][i] = p.init ? set_i(p.init[r]) : load_unit(c + r * ldc + i * 16);
  const int32_t* a = reinterpret_cast<const int32_t*>(p.a);
  const uint8_t* b = p.b;
  const int64_t b_tile = p.b_tile, whole = p.lines / kLines;
  const uint8_t* ahead = p.ahead;
  for (int64_t u = 0; u < whole; ++u) {
    for (int64_t line = 0; line < p.ahead_unit; line += 64) prefetch_far(ahead + line);
    ahead += p.ahead_unit;
    for (int q = 0; q < 4; ++q) {
#pragma GCC unroll 4
      for (int s = 0; s < 4 / kSteps; ++s) int8_line<Bits, MR, NT>(acc, b + s * 64, b_tile, a + s * kSteps);
      a += 4;
      b += 4 / kSteps * 64;
    }
    a += (MR - 1) * 16;
  }
  for (int64_t l = 0; l < p.lines - whole * kLines; ++l) int8_line<Bits, MR, NT>(acc, b + l * 64, b_tile, a + l * kSteps);
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < NT; ++i) store_unit(c + r * ldc + i * 16, acc[r][i]);
}

template <int Bits, int MR, int NT> void int8_tiles(const gemm8::Product& p) {
  if constexpr (NT > 0) {
    if (p.tiles == NT) return int8_block<Bits, MR, NT>(p);
    int8_tiles<Bits, MR, NT - 1>(p);
  }
}
template <int Bits, int MR, int NT> void int8_rows(const gemm8::Product& p) {
  if constexpr (MR > 0) {
    if (p.rows == MR) return int8_tiles<Bits, MR, NT>(p);
    int8_rows<Bits, MR - 1, NT>(p);
  }
}

}  // namespace
}  // namespace effk::EFFK_TIER
