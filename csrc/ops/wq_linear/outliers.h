// The sparse part of the product. Part of body.h.
//
// t16 keeps the entries of a tile rank by rank: the first of each of its 16 rows, then the second ones, and so on. The rows
// that have an entry of a rank are a mask, row lengths compared with the rank; a rank is one vector multiply-add (one row of
// x) or up to 16 of them that do not wait for one another (many rows). A row's sum has one fused multiply-add an entry,
// columns ascending, from zero: the same on every tier and for any number of rows of x.
#pragma once
#include <cmath>
#include <cstring>

#include "ops/wq_linear/prepare.h"
#include "simd/transpose.h"

namespace effk::EFFK_TIER {
namespace {

EFFK_INLINE int lanes_of(const WqWeight& w, int64_t tile) { return int(w.n - tile * 16 < 16 ? w.n - tile * 16 : 16); }
EFFK_INLINE vi row_lengths(const WqWeight& w, int64_t tile) {
  const int32_t* p = w.out_ptr + tile * 16;
  const int lanes = lanes_of(w, tile);
  if (lanes == 16) return sub_i(load_unit(p + 1), load_unit(p));
  int32_t part[17];
  for (int i = 0; i < 17; ++i) part[i] = p[i < lanes ? i : lanes];
  return sub_i(load_unit(part + 1), load_unit(part));
}
// Entries of a run of tiles.
EFFK_INLINE int64_t entries_of(const WqWeight& w, int64_t tile, int tiles) {
  const int64_t end = (tile + tiles) * 16;
  return w.out_ptr[end < w.n ? end : w.n] - w.out_ptr[tile * 16];
}

// Lists of outliers are streams too slow for hardware prefetchers.
constexpr int kEntriesAhead = 512;  // a kilobyte of columns of 16 bits and of values
EFFK_INLINE void prefetch_lengths(const WqWeight& w, int64_t tile, int tiles) {
  for (int i = 0; i < tiles; ++i) prefetch(w.out_ptr + (tile + i) * 16);
}

// One row of x and columns of 16 bits: the entries of a few tiles are gathered before the first of them, and the weights to
// come are fetched meanwhile (a gather inside the loop over spans costs the registers of every span). Few tiles, so that the
// result stays in the first-level cache; not one, because x has to return to it each time.
class Gathered {
 public:
  static constexpr int kMax = 4096;  // entries
  static constexpr int kTiles = 8;   // tuned on Zen 5
  static constexpr int kLines = 4;   // of the stream, for 16 entries
  // `stream`: weights that come after the prefetched ones. They are fetched while the gather is busy with caches.
  __attribute__((noinline)) void gather(const Tile& t, int64_t tile, int tiles, const uint8_t* stream) {
    const WqWeight& w = *t.w;
    first_ = w.out_ptr[tile * 16];
    int count = int(entries_of(w, tile, tiles));
    const uint16_t *cols = static_cast<const uint16_t*>(w.out_col) + first_, *from = w.out_val + first_;
    const float* x = t.dense_x;
    float *value = value_, *picked = picked_;
    for (; count >= 16; count -= 16, cols += 16, from += 16, value += 16, picked += 16, stream += 64 * kLines) {
      prefetch(cols + kEntriesAhead);
      prefetch(from + kEntriesAhead);
      for (int line = 0; line < kLines; ++line) prefetch_once(stream + 64 * line);
      store_f32(value, load_f16(from));
      unroll<16>([&](auto q) { copy_float(picked + q, x + cols[q]); });
    }
    if (count > 0) store_f32(value, load_f16_part(from, count));
    for (int q = 0; q < count; ++q) copy_float(picked + q, x + cols[q]);
  }
  // Sums of the 16 rows of a tile.
  __attribute__((noinline)) vf rows(const WqWeight& w, int64_t tile) const {
    const vi length = row_lengths(w, tile);
    const int64_t at = w.out_ptr[tile * 16] - first_;
    const float *value = value_ + at, *picked = picked_ + at;
    vf sum = zero_f();
    int rank = 0;
    for (uint32_t mask; (mask = above(length, set_i(rank))) != 0; ++rank) {
      sum = fma(expand_f32(value, mask), expand_f32(picked, mask), sum);
      const int count = __builtin_popcount(mask);
      value += count;
      picked += count;
    }
    return sum;
  }

