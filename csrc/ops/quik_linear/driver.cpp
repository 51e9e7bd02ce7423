// Cuts the work into tiles of rows and columns; memory and threads. Compiled with baseline flags.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "common/half.h"
#include "gemm/choose.h"
#include "gemm/int8/int8.h"
#include "ops/quik_linear/kernels.h"
#include "ops/wq_linear/wq_linear.h"

namespace effk {
namespace quik {

extern const Kernel kScalar;
#ifdef EFFK_X86
extern const Kernel kAvx2, kAvx512;
#endif

const Kernel* const kKernels[] = {
#ifdef EFFK_X86
    &kAvx512, &kAvx2,
#endif
    &kScalar,
};
const int kKernelCount = int(sizeof(kKernels) / sizeof(kKernels[0]));

namespace {

using gemm::aligned;
using gemm::over_slots;
using gemm::shifted;
using panel::bytes_of;
using panel::ceil_div;

const Kernel& choose() {
  for (const Kernel* k : kKernels)
    if (k->tier <= isa::active()) return *k;
  return kScalar;
}

constexpr int kForms = 2;  // of outliers: gemm::Form

// The runs of the base columns; at most one per column.
int64_t runs_bytes(const QuikSplit& s) { return aligned((s.base ? s.n_base : 1) * int64_t(sizeof(Run))); }
Columns find_runs(const QuikSplit& s, void* room) {
  Run* runs = static_cast<Run*>(room);
  if (!s.base) {
    runs[0] = {0, int32_t(s.n_base)};
    return {runs, 1, s};
  }
  int64_t count = 0;
  for (int64_t i = 0; i < s.n_base;) {
    int64_t j = i + 1;
    while (j < s.n_base && s.base[j] == s.base[j - 1] + 1) ++j;
    runs[count++] = {s.base[i], int32_t(j - i)};
    i = j;
  }
  return {runs, count, s};
}

// Memory handed out piece by piece; with a null base it only counts.
struct Room {
  char* base;
  int64_t used = 0;
  template <class T> T* take(int64_t count) {
    char* at = base ? base + used : nullptr;
    used += aligned(count * int64_t(sizeof(T)));
    return reinterpret_cast<T*>(at);
  }
};

// Quantised rows as the products read them.
struct Rows {
  int8_t* codes;          // blocks of gemm8 rows: [units][rows][64]
  float *scale, *zero;
  int32_t* start;         // where the sums of a row start, for 4-bit weights and for 8-bit ones: [2][rows]
  char* outliers[kForms]; // packed for csrc/gemm, or null
};

struct Plan {
  const QuikLinearArgs& a;
  const Kernel& k;
  const gemm8::Kernel& product;
  const gemm::Kernel* form[kForms] = {};  // that some weight's outliers take
  int64_t piece, tile, block, o_units[kForms], o_block[kForms], tiles = 0;

  explicit Plan(const QuikLinearArgs& args) : a(args), k(choose()), product(gemm8::choose()) {
    block = gemm8::block_bytes(product, a.split.n_base);
    piece = product.rows;
    for (int i = 0; i < a.n_weights; ++i) {
      tiles = std::max(tiles, t16::tiles(a.weights[i].n));
      if (!a.weights[i].outliers) continue;
      const gemm::Kernel& g = gemm::choose(a.x_dtype, a.weights[i].out_dtype);
      const int f = int(g.form);
      form[f] = &g;
      o_units[f] = panel::padded(a.split.n_out, DType::bf16) / gemm::unit_k(g.form);  // the longest of all types of panels
      o_block[f] = g.rows * o_units[f] * gemm::kUnitBytes;
      piece = std::lcm(piece, int64_t(g.rows));
    }
    tile = std::max<int64_t>(1, gemm8::kTileRows / piece) * piece;  // whole blocks of every kind of packed rows
  }

