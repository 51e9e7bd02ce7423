// The loops of relu_ffn over the vector vocabulary of csrc/simd, for one token at a time or up to four together; many.h has those for
// more. Bound: reading the weights, a multiply-add of fp32 a weight and token; rows of other types are widened in registers. Reached on
// Zen 5, one core, with 4096 columns from large pages of memory that is read at 40 to 42 GB/s: rows in order 37 to 38 GB/s in bf16, 38 to
// 39 in int8 and 18 in int4, rows picked here and there 36 in fp32, 29 in bf16 and 31 in int8. Small pages cost 15 %. From cache: 70 GB/s in
// bf16, 56 in int8, 30 in int4. Gap: a core keeps some 50 lines in flight by itself, and the hardware's fetching, which has more, needs
// runs longer than a row; int4 is bound by arithmetic. Picked rows one at a time were 10 to 30 % slower, two 15 to 25 %, eight alike.
#pragma once
#include <type_traits>

#include "ops/relu_ffn/kernels.h"
#include "simd/activation.h"
#include "simd/convert.h"

namespace effk::EFFK_TIER {
namespace {

using neuron::Rows;
using relu_ffn::List;

template <Rows R> constexpr int kChunks = int(neuron::unit_columns(R) / neuron::kChunk);  // vectors of a unit
constexpr bool kWide = kLanes == 16;       // registers for the sums of four rows
constexpr int kPicked = 4;                 // rows together where they lie here and there: as many streams from memory
constexpr int64_t kAheadLines = 32;        // of such rows, in lines: 16 and 64 lose 10 to 20 %, except in fp32
constexpr int64_t kKick = 2;               // fp32: these lines of each next row start the hardware's own fetching, 15 % faster than all
constexpr int kAdded = 8;                  // short rows of fp32 that are added up for one token, their first line fetched: at 768 columns 8 %
constexpr int64_t kAddedUnits = 64;        // faster than four, at 2048 3 % slower
// Rows in order, one at a time: how far ahead, in whole rows and at least one. Tuned on 4096 columns, whose x takes a third of the
// first-level cache: 8 KiB are best in bf16 (16 and more lose 8 %), 12 to 20 in int8 (4 lose 4 %).
constexpr int64_t kAheadBytes = 12 << 10;
constexpr int kFewTokens = 4;            // up to so many; beyond, the loops of many.h
constexpr int64_t kShortRow = 1 << 10;     // bytes
constexpr int kByGroups = 256;             // factors of groups that add_rows makes at a time, a row and token: 1 KiB

template <Rows R> EFFK_INLINE vf chunk(const uint8_t* row, int64_t j) {  // vector j of a row
  if constexpr (R == Rows::f32) return load_f32(row + j * 64);
  else if constexpr (R == Rows::bf16) return load_bf16(row + j * 32);
  else if constexpr (R == Rows::f16) return load_f16(row + j * 32);
  else return to_float(load_s8(row + j * 16));
}
// Code - 8 of the nibbles at bits 4S..4S+3, S < 4: put into the mantissa of 2^(23 - 4S), then that and 8 taken off, exactly. Neither
// is a shuffle, of which a core does one or two at a time: a third more codes a second than by shifts and a table of 16.
template <int S> EFFK_INLINE vf nibbles(vi unit) {
  constexpr int exponent = 23 - 4 * S;
  return sub_f(as_float(and_or(unit, set_i(15 << 4 * S), set_i((127 + exponent) << 23))), set_f(float((1 << exponent) + 8)));
}
template <int S, int End, class F> EFFK_INLINE void unrolled(const F& f) {
  if constexpr (S < End) { f(std::integral_constant<int, S>()); unrolled<S + 1, End>(f); }
}

EFFK_INLINE int64_t neuron_of(const List& l, int64_t i) { return l.index ? l.index[i] : l.first + i; }
EFFK_INLINE const uint8_t* row_at(const List& l, int64_t i) { return l.rows + neuron_of(l, i) * l.row_bytes; }

}  // namespace
}  // namespace effk::EFFK_TIER

#include "ops/relu_ffn/many.h"

