// Prepares the rows of every expert that has some, then runs the kernels of wq_linear over all experts' tiles.
// Compiled with baseline flags.
#include "ops/wq_grouped_linear/wq_grouped_linear.h"

#include "ops/wq_linear/kernels.h"

namespace effk {
namespace wq {
namespace {

constexpr size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }
constexpr int64_t width(DType t) { return t == DType::f32 ? 4 : 2; }

// An expert with rows: one call of wq_linear, in all but the loop around it.
struct Expert {
  WqWeight w;
  Rows rows;
  const Kernel* kernel;
  const char* x;
  char* y;
  bool gemv;
  int64_t end_block;         // its blocks of rows, counted over all experts
};

// The tiles of one expert for up to kMaxBlocks blocks of its rows, in units of `step` tiles.
struct Part {
  const Expert* expert;
  int block, blocks, step;
  int64_t units, unit_cost, end_cost;
};

// Estimated cost of a tile: reading it, and meeting it with rows. Eight rows count as much as reading, as in the driver of
// wq_linear; only the balance between threads depends on it.
constexpr int64_t kReadCost = 8;

WqLinearArgs call_of(const WqGroupedArgs& a, int64_t e) {
  WqLinearArgs call{};
  call.x_dtype = a.x_dtype;
  call.m = a.offsets[e + 1] - a.offsets[e];
  call.k = a.k;
  call.compute = a.compute;
  return call;
}

struct Layout {
  const Kernel* kernel;
  int64_t experts, parts;    // that there are
  size_t part_at, data, scale, sum, total;
};

Layout layout_of(const WqGroupedArgs& a) {
  Layout l{};
  Rows r{};
  l.kernel = choose(call_of(a, 0), a.first);
  for (int64_t e = 0; e < a.experts; ++e) {
    const WqLinearArgs call = call_of(a, e);
    if (call.m == 0) continue;
    r = describe(call, a.first, *l.kernel);
    ++l.experts;
    l.parts += t16::ceil_div(r.blocks, kMaxBlocks);
  }
  l.part_at = aligned(size_t(l.experts) * sizeof(Expert));
  l.data = l.part_at + aligned(size_t(l.parts) * sizeof(Part));
  l.scale = l.data + aligned(size_t(a.m * r.kpad) * steps_per_unit(l.kernel->form));
  l.sum = l.scale + aligned(size_t(a.m * r.spans) * 4);
  l.total = l.sum + aligned(size_t(a.m * r.spans) * 4);
  return l;
}

void run_units(const Part& part, int64_t first, int64_t last, DType dtype) {
  const Expert& expert = *part.expert;
  const int64_t tiles = t16::tiles(expert.w.n);
  const int64_t longest = expert.gemv ? kMaxGemvTiles / part.step : 1;  // units a call
  for (int64_t unit = first; unit < last; unit += longest) {
    const int64_t end = (unit + longest < last ? unit + longest : last) * part.step;
    Tile t{};
    t.w = &expert.w;
    t.rows = &expert.rows;
    t.tile = unit * part.step;
    t.tiles = int((end < tiles ? end : tiles) - t.tile);
    t.block = part.block;
    t.blocks = part.blocks;
    t.y = expert.y;
    t.y_dtype = dtype;
    (expert.gemv ? expert.kernel->gemv : expert.kernel->gemm)(t);
  }
}

}  // namespace
}  // namespace wq

WqWeight wq_expert(const WqWeight& first, int64_t expert) {
  const int64_t tiles = t16::tiles(first.n);
  WqWeight w = first;
  w.bias = nullptr;
  w.n = (expert + 1) * tiles * t16::kTileRows;
  w = wq_cut(w, expert * tiles, (expert + 1) * tiles);
  w.n = first.n;
  if (first.bias) w.bias = static_cast<const char*>(first.bias) + expert * first.n * wq::width(first.bias_dtype);
  return w;
}

size_t wq_grouped_linear_workspace(const WqGroupedArgs& a) {
  return a.m == 0 || a.first.n == 0 ? 0 : wq::layout_of(a).total;
}