  Rows take(Room& room, int64_t rows) const {
    Rows r{};
    r.codes = room.take<int8_t>(gemm8::packed_bytes(product, rows, a.split.n_base));
    r.scale = room.take<float>(rows);
    r.zero = room.take<float>(rows);
    r.start = room.take<int32_t>(2 * rows);
    for (int f = 0; f < kForms; ++f)
      if (form[f]) r.outliers[f] = room.take<char>(ceil_div(rows, form[f]->rows) * o_block[f]);
    return r;
  }
  struct Scratch { float* room; char* x_out; };  // of one thread that quantises
  Scratch take_scratch(Room& room) const {
    return {room.take<float>(room_floats(a.split.n_base)), room.take<char>(tile * a.split.n_out * bytes_of(a.x_dtype))};
  }
  int32_t* take_sums(Room& room) const { return room.take<int32_t>(gemm8::sums_bytes(tile, tiles) / 4); }

  // Rows [t0, t0 + rows) of x, at most a tile, into rows [at, ..) of `to`, which holds `total`; `at` is a multiple of the tile.
  void quantize(const Columns& c, int64_t t0, int64_t rows, const Rows& to, int64_t at, int64_t total, const Scratch& s) const {
    const int64_t out_bytes = a.split.n_out * bytes_of(a.x_dtype);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t b = (at + r) / product.rows, in_block = std::min<int64_t>(product.rows, total - b * product.rows);
      int32_t sum;
      k.quantize(c, a.bits_a, a.mode == QuikMode::sim,
                 {shifted(a.x, (t0 + r) * a.split.k, a.x_dtype), a.x_dtype, s.room, to.codes + b * block + (at + r) % product.rows * 64, in_block * 64,
                  to.scale + at + r, to.zero + at + r, &sum, s.x_out + r * out_bytes});
      to.start[at + r] = -8 * sum;
      to.start[total + at + r] = -128 * sum;
    }
    for (int f = 0; f < kForms; ++f) {
      if (!form[f]) continue;
      const gemm::Kernel& g = *form[f];
      for (int64_t r = 0; r < rows; r += g.rows)
        g.pack_rows({s.x_out + r * out_bytes, a.x_dtype, a.split.n_out, 1}, int(std::min<int64_t>(g.rows, rows - r)), a.split.n_out, o_units[f],
                    to.outliers[f] + (at + r) / g.rows * o_block[f]);
    }
  }

