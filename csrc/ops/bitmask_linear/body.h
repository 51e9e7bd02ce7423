// The loops of bitmask_linear over the vector vocabulary of csrc/simd and the tier's own expansion of values by a mask:
//
//   vf expand16<V>(at, bits)   16 columns in fp32: value i at the i-th set bit, 0 elsewhere; reads at most 64 bytes from `at`
//   vi expand64(at, mask)      64 columns of bytes
//   void fold(acc, out)        out[r] = sum of the lanes of acc[r], r < 8
//   kTileRows, kTileTokens     the register block of a dense product
//
// One token: values go from memory through one expansion to eight sums, one a row. Bound: reading the weight; an expansion, a dot
// product, a popcount and an address for 64 weights. More tokens: see the contract.
#pragma once
#include <type_traits>

#include "ops/bitmask_linear/kernels.h"
#include "simd/convert.h"

namespace effk::EFFK_TIER {
namespace {

using namespace effk::bitmask;

// Read once: g++ reads a mask a second time for its count, and 75 % zeros take 3 to 10 % longer (Zen 5).
EFFK_INLINE uint64_t in_register(uint64_t mask) {
  __asm__("" : "+r"(mask));
  return mask;
}
EFFK_INLINE int64_t popcount(uint64_t mask) { return __builtin_popcountll(mask); }
EFFK_INLINE void put(void* y, DType t, int64_t i, float v) {
  if (t == DType::f32) { std::memcpy(static_cast<char*>(y) + 4 * i, &v, 4); return; }
  const uint16_t h = t == DType::bf16 ? float_to_bf16(v) : float_to_f16(v);
  std::memcpy(static_cast<char*>(y) + 2 * i, &h, 2);
}

void read_token(const void* x, DType t, int64_t k, float* to, int64_t x_row) { read_floats(x, t, k, 0, x_row, to); }

void quantize_token(const void* x, DType t, int64_t k, uint8_t* to, int64_t x_row, float* sx) {
  const char* from = static_cast<const char*>(x);
  const auto at = [&](int64_t i) { return load_floats(from + i * int64_t(bytes_of(t)), t, int(k - i < 16 ? k - i : 16)); };
  vi largest = zero_i();  // of the bits of |x|, which are ordered as the values are; NaN and infinity come last
  for (int64_t i = 0; i < k; i += 16) largest = max_i(largest, bits_and(as_int(at(i)), set_i(0x7fffffff)));
  const int32_t bits = reduce_max_i(largest);
  float most, scale;
  std::memcpy(&most, &bits, 4);
  scale = most / 127.0f;
  const bool finite = bits < 0x7f800000;
  if (scale == 0.0f || !finite) scale = 1.0f;
  const vf by = set_f(scale), limit = set_f(127.0f), low = set_f(-127.0f);
  std::memset(to, 0, size_t(x_row));
  for (int64_t i = 0; finite && i < k; i += 16) store_s8(to + i, round_to_int(min_f(max_f(div_f(at(i), by), low), limit)));
  for (int64_t i = 0; i < x_row; ++i) to[i] ^= 0x80;
  *sx = finite ? scale : bits_float(0x7fc00000);
}

// ---- what panels have in common -------------------------------------------------------------------

struct Panel {
  const Weight& w;
  int64_t blocks, row0;
  int rows;
  const uint64_t* masks;
  const uint8_t* at;  // the next value

