// Cuts a linear layer into tiles of tokens and columns. Compiled with baseline flags.
#include "gemm/gemm.h"

#include <algorithm>
#include <cstring>

#include "common/half.h"
#include "gemm/choose.h"

namespace effk::gemm {

extern const Kernel kScalar;
#ifdef EFFK_X86
extern const Kernel kAvx2, kAvx512, kAvx512Bf16;
#endif

const Kernel* const kKernels[] = {
#ifdef EFFK_X86
    &kAvx512Bf16, &kAvx512, &kAvx2,
#endif
    &kScalar,
};
const int kKernelCount = int(sizeof(kKernels) / sizeof(kKernels[0]));

const Kernel& choose(DType x, DType panels) {
  const bool pairs = x == DType::bf16 && panels == DType::bf16;
  for (const Kernel* k : kKernels)
    if (k->tier <= isa::active() && (!k->needs_bf16 || isa::has_bf16()) && (pairs || k->form == Form::fp32)) return *k;
  return kScalar;
}
const char* kernel_name(DType x, DType panels) { return choose(x, panels).name; }

namespace {

// Tuned on Zen 5 (48 KiB, 1 MiB, 32 MiB), T = 512. A slice of the packed rows (256 rows, 512 of k: 512 KiB) stays in the second-level
// cache while a panel of weights (96 KiB) and the next one stream through it. More rows a tile mean that large weights come from memory
// less often: 64 rows lose 5 % at 2048 -> 8192, 512 gain nothing. Results of 12 tiles of columns stay beside that (192 KiB): 24 lose 8 %
// in dense layers, 6 lose 3 % in DYAD ones. Without fetching the next panel ahead dense fp32 was at 77 %, bf16 at 78 %.
constexpr int64_t kMinTileRows = 64, kMaxTileRows = 256;  // tokens whose packed rows are used together
constexpr int64_t kTileBytes = 4 << 20;   // of packed rows, unless the fewest rows need more: limits the memory of many threads
constexpr int64_t kDepthUnits = 32;       // units of k between visits of the results: 512 in fp32
constexpr int64_t kStartBytes = 1024;      // of a tile, fetched before its turn
constexpr int64_t kChunkTiles = 12;       // tiles of columns whose results are kept

// What one layer needs of memory, in bytes, and how its operands lie.
struct Plan {
  const Kernel* k;
  bool split;                             // ot, dt: two sums that meet at the end
  int64_t operands;                       // packed rows per token
  int64_t units, part_units;              // of one operand, of one of its parts
  int64_t f_in, f_out, tiles, bias_row;   // tiles of one matrix; padded bias of one block
  int64_t tile_rows;                      // of tokens, whole blocks