  // Rows [at, at + rows) of `from`, rows [t0, ..) of x, times tiles [j0, j1) of weight i.
  void multiply(const Rows& from, int64_t at, int64_t total, int64_t t0, int64_t rows, int i, int64_t j0, int64_t j1, int32_t* sums) const {
    const QuikWeight& w = a.weights[i];
    const gemm::Kernel& g = gemm::choose(a.x_dtype, w.outliers ? w.out_dtype : DType::f32);
    const int64_t panel_tile = panel::padded(a.split.n_out, w.out_dtype) * panel::kColumns * bytes_of(w.out_dtype);
    const int f = int(g.form);
    gemm8::multiply_tile(
        product, from.codes + at / product.rows * block, rows, from.start + (w.bits == 8 ? total : 0) + at, {w.packed, w.n, a.split.n_base, w.bits}, j0, j1,
        sums, [&](int64_t j, int64_t tiles_here, int32_t* c, int64_t ldc) {
          float* y = reinterpret_cast<float*>(c);
          const int64_t n0 = j * t16::kTileRows, columns = std::min(tiles_here * t16::kTileRows, w.n - n0);
          k.dequantize({c, ldc, rows, columns, from.scale + at, from.zero + at, float(1 << (a.bits_a - 1)), w.scales + n0, w.reduced + n0,
                        w.bias ? shifted(w.bias, n0, w.bias_dtype) : nullptr, w.bias_dtype, 0, y});
          if (w.outliers) {
            const uint8_t* panels = static_cast<const uint8_t*>(w.outliers) + j * panel_tile;
            const int64_t units = panel::padded(a.split.n_out, w.out_dtype) / gemm::unit_k(g.form), blocks = ceil_div(rows, g.rows);
            // The panels of the next group are fetched meanwhile, a part by each block of rows.
            const bool more = j + tiles_here < j1;
            const int64_t share = more && blocks > 1 ? ceil_div(std::min(tiles_here, j1 - j - tiles_here) * panel_tile, blocks * units * 64) * 64 : 0;
            for (int64_t d = 0, step; d < tiles_here; d += step) {
              step = gemm::next_tiles(tiles_here - d, g.tiles);
              for (int64_t b = 0; b < blocks; ++b) {
                const int64_t in_block = std::min<int64_t>(g.rows, rows - b * g.rows);
                g.multiply({from.outliers[f] + (at / g.rows + b) * o_block[f], in_block * gemm::kUnitBytes, panels + d * panel_tile, panel_tile, units,
                            nullptr, true, y + b * g.rows * ldc + d * panel::kColumns, ldc, int(in_block), int(step), panel::kColumns, w.out_dtype,
                            panels + tiles_here * panel_tile + b * share * units, d ? 0 : share});
              }
            }
          }
        },
        [&](int64_t j, int64_t tiles_here, int32_t* c, int64_t ldc) {
          const int64_t n0 = j * t16::kTileRows;
          g.finish(reinterpret_cast<float*>(c), ldc, rows, std::min(tiles_here * t16::kTileRows, w.n - n0),
                   {shifted(a.y[i], t0 * w.n + n0, a.x_dtype), a.x_dtype, w.n, 1, Activation::none});
        });
  }
};

// Few tiles of rows for many threads: all rows are quantised first, then tiles of rows and of columns are shared out.
bool few_tiles(int64_t token_tiles, int threads) { return threads > 1 && token_tiles < 2 * int64_t(threads); }

struct Shares {  // column chunks of each weight
  int64_t chunk, items = 0, token_tiles;
  Shares(const Plan& p, int threads) {
    token_tiles = ceil_div(p.a.m, p.tile);
    int64_t tiles = 0;
    for (int i = 0; i < p.a.n_weights; ++i) tiles += t16::tiles(p.a.weights[i].n);
    const int64_t wanted = ceil_div(4 * int64_t(threads), token_tiles);
    chunk = ceil_div(ceil_div(tiles, wanted), p.product.tiles) * p.product.tiles;
    for (int i = 0; i < p.a.n_weights; ++i) items += token_tiles * ceil_div(t16::tiles(p.a.weights[i].n), chunk);
  }
};

int64_t integer_workspace(const Plan& p, int threads) {
  Room room{nullptr};
  const int64_t token_tiles = ceil_div(p.a.m, p.tile), rows = few_tiles(token_tiles, threads) ? p.a.m : std::min(p.tile, p.a.m);
  const int64_t slots = few_tiles(token_tiles, threads) ? threads : std::min<int64_t>(threads, token_tiles);
  if (few_tiles(token_tiles, threads)) p.take(room, rows);
  for (int64_t s = 0; s < slots; ++s) {
    if (!few_tiles(token_tiles, threads)) p.take(room, rows);
    p.take_scratch(room);
    p.take_sums(room);
  }
  return room.used;
}

void run_integer(const Plan& p, const Columns& c, char* base, const ParallelFor& pf) {
  const QuikLinearArgs& a = p.a;
  const int64_t token_tiles = ceil_div(a.m, p.tile);
  const auto rows_of = [&](int64_t t) { return std::min(p.tile, a.m - t * p.tile); };
  Room room{base};
  if (!few_tiles(token_tiles, pf.threads)) {
    const int64_t slots = std::min<int64_t>(pf.threads, token_tiles), rows = std::min(p.tile, a.m);
    Room one{nullptr};
    p.take(one, rows), p.take_scratch(one), p.take_sums(one);
    over_slots(pf, slots, token_tiles, [&](int64_t slot, int64_t t) {
      Room mine{base + slot * one.used};
      const Rows r = p.take(mine, rows);
      const Plan::Scratch s = p.take_scratch(mine);
      int32_t* sums = p.take_sums(mine);
      const int64_t here = rows_of(t);
      p.quantize(c, t * p.tile, here, r, 0, here, s);
      for (int i = 0; i < a.n_weights; ++i) p.multiply(r, 0, here, t * p.tile, here, i, 0, t16::tiles(a.weights[i].n), sums);
    });
    return;
  }
  const Rows r = p.take(room, a.m);
  Room one{nullptr};
  p.take_scratch(one), p.take_sums(one);
  char* slots = base + room.used;
  // Pieces, not tiles: also few rows are shared.
  const int64_t piece = p.piece;
  over_slots(pf, std::min<int64_t>(pf.threads, ceil_div(a.m, piece)), ceil_div(a.m, piece), [&](int64_t slot, int64_t b) {
    Room mine{slots + slot * one.used};
    p.quantize(c, b * piece, std::min(piece, a.m - b * piece), r, b * piece, a.m, p.take_scratch(mine));
  });
  const Shares shares(p, pf.threads);
  over_slots(pf, std::min<int64_t>(pf.threads, shares.items), shares.items, [&](int64_t slot, int64_t item) {
    Room mine{slots + slot * one.used};
    p.take_scratch(mine);
    int32_t* sums = p.take_sums(mine);
    const int64_t t = item % token_tiles;
    int64_t column = item / token_tiles;
    int i = 0;
    for (int64_t count; column >= (count = ceil_div(t16::tiles(a.weights[i].n), shares.chunk)); ++i) column -= count;
    const int64_t j0 = column * shares.chunk, j1 = std::min(j0 + shares.chunk, t16::tiles(a.weights[i].n));
    p.multiply(r, t * p.tile, a.m, t * p.tile, rows_of(t), i, j0, j1, sums);
  });
}

// Weight-only: base columns beside each other through wq_linear, which adds to them what the outliers give in fp32.
constexpr int64_t kOnlyRows = 192;  // at a time: whole blocks of every kind of packed rows

struct Only {
  const Plan& p;
  int64_t rows;
  bool copied;  // base columns; a single row that lies as it is wanted is not
  char *base, *x_out, *packed[kForms], *wq;
  float* add;

