// Gradients of DYAD weights: products over the tokens, a chunk of them at a time. Compiled with baseline flags.
// Reached on Zen 5, one core, n = 4: 64 to 75 % of the multiply-add peak in fp32, 58 to 72 % in bf16. Gap: gy is transposed while it
// is packed, which a product that takes rows of k would save, and results are read and written once a chunk.
#include <algorithm>

#include "gemm/choose.h"
#include "gemm/gemm.h"

namespace effk::gemm {
namespace {

constexpr int64_t kChunkTokens = 512;     // a multiple of every unit of k
constexpr int64_t kGroupTokens = 32;      // packed at a time, a whole number of units
constexpr int64_t kRowBlocks = 16, kColumnTiles = 24;  // of the gradient that one item makes

struct GradientPlan {
  const Kernel* k;
  DType panels;
  bool first_gy, second_gy, first_x, second_x;  // which operands the wanted gradients need, as they are and by residues
  int64_t f_in, f_out, group, groups, blocks, tiles, units, tile_bytes, a_bytes, b_bytes, x2_bytes, gy2_bytes, sum_floats;

  GradientPlan(const GradientArgs& g) {
    k = &choose(g.dtype, g.dtype);
    panels = k->form == Form::bf16 ? DType::bf16 : DType::f32;
    const bool rows = g.kind == panel::Kind::ot || g.kind == panel::Kind::dt;
    const bool columns = g.kind == panel::Kind::it || g.kind == panel::Kind::dt;
    first_gy = g.gwl || (g.gwu && !rows);
    second_gy = g.gwu && rows;
    first_x = g.gwl || (g.gwu && !columns);
    second_x = g.gwu && columns;
    f_in = g.n * g.d_in;
    f_out = g.n * g.d_out;
    group = k->rows == 8 ? 16 : k->rows;         // rows of a packed together: transposes are of 16
    groups = ceil_div(g.d_out, group);
    blocks = ceil_div(g.d_out, k->rows);
    tiles = panel::tiles(g.d_in);
    const int64_t depth = panel::padded(std::min(kChunkTokens, g.tokens), panels);
    units = depth / unit_k(k->form);
    tile_bytes = depth * panel::kColumns * bytes_of(panels);
    a_bytes = g.n * groups * group * units * kUnitBytes;
    b_bytes = g.n * tiles * tile_bytes;
    const int64_t tokens = std::min(kChunkTokens, g.tokens);
    x2_bytes = second_x && !g.features ? aligned(tokens * f_in * bytes_of(g.dtype)) : 0;
    gy2_bytes = second_gy && !g.features ? aligned(tokens * f_out * bytes_of(g.dtype)) : 0;
    sum_floats = g.w_dtype == DType::f32 ? 0 : (g.n * g.d_out * g.d_in + 15) / 16 * 16;
  }
  int64_t bytes() const { return 2 * (a_bytes + b_bytes) + x2_bytes + gy2_bytes + 2 * sum_floats * 4; }
};

}  // namespace

size_t gradient_workspace(const GradientArgs& g, int) {
  if (g.tokens == 0 || !(g.gwl || g.gwu)) return 0;
  return size_t(GradientPlan(g).bytes());
}

void gradient(const GradientArgs& g, void* workspace, const ParallelFor& pf) {
  const int64_t count = g.n * g.d_out * g.d_in;
  if (g.tokens == 0) {
    for (void* w : {g.gwl, g.gwu})
      if (w) std::fill_n(static_cast<char*>(w), count * bytes_of(g.w_dtype), char(0));
    return;
  }
  if (!g.gwl && !g.gwu) return;
  const GradientPlan p(g);
  const Kernel& k = *p.k;
  char* room = static_cast<char*>(workspace);
  char *a[2] = {room, room + p.a_bytes}, *b[2] = {room + 2 * p.a_bytes, room + 2 * p.a_bytes + p.b_bytes};
  char* x2 = room + 2 * (p.a_bytes + p.b_bytes);
  char* gy2 = x2 + p.x2_bytes;
  float* sums = reinterpret_cast<float*>(gy2 + p.gy2_bytes);
  float* c[2] = {p.sum_floats ? sums : static_cast<float*>(g.gwl), p.sum_floats ? sums + p.sum_floats : static_cast<float*>(g.gwu)};
  const int size = int(bytes_of(g.dtype));

  // Column d * side + j, or j * n + d when `second`, of a matrix [tokens, width] or its transpose, from token t0 + t on. In rows
  // of tokens the second comes from residues that were gathered first, those of the chunk at t0.
  const auto source = [&](const void* m, const void* residues, bool second, int64_t width, int64_t side, int64_t d, int64_t j, int64_t t0, int64_t t) {
    if (g.features) {
      const int64_t first = (second ? j * g.n + d : d * side + j) * g.tokens + t0 + t;
      return Source{shifted(m, first, g.dtype), g.dtype, second ? g.n * g.tokens : g.tokens, 1};
    }
    return Source{second ? shifted(residues, t * width + d * side + j, g.dtype) : shifted(m, (t0 + t) * width + d * side + j, g.dtype), g.dtype, 1, width};
  };
  for (int64_t t0 = 0; t0 < g.tokens; t0 += kChunkTokens) {
    const int64_t tokens = std::min(kChunkTokens, g.tokens - t0), depth = panel::padded(tokens, p.panels), units = depth / unit_k(k.form);
    // A group of tokens for all rows and columns, so that memory is read row by row.
    const int64_t group_units = kGroupTokens / unit_k(k.form);
    parallel_for(pf, ceil_div(tokens, kGroupTokens), 1, [&](int64_t g0, int64_t g1) {
      for (int64_t i = g0; i < g1; ++i) {
        const int64_t t = i * kGroupTokens, count = std::min(kGroupTokens, tokens - t), here = std::min(group_units, units - i * group_units);
        for (int64_t r = t; r < t + count; ++r) {
          if (p.x2_bytes) k.deinterleave(shifted(g.x, (t0 + r) * p.f_in, g.dtype), size, g.d_in, g.n, x2 + r * p.f_in * size, g.d_in, kUnitBytes / size);
          if (p.gy2_bytes) k.deinterleave(shifted(g.gy, (t0 + r) * p.f_out, g.dtype), size, g.d_out, g.n, gy2 + r * p.f_out * size, g.d_out, kUnitBytes / size);
        }
        for (int second = 0; second < 2; ++second) {
          for (int64_t l = 0; (second ? p.second_gy : p.first_gy) && l < g.n * p.groups; ++l) {
            const int64_t d = l / p.groups, o = l % p.groups * p.group;
            const int rows = int(std::min(p.group, g.d_out - o));
            k.pack_rows(source(g.gy, gy2, second, p.f_out, g.d_out, d, o, t0, t), rows, count, here,
                        a[second] + (l * p.group * p.units + i * group_units * rows) * kUnitBytes);
          }
          for (int64_t l = 0; (second ? p.second_x : p.first_x) && l < g.n * p.tiles; ++l) {
            const int64_t d = l / p.tiles, j = l % p.tiles * panel::kColumns;
            k.pack_tile(source(g.x, x2, second, p.f_in, g.d_in, d, j, t0, t), int(std::min<int64_t>(panel::kColumns, g.d_in - j)), count, p.panels,
                        b[second] + l * p.tile_bytes + t * panel::kColumns * bytes_of(p.panels));
          }
        }
      }
    });
    const int64_t row_items = ceil_div(p.blocks, kRowBlocks), column_items = ceil_div(p.tiles, kColumnTiles), items = row_items * column_items;
    parallel_for(pf, 2 * g.n * items, 1, [&](int64_t i0, int64_t i1) {
      for (int64_t i = i0; i < i1; ++i) {
        const int component = int(i / (g.n * items));
        if (!(component ? g.gwu : g.gwl)) continue;
        const int64_t d = i / items % g.n, b0 = i % row_items * kRowBlocks, j0 = i % items / row_items * kColumnTiles;
        const char* groups = a[component && p.second_gy] + d * p.groups * p.group * p.units * kUnitBytes;
        const char* columns = b[component && p.second_x] + d * p.tiles * p.tile_bytes;
        const int64_t j1 = std::min(j0 + kColumnTiles, p.tiles);
        for (int64_t j = j0, step; j < j1; j += step) {
          step = next_tiles(j1 - j, k.tiles);
          const int last = int(std::min<int64_t>(panel::kColumns, g.d_in - (j + step - 1) * panel::kColumns));
          // The next panel is fetched meanwhile, as in driver.cpp.
          const int64_t r1 = std::min(b0 + kRowBlocks, p.blocks), parts = ceil_div(r1 - b0, step), unit = p.tile_bytes / p.units;
          const int64_t share = parts > 1 && j + step < j1 ? ceil_div(unit, parts * 64) * 64 : 0;
          for (int64_t r = b0; r < r1; ++r) {
            const int64_t o = r * k.rows, first = o / p.group * p.group, a_unit = std::min(p.group, g.d_out - first) * kUnitBytes;
            k.multiply({groups + first * p.units * kUnitBytes + (o - first) * kUnitBytes, a_unit, reinterpret_cast<const uint8_t*>(columns + j * p.tile_bytes), p.tile_bytes, units,
                        nullptr, t0 > 0, c[component] + (d * g.d_out + r * k.rows) * g.d_in + j * panel::kColumns, g.d_in,
                        int(std::min<int64_t>(k.rows, g.d_out - o)), int(step), last, p.panels,
                        reinterpret_cast<const uint8_t*>(columns + (j + step + (r - b0) % step) * p.tile_bytes + (r - b0) / step * share * units), share});
          }
        }
      }
    });
  }
  if (p.sum_floats)
    parallel_for(pf, g.n * g.d_out, 64, [&](int64_t r0, int64_t r1) {
      for (int i = 0; i < 2; ++i)
        if (void* w = i ? g.gwu : g.gwl)
          k.finish(c[i] + r0 * g.d_in, g.d_in, r1 - r0, g.d_in, {shifted(w, r0 * g.d_in, g.w_dtype), g.w_dtype, g.d_in, 1, Activation::none});
    });
}

void column_sums(const void* gy, DType dtype, bool features, int64_t tokens, int64_t columns, float* sum, const ParallelFor& pf) {
  const Kernel& k = choose(DType::f32, DType::f32);
  const int64_t tiles = panel::tiles(columns), grain = ceil_div(16 << 10, (tokens + 1) * panel::kColumns);
  parallel_for(pf, tiles, grain, [&](int64_t i0, int64_t i1) {
    for (int64_t i = i0; i < i1; ++i) {
      const int64_t j = i * panel::kColumns;
      const int part = int(std::min<int64_t>(panel::kColumns, columns - j));
      float whole[panel::kColumns];
      k.sums(features ? Source{shifted(gy, j * tokens, dtype), dtype, tokens, 1} : Source{shifted(gy, j, dtype), dtype, 1, columns}, part, tokens, whole);
      std::copy_n(whole, part, sum + j);
    }
  });
}

}  // namespace effk::gemm
