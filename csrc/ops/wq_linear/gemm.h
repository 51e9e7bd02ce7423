// The product with any number of rows of x. Part of body.h.
#pragma once
#include <cstring>

#include "ops/wq_linear/gemv.h"

namespace effk::EFFK_TIER {
namespace {

// Operands of one span, for weights whose codes need a table look-up that is worth doing once.
template <class D, int Bits> inline void build_panel(const uint8_t* p, int chunks, const Codes& codes, const Zeros& z, uint8_t* panel) {
  for (int c = 0; c < chunks; ++c, p += t16::chunk_bytes(Bits), panel += kUnits<Bits> * D::kSteps * 64) {
    const Chunk<Bits> chunk = load_chunk<Bits>(p);
    unroll<kUnits<Bits>>([&](auto u) {
      vi unit = unit_of<Bits, u>(chunk);
      if constexpr (D::kForm == Form::int8) unit = shuffle_bytes(codes.table16, unit);
      unroll<D::kSteps>([&](auto st) { store_unit(panel + (u * D::kSteps + st) * 64, D::template expand<Bits, st>(unit, codes, z)); });
    });
  }
}
template <class D, int MR, int NT>
EFFK_INLINE void dot_panel(typename D::Acc (&acc)[MR][NT][1], const uint8_t* const* panel, int steps, const int32_t* x) {
  for (int k = 0; k < steps; ++k) {
    vi w[NT];
    unroll<NT>([&](auto i) { w[i] = load_unit(panel[i] + k * 64); });
    unroll<MR>([&](auto m) {
      const vi xv = broadcast(x + k * MR + m);
      unroll<NT>([&](auto i) { acc[m][i][0] = D::step(acc[m][i][0], w[i], xv); });
    });
  }
}

// One span as gemm sees it: packed tiles (or panels), scales and zero points.
template <int NT> struct SpanOfTiles { const uint8_t* p[NT]; vf scale[NT]; Zeros z[NT]; int chunks, steps; };

// One block of MR rows over one span; y[i] holds the block's results so far. Bits = 0: panels.
template <class D, int Bits, int MR, int NT>
void micro(const WqWeight& w, const Codes& codes, const SpanOfTiles<NT>& s, const int32_t* x, const float* scale, const int32_t* sum, float* y,
           int64_t y_stride) {
  typename D::Acc acc[MR][NT][1];
  unroll<MR>([&](auto m) { unroll<NT>([&](auto i) { acc[m][i][0] = D::init(w, codes, s.z[i], sum[m]); }); });
  if constexpr (Bits == 0) dot_panel<D, MR, NT>(acc, s.p, s.steps, x);
  else dot_span<D, Bits, MR, NT, 1, kGemmAhead>(acc, s.p, s.chunks, x, codes, s.z);
  unroll<MR>([&](auto m) {
    unroll<NT>([&](auto i) {
      float* p = y + i * y_stride + m * 16;
      store_f32(p, D::finish(acc[m][i][0], w, s.z[i], s.scale[i], scale[m], sum[m], load_f32(p)));
    });
  });
}
template <class D, int Bits, int NT, int MR = 1, class... A> inline void micro_rows(int rows, const A&... a) {
  if (rows == MR) return micro<D, Bits, MR, NT>(a...);
  if constexpr (MR < EFFK_BLOCK_ROWS) micro_rows<D, Bits, NT, MR + 1>(rows, a...);
}

template <class D, int Bits, int NT, bool Panel> void gemm_tiles(const Tile& t) {
  const WqWeight& w = *t.w;
  const Rows& r = *t.rows;
  const Layout<D, Bits> layout(w, r);
  const Codes& codes = layout.codes;
  const Spans& spans = layout.spans;
  const int64_t groups = layout.groups, tile_bytes = layout.tile_bytes;
  constexpr int64_t kStride = wq::kMaxBlocks * EFFK_BLOCK_ROWS * 16;
  constexpr int kPanelBytes = (t16::kMaxActGroup / 4) * D::kSteps * 64;
  alignas(64) uint8_t panel[Panel ? NT * kPanelBytes : 1];
  alignas(64) float y[NT * kStride];
  const int64_t m0 = r.first_row(t.block);
  int total = 0;
  for (int b = 0; b < t.blocks; ++b) total += r.rows_in(t.block + b);
  for (int i = 0; i < NT; ++i) std::memset(y + i * kStride, 0, size_t(total) * 64);
  for (int64_t h = 0; h < spans.count; ++h) {
    SpanOfTiles<NT> s;
    s.chunks = spans.chunks(h);
    s.steps = s.chunks * kUnits<Bits> * D::kSteps;
    for (int i = 0; i < NT; ++i) {
      const int64_t tile = tile_index<NT>(t, i);
      s.p[i] = w.packed + tile * tile_bytes + h * spans.full_chunks * t16::chunk_bytes(Bits);
      s.z[i] = zeros_of(w, tile, spans.group(h), groups);
      s.scale[i] = mul_f(scales_of(w, tile, spans.group(h), groups), set_f(codes.rescale));
      if constexpr (Panel) {
        build_panel<D, Bits>(s.p[i], s.chunks, codes, s.z[i], panel + i * kPanelBytes);
        s.p[i] = panel + i * kPanelBytes;
      }
    }
    for (int b = 0; b < t.blocks; ++b) {
      const int block = t.block + b;
      const int64_t at = r.scale_at(block, h);
      micro_rows<D, Panel ? 0 : Bits, NT>(r.rows_in(block), w, codes, s, r.data + r.data_at(block, h, D::kSteps), r.scale + at, r.sum + at,
                                          y + (r.first_row(block) - m0) * 16, kStride);
    }
  }
  finish_tiles<NT>(t, m0, total, y, kStride, w.out_ptr != nullptr);
}

// D below 8 bits, D8 at 8 bits, DBook where codes go through a table of the weight.
template <class D, class D8, class DBook, int NT> void gemm(const Tile& t) {
  const bool book = t.w->codebook && (D::kForm == Form::int8 || t.w->codebook_per_row);
  switch (t.w->bits) {
    case 2: return book ? gemm_tiles<DBook, 2, NT, true>(t) : gemm_tiles<D, 2, NT, false>(t);
    case 3: return book ? gemm_tiles<DBook, 3, NT, true>(t) : gemm_tiles<D, 3, NT, false>(t);
    case 4: return book ? gemm_tiles<DBook, 4, NT, true>(t) : gemm_tiles<D, 4, NT, false>(t);
    default: return gemm_tiles<D8, 8, NT, false>(t);
  }
}

}  // namespace
}  // namespace effk::EFFK_TIER