  Only(const Plan& plan, Room& room) : p(plan), rows(std::min(kOnlyRows, p.a.m)) {
    const QuikLinearArgs& a = p.a;
    copied = a.split.base || (a.split.n_out && rows > 1);
    base = copied ? room.take<char>(rows * a.split.n_base * bytes_of(a.x_dtype)) : nullptr;
    x_out = room.take<char>(rows * a.split.n_out * bytes_of(a.x_dtype));
    int64_t columns = 0;
    for (int i = 0; i < a.n_weights; ++i)
      if (a.weights[i].outliers) columns += t16::tiles(a.weights[i].n) * t16::kTileRows;
    for (int f = 0; f < kForms; ++f) packed[f] = p.form[f] ? room.take<char>(ceil_div(rows, p.form[f]->rows) * p.o_block[f]) : nullptr;
    add = room.take<float>(rows * columns);
    wq = room.take<char>(wq_workspace());
  }
  WqWeight base_weight(int i) const {
    const QuikWeight& w = p.a.weights[i];
    WqWeight b{};
    b.packed = w.packed, b.scales = w.scales, b.scales_f32 = true;
    b.n = w.n, b.k = p.a.split.n_base, b.bits = w.bits;
    b.bias = w.bias, b.bias_dtype = w.bias_dtype;
    return b;
  }
  int64_t wq_workspace() const {
    int64_t most = 0;
    for (int i = 0; i < p.a.n_weights; ++i) {
      const WqWeight w = base_weight(i);
      for (int64_t m : {rows, p.a.m % rows})  // the form of a piece depends on its rows
        most = std::max(most, int64_t(wq_linear_workspace({nullptr, p.a.x_dtype, m, w.k, &w, nullptr, 1, Compute::fp})));
    }
    return most;
  }
};

void run_weight_only(const Plan& p, const Columns& c, char* memory, const ParallelFor& pf) {
  const QuikLinearArgs& a = p.a;
  Room room{memory};
  const Only o(p, room);
  const int64_t size = bytes_of(a.x_dtype), n_out = a.split.n_out;
  for (int64_t t0 = 0; t0 < a.m; t0 += o.rows) {
    const int64_t rows = std::min(o.rows, a.m - t0);
    const int64_t piece = p.piece;
    if (o.copied || n_out)
      parallel_for(pf, ceil_div(rows, piece), ceil_div(32 << 10, piece * a.split.k), [&](int64_t b0, int64_t b1) {
        for (int64_t r = b0 * piece; r < std::min(rows, b1 * piece); ++r)
          p.k.split(c, shifted(a.x, (t0 + r) * a.split.k, a.x_dtype), a.x_dtype, o.copied ? o.base + r * a.split.n_base * size : nullptr,
                    o.x_out + r * n_out * size);
        for (int f = 0; f < kForms; ++f)
          for (int64_t r = b0 * piece; p.form[f] && r < std::min(rows, b1 * piece); r += p.form[f]->rows)
            p.form[f]->pack_rows({o.x_out + r * n_out * size, a.x_dtype, n_out, 1}, int(std::min<int64_t>(p.form[f]->rows, rows - r)), n_out, p.o_units[f],
                                 o.packed[f] + r / p.form[f]->rows * p.o_block[f]);
      });
    float* add = o.add;
    for (int i = 0; i < a.n_weights; ++i) {
      const QuikWeight& w = a.weights[i];
      WqWeight base = o.base_weight(i);
      if (w.outliers) {
        const gemm::Kernel& g = gemm::choose(a.x_dtype, w.out_dtype);
        const int64_t tile_bytes = panel::padded(n_out, w.out_dtype) * panel::kColumns * bytes_of(w.out_dtype), ldc = t16::tiles(w.n) * t16::kTileRows;
        const int64_t units = panel::padded(n_out, w.out_dtype) / gemm::unit_k(g.form), steps = ceil_div(t16::tiles(w.n), g.tiles);
        parallel_for(pf, steps, ceil_div(64 << 10, g.tiles * tile_bytes), [&](int64_t s0, int64_t s1) {
          for (int64_t s = s0; s < s1; ++s) {
            const int64_t j = s * g.tiles, here = std::min<int64_t>(g.tiles, t16::tiles(w.n) - j);
            alignas(64) float init[gemm::kMaxTiles * panel::kColumns] = {};
            for (int64_t n = 0; w.bias && n < std::min(here * panel::kColumns, w.n - j * panel::kColumns); ++n) {
              const char* at = shifted(w.bias, j * panel::kColumns + n, w.bias_dtype);
              uint16_t h;
              if (w.bias_dtype == DType::f32) { std::memcpy(init + n, at, 4); continue; }
              std::memcpy(&h, at, 2);
              init[n] = w.bias_dtype == DType::bf16 ? bf16_to_float(h) : f16_to_float(h);
            }
            const uint8_t* panels = static_cast<const uint8_t*>(w.outliers) + j * tile_bytes;
            for (int64_t r = 0; r < rows; r += g.rows)
              g.multiply({o.packed[int(g.form)] + r / g.rows * p.o_block[int(g.form)], std::min<int64_t>(g.rows, rows - r) * gemm::kUnitBytes, panels, tile_bytes, units, init, false,
                          add + r * ldc + j * panel::kColumns, ldc, int(std::min<int64_t>(g.rows, rows - r)), int(here), panel::kColumns, w.out_dtype,
                          nullptr, 0});
          }
        });
        base.bias = add;
        base.bias_dtype = DType::f32;
        base.bias_row = ldc;
        add += o.rows * ldc;
      }
      void* y = shifted(a.y[i], t0 * w.n, a.x_dtype);
      const void* x = o.copied ? o.base : shifted(a.x, t0 * a.split.k, a.x_dtype);
      wq_linear({x, a.x_dtype, rows, base.k, &base, &y, 1, Compute::fp}, o.wq, pf);
    }
  }
}

}  // namespace
}  // namespace quik

