// The loops of bitmask_linear over the vector vocabulary of csrc/simd and the tier's own expansion of values by a mask:
//
//   vi bytes64(at, mask)       64 columns of bytes: value i at the i-th set bit of the word, 0 elsewhere; reads at most 64 bytes from
//                              `at` and moves it behind the values
//   vi dot64<Few>(acc, x, at, mask)         acc + the product of these with 64 bytes of x. Few: most words have half of their bits
//                                           set at most
//   void floats64<V, Few>(at, mask, w)      the same in fp32, w[4], columns in the order of order_columns
//   vi load_half(p)            32 bytes, zeros behind them
//   void order_columns<V>(x, n)             brings 64 i fp32 columns of x into that order; nothing for most
//   kStreamTokens              so many tokens at most are served from the stream of values, two or three at a time
//   kFewValues                 from how many bits of 64 on Few does not pay
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

EFFK_INLINE void put(void* y, DType t, int64_t i, float v) {
  if (t == DType::f32) { std::memcpy(static_cast<char*>(y) + 4 * i, &v, 4); return; }
  const uint16_t h = t == DType::bf16 ? float_to_bf16(v) : float_to_f16(v);
  std::memcpy(static_cast<char*>(y) + 2 * i, &h, 2);
}

void read_token(const void* x, DType t, int64_t k, Values values, float* to, int64_t x_row) {
  read_floats(x, t, k, 0, x_row, to);
  if (values == Values::bf16) order_columns<Values::bf16>(to, x_row);
}

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

  bool few;           // few bits are set: which form of an expansion is the faster one

  EFFK_INLINE Panel(const Weight& weight, int64_t p)
      : w(weight), blocks(bitmask::blocks(weight.k)), row0(p * kRows), rows(int(weight.n - row0 < kRows ? weight.n - row0 : kRows)),
        masks(weight.masks + p * blocks * kRows), at(weight.values + weight.ptr[p] * bitmask::bytes_of(weight.type)),
        few(weight.ptr[p + 1] - weight.ptr[p] <= blocks * kRows * kFewValues) {}
};
EFFK_INLINE float bias_of(const Args& a, int64_t row) { return a.bias ? float_at(a.bias, a.bias_dtype, row) : 0.0f; }

// The eight rows of a whole panel at once: with few columns what ends a panel costs as much as its products.
EFFK_INLINE vf load_eight(const void* p, DType t, int64_t i) {
  const auto* at = static_cast<const uint8_t*>(p) + i * int64_t(bytes_of(t));
  switch (t) {
    case DType::bf16: return load_part<DType::bf16>(at, 0, int(kRows));
    case DType::f16: return load_part<DType::f16>(at, 0, int(kRows));
    default: return as_float(load_half(at));
  }
}
EFFK_INLINE void store_eight(void* p, DType t, int64_t i, vf v) {
  switch (t) {
    case DType::bf16: return store_part<DType::bf16>(p, i, int(kRows), v);
    case DType::f16: return store_part<DType::f16>(p, i, int(kRows), v);
    default: return store_part<DType::f32>(p, i, int(kRows), v);
  }
}
// y = v + bias for the rows of a panel.
EFFK_INLINE void put_rows(const Args& a, const Panel& p, vf v, char* y, int64_t token) {
  const int64_t at = token * a.w.n + p.row0;
  if (p.rows == kRows) return store_eight(y, a.dtype, at, add_f(v, a.bias ? load_eight(a.bias, a.bias_dtype, p.row0) : zero_f()));
  float rows[16];
  store_f32(rows, v);
  for (int r = 0; r < p.rows; ++r) put(y, a.dtype, at + r, rows[r] + bias_of(a, p.row0 + r));
}

// ---- int8 activations -----------------------------------------------------------------------------

// total + the sums over columns of group g (one scale a row: over all), integers with 128 added to every activation, in fp32.
EFFK_INLINE vf add_group(const Panel& p, int64_t g, const void* sums, vf total) {
  vf scale, codes;
  if (!p.w.group && p.rows == kRows) {
    scale = load_eight(p.w.scale, DType::f32, p.row0);
    codes = load_eight(p.w.row_sum, DType::f32, p.row0);
  } else {
    const int64_t groups = bitmask::groups(p.w.k, p.w.group);
    float scales[16] = {};
    int32_t sum[16] = {};
    for (int r = 0; r < p.rows; ++r) scales[r] = p.w.scale[(p.row0 + r) * groups + g], sum[r] = p.w.row_sum[(p.row0 + r) * groups + g];
    scale = load_f32(scales);
    codes = load_f32(sum);
  }
  const vi exact = sub_i(as_int(load_eight(sums, DType::f32, 0)), shift_left<7>(as_int(codes)));
  return add_f(total, mul_f(scale, to_float(exact)));
}