 private:
  // Through a general register: g++ otherwise collects vectors by lane insertions, which take twice as long.
  static EFFK_INLINE void copy_float(float* to, const float* from) {
    uint32_t word;
    std::memcpy(&word, from, 4);
    __asm__("" : "+r"(word));
    std::memcpy(to, &word, 4);
  }
  alignas(64) float value_[kMax + 16], picked_[kMax + 16];
  int32_t first_;
};

// Numbers of the set bits of a byte, ascending, one a byte.
struct BitNumbers {
  uint64_t of[256];
  constexpr BitNumbers() : of() {
    for (int byte = 0; byte < 256; ++byte)
      for (int bit = 0, n = 0; bit < 8; ++bit)
        if (byte >> bit & 1) of[byte] |= uint64_t(bit) << 8 * n++;
  }
};
constexpr BitNumbers kBitNumbers;

// Any number of rows of x. The sums of up to kSparseTiles tiles lie in the first-level cache, 256 floats a block:
//   one row of x: [tile][row of the tile];  2 to 8: [pair of tiles][row of the tile][tile of the pair][8];
//   more: [tile][row of the tile][16]
// so that the 16 x 16 values of a block, transposed, are results of many rows of x. First the place of every entry's sum
// and its value as fp32 are listed, then one loop runs over the entries of all tiles.
constexpr int kSparseTiles = 8;
template <class Col, int Width> class Sparse {
 public:
  Sparse(const WqWeight& w, const float* x) : w_(w), x_(x) {}
  // The sums of `tiles` tiles, whole blocks of them, with x [k][Width].
  void run(int64_t tile, int tiles, float* sum) {
    for (int i = 0; i < tiles * Width; ++i) store_f32(sum + i * 16, zero_f());
    if (Width == 8 && tiles % 2 == 1) std::memset(sum + tiles * 128, 0, 512);
    at_ = w_.out_ptr[tile * 16];
    count_ = 0;
    for (int i = 0; i < tiles; ++i) {
      const vi length = row_lengths(w_, tile + i);
      const uint64_t first = Width == 8 ? i / 2 * 32 + i % 2 : i * 16;
      int rank = 0;
      for (uint32_t mask; (mask = above(length, set_i(rank))) != 0; ++rank) {
        if (count_ > kPiece - 16) multiply(sum);
        list(mask, first);
      }
    }
    multiply(sum);
  }

 private:
  static constexpr int kPiece = 1024;
  EFFK_INLINE void list(uint32_t mask, uint64_t first) {
    constexpr uint64_t kStep = Width == 8 ? 2 : 1, kEach = 0x0101010101010101u;
    const uint64_t low = kBitNumbers.of[mask & 255] * kStep + first * kEach;
    const uint64_t high = kBitNumbers.of[mask >> 8] * kStep + (first + 8 * kStep) * kEach;
    std::memcpy(place_ + count_, &low, 8);
    std::memcpy(place_ + count_ + __builtin_popcount(mask & 255), &high, 8);
    count_ += __builtin_popcount(mask);
  }
  void multiply(float* sum) {
    const Col* cols = static_cast<const Col*>(w_.out_col) + at_;
    const uint16_t* values = w_.out_val + at_;
    for (int i = 0; i < count_; i += 16) {
      store_f32(value_ + i, load_f16_part(values + i, count_ - i));
      prefetch(values + i + kEntriesAhead);
      prefetch(cols + i + kEntriesAhead);
    }
    for (int i = 0; i < count_; ++i) {
      float* s = sum + place_[i] * Width;
      const float* x = x_ + int64_t(cols[i]) * Width;
      if constexpr (Width == 16) store_f32(s, fma(set_f(value_[i]), load_f32(x), load_f32(s)));
      else if constexpr (Width == 8) fma8(value_[i], x, s);
      else *s = std::fma(value_[i], *x, *s);
    }
    at_ += count_;
    count_ = 0;
  }
  const WqWeight& w_;
  const float* x_;
  int64_t at_;
  int count_;
  uint8_t place_[kPiece];
  alignas(64) float value_[kPiece];
};

// acc[tile][row of x][16], `stride` floats from tile to tile, += the outliers, for the rows [m0, m0 + rows) of x.
template <class Col, int Width> inline void add_outliers_of(const Tile& t, int64_t m0, int rows, float* acc, int64_t stride) {
  const WqWeight& w = *t.w;
  for (int64_t block = m0 / 16; block * 16 < m0 + rows; ++block) {
    Sparse<Col, Width> sparse(w, t.dense_x + block * w.k * 16);
    const int64_t first = block * 16 > m0 ? block * 16 : m0, end = block * 16 + 16 < m0 + rows ? block * 16 + 16 : m0 + rows;
    for (int i = 0; i < t.tiles; i += kSparseTiles) {
      const int tiles = t.tiles - i < kSparseTiles ? t.tiles - i : kSparseTiles;
      if (entries_of(w, t.tile + i, tiles) == 0) continue;
      alignas(64) float sum[kSparseTiles * 16 * Width], turned[256];
      sparse.run(t.tile + i, tiles, sum);
      for (int j = 0; j < tiles; ++j) {
        if (Width == 16 || (Width == 8 && j % 2 == 0)) transpose16(sum + j * 16 * Width, turned);
        const float* from = Width == 1 ? sum + j * 16 : turned + (Width == 8 ? j % 2 * 128 : 0);
        for (int64_t r = first; r < end; ++r) {
          float* a = acc + (i + j) * stride + (r - m0) * 16;
          store_f32(a, add_f(load_f32(a), load_f32(from + (r - block * 16) * 16)));
        }
      }
    }
  }
}
template <class Col> inline void add_outliers_of(const Tile& t, int64_t m0, int rows, float* acc, int64_t stride) {
  if (t.rows->m == 1) add_outliers_of<Col, 1>(t, m0, rows, acc, stride);
  else if (t.rows->m <= 8) add_outliers_of<Col, 8>(t, m0, rows, acc, stride);
  else add_outliers_of<Col, 16>(t, m0, rows, acc, stride);
}
inline void add_outliers(const Tile& t, int64_t m0, int rows, float* acc, int64_t stride) {
  t.w->col32 ? add_outliers_of<int32_t>(t, m0, rows, acc, stride) : add_outliers_of<uint16_t>(t, m0, rows, acc, stride);
}

// x as outliers read it, fp32: one row as it is, up to 8 rows as [k][8], more in blocks of 16 as [m / 16][k][16].
template <int Wide> inline void turn_block(const char* from, DType dtype, int rows, int64_t k, float* out) {
  alignas(64) float lines[256], columns[256];
  std::memset(lines, 0, sizeof lines);
  for (int64_t k0 = 0; k0 < k; k0 += 16) {
    const int count = int(k - k0 < 16 ? k - k0 : 16);
    for (int r = 0; r < rows; ++r) store_f32(lines + r * 16, load_floats(from + (r * k + k0) * width(dtype), dtype, count));
    for (int r = rows; r < Wide; ++r) store_f32(lines + r * 16, zero_f());
    transpose16(lines, columns);
    for (int i = 0; i < count; ++i) std::memcpy(out + (k0 + i) * Wide, columns + i * 16, Wide * 4);
  }
}
inline void prepare_dense(const void* x, DType dtype, int64_t m, int64_t k, int64_t block, float* out) {
  const char* from = static_cast<const char*>(x) + block * 16 * k * width(dtype);
  const int rows = int(m - block * 16 < 16 ? m - block * 16 : 16);
  if (m == 1)
    for (int64_t k0 = 0; k0 < k; k0 += 16) {
      const int count = int(k - k0 < 16 ? k - k0 : 16);
      store_some<DType::f32>(out + k0, count, load_floats(from + k0 * width(dtype), dtype, count));
    }
  else if (m <= 8) turn_block<8>(from, dtype, rows, k, out);
  else turn_block<16>(from, dtype, rows, k, out + block * k * 16);
}

}  // namespace
}  // namespace effk::EFFK_TIER