namespace effk::EFFK_TIER {
namespace {

// Whether rows in order go together like picked ones: short ones, whose sums would wait for each other.
EFFK_INLINE bool together(const List& l) { return l.index || l.row_bytes <= kShortRow; }
// How far ahead, in rows: of rows together, one set, or more where sets are small; of one.
template <int N> EFFK_INLINE int64_t sets_ahead(const List& l) {
  const int64_t sets = l.units < kAheadLines ? kAheadLines / l.units : 1;
  return N * sets;
}
EFFK_INLINE int64_t rows_ahead(const List& l) { return l.index || kAheadBytes < l.row_bytes ? 1 : kAheadBytes / l.row_bytes; }

// N rows from i on, and what is fetched meanwhile: a row at a time, the one `ahead`, past the second-level cache (3 % faster in order);
// several, a distance within them and on into the next N; and the scales of those.
template <Rows R, int N> struct Reading {
  const uint8_t *row[N], *next[N];
  const float* scale[N];
  int64_t first, end, distance;
  EFFK_INLINE Reading(const List& l, int64_t i, int64_t ahead, int64_t u0, int64_t u1) {
    first = u0, end = u1, distance = N == 1 || u1 - u0 < kAheadLines ? u1 - u0 : kAheadLines;
    for (int r = 0; r < N; ++r) {
      const int64_t then = neuron_of(l, i + r + ahead < l.count ? i + r + ahead : l.count - 1);
      row[r] = row_at(l, i + r);
      next[r] = l.rows + then * l.row_bytes;
      scale[r] = l.scales ? l.scales + neuron_of(l, i + r) * l.groups : nullptr;
      if (neuron::quantised(R) && l.index)
        for (int64_t g = 0; g < l.groups; g += 16) prefetch(l.scales + then * l.groups + g);
    }
  }
  EFFK_INLINE void fetch(int64_t u) const {
    if constexpr (R == Rows::f32 && N > 1) {
      if (u - first < (N == kAdded ? 1 : kKick))
        for (int r = 0; r < N; ++r) prefetch(next[r] + u * 64);
    } else {
      const int64_t v = u + distance;
      for (int r = 0; r < N; ++r) {
        const uint8_t* line = v < end ? row[r] + v * 64 : next[r] + (first + v - end) * 64;
        if constexpr (N == 1) prefetch_once(line);
        else prefetch(line);
      }
    }
  }
};

// N rows and B tokens: vector j goes to chain j % 4, or, where scales change, group g to chain g % 2; chains are added up at the end.
// GC: vectors of a group, 0: scales do not change along a row (or there are none). N does not change the sums.
template <Rows R, int GC, int B, int N>
EFFK_INLINE void dot_rows(const List& l, int64_t i, int64_t ahead, const float* x, int64_t x_row, float* out, int64_t out_row) {
  constexpr int K = kChunks<R>, C = GC ? 2 : 4, G = GC == 0 ? 1 : GC < K ? GC : K;  // G: vectors of a group inside a unit
  const Reading<R, N> at(l, i, ahead, 0, l.units);
  vf acc[N][C][B];
  for (int r = 0; r < N; ++r)
    for (int c = 0; c < C; ++c)
      for (int b = 0; b < B; ++b) acc[r][c][b] = zero_f();
  const auto unit = [&](int64_t u, auto first) __attribute__((always_inline)) {  // number `first` of those units whose vectors go round the chains
    at.fetch(u);
    vi raw[N];
    if constexpr (R == Rows::i4)
#pragma GCC unroll 4
      for (int r = 0; r < N; ++r) raw[r] = load_unit(at.row[r] + u * 64);
    unrolled<0, K / G>([&](auto p) {
      constexpr int P = decltype(p)::value;
      vf part[N][B];
      unrolled<0, G>([&](auto s) {
        constexpr int S = P * G + decltype(s)::value, chain = (decltype(first)::value * K + S) % C;
        vf xs[B];
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) xs[b] = load_f32(x + b * x_row + (u * K + S) * 16);
#pragma GCC unroll 4
        for (int r = 0; r < N; ++r) {
          vf w;
          if constexpr (R == Rows::i4) {
            if constexpr (S == 4) raw[r] = shift_right<16>(raw[r]);
            w = nibbles<S % 4>(raw[r]);
          } else w = chunk<R>(at.row[r], u * K + S);
#pragma GCC unroll 4
          for (int b = 0; b < B; ++b) {
            if constexpr (GC == 0) acc[r][chain][b] = mac(w, xs[b], acc[r][chain][b]);
            else if constexpr (S % G == 0) part[r][b] = mul_f(w, xs[b]);
            else part[r][b] = mac(w, xs[b], part[r][b]);
          }
        }
      });
      if constexpr (GC != 0) {
        const int64_t g = (u * K + P * G) / GC;
        const int64_t in = g < l.groups ? g : l.groups - 1;  // beyond the last group lie zeros
#pragma GCC unroll 4
        for (int r = 0; r < N; ++r) {
          const vf by = set_f(at.scale[r][in]);
#pragma GCC unroll 4
          for (int b = 0; b < B; ++b) acc[r][P % C][b] = mac(by, part[r][b], acc[r][P % C][b]);
        }
      }
    });
  };
  constexpr int kStep = K >= C ? 1 : C / K;  // units of a step
  int64_t u = 0;
  for (; u + kStep <= l.units; u += kStep)
    unrolled<0, kStep>([&](auto n) { unit(u + decltype(n)::value, n); });
  if constexpr (kStep > 1)
    unrolled<0, kStep - 1>([&](auto n) { if (u + decltype(n)::value < l.units) unit(u + decltype(n)::value, n); });
  for (int r = 0; r < N; ++r)
    for (int b = 0; b < B; ++b) {
      vf sum = add_f(acc[r][0][b], acc[r][1][b]);
      if constexpr (C == 4) sum = add_f(sum, add_f(acc[r][2][b], acc[r][3][b]));
      const float total = reduce_add_f(sum);
      out[b * out_row + i + r] = GC == 0 && at.scale[r] ? total * at.scale[r][0] : total;
    }
}
template <Rows R, int GC, int B> void dot_tokens(const List& l, const float* x, int64_t x_row, float* out, int64_t out_row) {
  constexpr int N = !kWide || B == 4 ? 1 : B == 2 ? 2 : kPicked;
  int64_t i = 0;
  if (N > 1 && together(l))
    for (; i + N <= l.count; i += N) dot_rows<R, GC, B, N>(l, i, sets_ahead<N>(l), x, x_row, out, out_row);
  for (; i < l.count; ++i) dot_rows<R, GC, B, 1>(l, i, rows_ahead(l), x, x_row, out, out_row);
}
template <Rows R, int GC> void dot_grouped(const List& l, const float* x, int64_t x_row, int tokens, float* out, int64_t out_row) {
  if (tokens > kFewTokens) return dot_many<R, GC>(l, x, x_row, tokens, out, out_row);
  for (; tokens >= 4; tokens -= 4, x += 4 * x_row, out += 4 * out_row) dot_tokens<R, GC, 4>(l, x, x_row, out, out_row);
  for (; tokens >= 2; tokens -= 2, x += 2 * x_row, out += 2 * out_row) dot_tokens<R, GC, 2>(l, x, x_row, out, out_row);
  if (tokens) dot_tokens<R, GC, 1>(l, x, x_row, out, out_row);
}

// T vectors of N rows, from vector j on, times their factors into y. by: [N][B][kByGroups], that of vector j first.
// i4: number S of four vectors; `raw` holds their nibbles lowest.
template <Rows R, int GC, int N, int B, int T, int S>
EFFK_INLINE void add_vectors(const Reading<R, N>& at, const vi* raw, int64_t j, const float* by, float* y, int64_t y_row) {
  vf sum[T][B];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) sum[t][b] = load_f32(y + b * y_row + (j + t) * 16);
  unrolled<0, N>([&](auto rr) {
    constexpr int r = decltype(rr)::value;
    unrolled<0, T>([&](auto tt) {
      constexpr int t = decltype(tt)::value;
      vf w;
      if constexpr (R == Rows::i4) w = nibbles<S + t>(raw[r]);
      else w = chunk<R>(at.row[r], j + t);
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) sum[t][b] = mac(w, set_f(by[(r * B + b) * kByGroups + (GC && T > GC ? t / GC : 0)]), sum[t][b]);
    });
  });
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) store_f32(y + b * y_row + (j + t) * 16, sum[t][b]);
}
template <Rows R, int GC, int N, int B>
EFFK_INLINE void add_block(const List& l, int64_t i, int64_t ahead, const float* h, int64_t h_row, int64_t u0, int64_t u1, float* y, int64_t y_row) {
  constexpr int K = kChunks<R>, T = B == 4 || R == Rows::i4 ? 2 : 4;
  const Reading<R, N> at(l, i, ahead, u0, u1);
  float by[N * B * kByGroups];
  constexpr int64_t kSegment = GC ? kByGroups * GC / K : int64_t(1) << 62;  // units
  static_assert(GC == 0 || kByGroups * GC % K == 0);
  for (int64_t s0 = u0 / kSegment * kSegment; s0 < u1; s0 += kSegment) {
    const int64_t first = s0 > u0 ? s0 : u0, end = u1 - s0 < kSegment ? u1 : s0 + kSegment;
    const int64_t g0 = GC ? first * K / (GC ? GC : 1) : 0, g1 = GC ? (end * K - 1) / (GC ? GC : 1) + 1 : 1;
    for (int r = 0; r < N; ++r)
      for (int b = 0; b < B; ++b) {
        const float value = h[b * h_row + i + r], *scale = at.scale[r];
        float* to = by + (r * B + b) * kByGroups;
        if constexpr (GC == 0) to[0] = scale ? value * scale[0] : value;
        else
          for (int64_t g = g0; g < g1; ++g) to[g - g0] = value * scale[g < l.groups ? g : l.groups - 1];  // beyond the last lie zeros
      }
    const auto factor = [&](int64_t j) { return by + (GC ? j / (GC ? GC : 1) - g0 : 0); };
    if constexpr (R == Rows::i4) {
      for (int64_t u = first; u < end; ++u) {
        at.fetch(u);
        vi raw[N];
#pragma GCC unroll 4
        for (int r = 0; r < N; ++r) raw[r] = load_unit(at.row[r] + u * 64);
        const auto half = [&](int64_t j) __attribute__((always_inline)) {
          add_vectors<R, GC, N, B, T, 0>(at, raw, j, factor(j), y, y_row);
          add_vectors<R, GC, N, B, T, 2>(at, raw, j + 2, factor(j + 2), y, y_row);
        };
        half(u * K);
#pragma GCC unroll 4
        for (int r = 0; r < N; ++r) raw[r] = shift_right<16>(raw[r]);
        half(u * K + 4);
      }
    } else {
      int64_t j = first * K;
      constexpr int U = T > K ? T / K : 1;  // units of a step
      for (; j + T <= end * K; j += T) {
        if (j % K == 0)
          for (int n = 0; n < U; ++n) at.fetch(j / K + n);
        add_vectors<R, GC, N, B, T, 0>(at, nullptr, j, factor(j), y, y_row);
      }
      for (; j < end * K; ++j) {
        if (j % K == 0) at.fetch(j / K);
        add_vectors<R, GC, N, B, 1, 0>(at, nullptr, j, factor(j), y, y_row);
      }
    }
  }
}
template <Rows R, int GC, int B>
void add_tokens(const List& l, const float* h, int64_t h_row, int64_t u0, int64_t u1, float* y, int64_t y_row) {
  constexpr int N = !kWide && B == 4 ? 1 : kPicked;
  int64_t i = 0;
  if constexpr (kWide && R == Rows::f32 && B == 1)
    if (l.index && l.units <= kAddedUnits)
      for (; i + kAdded <= l.count; i += kAdded) add_block<R, GC, kAdded, B>(l, i, sets_ahead<kAdded>(l), h, h_row, u0, u1, y, y_row);
  if (N > 1 && (together(l) || R == Rows::i4 || B > 1))
    for (; i + N <= l.count; i += N) add_block<R, GC, N, B>(l, i, sets_ahead<N>(l), h, h_row, u0, u1, y, y_row);
  for (; i < l.count; ++i) add_block<R, GC, 1, B>(l, i, rows_ahead(l), h, h_row, u0, u1, y, y_row);
}
template <Rows R, int GC>
void add_grouped(const List& l, const float* h, int64_t h_row, int tokens, int64_t u0, int64_t u1, float* y, int64_t y_row) {
  if (tokens > kFewTokens) return add_many<R, GC>(l, h, h_row, tokens, u0, u1, y, y_row);
  for (; tokens >= 4; tokens -= 4, h += 4 * h_row, y += 4 * y_row) add_tokens<R, GC, 4>(l, h, h_row, u0, u1, y, y_row);
  for (; tokens >= 2; tokens -= 2, h += 2 * h_row, y += 2 * y_row) add_tokens<R, GC, 2>(l, h, h_row, u0, u1, y, y_row);
  if (tokens) add_tokens<R, GC, 1>(l, h, h_row, u0, u1, y, y_row);
}