// Sums of T tokens over `blocks` blocks of 64 columns from a memory stream; `at` moves on. Few: 32 values of a row's 64 are more than usual.
template <bool Few, int T> EFFK_INLINE void sum_blocks(const uint8_t* x, int64_t x_row, const uint64_t* mask, int64_t blocks, const uint8_t*& at,
                                                       int32_t (*sums)[kRows]) {
  vi acc[T][kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) acc[t][r] = zero_i();
  for (int64_t b = 0; b < blocks; ++b, mask += kRows) {
    vi codes[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) codes[t] = load_unit(x + t * x_row + b * kBlock);
    prefetch(mask + kAheadBytes / 8);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      if (r % 2 == 0) prefetch(at + kAheadBytes);  // a line for two rows: half of the weight is zero, or more
      if constexpr (T == 1) {
        acc[0][r] = dot64<Few>(acc[0][r], codes[0], at, mask + r);
      } else {
        const vi w = bytes64(at, mask + r);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) acc[t][r] = dot_u8s8<true>(acc[t][r], codes[t], w);
      }
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) fold(acc[t], sums[t]);
}

// Panel i times T tokens from token t0 on.
template <int T> void stream_int8(const Args& a, const Tokens& t, int64_t t0, int64_t i, char* y) {
  const uint8_t* x = static_cast<const uint8_t*>(t.x) + t0 * t.x_row;
  const Panel p(a.w, i);
  const int64_t step = a.w.group ? a.w.group / kBlock : p.blocks;
  const uint8_t* at = p.at;
  vf total[T];
#pragma GCC unroll 4
  for (int n = 0; n < T; ++n) total[n] = zero_f();
  for (int64_t b0 = 0, g = 0; b0 < p.blocks; b0 += step, ++g) {
    const int64_t count = b0 + step < p.blocks ? step : p.blocks - b0;
    int32_t sums[T][kRows];
    if (p.few && T == 1) sum_blocks<true, T>(x + b0 * kBlock, t.x_row, p.masks + b0 * kRows, count, at, sums);
    else sum_blocks<false, T>(x + b0 * kBlock, t.x_row, p.masks + b0 * kRows, count, at, sums);
#pragma GCC unroll 4
    for (int n = 0; n < T; ++n) total[n] = add_group(p, g, sums[n], total[n]);
  }
#pragma GCC unroll 4
  for (int n = 0; n < T; ++n) put_rows(a, p, mul_f(total[n], set_f(t.sx[t0 + n])), y, t0 + n);
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

// Scales of groups are multiplied into the weights; one a row waits for the sum.
EFFK_INLINE float scale_at(const Panel& p, int r, int64_t b) {
  return r < p.rows ? p.w.scale[(p.row0 + r) * bitmask::groups(p.w.k, p.w.group) + b * kBlock / p.w.group] : 0.0f;
}
// row(r): the vector of sums of row r.
template <class F> EFFK_INLINE void finish_floats(const Args& a, const Panel& p, const F& row, char* y, int64_t token) {
  vf v = reduce_rows([&](int r) { return r < kRows ? row(r) : zero_f(); });
  if (a.w.scale && !a.w.group) {
    float scales[16] = {};
    std::memcpy(scales, a.w.scale + p.row0, size_t(p.rows) * 4);
    v = mul_f(v, load_f32(scales));
  }
  put_rows(a, p, v, y, token);
}

template <Values V, bool Few, bool Scaled, int T> EFFK_INLINE void sum_floats(const Panel& p, const float* x, int64_t x_row, vf (&sums)[T][kRows]) {
  const uint64_t* mask = p.masks;
  const uint8_t* at = p.at;
  vf acc[T][kRows], scale[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) acc[t][r] = zero_f();
  const int64_t step = Scaled ? p.w.group / kBlock : p.blocks;
  for (int64_t b0 = 0; b0 < p.blocks; b0 += step) {
    const int64_t b1 = b0 + step < p.blocks ? b0 + step : p.blocks;
#pragma GCC unroll 8
    for (int r = 0; Scaled && r < kRows; ++r) scale[r] = set_f(scale_at(p, r, b0));
    for (int64_t b = b0; b < b1; ++b, mask += kRows) {
      prefetch(mask + kAheadBytes / 8);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        prefetch(at + kAheadBytes);
        vf w[4];
        floats64<V, Few>(at, mask + r, w);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          const vf v = Scaled ? mul_f(w[j], scale[r]) : w[j];
#pragma GCC unroll 4
          for (int t = 0; t < T; ++t) acc[t][r] = mac(v, load_f32(x + t * x_row + b * kBlock + j * 16), acc[t][r]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) sums[t][r] = acc[t][r];
}
template <Values V, bool Scaled, int T> void stream_float(const Args& a, const Tokens& t, int64_t t0, int64_t i, char* y) {
  const float* x = static_cast<const float*>(t.x) + t0 * t.x_row;
  const Panel p(a.w, i);
  vf sums[T][kRows];
  p.few ? sum_floats<V, true, Scaled, T>(p, x, t.x_row, sums) : sum_floats<V, false, Scaled, T>(p, x, t.x_row, sums);
  for (int n = 0; n < T; ++n) finish_floats(a, p, [&](int r) { return sums[n][r]; }, y, t0 + n);
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
        for (int r = 0; r < kRows; ++r) store_unit(piece + ((b - b0) * kRows + r) * 64, bytes64(at, p.masks + b * kRows + r));
      }
      for (int r = 0; r < kRows; r += kTileRows)
        over_tokens(t.count, [&](int64_t t0, auto tokens) {
          block_int8<kTileRows, decltype(tokens)::value>(piece + r * 64, b1 - b0, x + t0 * t.x_row + b0 * kBlock, t.x_row, sums + t0 * kRows + r, kRows);
        });
      if (b1 < end) continue;
      for (int64_t n = 0; n < t.count; ++n) {
        float* sum = total + n * kRows;
        store_eight(sum, DType::f32, 0, add_group(p, b0 / step, sums + n * kRows, load_eight(sum, DType::f32, 0)));
      }
      std::memset(sums, 0, size_t(t.count * kRows) * 4);
    }
    for (int64_t n = 0; n < t.count; ++n) put_rows(a, p, mul_f(load_eight(total, DType::f32, n * kRows), set_f(t.sx[n])), y, n);
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
          vf w[4];
          floats64<V, false>(at, p.masks + b * kRows + r, w);
          const vf scale = set_f(V == Values::i8 && p.w.group ? scale_at(p, r, b) : 1.0f);
          for (int j = 0; j < 4; ++j) store_f32(to + j * kRows * 64, V == Values::i8 ? mul_f(w[j], scale) : w[j]);
        }
      for (int r = 0; r < kRows; r += kTileRows)
        over_tokens(t.count, [&](int64_t t0, auto tokens) {
          block_float<kTileRows, decltype(tokens)::value>(piece + r * 64, (b1 - b0) * 4, x + t0 * t.x_row + b0 * kBlock, t.x_row,
                                                          sums + t0 * kStride + r * 16, kStride);
        });
    }
    for (int64_t n = 0; n < t.count; ++n)
      finish_floats(a, p, [&](int r) { return load_f32(sums + n * kStride + r * 16); }, y, n);
  }
}