size_t quik_linear_workspace(const QuikLinearArgs& a, int threads) {
  if (a.m == 0) return 0;
  const quik::Plan p(a);
  int64_t bytes = quik::runs_bytes(a.split);
  if (quik_weight_only(a)) {
    quik::Room room{nullptr};
    const quik::Only only(p, room);
    bytes += room.used;
  } else {
    bytes += quik::integer_workspace(p, threads);
  }
  return size_t(bytes);
}

void quik_linear(const QuikLinearArgs& a, void* workspace, const ParallelFor& pf) {
  if (a.m == 0) return;
  const quik::Plan p(a);
  char* room = static_cast<char*>(workspace);
  const quik::Columns c = quik::find_runs(a.split, room);
  room += quik::runs_bytes(a.split);
  quik_weight_only(a) ? quik::run_weight_only(p, c, room, pf) : quik::run_integer(p, c, room, pf);
}

size_t quik_quantize_workspace(const QuikQuantizeArgs& a, int threads) {
  return size_t(quik::runs_bytes(a.split) + threads * (gemm::aligned(quik::room_floats(a.split.n_base) * 4) + gemm::aligned(quik::padded(a.split.n_base))));
}

void quik_quantize(const QuikQuantizeArgs& a, void* workspace, const ParallelFor& pf) {
  using namespace quik;
  if (a.m == 0) return;
  const Kernel& k = choose();
  const Columns c = find_runs(a.split, workspace);
  char* rest = static_cast<char*>(workspace) + runs_bytes(a.split);
  const int64_t n = a.split.n_base, floats = aligned(room_floats(n) * 4), slot_bytes = floats + aligned(padded(n));
  const int64_t pieces = std::min<int64_t>(a.m, 4 * int64_t(pf.threads));
  over_slots(pf, std::min<int64_t>(pf.threads, pieces), pieces, [&](int64_t slot, int64_t piece) {
    float* room = reinterpret_cast<float*>(rest + slot * slot_bytes);
    int8_t* codes = reinterpret_cast<int8_t*>(rest + slot * slot_bytes + floats);
    for (int64_t r = a.m * piece / pieces; r < a.m * (piece + 1) / pieces; ++r) {
      k.quantize(c, a.bits, a.mode == QuikMode::sim,
                 {shifted(a.x, r * a.split.k, a.x_dtype), a.x_dtype, room, codes, 64, a.scale + r, a.zero + r, nullptr,
                  shifted(a.x_out, r * a.split.n_out, a.x_dtype)});
      if (a.bits == 8) {
        std::memcpy(a.qx + r * n, codes, size_t(n));
      } else {  // behind the last column codes are 0
        uint8_t* to = a.qx + r * ceil_div(n, 2);
        for (int64_t i = 0; i < ceil_div(n, 2); ++i) to[i] = uint8_t((codes[2 * i] & 15) | codes[2 * i + 1] << 4);
      }
    }
  });
}