  Plan(const LinearArgs& a, int threads) {
    const panel::Shape& s = a.shape;
    k = &choose(a.dtype, s.dtype);
    split = s.kind == panel::Kind::ot || s.kind == panel::Kind::dt;
    operands = s.kind == panel::Kind::dt ? 2 * s.n : s.n;
    part_units = panel::padded(s.d_in, s.dtype) / unit_k(k->form);
    units = s.parts() * part_units;
    f_in = gemm::f_in(s);
    f_out = gemm::f_out(s);
    tiles = panel::tiles(s.d_out);
    bias_row = tiles * panel::kColumns;
    const int64_t most = std::min(kMaxTileRows, std::max(kMinTileRows, kTileBytes / (operands * units * kUnitBytes)));
    const int64_t each = ceil_div(a.tokens, ceil_div(ceil_div(a.tokens, most), threads) * threads);  // as many tiles for every thread
    tile_rows = ceil_div(std::min(std::max(each, kMinTileRows), a.tokens), k->rows) * k->rows;
  }
  int64_t blocks(int64_t rows) const { return ceil_div(rows, k->rows); }
  int64_t packed_bytes(int64_t rows) const { return operands * blocks(rows) * k->rows * units * kUnitBytes; }
  int64_t sums_bytes(int64_t rows) const { return split ? aligned(2 * rows * f_out * 4) : 0; }
  int64_t residue_bytes(DType t) const { return aligned(k->rows * f_in * bytes_of(t)); }
  int64_t results_bytes() const { return tile_rows * std::min(kChunkTiles, tiles) * panel::kColumns * 4; }
  int64_t bias_bytes(const LinearArgs& a) const { return a.bias ? aligned(a.shape.n * bias_row * 4) : 0; }
};

float element(const void* p, DType t, int64_t i) {
  if (t == DType::f32) { float f; std::memcpy(&f, shifted(p, i, t), 4); return f; }
  uint16_t h;
  std::memcpy(&h, shifted(p, i, t), 2);
  return t == DType::bf16 ? bf16_to_float(h) : f16_to_float(h);
}

// Bias in fp32, every block padded to whole tiles; null without one.
const float* widen_bias(const LinearArgs& a, const Plan& p, void* room) {
  if (!a.bias) return nullptr;
  float* to = static_cast<float*>(room);
  for (int64_t d = 0; d < a.shape.n; ++d)
    for (int64_t o = 0; o < p.bias_row; ++o)
      to[d * p.bias_row + o] = o < a.shape.d_out ? element(a.bias, a.bias_dtype, d * a.shape.d_out + o) : 0.0f;
  return to;
}

// Rows [t0, t0 + rows), at most one block, of all operands; operand i of block b at packed + (i * blocks + b) * stride.
void pack_block(const LinearArgs& a, const Plan& p, int64_t t0, int rows, char* packed, int64_t operand_stride, char* residues) {
  const panel::Shape& s = a.shape;
  const auto contiguous = [&](int64_t d) {
    return a.features ? Source{shifted(a.x, d * s.d_in * a.tokens + t0, a.dtype), a.dtype, 1, a.tokens}
                      : Source{shifted(a.x, t0 * p.f_in + d * s.d_in, a.dtype), a.dtype, p.f_in, 1};
  };
  const auto residue = [&](int64_t d) {
    return a.features ? Source{shifted(a.x, d * a.tokens + t0, a.dtype), a.dtype, 1, s.n * a.tokens}
                      : Source{residues + d * s.d_in * bytes_of(a.dtype), a.dtype, p.f_in, 1};
  };
  const bool second = s.kind == panel::Kind::it || s.kind == panel::Kind::dt;
  const bool in_place = second && !a.features && a.dtype == (p.k->form == Form::bf16 ? DType::bf16 : DType::f32);  // no copy between
  const int size = int(bytes_of(a.dtype));
  char* apart = packed + (s.kind == panel::Kind::it ? p.part_units * rows * kUnitBytes : s.n * operand_stride);
  if (second && !a.features)
    for (int r = 0; r < rows; ++r) {
      const char* row = shifted(a.x, (t0 + r) * p.f_in, a.dtype);
      if (in_place) p.k->deinterleave(row, size, s.d_in, s.n, apart + r * kUnitBytes, operand_stride / size, rows * kUnitBytes / size);
      else p.k->deinterleave(row, size, s.d_in, s.n, residues + r * p.f_in * size, s.d_in, kUnitBytes / size);
    }
  const int64_t in_unit = unit_k(p.k->form), whole = s.d_in / in_unit, rest = s.d_in % in_unit * size;
  for (int64_t d = 0; d < s.n; ++d) {
    p.k->pack_rows(contiguous(d), rows, s.d_in, p.part_units, packed + d * operand_stride);
    if (!second) continue;
    char* to = apart + d * operand_stride;
    if (!in_place) p.k->pack_rows(residue(d), rows, s.d_in, p.part_units, to);
    else
      for (int64_t u = whole; u < p.part_units; ++u)  // zeros beyond d_in
        for (int r = 0; r < rows; ++r) {
          const int64_t keep = u == whole ? rest : 0;
          std::memset(to + (u * rows + r) * kUnitBytes + keep, 0, kUnitBytes - keep);
        }
  }
}

// One operand of `rows` packed tokens, from block `b0` on, times tiles [j0, j1) of a matrix.
void multiply(const Plan& p, DType panels, const char* operand, int64_t rows, const uint8_t* matrix, int64_t tile_bytes, int64_t columns,
              int64_t j0, int64_t j1, const float* bias, float* results, const Output& out) {
  const Kernel& k = *p.k;
  const int64_t blocks = p.blocks(rows), block_bytes = p.units * k.rows * kUnitBytes;
  const int64_t b_unit = tile_bytes / p.units;
  const int64_t depth = blocks == 1 ? p.units : kDepthUnits;  // one block reads the weights as they lie, across matrices
  const bool direct = out.dtype == DType::f32 && out.column == 1 && out.act == Activation::none;  // sums are results
  for (int64_t c0 = j0; c0 < j1; c0 += kChunkTiles) {
    const int64_t c1 = std::min(c0 + kChunkTiles, j1), ldc = direct ? out.row : (c1 - c0) * panel::kColumns;
    for (int64_t u0 = 0; u0 < p.units; u0 += depth) {
      const int64_t units = std::min(depth, p.units - u0);
      for (int64_t j = c0, step; j < c1; j += step) {
        step = next_tiles(c1 - j, k.tiles);
        float* c = direct ? static_cast<float*>(out.data) + j * panel::kColumns : results + (j - c0) * panel::kColumns;
        const uint8_t* panel = matrix + j * tile_bytes + u0 * b_unit;
        // The panel that comes next is fetched meanwhile, a part of one of its tiles by each block of rows.
        const bool inside = j + step < c1, deeper = u0 + units < p.units;
        const uint8_t* next = inside ? panel + step * tile_bytes : matrix + (deeper ? c0 * tile_bytes + (u0 + units) * b_unit : c1 * tile_bytes);
        const int64_t parts = ceil_div(blocks, step);
        const int64_t share = parts > 1 && (inside || deeper || c1 < j1) ? ceil_div(b_unit, parts * 64) * 64 : 0;
        if (blocks == 1)  // weights are read as they lie: start the streams of the next tiles, the hardware goes on
          for (int64_t t = 0; t < step; ++t)
            for (int64_t line = 0; line < kStartBytes; line += 64) __builtin_prefetch(panel + (step + t) * tile_bytes + line, 0, 2);
        const int64_t here = std::min(step * panel::kColumns, columns - j * panel::kColumns);
        for (int64_t b = 0; b < blocks; ++b) {
          const int in_block = int(std::min<int64_t>(k.rows, rows - b * k.rows));
          k.multiply({operand + b * block_bytes + u0 * in_block * kUnitBytes, in_block * kUnitBytes, panel, tile_bytes, units,
                      bias ? bias + j * panel::kColumns : nullptr, u0 > 0, c + b * k.rows * ldc, ldc, in_block, int(step),
                      direct ? int(here - (step - 1) * panel::kColumns) : panel::kColumns, panels,
                      next + b % step * tile_bytes + b / step * share * units, share});
        }
        if (direct || u0 + units < p.units) continue;
        Output part = out;
        part.data = shifted(out.data, j * panel::kColumns * out.column, out.dtype);
        k.finish(c, ldc, rows, here, part);
      }
    }
  }
}

// Where the results of a matrix go. sums: [rows][2][f_out], the two halves of ot and dt.
Output target(const LinearArgs& a, const Plan& p, int64_t t0, int64_t matrix, float* sums) {
  const panel::Shape& s = a.shape;
  if (p.split) return {sums + matrix / s.n * p.f_out + matrix % s.n * s.d_out, DType::f32, 2 * p.f_out, 1, Activation::none};
  const int64_t first = matrix * s.d_out;
  if (a.features) return {shifted(a.y, first * a.tokens + t0, a.dtype), a.dtype, 1, a.tokens, a.act};
  return {shifted(a.y, t0 * p.f_out + first, a.dtype), a.dtype, p.f_out, 1, a.act};
}

void join(const LinearArgs& a, const Plan& p, int64_t t0, int64_t rows, float* sums) {
  for (int64_t r = 0; r < rows; ++r) {
    float* row = sums + r * 2 * p.f_out;
    p.k->interleave_add(row + p.f_out, a.shape.d_out, a.shape.d_out, a.shape.n, row);
  }
  const Output out = a.features ? Output{shifted(a.y, t0, a.dtype), a.dtype, 1, a.tokens, a.act}
                                : Output{shifted(a.y, t0 * p.f_out, a.dtype), a.dtype, p.f_out, 1, a.act};
  p.k->finish(sums, 2 * p.f_out, rows, p.f_out, out);
}

void multiply_matrix(const LinearArgs& a, const Plan& p, const char* packed, int64_t operand_stride, int64_t t0, int64_t rows, int64_t matrix,
                     int64_t j0, int64_t j1, const float* bias, float* results, float* sums) {
  const panel::Shape& s = a.shape;
  const int64_t operand = s.kind == panel::Kind::ot ? matrix % s.n : matrix;
  multiply(p, s.dtype, packed + operand * operand_stride, rows, a.panels + matrix * s.matrix_bytes(), s.tile_bytes(), s.d_out, j0, j1,
           bias && matrix < s.n ? bias + matrix * p.bias_row : nullptr, results, target(a, p, t0, matrix, sums));
}

// One tile of tokens by one thread. Memory: packed rows, results, residues, sums.
int64_t tile_bytes(const LinearArgs& a, const Plan& p, int64_t rows) {
  return p.packed_bytes(rows) + p.results_bytes() + p.residue_bytes(a.dtype) + p.sums_bytes(rows);
}
void run_tile(const LinearArgs& a, const Plan& p, int64_t t0, int64_t rows, const float* bias, char* room) {
  char* packed = room;
  float* results = reinterpret_cast<float*>(packed + p.packed_bytes(rows));
  char* residues = reinterpret_cast<char*>(results) + p.results_bytes();
  float* sums = reinterpret_cast<float*>(residues + p.residue_bytes(a.dtype));
  const int64_t operand_stride = p.packed_bytes(rows) / p.operands, block = operand_stride / p.blocks(rows);
  for (int64_t b = 0; b < p.blocks(rows); ++b)
    pack_block(a, p, t0 + b * p.k->rows, int(std::min<int64_t>(p.k->rows, rows - b * p.k->rows)), packed + b * block, operand_stride, residues);
  for (int64_t m = 0; m < a.shape.matrices(); ++m)
    multiply_matrix(a, p, packed, operand_stride, t0, rows, m, 0, p.tiles, bias, results, sums);
  if (p.split) join(a, p, t0, rows, sums);
}

// Few tokens for many threads: all rows are packed first, then tiles of tokens, matrices and columns are shared out.
struct Shared {
  int64_t packed, sums, slot, slots, chunk, chunks, token_tiles;
  Shared(const LinearArgs& a, const Plan& p, int threads) {
    token_tiles = ceil_div(a.tokens, p.tile_rows);
    const int64_t wanted = ceil_div(4 * int64_t(threads), token_tiles * a.shape.matrices());
    chunk = ceil_div(ceil_div(p.tiles, wanted), p.k->tiles) * p.k->tiles;
    chunks = ceil_div(p.tiles, chunk);
    slots = std::min<int64_t>(threads, token_tiles * a.shape.matrices() * chunks);
    packed = p.packed_bytes(a.tokens);
    sums = p.sums_bytes(a.tokens);
    slot = std::max(p.results_bytes(), p.residue_bytes(a.dtype));
  }
  int64_t bytes(int threads) const { return packed + sums + threads * slot; }
};

void run_shared(const LinearArgs& a, const Plan& p, const float* bias, char* room, const ParallelFor& pf) {
  const Shared s(a, p, pf.threads);
  char* packed = room;
  float* sums = reinterpret_cast<float*>(packed + s.packed);
  char* slots = packed + s.packed + s.sums;
  const int64_t blocks = p.blocks(a.tokens), operand_stride = s.packed / p.operands, block = operand_stride / blocks;
  over_slots(pf, std::min<int64_t>(pf.threads, blocks), blocks, [&](int64_t slot, int64_t b) {
    pack_block(a, p, b * p.k->rows, int(std::min<int64_t>(p.k->rows, a.tokens - b * p.k->rows)), packed + b * block, operand_stride, slots + slot * s.slot);
  });
  const int64_t matrices = a.shape.matrices();
  over_slots(pf, s.slots, s.token_tiles * matrices * s.chunks, [&](int64_t slot, int64_t i) {
    const int64_t j0 = i / s.token_tiles % s.chunks * s.chunk, m = i / s.token_tiles / s.chunks, t0 = i % s.token_tiles * p.tile_rows;
    const int64_t rows = std::min(p.tile_rows, a.tokens - t0);
    multiply_matrix(a, p, packed + t0 / p.k->rows * block, operand_stride, t0, rows, m, j0, std::min(j0 + s.chunk, p.tiles), bias,
                    reinterpret_cast<float*>(slots + slot * s.slot), sums + t0 * 2 * p.f_out);
  });
  if (p.split)
    over_slots(pf, std::min<int64_t>(pf.threads, blocks), blocks, [&](int64_t, int64_t b) {
      const int64_t t0 = b * p.k->rows;
      join(a, p, t0, std::min<int64_t>(p.k->rows, a.tokens - t0), sums + t0 * 2 * p.f_out);
    });
}

bool few_tokens(int64_t token_tiles, int threads) { return token_tiles < threads; }

}  // namespace

size_t linear_workspace(const LinearArgs& a, int threads) {
  if (a.tokens == 0) return 0;
  const Plan p(a, threads);
  const int64_t tiles = ceil_div(a.tokens, p.tile_rows);
  const int64_t rest = few_tokens(tiles, threads) ? Shared(a, p, threads).bytes(threads)
                                                  : std::min<int64_t>(threads, tiles) * tile_bytes(a, p, std::min(p.tile_rows, a.tokens));
  return size_t(p.bias_bytes(a) + rest);
}

void linear(const LinearArgs& a, void* workspace, const ParallelFor& pf) {
  if (a.tokens == 0) return;
  const Plan p(a, pf.threads);
  char* room = static_cast<char*>(workspace);
  const float* bias = widen_bias(a, p, room);
  room += p.bias_bytes(a);
  const int64_t tiles = ceil_div(a.tokens, p.tile_rows);
  if (few_tokens(tiles, pf.threads)) return run_shared(a, p, bias, room, pf);
  const int64_t slot_bytes = tile_bytes(a, p, std::min(p.tile_rows, a.tokens));
  over_slots(pf, std::min<int64_t>(pf.threads, tiles), tiles, [&](int64_t slot, int64_t i) {
    const int64_t t0 = i * p.tile_rows;
    run_tile(a, p, t0, std::min(p.tile_rows, a.tokens - t0), bias, room + slot * slot_bytes);
  });
}

namespace {

// Tokens of a tile of both layers, and of what lies between.
int64_t pair_tile(const LinearArgs& a, const Plan& first, const Plan& second) {
  const int64_t between = std::max(kMinTileRows, kTileBytes / (first.f_out * int64_t(bytes_of(a.dtype))));
  return std::min({first.tile_rows, second.tile_rows, between});
}
// The hidden tile, and what either layer needs at a time.
int64_t pair_bytes(const LinearArgs& a, const Plan& p, const LinearArgs& b, const Plan& q, int64_t rows) {
  const auto most = [&](const LinearArgs& l, const Plan& plan) { return tile_bytes(l, plan, std::min(plan.tile_rows, rows)); };
  return aligned(rows * p.f_out * bytes_of(a.dtype)) + std::max(most(a, p), most(b, q));
}

}  // namespace

size_t linear_pair_workspace(const LinearArgs& first, const LinearArgs& second, int threads) {
  if (first.tokens == 0) return 0;
  const Plan p(first, threads), q(second, threads);
  const int64_t rows = std::min(pair_tile(first, p, q), first.tokens), tiles = ceil_div(first.tokens, rows);
  if (few_tokens(tiles, threads))
    return size_t(aligned(first.tokens * p.f_out * bytes_of(first.dtype))) + std::max(linear_workspace(first, threads), linear_workspace(second, threads));
  return size_t(p.bias_bytes(first) + q.bias_bytes(second) + std::min<int64_t>(threads, tiles) * pair_bytes(first, p, second, q, rows));
}

void linear_pair(const LinearArgs& first, const LinearArgs& second, void* workspace, const ParallelFor& pf) {
  if (first.tokens == 0) return;
  const Plan p(first, pf.threads), q(second, pf.threads);
  char* room = static_cast<char*>(workspace);
  const int64_t rows = std::min(pair_tile(first, p, q), first.tokens), tiles = ceil_div(first.tokens, rows);
  LinearArgs a = first, b = second;
  if (few_tokens(tiles, pf.threads)) {
    a.y = room;
    b.x = room;
    room += aligned(first.tokens * p.f_out * bytes_of(first.dtype));
    linear(a, room, pf);
    return linear(b, room, pf);
  }
  const float* bias1 = widen_bias(a, p, room);
  room += p.bias_bytes(a);
  const float* bias2 = widen_bias(b, q, room);
  room += q.bias_bytes(b);
  const int64_t slot_bytes = pair_bytes(a, p, b, q, rows);
  over_slots(pf, std::min<int64_t>(pf.threads, tiles), tiles, [&](int64_t slot, int64_t i) {
    const int64_t t0 = i * rows, count = std::min(rows, first.tokens - t0);
    char* hidden = room + slot * slot_bytes;
    char* rest = hidden + aligned(rows * p.f_out * bytes_of(first.dtype));
    LinearArgs one = a, two = b;
    one.x = shifted(a.x, t0 * p.f_in, a.dtype);
    two.y = shifted(b.y, t0 * q.f_out, b.dtype);
    one.y = hidden;
    two.x = hidden;
    one.tokens = two.tokens = count;
    run_tile(one, p, 0, count, bias1, rest);
    run_tile(two, q, 0, count, bias2, rest);
  });
}

void pack(const panel::Shape& s, const void* wl, const void* wu, DType dtype, bool transposed, uint8_t* panels, const ParallelFor& pf) {
  const Kernel& k = choose(DType::f32, DType::f32);
  const int64_t tiles = panel::tiles(s.d_out), part = panel::padded(s.d_in, s.dtype) * panel::kColumns * bytes_of(s.dtype);
  const auto source = [&](const void* w, int64_t d, int64_t o) {
    const int64_t block = d * s.d_out * s.d_in;
    return transposed ? Source{shifted(w, block + o, dtype), dtype, 1, s.d_out} : Source{shifted(w, block + o * s.d_in, dtype), dtype, s.d_in, 1};
  };
  const int64_t grain = ceil_div(16 << 10, s.d_in * panel::kColumns);
  parallel_for(pf, s.matrices() * tiles, grain, [&](int64_t i0, int64_t i1) {
    for (int64_t i = i0; i < i1; ++i) {
      const int64_t m = i / tiles, j = i % tiles, o = j * panel::kColumns;
      const int columns = int(std::min<int64_t>(panel::kColumns, s.d_out - o));
      uint8_t* to = panels + m * s.matrix_bytes() + j * s.tile_bytes();
      k.pack_tile(source(m < s.n ? wl : wu, m % s.n, o), columns, s.d_in, s.dtype, to);
      if (s.kind == panel::Kind::it) k.pack_tile(source(wu, m, o), columns, s.d_in, s.dtype, to + part);
    }
  });
}

}  // namespace effk::gemm
