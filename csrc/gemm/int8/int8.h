// The shared integer product: A[m, n] = sum_k a[m, k] (u[n, k] - 2^(bits-1)), a signed bytes, u the codes of a t16 weight
// (formats/t16.h), exact in int32 (wrap-around in between is harmless while the result fits). What a tier offers, and the blocking
// around it; who owns memory and threads is the caller (ops/quik_linear, ops/sp24).
//
// The unsigned operand of the dot-product instruction is the weight: a t16 unit of 8-bit codes is the vector operand as it is
// stored, 4 bits take one instruction more a unit, in registers. The 4 activation bytes of a step are broadcast. The zero point is
// taken off as 2^(bits-1) times the sum of the row, where sums start.
#pragma once
#include <algorithm>
#include <cstdint>

#include "common/export.h"
#include "formats/t16.h"
#include "isa/isa.h"

namespace effk::gemm8 {

constexpr int kUnitBytes = 64;  // of a packed row: 64 k, 16 steps
constexpr int kMaxRows = 8, kMaxTiles = 3;
constexpr int64_t units(int64_t k) { return t16::ceil_div(k, kUnitBytes); }

struct Weight {
  const uint8_t* packed;  // t16
  int64_t n, k;
  int bits;               // 4, 8
  int64_t tile_bytes() const { return t16::chunks(k, bits) * kUnitBytes; }
};

// One block of rows times some tiles over a range of k.
struct Product {
  const int8_t* a;        // [units][rows][64]; zero behind the last k
  const uint8_t* b;       // first line of the first tile; a line is 4 k in 8 bits, 8 k in 4
  int64_t b_tile, lines;
  const int32_t* init;    // [rows] where sums start, or null: they go on from c
  int32_t* c;             // [rows][tiles * 16]
  int64_t ldc;
  int rows, tiles, bits;
  const uint8_t* ahead;   // fetched into the second-level cache meanwhile, `ahead_unit` bytes per unit, or null
  int64_t ahead_unit;
};

struct Kernel {
  isa::Tier tier;
  const char* name;
  int rows, tiles;        // of the largest block
  void (*multiply)(const Product&);
  // Row-major codes of `bits` (4: two's complement nibbles, the lower one first) to [units][rows][64]; sum[r] over each row.
  void (*pack_rows)(const uint8_t* a, int64_t row_bytes, int rows, int64_t k, int bits, int8_t* to, int32_t* sum);
};
EFFK_EXPORT extern const Kernel* const kKernels[];  // best first
EFFK_EXPORT extern const int kKernelCount;
const Kernel& choose();

// Tuned on Zen 5 (48 KiB, 1 MiB, 32 MiB; 4096 x 4096, one core, all blocks of 4096 rows): 94 % of the peak with 64 rows in 8 bits,
// where a byte of the weight meets too few rows for its way from the third-level cache, 98 % with 128, 96 % with 192 or 256. In 4
// bits 97, 100 and 98 %. Half the depth loses 1 to 2 %, twice gains nothing.
constexpr int64_t kTileRows = 128;   // rows whose codes are used together
constexpr int64_t kDepthUnits = 32;  // units of k between visits of the sums: a piece of 128 rows is 256 KiB
constexpr int64_t kChunkTiles = 24;  // tiles of columns whose sums are kept beside that: 128 x 384, 192 KiB

inline int64_t tile_rows(const Kernel& k) { return std::max<int64_t>(1, kTileRows / k.rows) * k.rows; }
inline int64_t block_bytes(const Kernel& k, int64_t depth) { return k.rows * units(depth) * kUnitBytes; }
inline int64_t packed_bytes(const Kernel& k, int64_t rows, int64_t depth) { return t16::ceil_div(rows, k.rows) * block_bytes(k, depth); }
inline int64_t sums_bytes(int64_t rows, int64_t tiles) { return rows * std::min(kChunkTiles, tiles) * t16::kTileRows * 4; }

// `rows` packed rows (blocks of k.rows, the last shorter) times tiles [j0, j1): init[r] is where the sums of row r start. Calls
// group(j, tiles, c, ldc) when the sums of a few tiles [j, j + tiles) are ready, in c and in the first-level cache, and whole(j,
// tiles, c, ldc) when those of a chunk are: stores of results are worth lines of more than one group. c is part of `room`
// (sums_bytes), ldc the same for the groups of a chunk.
template <class Group, class Whole>
void multiply_tile(const Kernel& k, const int8_t* a, int64_t rows, const int32_t* init, const Weight& w, int64_t j0, int64_t j1, int32_t* room,
                   const Group& group, const Whole& whole) {
  const int64_t depth = units(w.k), block = block_bytes(k, w.k), blocks = t16::ceil_div(rows, k.rows), tile = w.tile_bytes();
  const int64_t unit_lines = kUnitBytes / t16::chunk_k(w.bits), unit_bytes = unit_lines * kUnitBytes, lines = tile / kUnitBytes;
  for (int64_t c0 = j0; c0 < j1; c0 += kChunkTiles) {
    const int64_t c1 = std::min(c0 + kChunkTiles, j1), ldc = (c1 - c0) * t16::kTileRows;
    for (int64_t u0 = 0; u0 < depth; u0 += kDepthUnits) {
      const int64_t u1 = std::min(u0 + kDepthUnits, depth);
      for (int64_t j = c0, step; j < c1; j += step) {
        step = std::min<int64_t>(k.tiles, c1 - j);
        int32_t* c = room + (j - c0) * t16::kTileRows;
        const uint8_t* b = w.packed + j * tile + u0 * unit_bytes;
        // The tiles that come next are fetched meanwhile, a part of one of them by each block of rows.
        const bool inside = j + step < c1, deeper = u1 < depth;
        const uint8_t* next = inside ? b + step * tile : deeper ? w.packed + c0 * tile + u1 * unit_bytes : w.packed + c1 * tile;
        const int64_t parts = t16::ceil_div(blocks, step);
        const int64_t share = parts > 1 && (inside || deeper || c1 < j1) ? t16::ceil_div(unit_bytes, parts * 64) * 64 : 0;
        for (int64_t r = 0; r < blocks; ++r) {
          const int in_block = int(std::min<int64_t>(k.rows, rows - r * k.rows));
          k.multiply({a + r * block + u0 * in_block * kUnitBytes, b, tile, std::min(u1 * unit_lines, lines) - u0 * unit_lines,
                      u0 ? nullptr : init + r * k.rows, c + r * k.rows * ldc, ldc, in_block, int(step), w.bits,
                      share ? next + r % step * tile + r / step * share * (u1 - u0) : nullptr, share});
        }
        if (u1 == depth) group(j, step, c, ldc);
      }
    }
    whole(c0, c1 - c0, room, ldc);
  }
}

}  // namespace effk::gemm8