template <Rows R> void dot(const List& l, const float* x, int64_t x_row, int tokens, float* out, int64_t out_row) {
  if constexpr (neuron::quantised(R)) {
    if (l.group == 32) return dot_grouped<R, 2>(l, x, x_row, tokens, out, out_row);
    if (l.group == 64) return dot_grouped<R, 4>(l, x, x_row, tokens, out, out_row);
    if (l.group == 128) return dot_grouped<R, 8>(l, x, x_row, tokens, out, out_row);
  }
  dot_grouped<R, 0>(l, x, x_row, tokens, out, out_row);
}
template <Rows R> void add_rows(const List& l, const float* h, int64_t h_row, int tokens, int64_t u0, int64_t u1, float* y, int64_t y_row) {
  if constexpr (neuron::quantised(R)) {
    if (l.group == 32) return add_grouped<R, 2>(l, h, h_row, tokens, u0, u1, y, y_row);
    if (l.group == 64) return add_grouped<R, 4>(l, h, h_row, tokens, u0, u1, y, y_row);
    if (l.group == 128) return add_grouped<R, 8>(l, h, h_row, tokens, u0, u1, y, y_row);
  }
  add_grouped<R, 0>(l, h, h_row, tokens, u0, u1, y, y_row);
}

// a of 16 gates and a bit for each active one; p: the parameter of each, cut: of the whole token.
EFFK_INLINE uint32_t gate(Gate kind, vf g, vf p, float cut, vf& a) {
  const vf zero = zero_f();
  switch (kind) {
    case Gate::relu:
    case Gate::drelu: a = g; return not_below(g, zero);
    case Gate::relu2: a = mul_f(g, g); return not_below(g, zero);
    case Gate::shifted_relu: a = sub_f(g, p); return not_below(g, p);
    case Gate::fatrelu: a = g; return not_below(g, p);
    case Gate::silu_threshold: {
      a = activate(g, Activation::silu);
      const vf size = max_f(a, sub_f(zero, a));
      return (~not_below(p, size) & 0xffffu) | not_below(a, a);  // not |a| < p; NaN too
    }
    case Gate::gelu_gauss: {
      const vf over = sub_f(g, set_f(cut));
      a = activate(over, Activation::gelu_tanh);
      return not_below(g, set_f(cut));
    }
    case Gate::magnitude: a = g; return not_below(max_f(g, sub_f(zero, g)), p) | not_below(g, g);
    default: a = g; return 0xffffu;  // top_k: the driver allows those
  }
}

