// The loops of relu_ffn over the vector vocabulary of csrc/simd, for one token at a time or up to four together. Bound: reading the
// weights, a multiply-add of fp32 a weight and token; rows of other types are widened in registers. Reached on Zen 5, one core,
// 4096 x 11008 from memory at 40 GB/s: products 35 to 38 GB/s in bf16 and int8, 25 in int4; sums of rows 34 to 36 when all are
// read and 20 to 27 when one in two to ten is, int4 18 and 11. Gap: short runs, behind which the hardware fetches lines that nobody
// reads; int4 sums are bound by arithmetic. Four rows a visit of y in bf16 and int8 read all at 26, one row a visit in int4 at 15.
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
constexpr int64_t kAhead = 1;              // dot: rows between the one that is read and the one that is fetched
constexpr int64_t kAheadBytes = 16 << 10;  // add_rows: the same in bytes; 4, 24 and 40 KiB are alike in bf16, less loses 20 % in int8
constexpr float kNibbles[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

template <Rows R, int S> EFFK_INLINE vf chunk(const uint8_t* unit, const Table& nibbles) {
  if constexpr (R == Rows::f32) return load_f32(unit);
  else if constexpr (R == Rows::bf16) return load_bf16(unit + S * 32);
  else if constexpr (R == Rows::f16) return load_f16(unit + S * 32);
  else if constexpr (R == Rows::i8) return to_float(load_s8(unit + S * 16));
  else return lookup(shift_right<4 * S>(load_unit(unit)), nibbles);
}
template <int S, int End, class F> EFFK_INLINE void unrolled(const F& f) {
  if constexpr (S < End) { f(std::integral_constant<int, S>()); unrolled<S + 1, End>(f); }
}

EFFK_INLINE const uint8_t* row_at(const List& l, int64_t i) { return l.rows + (l.index ? l.index[i] : l.first + i) * l.row_bytes; }
EFFK_INLINE const float* scales_at(const List& l, int64_t i) { return l.scales + (l.index ? l.index[i] : l.first + i) * l.groups; }

// One row and B tokens: vector j goes to chain j % 4, or, where scales change, group g to chain g % 2; chains are added up at the end.
// GC: vectors of a group, 0: scales do not change along a row (or there are none). A row at a time is one stream from memory.
template <Rows R, int GC, int B>
EFFK_INLINE void dot_row(const List& l, int64_t i, const float* x, int64_t x_row, float* out, int64_t out_row) {
  const Table nibbles = load_float_table(kNibbles);
  constexpr int K = kChunks<R>, C = GC ? 2 : 4, kStep = K >= C ? 1 : C / K;  // units of a step
  const uint8_t *row = row_at(l, i), *ahead = row_at(l, i + kAhead < l.count ? i + kAhead : l.count - 1);
  const float* scale = l.scales ? scales_at(l, i) : nullptr;
  vf acc[C][B];
  for (int c = 0; c < C; ++c)
    for (int b = 0; b < B; ++b) acc[c][b] = zero_f();
  const auto vectors = [&](int64_t u, auto first, auto count) {  // of unit u: numbers first.. of a step
    prefetch(ahead + u * 64);
    if constexpr (GC == 0) {
      unrolled<0, decltype(count)::value>([&](auto s) {
        constexpr int S = decltype(s)::value, N = decltype(first)::value + S;
        const vf w = chunk<R, S>(row + u * 64, nibbles);
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) acc[N % C][b] = mac(w, load_f32(x + b * x_row + (u * K + S) * 16), acc[N % C][b]);
      });
    } else {
      constexpr int G = GC < K ? GC : K;  // vectors of a group inside a unit
      unrolled<0, K / G>([&](auto p) {
        constexpr int P = decltype(p)::value;
        vf part[B];
        for (int b = 0; b < B; ++b) part[b] = zero_f();
        unrolled<0, G>([&](auto s) {
          constexpr int S = P * G + decltype(s)::value;
          const vf w = chunk<R, S>(row + u * 64, nibbles);
#pragma GCC unroll 4
          for (int b = 0; b < B; ++b) part[b] = mac(w, load_f32(x + b * x_row + (u * K + S) * 16), part[b]);
        });
        const int64_t g = (u * K + P * G) / GC;
        const vf by = set_f(scale[g < l.groups ? g : l.groups - 1]);  // beyond the last group lie zeros
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) acc[P % C][b] = mac(by, part[b], acc[P % C][b]);
      });
    }
  };
  constexpr std::integral_constant<int, K> all{};
  int64_t u = 0;
  for (; u + kStep <= l.units; u += kStep)
    unrolled<0, kStep>([&](auto n) { vectors(u + decltype(n)::value, std::integral_constant<int, decltype(n)::value * K>(), all); });
  if constexpr (kStep > 1)
    unrolled<0, kStep - 1>([&](auto n) {
      if (u + decltype(n)::value < l.units) vectors(u + decltype(n)::value, std::integral_constant<int, decltype(n)::value * K>(), all);
    });
  for (int b = 0; b < B; ++b) {
    vf sum = add_f(acc[0][b], acc[1][b]);
    if constexpr (C == 4) sum = add_f(sum, add_f(acc[2][b], acc[3][b]));
    const float total = reduce_add_f(sum);
    out[b * out_row + i] = GC == 0 && scale ? total * scale[0] : total;
  }
}
template <Rows R, int GC, int B> void dot_tokens(const List& l, const float* x, int64_t x_row, float* out, int64_t out_row) {
  for (int64_t i = 0; i < l.count; ++i) dot_row<R, GC, B>(l, i, x, x_row, out, out_row);
}
template <Rows R, int GC> void dot_grouped(const List& l, const float* x, int64_t x_row, int tokens, float* out, int64_t out_row) {
  for (; tokens >= 4; tokens -= 4, x += 4 * x_row, out += 4 * out_row) dot_tokens<R, GC, 4>(l, x, x_row, out, out_row);
  for (; tokens >= 2; tokens -= 2, x += 2 * x_row, out += 2 * out_row) dot_tokens<R, GC, 2>(l, x, x_row, out, out_row);
  if (tokens) dot_tokens<R, GC, 1>(l, x, x_row, out, out_row);
}