size_t quik_int_matmul_workspace(const QuikIntMatmulArgs& a, int threads) {
  const gemm8::Kernel& k = gemm8::choose();
  return size_t(gemm8::packed_bytes(k, a.m, a.k) + gemm::aligned(a.m * 4) + threads * gemm8::sums_bytes(gemm8::tile_rows(k), t16::tiles(a.n)));
}

void quik_int_matmul(const QuikIntMatmulArgs& a, void* workspace, const ParallelFor& pf) {
  using namespace quik;
  if (a.m == 0) return;
  const gemm8::Kernel& k = gemm8::choose();
  int8_t* codes = static_cast<int8_t*>(workspace);
  int32_t* start = reinterpret_cast<int32_t*>(codes + gemm8::packed_bytes(k, a.m, a.k));
  char* slots = reinterpret_cast<char*>(start) + aligned(a.m * 4);
  const int64_t row_bytes = a.bits_a == 8 ? a.k : ceil_div(a.k, 2), blocks = ceil_div(a.m, k.rows), block = gemm8::block_bytes(k, a.k);
  parallel_for(pf, blocks, ceil_div(64 << 10, block), [&](int64_t b0, int64_t b1) {
    for (int64_t b = b0; b < b1; ++b) {
      const int64_t rows = std::min<int64_t>(k.rows, a.m - b * k.rows);
      k.pack_rows(a.qx + b * k.rows * row_bytes, row_bytes, int(rows), a.k, a.bits_a, codes + b * block, start + b * k.rows);
      for (int64_t r = 0; r < rows; ++r) start[b * k.rows + r] *= -(1 << (a.bits_w - 1));
    }
  });
  const int64_t tile = gemm8::tile_rows(k), token_tiles = ceil_div(a.m, tile), tiles = t16::tiles(a.n);
  const int64_t wanted = token_tiles < 2 * int64_t(pf.threads) && pf.threads > 1 ? ceil_div(4 * int64_t(pf.threads), token_tiles) : 1;
  const int64_t chunk = ceil_div(ceil_div(tiles, wanted), k.tiles) * k.tiles, items = token_tiles * ceil_div(tiles, chunk);
  over_slots(pf, std::min<int64_t>(pf.threads, items), items, [&](int64_t slot, int64_t item) {
    const int64_t t0 = item % token_tiles * tile, rows = std::min(tile, a.m - t0), j0 = item / token_tiles * chunk;
    gemm8::multiply_tile(k, codes + t0 / k.rows * block, rows, start + t0, {a.packed, a.n, a.k, a.bits_w}, j0, std::min(j0 + chunk, tiles),
                         reinterpret_cast<int32_t*>(slots + slot * gemm8::sums_bytes(tile, tiles)), [](auto...) {},
                         [&](int64_t j, int64_t here, int32_t* c, int64_t ldc) {
                           const int64_t n0 = j * t16::kTileRows, columns = std::min(here * t16::kTileRows, a.n - n0);
                           for (int64_t r = 0; r < rows; ++r) std::memcpy(a.acc + (t0 + r) * a.n + n0, c + r * ldc, size_t(columns) * 4);
                         });
  });
}