  EFFK_INLINE Panel(const Weight& weight, int64_t p)
      : w(weight), blocks(bitmask::blocks(weight.k)), row0(p * kRows), rows(int(weight.n - row0 < kRows ? weight.n - row0 : kRows)),
        masks(weight.masks + p * blocks * kRows), at(weight.values + weight.ptr[p] * bitmask::bytes_of(weight.type)) {}
};
EFFK_INLINE float bias_of(const Args& a, int64_t row) { return a.bias ? float_at(a.bias, a.bias_dtype, row) : 0.0f; }

// ---- int8 activations -----------------------------------------------------------------------------

// Sums over columns of group g (whole: of the row), integers with 128 added to every activation, to their fp32 total.
EFFK_INLINE void add_group(const Panel& p, int64_t g, const int32_t* sums, float* total) {
  const int64_t groups = bitmask::groups(p.w.k, p.w.group);
  for (int r = 0; r < p.rows; ++r) {
    const int64_t i = (p.row0 + r) * groups + g;
    const int32_t exact = int32_t(uint32_t(sums[r]) - 128u * uint32_t(p.w.row_sum[i]));
    total[r] = total[r] + p.w.scale[i] * float(exact);
  }
}
EFFK_INLINE void finish_int8(const Args& a, const Panel& p, float sx, const float* total, char* y, int64_t token) {
  for (int r = 0; r < p.rows; ++r) put(y, a.dtype, token * a.w.n + p.row0 + r, total[r] * sx + bias_of(a, p.row0 + r));
}

void stream_int8(const Args& a, const Tokens& t, int64_t p0, int64_t p1, char* y) {
  const uint8_t* x = static_cast<const uint8_t*>(t.x);
  for (int64_t i = p0; i < p1; ++i) {
    const Panel p(a.w, i);
    const int64_t step = a.w.group ? a.w.group / kBlock : p.blocks;
    const uint64_t* mask = p.masks;
    const uint8_t* at = p.at;
    float total[kRows] = {};
    for (int64_t b0 = 0; b0 < p.blocks; b0 += step) {
      const int64_t b1 = b0 + step < p.blocks ? b0 + step : p.blocks;
      vi acc[kRows];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) acc[r] = zero_i();
      for (int64_t b = b0; b < b1; ++b, mask += kRows) {
        const vi codes = load_unit(x + b * kBlock);
        prefetch(mask + kAheadBytes / 8);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          if (r % 2 == 0) prefetch(at + kAheadBytes);  // a line for two rows: half of the weight is zero, or more
          const uint64_t bits = in_register(mask[r]);
          acc[r] = dot_u8s8<true>(acc[r], codes, expand64(at, bits));
          at += popcount(bits);
        }
      }
      int32_t sums[kRows];
      fold(acc, sums);
      add_group(p, b0 / step, sums, total);
    }
    finish_int8(a, p, t.sx[0], total, y, 0);
  }
}

// Rows [r, r + R) of a piece, `units` vectors of 64 columns, times T tokens: added to sums[token * stride + row].
template <int R, int T> EFFK_INLINE void block_int8(const uint8_t* piece, int64_t units, const uint8_t* x, int64_t x_row, uint32_t* sums, int64_t stride) {
  vi acc[T][R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) acc[t][r] = zero_i();
  for (int64_t u = 0; u < units; ++u) {
    vi codes[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) codes[t] = load_unit(x + t * x_row + u * 64);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vi w = load_unit(piece + (u * kRows + r) * 64);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) acc[t][r] = dot_u8s8<true>(acc[t][r], codes[t], w);
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
    int32_t out[R];
    fold(acc[t], out);
    for (int r = 0; r < R; ++r) sums[t * stride + r] += uint32_t(out[r]);
  }
}

// ---- float activations ----------------------------------------------------------------------------

template <Values V> EFFK_INLINE vf expand_scaled(const uint8_t* at, uint32_t bits, const float* scale) {
  const vf w = expand16<V>(at, bits);
  if constexpr (V != Values::i8) return w;
  return scale ? mul_f(w, set_f(*scale)) : w;
}
// Calls visit(j, w): columns 16 j.. of 64, for the four j.
template <Values V, class F> EFFK_INLINE const uint8_t* visit_block(const uint8_t* at, uint64_t bits, const float* scale, const F& visit) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const uint32_t part = uint32_t(bits >> (16 * j)) & 0xffffu;
    visit(j, expand_scaled<V>(at, part, scale));
    at += popcount(part) * bitmask::bytes_of(V);
  }
  return at;
}
// The scale that is multiplied into a weight: only with groups; one a row waits for the sum.
template <Values V> EFFK_INLINE const float* scale_inside(const Panel& p, int r, int64_t b) {
  if (V != Values::i8 || !p.w.group || r >= p.rows) return nullptr;
  return p.w.scale + (p.row0 + r) * bitmask::groups(p.w.k, p.w.group) + b * kBlock / p.w.group;
}
EFFK_INLINE void finish_float(const Args& a, const Panel& p, int r, vf sum, char* y, int64_t token) {
  if (r >= p.rows) return;
  float v = reduce_add_f(sum);
  if (a.w.scale && !a.w.group) v = v * a.w.scale[p.row0 + r];
  put(y, a.dtype, token * a.w.n + p.row0 + r, v + bias_of(a, p.row0 + r));
}

