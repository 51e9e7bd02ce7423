// The two products of attention as register blocks: queries times a block of keys, and weights times the values of that block.
// Sums run over channels, and over positions, one after the other in one chain a lane: a result does not depend on the block.
//
// Per channel (position) R rows x N vectors: N loads, R broadcasts, R N multiply-adds. In 512 bits 6 x 4: 10 loads for 24, two of each a
// cycle. fp16 is widened on the way where few rows use it, else once beforehand (body.h).
#pragma once
#include "ops/attention/kernels.h"
#include "simd/convert.h"

namespace effk::EFFK_TIER {
namespace {

using kv::Type;

constexpr int kRows = EFFK_ATTENTION_ROWS, kVectors = EFFK_ATTENTION_VECTORS;
constexpr int kIntRows = kRows >= 2 ? kRows / 2 : 1;  // a row has two parts
constexpr int64_t kBlock = attention::kBlock;

template <Type T> EFFK_INLINE vf load_values(const uint8_t* p) {
  if constexpr (T == Type::f32) return load_f32(p);
  else if constexpr (T == Type::f16) return load_f16(p);
  else return to_float(load_s8(p));
}

// s[r * kBlock + 16 n + l] = q[r * d ..] . key l of tile n
template <Type T, int R, int N> void score_block(const float* q, int64_t d, const uint8_t* k, float* s, int64_t ahead) {
  constexpr int64_t kStep = 16 * kv::element_bytes(T);
  vf acc[R][N];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) acc[r][n] = zero_f();
  const int64_t tile = d * kStep;
  for (int64_t c = 0; c < d; ++c, k += kStep) {
    vf key[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) key[n] = load_values<T>(k + n * tile);
    if (ahead)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) prefetch(k + n * tile + ahead);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vf by = set_f(q[r * d + c]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[r][n] = mac(key[n], by, acc[r][n]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store_f32(s + r * kBlock + 16 * n, acc[r][n]);
}

// A query beside i8 keys, in the 4 d bytes of a row: q = unit (128 high + low), high and low d signed bytes each.
struct IntQuery {
  const int8_t *high, *low;
  float unit;
  int32_t offset;  // 128 times the sum of 128 high + low: what codes + 128 bring too much
};
EFFK_INLINE IntQuery int_query(const float* q, int64_t d) {
  const auto* bytes = reinterpret_cast<const int8_t*>(q);
  IntQuery out{bytes, bytes + d, 0, 0};
  std::memcpy(&out.unit, bytes + 2 * d, 4);
  std::memcpy(&out.offset, bytes + 2 * d + 4, 4);
  return out;
}
template <int R, int N> void int_score_block(const float* q, int64_t d, const uint8_t* k, const float* scale, float* s, int64_t ahead) {
  vi high[R][N], low[R][N];
  IntQuery query[R];
  for (int r = 0; r < R; ++r) {
    query[r] = int_query(q + r * d, d);
    for (int n = 0; n < N; ++n) high[r][n] = zero_i(), low[r][n] = set_i(-query[r].offset);
  }
  const int64_t tile = d * 16;
  for (int64_t c = 0; c < d; c += 4, k += 64) {
    vi key[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) key[n] = load_unit(k + n * tile);
    if (ahead)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) prefetch(k + n * tile + ahead);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      int32_t h, l;
      std::memcpy(&h, query[r].high + c, 4);
      std::memcpy(&l, query[r].low + c, 4);
      const vi by_high = set_i(h), by_low = set_i(l);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        high[r][n] = dot_u8s8<true>(high[r][n], key[n], by_high);
        low[r][n] = dot_u8s8<true>(low[r][n], key[n], by_low);
      }
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    const vf by = load_f32(scale + 16 * n);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      store_f32(s + r * kBlock + 16 * n, mul_f(to_float(add_i(shift_left<7>(high[r][n]), low[r][n])), mul_f(by, set_f(query[r].unit))));
  }
}

// `ahead`: bytes from here to what is fetched meanwhile, the next block; 0: nothing.
// sum[r * d ..] = alpha[r] sum[r * d ..] + sum over j < count of w[r * kBlock + j] (value j), channels of N vectors
template <Type T, int R, int N>
void weigh_block(const float* w, int64_t count, const uint8_t* v, int64_t d, const float* alpha, float* sum, int64_t ahead) {
  constexpr int64_t kSize = kv::element_bytes(T);
  vf acc[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[r][n] = mul_f(load_f32(sum + r * d + 16 * n), set_f(alpha[r]));
  for (int64_t j = 0; j < count; ++j, v += d * kSize) {
    vf value[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) value[n] = load_values<T>(v + 16 * n * kSize);
    if (ahead)
#pragma GCC unroll 4
      for (int n = 0; n < N; n += int(4 / kSize)) prefetch(v + 16 * n * kSize + ahead);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vf by = set_f(w[r * kBlock + j]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[r][n] = mac(value[n], by, acc[r][n]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store_f32(sum + r * d + 16 * n, acc[r][n]);
}

// f(rows, vectors) for the R x N block of a call.
template <int R, int N, class F> EFFK_INLINE void with_vectors(int n, const F& f) {
  if constexpr (N > 0) n == N ? f(std::integral_constant<int, R>(), std::integral_constant<int, N>()) : with_vectors<R, N - 1>(n, f);
}
template <int R, class F> EFFK_INLINE void with_block(int r, int n, const F& f) {
  if constexpr (R > 0) r == R ? with_vectors<R, kVectors>(n, f) : with_block<R - 1>(r, n, f);
}
// Cuts `total` vectors into blocks as equal as can be, of at most kVectors: no block of one behind full ones.
template <class F> EFFK_INLINE void over_vectors(int total, const F& f) {
  for (int done = 0, blocks = (total + kVectors - 1) / kVectors; blocks; --blocks) {
    const int n = (total - done + blocks - 1) / blocks;
    f(done, n);
    done += n;
  }
}

// Scores of `rows` queries with `tiles` tiles of keys; T: of the keys at k.
template <Type T> EFFK_INLINE void scores(const float* q, int rows, int64_t d, const uint8_t* k, const float* k_scale, int tiles, float* s,
                                               int64_t ahead) {
  over_vectors(tiles, [&](int first, int count) {
    const uint8_t* keys = k + first * kv::tile_bytes(T, d);
    if constexpr (T == Type::i8) {
      for (int r = 0; r < rows; r += kIntRows)
        with_block<kIntRows>(rows - r < kIntRows ? rows - r : kIntRows, count, [&](auto R, auto N) {
          int_score_block<decltype(R)::value, decltype(N)::value>(q + r * d, d, keys, k_scale + first * 16, s + r * kBlock + first * 16,
                                                                   r ? 0 : ahead);
        });
    } else {
      with_block<kRows>(rows, count, [&](auto R, auto N) { score_block<T, decltype(R)::value, decltype(N)::value>(q, d, keys, s + first * 16, ahead); });
    }
  });
}
template <Type T> EFFK_INLINE void weigh(const float* w, int rows, int64_t count, const uint8_t* v, int64_t d, const float* alpha, float* sum,
                                              int64_t ahead) {
  over_vectors(int(d / 16), [&](int first, int vectors) {
    with_block<kRows>(rows, vectors, [&](auto R, auto N) {
      weigh_block<T, decltype(R)::value, decltype(N)::value>(w, count, v + first * 16 * kv::element_bytes(T), d, alpha, sum + first * 16, ahead);
    });
  });
}

}  // namespace
}  // namespace effk::EFFK_TIER