void quik_dequantize(const QuikDequantizeArgs& a, const ParallelFor& pf) {
  using namespace quik;
  if (a.m == 0 || a.n == 0) return;
  const Kernel& k = choose();
  const gemm::Kernel& g = gemm::choose(DType::f32, DType::f32);
  constexpr int64_t kColumns = 512;
  parallel_for(pf, a.m, ceil_div(32 << 10, a.n), [&](int64_t r0, int64_t r1) {
    alignas(64) int32_t whole[16];
    alignas(64) float y[kColumns];
    for (int64_t r = r0; r < r1; ++r)
      for (int64_t j = 0; j < a.n; j += kColumns) {
        const int64_t columns = std::min(kColumns, a.n - j);
        const auto run = [&](const int32_t* acc, int64_t at, int64_t count) {
          k.dequantize({acc, kColumns, 1, count, a.scale + r, a.zero + r, float(1 << (a.bits_a - 1)), a.w_scale + at, a.w_reduced + at,
                        a.y_in ? shifted(a.y_in, r * a.n + at, a.y_in_dtype) : nullptr, a.y_in_dtype, 0, y + (at - j)});
        };
        const int64_t vectors = columns / 16 * 16;
        if (vectors) run(a.acc + r * a.n + j, j, vectors);
        if (vectors < columns) {  // the last vector would read beyond acc
          std::memcpy(whole, a.acc + r * a.n + j + vectors, size_t(columns - vectors) * 4);
          run(whole, j + vectors, columns - vectors);
        }
        g.finish(y, kColumns, 1, columns, {shifted(a.y, r * a.n + j, a.y_dtype), a.y_dtype, a.n, 1, Activation::none});
      }
  });
}

}  // namespace effk
