// Compressing, expanding and multiplying 2:4 and pair-wise 4:8 weights. Compiled with baseline flags: the product is that of
// csrc/gemm/int8, and what surrounds it is bound by memory.
#include "ops/sp24/sp24.h"

#include <algorithm>
#include <cstring>

#include "gemm/choose.h"
#include "gemm/int8/int8.h"

namespace effk {
namespace {

using gemm::aligned;
using gemm::ceil_div;
using gemm::over_slots;

// First column of kept place i of a row, from its 2 bits.
int64_t column_of(Sp24 pattern, int64_t i, int place) { return pattern == Sp24::pairs ? 8 * (i / 2) + 2 * place : 4 * (i / 2) + place; }
int place_at(const uint8_t* meta, int64_t i) { return meta[i / 4] >> (2 * (i % 4)) & 3; }

// Row n of the weight as byte column n % 16 of a t16 tile of 8-bit codes; others of the tile stay as they are.
void expand_row(const Sp24MatmulArgs& a, int64_t n, uint8_t* tile) {
  const int width = a.pattern == Sp24::pairs ? 2 : 1;
  const int8_t* values = a.values + n * (a.k / 2);
  const uint8_t* meta = a.meta + n * sp24_meta_bytes(a.pattern, a.k);
  uint8_t* lane = tile + n % t16::kTileRows * 4;
  for (int64_t i = 0; i < sp24_kept(a.pattern, a.k); ++i) {
    const int64_t c = column_of(a.pattern, i, place_at(meta, i));
    for (int j = 0; j < width; ++j) lane[(c + j) / 4 * t16::kUnitBytes + (c + j) % 4] = uint8_t(int(*values++) + 128);
  }
}

}  // namespace

bool sp24_compress(const int8_t* w, int64_t n, int64_t k, Sp24 pattern, int8_t* values, uint8_t* meta, int64_t* row) {
  const int width = pattern == Sp24::pairs ? 2 : 1;
  const int64_t period = sp24_period(pattern), meta_bytes = sp24_meta_bytes(pattern, k);
  std::memset(meta, 0, size_t(n * meta_bytes));
  for (int64_t r = 0; r < n; ++r, w += k, meta += meta_bytes) {
    int64_t at = 0;
    for (int64_t g = 0; g < k; g += period) {
      bool keep[4];
      int kept = 0;
      for (int p = 0; p < 4; ++p) {
        keep[p] = false;
        for (int j = 0; j < width; ++j) keep[p] |= w[g + p * width + j] != 0;
        kept += keep[p];
      }
      if (kept > 2) return *row = r, false;
      for (int p = 0; p < 4 && kept < 2; ++p)
        if (!keep[p]) keep[p] = true, ++kept;
      for (int p = 0; p < 4; ++p) {
        if (!keep[p]) continue;
        meta[at / 4] = uint8_t(meta[at / 4] | p << (2 * (at % 4)));
        ++at;
        for (int j = 0; j < width; ++j) *values++ = w[g + p * width + j];
      }
    }
  }
  return true;
}

void sp24_decompress(const int8_t* values, const uint8_t* meta, int64_t n, int64_t k, Sp24 pattern, int8_t* w, const ParallelFor& pf) {
  const int width = pattern == Sp24::pairs ? 2 : 1;
  parallel_for(pf, n, ceil_div(64 << 10, k), [&](int64_t r0, int64_t r1) {
    for (int64_t r = r0; r < r1; ++r) {
      const int8_t* value = values + r * (k / 2);
      const uint8_t* places = meta + r * sp24_meta_bytes(pattern, k);
      int8_t* to = w + r * k;
      std::memset(to, 0, size_t(k));
      for (int64_t i = 0; i < sp24_kept(pattern, k); ++i, value += width)
        std::memcpy(to + column_of(pattern, i, place_at(places, i)), value, size_t(width));
    }
  });
}

size_t sp24_matmul_workspace(const Sp24MatmulArgs& a, int threads) {
  const gemm8::Kernel& k = gemm8::choose();
  const int64_t tiles = t16::tiles(a.n), chunk = std::min(gemm8::kChunkTiles, tiles);
  return size_t(gemm8::packed_bytes(k, a.m, a.k) + aligned(a.m * 4) +
                threads * (gemm8::sums_bytes(gemm8::tile_rows(k), tiles) + chunk * t16::packed_bytes(t16::kTileRows, a.k, 8)));
}

void sp24_matmul(const Sp24MatmulArgs& a, void* workspace, const ParallelFor& pf) {
  if (a.m == 0 || a.n == 0) return;
  const gemm8::Kernel& k = gemm8::choose();
  int8_t* codes = static_cast<int8_t*>(workspace);
  int32_t* start = reinterpret_cast<int32_t*>(codes + gemm8::packed_bytes(k, a.m, a.k));
  char* slots = reinterpret_cast<char*>(start) + aligned(a.m * 4);
  const int64_t blocks = ceil_div(a.m, k.rows), block = gemm8::block_bytes(k, a.k);
  parallel_for(pf, blocks, ceil_div(64 << 10, block), [&](int64_t b0, int64_t b1) {
    for (int64_t b = b0; b < b1; ++b) {
      const int64_t rows = std::min<int64_t>(k.rows, a.m - b * k.rows);
      k.pack_rows(reinterpret_cast<const uint8_t*>(a.qx) + b * k.rows * a.k, a.k, int(rows), a.k, 8, codes + b * block, start + b * k.rows);
      for (int64_t r = 0; r < rows; ++r) start[b * k.rows + r] *= -128;
    }
  });
  const int64_t tiles = t16::tiles(a.n), tile_bytes = t16::packed_bytes(t16::kTileRows, a.k, 8), tile = gemm8::tile_rows(k);
  const int64_t chunk = std::min(gemm8::kChunkTiles, ceil_div(ceil_div(tiles, 4 * int64_t(pf.threads)), k.tiles) * k.tiles);
  const int64_t sums = gemm8::sums_bytes(tile, tiles), slot_bytes = sums + std::min(gemm8::kChunkTiles, tiles) * tile_bytes;
  const int64_t items = ceil_div(tiles, chunk);
  over_slots(pf, std::min<int64_t>(pf.threads, items), items, [&](int64_t slot, int64_t item) {
    int32_t* room = reinterpret_cast<int32_t*>(slots + slot * slot_bytes);
    uint8_t* expanded = reinterpret_cast<uint8_t*>(room) + sums;
    const int64_t j0 = item * chunk, count = std::min(chunk, tiles - j0), n0 = j0 * t16::kTileRows, n1 = std::min(a.n, (j0 + count) * t16::kTileRows);
    std::memset(expanded, 128, size_t(count * tile_bytes));
    for (int64_t n = n0; n < n1; ++n) expand_row(a, n, expanded + (n - n0) / t16::kTileRows * tile_bytes);
    for (int64_t t0 = 0; t0 < a.m; t0 += tile) {
      const int64_t rows = std::min(tile, a.m - t0);
      gemm8::multiply_tile(k, codes + t0 / k.rows * block, rows, start + t0, {expanded, n1 - n0, a.k, 8}, 0, count, room, [](auto...) {},
                           [&](int64_t j, int64_t here, int32_t* c, int64_t ldc) {
                             const int64_t n = n0 + j * t16::kTileRows, columns = std::min(here * t16::kTileRows, a.n - n);
                             for (int64_t r = 0; r < rows; ++r) std::memcpy(a.acc + (t0 + r) * a.n + n, c + r * ldc, size_t(columns) * 4);
                           });
    }
  });
}

}  // namespace effk