template <Values V> void stream_float(const Args& a, const Tokens& t, int64_t p0, int64_t p1, char* y) {
  const float* x = static_cast<const float*>(t.x);
  for (int64_t i = p0; i < p1; ++i) {
    const Panel p(a.w, i);
    const uint64_t* mask = p.masks;
    const uint8_t* at = p.at;
    vf acc[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) acc[r] = zero_f();
    for (int64_t b = 0; b < p.blocks; ++b, mask += kRows) {
      prefetch(mask + kAheadBytes / 8);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        prefetch(at + kAheadBytes);
        at = visit_block<V>(at, mask[r], scale_inside<V>(p, r, b), [&](int j, vf w) { acc[r] = mac(w, load_f32(x + b * kBlock + j * 16), acc[r]); });
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) finish_float(a, p, r, acc[r], y, 0);
  }
}

// The same over vectors of 16 columns in fp32; sums are vectors, [token * stride + row * 16].
template <int R, int T> EFFK_INLINE void block_float(const uint8_t* piece, int64_t units, const float* x, int64_t x_row, float* sums, int64_t stride) {
  vf acc[T][R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) acc[t][r] = load_f32(sums + t * stride + r * 16);
  for (int64_t u = 0; u < units; ++u) {
    vf v[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) v[t] = load_f32(x + t * x_row + u * 16);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vf w = load_f32(piece + (u * kRows + r) * 64);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) acc[t][r] = mac(w, v[t], acc[t][r]);
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) store_f32(sums + t * stride + r * 16, acc[t][r]);
}

// ---- many tokens ----------------------------------------------------------------------------------

// Runs block<T>(token) over all tokens, kTileTokens at a time.
template <int T, class F> EFFK_INLINE void rest_of_tokens(int64_t first, int64_t count, const F& block) {
  if constexpr (T > 0) {
    if (count == T) return block(first, std::integral_constant<int, T>());
    rest_of_tokens<T - 1>(first, count, block);
  }
}
template <class F> EFFK_INLINE void over_tokens(int64_t count, const F& block) {
  int64_t t = 0;
  for (; t + kTileTokens <= count; t += kTileTokens) block(t, std::integral_constant<int, kTileTokens>());
  rest_of_tokens<kTileTokens - 1>(t, count - t, block);
}

void tile_int8(const Args& a, const Tokens& t, int64_t p0, int64_t p1, char* y, char* room) {
  uint8_t* piece = reinterpret_cast<uint8_t*>(room);
  uint32_t* sums = reinterpret_cast<uint32_t*>(room + kRows * kPieceBytes);  // [count][8]
  float* total = reinterpret_cast<float*>(sums + t.count * kRows);           // [count][8]
  const uint8_t* x = static_cast<const uint8_t*>(t.x);
  constexpr int64_t kPiece = kPieceBytes / kBlock;
  for (int64_t i = p0; i < p1; ++i) {
    const Panel p(a.w, i);
    const int64_t step = a.w.group ? a.w.group / kBlock : p.blocks;
    const uint8_t* at = p.at;
    std::memset(sums, 0, size_t(t.count * kRows) * 8);
    for (int64_t b0 = 0, b1; b0 < p.blocks; b0 = b1) {
      const int64_t group_end = (b0 / step + 1) * step, end = group_end < p.blocks ? group_end : p.blocks;
      b1 = b0 + kPiece < end ? b0 + kPiece : end;
      for (int64_t b = b0; b < b1; ++b) {
        prefetch(at + kAheadBytes);
        prefetch(at + kAheadBytes + 64);
        for (int r = 0; r < kRows; ++r) {
          const uint64_t bits = p.masks[b * kRows + r];
          store_unit(piece + ((b - b0) * kRows + r) * 64, expand64(at, bits));
          at += popcount(bits);
        }
      }
      for (int r = 0; r < kRows; r += kTileRows)
        over_tokens(t.count, [&](int64_t t0, auto tokens) {
          block_int8<kTileRows, decltype(tokens)::value>(piece + r * 64, b1 - b0, x + t0 * t.x_row + b0 * kBlock, t.x_row, sums + t0 * kRows + r, kRows);
        });
      if (b1 < end) continue;
      for (int64_t n = 0; n < t.count; ++n) {
        int32_t exact[kRows];
        std::memcpy(exact, sums + n * kRows, sizeof exact);
        add_group(p, b0 / step, exact, total + n * kRows);
      }
      std::memset(sums, 0, size_t(t.count * kRows) * 4);
    }
    for (int64_t n = 0; n < t.count; ++n) finish_int8(a, p, t.sx[n], total + n * kRows, y, n);
  }
}