// Few tokens: a panel is read from memory by the first of them, and from a cache and expanded again by the others.
template <class F> EFFK_INLINE void stream(const Tokens& t, int64_t p0, int64_t p1, const F& panel) {
  for (int64_t i = p0; i < p1; ++i) {
    int64_t t0 = 0;
    if constexpr (kStreamTokens > 1) {
      for (; t.count - t0 == 3 || t.count - t0 > 4; t0 += 3) panel(t0, i, std::integral_constant<int, 3>());
      for (; t.count - t0 >= 2; t0 += 2) panel(t0, i, std::integral_constant<int, 2>());
    }
    for (; t0 < t.count; ++t0) panel(t0, i, std::integral_constant<int, 1>());
  }
}
template <Values V> void multiply_float(const Args& a, const Tokens& t, int64_t p0, int64_t p1, char* y, char* room) {
  if (t.count > kStreamTokens) return tile_float<V>(a, t, p0, p1, y, room);
  stream(t, p0, p1, [&](int64_t t0, int64_t i, auto tokens) {
    constexpr int T = decltype(tokens)::value;
    if (V == Values::i8 && a.w.group) stream_float<V, V == Values::i8, T>(a, t, t0, i, y);
    else stream_float<V, false, T>(a, t, t0, i, y);
  });
}
void multiply_panels(const Args& a, const Tokens& t, int64_t p0, int64_t p1, char* y, char* room) {
  if (a.int8 && t.count > kStreamTokens) return tile_int8(a, t, p0, p1, y, room);
  if (a.int8) return stream(t, p0, p1, [&](int64_t t0, int64_t i, auto tokens) { stream_int8<decltype(tokens)::value>(a, t, t0, i, y); });
  switch (a.w.type) {
    case Values::f32: return multiply_float<Values::f32>(a, t, p0, p1, y, room);
    case Values::bf16: return multiply_float<Values::bf16>(a, t, p0, p1, y, room);
    case Values::i8: return multiply_float<Values::i8>(a, t, p0, p1, y, room);
  }
}

#define EFFK_BITMASK_KERNEL &tier::read_token, &tier::quantize_token, &tier::multiply_panels

}  // namespace
}  // namespace effk::EFFK_TIER