template <Rows R, int GC, int N, int B>
EFFK_INLINE void add_block(const List& l, int64_t i, int64_t ahead, const float* h, int64_t h_row, int64_t u0, int64_t u1, float* y, int64_t y_row) {
  const Table nibbles = load_float_table(kNibbles);
  constexpr int K = kChunks<R>;
  const uint8_t *row[N], *next[N];
  const float* scale[N];
  vf by[N][B];
  for (int r = 0; r < N; ++r) {
    row[r] = row_at(l, i + r);
    next[r] = row_at(l, i + r + ahead < l.count ? i + r + ahead : l.count - 1);
    scale[r] = l.scales ? scales_at(l, i + r) : nullptr;
    for (int b = 0; b < B; ++b) by[r][b] = set_f(GC == 0 && scale[r] ? h[b * h_row + i + r] * scale[r][0] : h[b * h_row + i + r]);
  }
  for (int64_t u = u0; u < u1; ++u) {
    for (int r = 0; r < N; ++r) prefetch(next[r] + u * 64);
    unrolled<0, K>([&](auto s) {
      constexpr int S = decltype(s)::value;
      const int64_t j = u * K + S;
      if constexpr (GC != 0)
        if (j % GC == 0 || (u == u0 && S == 0)) {
          const int64_t g = j / GC < l.groups ? j / GC : l.groups - 1;
          for (int r = 0; r < N; ++r)
            for (int b = 0; b < B; ++b) by[r][b] = set_f(h[b * h_row + i + r] * scale[r][g]);
        }
      vf sum[B];
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) sum[b] = load_f32(y + b * y_row + j * 16);
#pragma GCC unroll 4
      for (int r = 0; r < N; ++r) {
        const vf w = chunk<R, S>(row[r] + u * 64, nibbles);
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) sum[b] = mac(w, by[r][b], sum[b]);
      }
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) store_f32(y + b * y_row + j * 16, sum[b]);
    });
  }
}
template <Rows R, int GC, int B>
void add_tokens(const List& l, const float* h, int64_t h_row, int64_t u0, int64_t u1, float* y, int64_t y_row) {
  constexpr int N = R == Rows::i4 && B < 4 ? 4 : 1;  // rows for one visit of y
  const int64_t ahead = (kAheadBytes / l.row_bytes / N + 1) * N;
  int64_t i = 0;
  for (; i + N <= l.count; i += N) add_block<R, GC, N, B>(l, i, ahead, h, h_row, u0, u1, y, y_row);
  for (; i < l.count; ++i) add_block<R, GC, 1, B>(l, i, 1, h, h_row, u0, u1, y, y_row);
}
template <Rows R, int GC>
void add_grouped(const List& l, const float* h, int64_t h_row, int tokens, int64_t u0, int64_t u1, float* y, int64_t y_row) {
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
    alignas(64) float values[relu_ffn::kMaxTokens][16];
    uint32_t active[relu_ffn::kMaxTokens], any = 0;
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
