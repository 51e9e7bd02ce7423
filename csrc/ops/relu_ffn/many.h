// The loops for many tokens: a prompt. Same sums in the same order as the loops for few, so that a token's result does not depend on
// how many come with it; blocks of tokens and rows stay in registers, weights are widened once for all tokens. Bound: multiply-adds
// of fp32. Part of body.h.
//
// Why not the products of csrc/gemm: they add along k in pieces of 64, or in bf16, so a token in a prompt would get other bits than
// the same token alone.
#pragma once

namespace effk::EFFK_TIER {
namespace {

constexpr int kManyRows = kWide ? 6 : 2, kManyTokens = kWide ? 4 : 2;  // of a register block; sums of 24, or 4 x 2, registers
constexpr int kSlab = 64;       // vectors of a row that are widened at a time, 6 rows: 24 KiB, half a first-level cache
constexpr int kSlabRow = kSlab + 1;  // vectors from one row to the next: 4 KiB apart they would share a twelfth of the cache
constexpr int kSlabAdd = 24;    // the same where rows are added up; whole units of each type
constexpr int kRowsAdd = 32;    // with so many rows: 48 KiB
using relu_ffn::kMostTokens;

// Vectors [j0, j0 + count) of a row in fp32, j0 at a unit.
template <Rows R> EFFK_INLINE void widen(const uint8_t* row, int64_t j0, int64_t count, float* to) {
  if constexpr (R == Rows::i4) {
    for (int64_t j = 0; j < count; j += 8) {
      vi raw = load_unit(row + (j0 + j) / 8 * 64);
      unrolled<0, 4>([&](auto s) { store_f32(to + (j + decltype(s)::value) * 16, nibbles<decltype(s)::value>(raw)); });
      raw = shift_right<16>(raw);
      unrolled<0, 4>([&](auto s) { store_f32(to + (j + 4 + decltype(s)::value) * 16, nibbles<decltype(s)::value>(raw)); });
    }
  } else {
    for (int64_t j = 0; j < count; ++j) store_f32(to + j * 16, chunk<R>(row, j0 + j));
  }
}
// The same part of another row into the second-level cache.
template <Rows R> EFFK_INLINE void fetch_part(const uint8_t* row, int64_t j0, int64_t count) {
  for (int64_t u = j0 / kChunks<R>; u * kChunks<R> < j0 + count; ++u) prefetch_far(row + u * 64);
}

// How dot_rows goes along a row: pieces of kPiece vectors, piece p of a unit into chain p % kChains.
template <Rows R, int GC> struct Along {
  static constexpr int kPiece = GC == 0 ? 1 : GC < kChunks<R> ? GC : kChunks<R>;
  static constexpr int kChains = GC == 0 ? 4 : kChunks<R> / kPiece < 2 ? 1 : 2;
};

// One chain of a block: sums of kManyRows rows, widened, times kManyTokens tokens, goes on from and to sums[token][row][4 chains][16].
template <int P, int C> EFFK_INLINE void chain_of_block(const float* w, const float* const* x, int64_t vectors, int chain, const float* const* scale, int gc,
                                                        int64_t j0, int64_t last_group, float* sums) {  // j0: where the vectors begin in the row
  constexpr int N = kManyRows, B = kManyTokens;
  vf acc[N][B];
  const auto place = [&](int r, int b) { return sums + ((b * N + r) * 4 + chain) * 16; };
  unrolled<0, N>([&](auto r) { unrolled<0, B>([&](auto b) { acc[r][b] = j0 == 0 ? zero_f() : load_f32(place(r, b)); }); });
  for (int64_t j = chain * P; j < vectors; j += C * P) {
    if (gc == 0) {
      vf xs[B];
      unrolled<0, B>([&](auto b) { xs[b] = load_f32(x[b] + j * 16); });
      unrolled<0, N>([&](auto r) {
        const vf v = load_f32(w + (r * kSlabRow + j) * 16);
        unrolled<0, B>([&](auto b) { acc[r][b] = mac(v, xs[b], acc[r][b]); });
      });
    } else {
      const int64_t g = (j0 + j) / gc, in = g < last_group ? g : last_group;  // beyond the last group lie zeros
      unrolled<0, N>([&](auto r) {
        vf part[B];
        unrolled<0, P>([&](auto s) {
          const vf v = load_f32(w + (r * kSlabRow + j + s) * 16);
          unrolled<0, B>([&](auto b) {
            const vf xs = load_f32(x[b] + (j + s) * 16);
            part[b] = decltype(s)::value == 0 ? mul_f(v, xs) : mac(v, xs, part[b]);
          });
        });
        const vf by = set_f(scale[r][in]);
        unrolled<0, B>([&](auto b) { acc[r][b] = mac(by, part[b], acc[r][b]); });
      });
    }
  }
  unrolled<0, N>([&](auto r) { unrolled<0, B>([&](auto b) { store_f32(place(r, b), acc[r][b]); }); });
}

// Rows and tokens beyond the last repeat it, and are dropped.
template <Rows R, int GC> void dot_many(const List& l, const float* x, int64_t x_row, int tokens, float* out, int64_t out_row) {
  using A = Along<R, GC>;
  constexpr int N = kManyRows, B = kManyTokens;
  constexpr int kBlocks = (kMostTokens + B - 1) / B, kSums = N * B * 4 * 16;
  alignas(64) float w[N * kSlabRow * 16], sums[kBlocks * kSums], totals[kMostTokens * N + 16];
  const int64_t vectors = l.units * kChunks<R>;
  const int blocks = (tokens + B - 1) / B;
  for (int64_t i = 0; i < l.count; i += N) {
    const uint8_t *row[N], *next[N];
    const float* scale[N];
    for (int r = 0; r < N; ++r) {
      const int64_t here = i + r < l.count ? i + r : l.count - 1, then = i + N + r < l.count ? i + N + r : l.count - 1;
      row[r] = row_at(l, here), next[r] = row_at(l, then);
      for (int64_t g = 0; l.scales && g < l.groups; g += 16) prefetch_far(l.scales + neuron_of(l, then) * l.groups + g);
      scale[r] = l.scales ? l.scales + neuron_of(l, here) * l.groups : nullptr;
    }
    for (int64_t j0 = 0; j0 < vectors; j0 += kSlab) {
      const int64_t count = vectors - j0 < kSlab ? vectors - j0 : kSlab;
      for (int r = 0; r < N; ++r) {
        widen<R>(row[r], j0, count, w + r * kSlabRow * 16);
        fetch_part<R>(next[r], j0, count);
      }
      for (int t = 0; t < blocks; ++t) {
        const float* xs[B];
        for (int b = 0; b < B; ++b) xs[b] = x + (t * B + b < tokens ? t * B + b : tokens - 1) * x_row + j0 * 16;
        for (int chain = 0; chain < A::kChains; ++chain)
          chain_of_block<A::kPiece, A::kChains>(w, xs, count, chain, scale, GC, j0, l.groups - 1, sums + t * kSums);
      }
    }
    for (int k = 0; k < tokens * N; k += 16)
      store_f32(totals + k, reduce_rows([&](int n) __attribute__((always_inline)) {
                  const float* at = sums + (k + n < tokens * N ? k + n : 0) * 64;
                  const vf sum = add_f(load_f32(at), A::kChains == 1 ? zero_f() : load_f32(at + 16));
                  return GC == 0 ? add_f(sum, add_f(load_f32(at + 32), load_f32(at + 48))) : sum;
                }));
    for (int b = 0; b < tokens; ++b)
      for (int r = 0; r < N && i + r < l.count; ++r) {
        const float total = totals[b * N + r];
        out[b * out_row + i + r] = GC == 0 && scale[r] ? total * scale[r][0] : total;
      }
  }
}

// T vectors of kManyTokens tokens of y: the `count` rows on the list, widened, times their factors, in order.
template <int T>
EFFK_INLINE void add_to_block(const float* w, const uint8_t* list, int count, const float* const* h, const float* const* scale, int64_t group, float* const* y) {
  constexpr int B = kManyTokens;
  vf sum[T][B];
  unrolled<0, T>([&](auto t) { unrolled<0, B>([&](auto b) { sum[t][b] = load_f32(y[b] + t * 16); }); });
  for (int n = 0; n < count; ++n) {
    const int64_t i = list[n];
    vf by[B];
    const float factor = scale ? scale[i][group] : 1.0f;  // times 1 is exact
    unrolled<0, B>([&](auto b) { by[b] = set_f(scale ? h[b][i] * factor : h[b][i]); });
    unrolled<0, T>([&](auto t) {
      const vf v = load_f32(w + (i * kSlabAdd + t) * 16);
      unrolled<0, B>([&](auto b) { sum[t][b] = mac(v, by[b], sum[t][b]); });
    });
  }
  unrolled<0, T>([&](auto t) { unrolled<0, B>([&](auto b) { store_f32(y[b] + t * 16, sum[t][b]); }); });
}

// Which of `count` <= kRowsAdd rows any token of a block takes something from: the others would add zeros.
EFFK_INLINE int rows_of_block(const float* const* h, int count, uint8_t* list) {
  int n = 0;
  for (int i = 0; i < count; i += 16) {
    uint32_t any = 0;
    for (int b = 0; b < kManyTokens; ++b) {
      const vf v = load_f32_part(h[b] + i, count - i < 16 ? count - i : 16);
      any |= not_below(v, zero_f()) | not_below(zero_f(), v);
    }
    for (; any; any &= any - 1) list[n++] = uint8_t(i + __builtin_ctz(any));
  }
  return n;
}

template <Rows R, int GC>
void add_many(const List& l, const float* h, int64_t h_row, int tokens, int64_t u0, int64_t u1, float* y, int64_t y_row) {
  constexpr int B = kManyTokens, K = kChunks<R>, T = GC == 2 ? 2 : GC ? 4 : kManyRows;
  static_assert(kSlabAdd % K == 0);
  alignas(64) float w[kRowsAdd * kSlabAdd * 16];
  for (int64_t j0 = u0 * K; j0 < u1 * K; j0 += kSlabAdd) {
    const int64_t vectors = u1 * K - j0 < kSlabAdd ? u1 * K - j0 : kSlabAdd;
    for (int64_t i = 0; i < l.count; i += kRowsAdd) {
      const int64_t count = l.count - i < kRowsAdd ? l.count - i : kRowsAdd;
      const float* scale[kRowsAdd];
      for (int64_t r = 0; r < count; ++r) {
        widen<R>(row_at(l, i + r), j0, vectors, w + r * kSlabAdd * 16);
        if (i + kRowsAdd + r < l.count) {
          fetch_part<R>(row_at(l, i + kRowsAdd + r), j0, vectors);
          if (l.scales) prefetch_far(l.scales + neuron_of(l, i + kRowsAdd + r) * l.groups + (GC ? j0 / (GC ? GC : 1) : 0));
        }
        scale[r] = l.scales ? l.scales + neuron_of(l, i + r) * l.groups : nullptr;
      }
      for (int t = 0; t < tokens; t += B) {  // a token that is repeated starts from the same sums and stores the same
        const float* hs[B];
        float* ys[B];
        uint8_t list[kRowsAdd];
        for (int b = 0; b < B; ++b) hs[b] = h + (t + b < tokens ? t + b : tokens - 1) * h_row + i;
        const int n = rows_of_block(hs, int(count), list);
        const auto at = [&](int64_t j) {
          for (int b = 0; b < B; ++b) ys[b] = y + (t + b < tokens ? t + b : tokens - 1) * y_row + (j0 + j) * 16;
        };
        const auto group = [&](int64_t j) { const int64_t g = GC ? (j0 + j) / (GC ? GC : 1) : 0; return g < l.groups ? g : l.groups - 1; };
        int64_t j = 0;
        for (; j + T <= vectors; j += T) at(j), add_to_block<T>(w + j * 16, list, n, hs, l.scales ? scale : nullptr, group(j), ys);
        for (; j < vectors; ++j) at(j), add_to_block<1>(w + j * 16, list, n, hs, l.scales ? scale : nullptr, group(j), ys);
      }
    }
  }
}

}  // namespace
}  // namespace effk::EFFK_TIER