template <Values V> void tile_float(const Args& a, const Tokens& t, int64_t p0, int64_t p1, char* y, char* room) {
  uint8_t* piece = reinterpret_cast<uint8_t*>(room);
  float* sums = reinterpret_cast<float*>(room + kRows * kPieceBytes);  // [count][8][16]
  const float* x = static_cast<const float*>(t.x);
  constexpr int64_t kPiece = kPieceBytes / (kBlock * 4), kStride = kRows * 16;
  for (int64_t i = p0; i < p1; ++i) {
    const Panel p(a.w, i);
    const uint8_t* at = p.at;
    std::memset(sums, 0, size_t(t.count * kStride) * 4);
    for (int64_t b0 = 0, b1; b0 < p.blocks; b0 = b1) {
      b1 = b0 + kPiece < p.blocks ? b0 + kPiece : p.blocks;
      for (int64_t b = b0; b < b1; ++b)
        for (int r = 0; r < kRows; ++r) {
          prefetch(at + kAheadBytes);
          uint8_t* to = piece + ((b - b0) * 4 * kRows + r) * 64;
          at = visit_block<V>(at, p.masks[b * kRows + r], scale_inside<V>(p, r, b), [&](int j, vf w) { store_f32(to + j * kRows * 64, w); });
        }
      for (int r = 0; r < kRows; r += kTileRows)
        over_tokens(t.count, [&](int64_t t0, auto tokens) {
          block_float<kTileRows, decltype(tokens)::value>(piece + r * 64, (b1 - b0) * 4, x + t0 * t.x_row + b0 * kBlock, t.x_row,
                                                          sums + t0 * kStride + r * 16, kStride);
        });
    }
    for (int64_t n = 0; n < t.count; ++n)
      for (int r = 0; r < kRows; ++r) finish_float(a, p, r, load_f32(sums + n * kStride + r * 16), y, n);
  }
}

template <Values V> void multiply_float(const Args& a, const Tokens& t, int64_t p0, int64_t p1, char* y, char* room) {
  t.count == 1 ? stream_float<V>(a, t, p0, p1, y) : tile_float<V>(a, t, p0, p1, y, room);
}
void multiply_panels(const Args& a, const Tokens& t, int64_t p0, int64_t p1, char* y, char* room) {
  if (a.int8) return t.count == 1 ? stream_int8(a, t, p0, p1, y) : tile_int8(a, t, p0, p1, y, room);
  switch (a.w.type) {
    case Values::f32: return multiply_float<Values::f32>(a, t, p0, p1, y, room);
    case Values::bf16: return multiply_float<Values::bf16>(a, t, p0, p1, y, room);
    case Values::i8: return multiply_float<Values::i8>(a, t, p0, p1, y, room);
  }
}

#define EFFK_BITMASK_KERNEL &tier::read_token, &tier::quantize_token, &tier::multiply_panels

}  // namespace
}  // namespace effk::EFFK_TIER
