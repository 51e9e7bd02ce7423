// The inner loop, and the product with one to eight rows of x. Part of body.h.
#pragma once
#include "ops/wq_linear/finish.h"

namespace effk::EFFK_TIER {
namespace {

// How far ahead of a tile's stream to prefetch, in bytes over all streams of the loop; tuned on Zen 5 with 1 and 2 threads
// at 2 to 8 bits. Few rows of x are bound by memory: 110 ns of latency at 40 GB/s are 4.4 KB in flight, and only well
// beyond that do waiting and computing overlap (2 KB: three quarters of the speed at one row, half at four). With a
// register block of rows the products take longer than the loads, and lines fetched too early would push x out of the
// first-level cache.
constexpr int kGemvAhead = 12 << 10;
constexpr int kGemmAhead = 4 << 10;

// The inner loop: MR rows of x times one span of NT tiles, into acc. Exact sums may be split into parts to shorten chains.
template <class D, int Bits, int MR, int NT, int Parts, int Ahead>
EFFK_INLINE void dot_span(typename D::Acc (&acc)[MR][NT][Parts], const uint8_t* const* tile, int chunks, const int32_t* x, const Codes& codes,
                          const Zeros* z) {
  for (int c = 0; c < chunks; ++c) {
    Chunk<Bits> chunk[NT];
    unroll<NT>([&](auto i) {
      const uint8_t* p = tile[i] + c * t16::chunk_bytes(Bits);
      chunk[i] = load_chunk<Bits>(p);
      unroll<t16::chunk_bytes(Bits) / 64>([&](auto line) { prefetch_once(p + Ahead / NT + 64 * line); });
    });
    unroll<kUnits<Bits>>([&](auto u) {
      vi unit[NT];
      unroll<NT>([&](auto i) { unit[i] = unit_of<Bits, u>(chunk[i]); });
      unroll<D::kSteps>([&](auto st) {
        vi w[NT];
        unroll<NT>([&](auto i) { w[i] = D::template expand<Bits, st>(unit[i], codes, z[i]); });
        unroll<MR>([&](auto m) {
          const vi xv = broadcast(x + (u * D::kSteps + st) * MR + m);
          unroll<NT>([&](auto i) { acc[m][i][u % Parts] = D::step(acc[m][i][u % Parts], w[i], xv); });
        });
      });
    });
    x += kUnits<Bits> * D::kSteps * MR;
  }
}

// Tiles beyond the last one repeat it: their results are dropped, and no second set of kernels is needed for the remainder.
template <int NT> EFFK_INLINE int64_t tile_index(const Tile& t, int i) { return t.tile + (i < t.tiles ? i : t.tiles - 1); }

// What is the same for all tiles of a weight, worked out once per call: a tile may last no more than a few hundred cycles.
template <class D, int Bits> struct Layout {
  Codes codes;
  Spans spans;
  int64_t groups, tile_bytes;
  Layout(const WqWeight& w, const Rows& r)
      : codes(codes_of<D, Bits>(w)), spans(spans_of<Bits>(w, r)), groups(t16::groups(w.k, w.group)),
        tile_bytes(t16::chunks(w.k, Bits) * t16::chunk_bytes(Bits)) {}
};

// NT tiles from t.tile on: out[tile][row of x][16].
template <class D, int Bits, int MR, int NT> void gemv_tiles(const Tile& t, const Layout<D, Bits>& layout, float* out) {
  const WqWeight& w = *t.w;
  const Rows& r = *t.rows;
  const Codes& codes = layout.codes;
  const Spans& spans = layout.spans;
  const int64_t groups = layout.groups, tile_bytes = layout.tile_bytes;
  const bool zeros = w.zeros != nullptr;
  constexpr int kParts = D::kForm == Form::int8 && MR * NT <= 4 ? 2 : 1;
  vf y[MR][NT];
  unroll<MR>([&](auto m) { unroll<NT>([&](auto i) { y[m][i] = zero_f(); }); });
  const uint8_t* p[NT];
  int64_t constants[NT];
  Zeros z[NT];
  unroll<NT>([&](auto i) {
    p[i] = w.packed + tile_index<NT>(t, i) * tile_bytes;
    constants[i] = tile_index<NT>(t, i) * groups * 16;
    z[i] = {zero_i(), zero_f(), nullptr};
  });
  const int32_t* x = r.data;
  for (int64_t h = 0; h < spans.count; ++h) {
    const int chunks = spans.chunks(h);
    const int64_t group = spans.group(h) * 16;
    typename D::Acc acc[MR][NT][kParts];
    unroll<NT>([&](auto i) {
      if (zeros) zeros_at(w, constants[i] + group, groups, z[i]);
      unroll<MR>([&](auto m) {
        acc[m][i][0] = D::init(w, codes, z[i], r.sum[h * MR + m]);
        if constexpr (kParts == 2) acc[m][i][1] = zero_i();
      });
    });
    dot_span<D, Bits, MR, NT, kParts, kGemvAhead>(acc, p, chunks, x, codes, z);
    x += chunks * kUnits<Bits> * D::kSteps * MR;
    unroll<NT>([&](auto i) {
      p[i] += chunks * t16::chunk_bytes(Bits);
      const vf scale = scales_at(w, constants[i] + group, groups);
      unroll<MR>([&](auto m) {
        if constexpr (kParts == 2) acc[m][i][0] = add_i(acc[m][i][0], acc[m][i][1]);
        y[m][i] = D::finish(acc[m][i][0], w, z[i], scale, r.scale[h * MR + m], r.sum[h * MR + m], y[m][i]);
      });
    });
  }
  unroll<NT>([&](auto i) { unroll<MR>([&](auto m) { store_f32(out + (i * MR + m) * 16, y[m][i]); }); });
}

// Outliers of one row of x are gathered for a few tiles at a time; others come last and together: between the tiles they would
// break the stream, and x would have to return to the first-level cache each time.
template <class D, int Bits, int NT, int Rows> void gemv_run(const Tile& t) {
  const Layout<D, Bits> layout(*t.w, *t.rows);
  alignas(64) float y[(wq::kMaxGemvTiles + NT) * Rows * 16];
  const int m = int(t.rows->m);
  const WqWeight& w = *t.w;
  const auto tiles_from = [&](int i, int wanted) { return t.tiles - i < wanted ? t.tiles - i : wanted; };
  Gathered outliers;
  bool few = w.out_ptr && !w.col32 && m == 1;
  if (w.out_ptr) prefetch_lengths(w, t.tile, 2 * t.tiles);
  if (few && entries_of(w, t.tile, t.tiles) > Gathered::kMax)
    for (int i = 0; i < t.tiles && few; i += NT) few = entries_of(w, t.tile + i, tiles_from(i, NT)) <= Gathered::kMax;
  int gathered = 0;  // tiles
  for (int i = 0; i < t.tiles; i += NT) {
    Tile part = t;
    part.tile = t.tile + i;
    part.tiles = tiles_from(i, NT);
    if (few && i == gathered) {
      int ahead = Gathered::kTiles;
      while (ahead > NT && entries_of(w, part.tile, tiles_from(i, ahead)) > Gathered::kMax) ahead /= 2;
      outliers.gather(t, part.tile, tiles_from(i, ahead), w.packed + part.tile * layout.tile_bytes + kGemvAhead);
      gathered += ahead;
    }
    float* out = y + i * m * 16;
    if constexpr (Rows == 4) {
      switch (m) {
        case 1:
          gemv_tiles<D, Bits, 1, NT>(part, layout, out);
          break;
        case 2: gemv_tiles<D, Bits, 2, NT>(part, layout, out); break;
        case 3: gemv_tiles<D, Bits, 3, NT>(part, layout, out); break;
        default: gemv_tiles<D, Bits, 4, NT>(part, layout, out);
      }
    } else {
      switch (m) {
        case 5: gemv_tiles<D, Bits, 5, NT>(part, layout, out); break;
        case 6: gemv_tiles<D, Bits, 6, NT>(part, layout, out); break;
        case 7: gemv_tiles<D, Bits, 7, NT>(part, layout, out); break;
        default: gemv_tiles<D, Bits, 8, NT>(part, layout, out);
      }
    }
    if (few)
      for (int j = 0; j < part.tiles; ++j) store_f32(out + j * 16, add_f(load_f32(out + j * 16), outliers.rows(w, part.tile + j)));
  }
  finish_tiles<wq::kMaxGemvTiles>(t, 0, m, y, m * 16, w.out_ptr && !few);
}
template <class D, class D8, int NT, int Rows> void gemv_bits(const Tile& t) {
  switch (t.w->bits) {
    case 2: return gemv_run<D, 2, NT, Rows>(t);
    case 3: return gemv_run<D, 3, NT, Rows>(t);
    case 4: return gemv_run<D, 4, NT, Rows>(t);
    default: return gemv_run<D8, 8, NT, Rows>(t);
  }
}
template <class D, class D8, int NT> void gemv(const Tile& t) {
  if constexpr (EFFK_BLOCK_ROWS >= 8)  // 5 to 8 rows: their sums and two tiles fill the registers
    if (t.rows->m > 4) return gemv_bits<D, D8, (NT < 2 ? NT : 2), 8>(t);
  gemv_bits<D, D8, NT, 4>(t);
}

}  // namespace
}  // namespace effk::EFFK_TIER