int64_t compact(Gate kind, const float* g, int64_t g_row, int64_t count, const float* param, bool param_each, const float* cut, int tokens,
                const uint16_t* allowed, int64_t allowed_row, int32_t base, int32_t* position, float* a, int64_t a_row, int32_t* nnz) {
  int64_t n = 0;
  for (int64_t j = 0; j < count; j += 16) {
    const int here = int(count - j < 16 ? count - j : 16);
    const uint32_t inside = (1u << here) - 1;
    const vf p = !param ? zero_f() : param_each ? load_f32_part(param + j, here) : set_f(param[0]);
    alignas(64) float values[relu_ffn::kMostTokens][16];
    uint32_t active[relu_ffn::kMostTokens], any = 0;
    for (int b = 0; b < tokens; ++b) {
      vf v;
      active[b] = gate(kind, load_f32_part(g + b * g_row + j, here), p, cut ? cut[b] : 0.0f, v) & inside;
      if (allowed) active[b] &= allowed[b * allowed_row + j / 16];
      store_f32(values[b], v);
      nnz[b] += __builtin_popcount(active[b]);
      any |= active[b];
    }
    for (; any; any &= any - 1, ++n) {
      const int lane = __builtin_ctz(any);
      position[n] = base + int32_t(j) + lane;
      for (int b = 0; b < tokens; ++b) a[b * a_row + n] = active[b] >> lane & 1 ? values[b][lane] : 0.0f;
    }
  }
  return n;
}

#define EFFK_RELU_FFN_KERNEL                                                                                               \
  {tier::dot<neuron::Rows::f32>, tier::dot<neuron::Rows::bf16>, tier::dot<neuron::Rows::f16>, tier::dot<neuron::Rows::i8>, \
   tier::dot<neuron::Rows::i4>},                                                                                           \
      {tier::add_rows<neuron::Rows::f32>, tier::add_rows<neuron::Rows::bf16>, tier::add_rows<neuron::Rows::f16>,           \
       tier::add_rows<neuron::Rows::i8>, tier::add_rows<neuron::Rows::i4>},                                                \
      tier::compact, tier::read_floats, tier::write_floats

}  // namespace
}  // namespace effk::EFFK_TIER