void wq_grouped_linear(const WqGroupedArgs& a, void* workspace, const ParallelFor& pf) {
  using namespace wq;
  if (a.m == 0 || a.first.n == 0) return;
  const Layout l = layout_of(a);
  char* base = static_cast<char*>(workspace);
  Expert* const experts = reinterpret_cast<Expert*>(base);
  Part* const parts = reinterpret_cast<Part*>(base + l.part_at);
  const int64_t tiles = t16::tiles(a.first.n), tile_bytes = t16::packed_bytes(t16::kTileRows, a.k, a.first.bits);

  int64_t count = 0, n_parts = 0, blocks = 0, cost = 0, bytes = 0;
  for (int64_t e = 0; e < a.experts; ++e) {
    const WqLinearArgs call = call_of(a, e);
    if (call.m == 0) continue;
    Expert& o = experts[count++];
    const int64_t row = a.offsets[e];
    o.w = wq_expert(a.first, e);
    o.kernel = l.kernel;
    o.gemv = is_gemv(*l.kernel, call, o.w);
    o.x = static_cast<const char*>(a.x) + row * a.k * width(a.x_dtype);
    o.y = static_cast<char*>(a.y) + row * a.first.n * width(a.x_dtype);
    o.rows = describe(call, o.w, *l.kernel);
    Rows& r = o.rows;
    r.data = reinterpret_cast<int32_t*>(base + l.data + row * r.kpad * steps_per_unit(l.kernel->form));
    r.scale = reinterpret_cast<float*>(base + l.scale) + row * r.spans;
    r.sum = reinterpret_cast<int32_t*>(base + l.sum) + row * r.spans;
    o.end_block = blocks += r.blocks;
    bytes += tiles * tile_bytes * (1 + call.m / kReadCost);
    for (int block = 0; block < r.blocks; block += kMaxBlocks) {
      Part& p = parts[n_parts++];
      p.expert = &o;
      p.block = block;
      p.blocks = r.blocks - block < kMaxBlocks ? r.blocks - block : kMaxBlocks;
      p.step = o.gemv ? l.kernel->gemv_tiles : l.kernel->gemm_tiles;
      p.units = t16::ceil_div(tiles, p.step);
      const int last = p.block + p.blocks - 1;
      p.unit_cost = p.step * (kReadCost + r.first_row(last) + r.rows_in(last) - r.first_row(block));
      p.end_cost = cost += p.units * p.unit_cost;
    }
  }

  const int64_t grain = t16::ceil_div((16 << 10) * blocks, a.k * a.m);  // 16 Ki elements: a few microseconds
  parallel_for(pf, blocks, grain, [&](int64_t b0, int64_t b1) {
    const Expert* o = experts;
    for (int64_t b = b0; b < b1; ++b) {
      while (b >= o->end_block) ++o;
      o->kernel->prepare(o->x, a.x_dtype, int(b - (o->end_block - o->rows.blocks)), o->rows);
    }
  });

  // Shares [s, s + 1) / n of the cost, each rounded up to whole units of a part, so that neighbours meet exactly.
  const int64_t most = t16::ceil_div(bytes, kGrainBytes), shares = pf.threads < most ? pf.threads : most;
  parallel_for(pf, shares, 1, [&](int64_t s0, int64_t s1) {
    const int64_t from = cost / shares * s0 + cost % shares * s0 / shares;
    const int64_t to = cost / shares * s1 + cost % shares * s1 / shares;
    for (int64_t i = 0; i < n_parts; ++i) {
      const Part& p = parts[i];
      const int64_t start = p.end_cost - p.units * p.unit_cost;
      if (p.end_cost <= from) continue;
      if (start >= to) break;
      const int64_t first = from <= start ? 0 : t16::ceil_div(from - start, p.unit_cost);
      const int64_t last = to >= p.end_cost ? p.units : t16::ceil_div(to - start, p.unit_cost);
      run_units(p, first, last, a.x_dtype);
    }
  });
}

}  // namespace effk
