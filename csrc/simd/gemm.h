// Register-blocked matrix products, shared by every family that multiplies. Included by a tier after its vector header.
//
//   c[r][j] = init[j] + sum_k a[r][k] b[k][j]       r < MR rows, j < NT tiles of 16 columns, k ascending, in chains of S::kChain units
//
// a: units of 64 bytes a row, [unit][MR][64 bytes], each 16 steps of a 32-bit operand that is broadcast; b: tiles of
// 16 columns (formats/panel.h), a step of each tile is one 64-byte operand (32 bytes in fp16). A step is one k in fp32 and a pair
// of k in bf16. Rows and tiles that a call lacks change nothing for the others, so a result does not depend on the block it is in.
//
// Per step: MR broadcasts, NT loads, MR x NT multiply-adds. In 512 bits 8 x 3: 11 loads for 24 multiply-adds, two of each a
// cycle; 24 accumulators, 3 operands of b and one of a are 28 of 32 registers. In 256 bits 6 x 1 (a tile is two registers):
// 8 loads for 12, 15 of 16 registers.
// Reached on Zen 5, of the multiply-add peak measured in the same run, one core, T = 512 and 2048, whole layers with all packing of
// activations: dense 81 to 91 % in fp32 and 79 to 93 % in bf16, DYAD n = 4 up to 92 and 90 %, n = 8 up to 90 and 87 %.
// Gap: layers with few outputs a block (3072 -> 768 at n = 8 has 96), where packing activations is a tenth of the time, and
// weights that come from memory.
#pragma once
#include "gemm/kernels.h"
#include "simd/convert.h"

namespace effk::EFFK_TIER {
namespace {

// How a step of a tile meets one operand of a.
struct StepF32 {
  static constexpr int kSteps = 1, kBytes = 64;  // steps that one load serves
  static constexpr int kChain = 4;               // units in one chain of sums: 64 products; costs 1 to 3 %
  static EFFK_INLINE void load(const uint8_t* p, vf (&b)[1]) { b[0] = load_f32(p); }
  static EFFK_INLINE vf madd(vf acc, vf b, const int32_t* a) { return mac(b, as_float(broadcast(a)), acc); }
};
struct StepF16 : StepF32 {
  static constexpr int kBytes = 32;
  static EFFK_INLINE void load(const uint8_t* p, vf (&b)[1]) { b[0] = load_f16(p); }
};
struct StepWide : StepF32 {  // bf16 pairs against fp32 a
  static constexpr int kSteps = 2;
  static EFFK_INLINE void load(const uint8_t* p, vf (&b)[2]) {
    const vi v = load_unit(p);
    b[0] = as_float(shift_left<16>(v));
    b[1] = as_float(bits_and(v, set_i(int32_t(0xffff0000))));
  }
};
#ifdef __AVX512BF16__
struct StepBf16 {
  static constexpr int kSteps = 1, kBytes = 64, kChain = 32;
  static EFFK_INLINE void load(const uint8_t* p, vf (&b)[1]) { b[0] = load_f32(p); }
  static EFFK_INLINE vf madd(vf acc, vf b, const int32_t* a) { return dot_bf16(acc, as_int(b), broadcast(a)); }
};
#endif

using gemm::Product;

template <class S, int MR, int NT> void multiply_block(const Product& p) {
  float* c = p.c;
  const int64_t ldc = p.ldc;
  const int last = p.last;
  const int32_t* a = static_cast<const int32_t*>(p.a);
  const int64_t a_next = p.a_unit / 4 - 16;
  const uint8_t* b = p.b;
  const int64_t b_tile = p.b_tile;
  const uint8_t* ahead = p.ahead;
  bool add = p.accumulate;
  for (int64_t u = 0; u < p.units;) {
    vf acc[MR][NT];
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < NT; ++i) acc[r][i] = zero_f();
    for (const int64_t end = u + S::kChain < p.units ? u + S::kChain : p.units; u < end; ++u) {
      for (int64_t line = 0; line < p.ahead_unit; line += 64) prefetch_far(ahead + line);
      ahead += p.ahead_unit;
      for (int q = 0; q < 4; ++q) {
#pragma GCC unroll 4
        for (int s = 0; s < 4; s += S::kSteps) {
          vf w[NT][S::kSteps];
#pragma GCC unroll 4
          for (int i = 0; i < NT; ++i) S::load(b + i * b_tile + s / S::kSteps * S::kBytes, w[i]);
#pragma GCC unroll 2
          for (int h = 0; h < S::kSteps; ++h)
#pragma GCC unroll 16
            for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
              for (int i = 0; i < NT; ++i) acc[r][i] = S::madd(acc[r][i], w[i][h], a + r * 16 + s + h);
        }
        a += 4;
        b += 4 / S::kSteps * S::kBytes;
      }
      a += a_next;
    }
    if (!add && p.init) {
#pragma GCC unroll 4
      for (int i = 0; i < NT; ++i)
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r) acc[r][i] = add_f(acc[r][i], load_f32(p.init + i * 16));
    }
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < NT; ++i) {
        float* to = c + r * ldc + i * 16;
        if (i == NT - 1 && last < 16) store_part<DType::f32>(to, 0, last, add ? add_f(acc[r][i], load_f32_part(to, last)) : acc[r][i]);
        else store_f32(to, add ? add_f(acc[r][i], load_f32(to)) : acc[r][i]);
      }
    add = true;
  }
}

template <class S, int MR, int NT> void multiply_tiles(const Product& p) {
  if constexpr (NT > 0) {
    if (p.tiles == NT) return multiply_block<S, MR, NT>(p);
    multiply_tiles<S, MR, NT - 1>(p);
  }
}
template <class S, int MR, int NT> void multiply_rows(const Product& p) {
  if constexpr (MR > 0) {
    if (p.rows == MR) return multiply_tiles<S, MR, NT>(p);
    multiply_rows<S, MR - 1, NT>(p);
  }
}

}  // namespace
}  // namespace effk::EFFK_TIER
