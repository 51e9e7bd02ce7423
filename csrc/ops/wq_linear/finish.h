// The last step of a tile: sparse outliers, bias, rounding, store. Part of body.h.
#pragma once
#include <cstring>

#include "ops/wq_linear/prepare.h"

namespace effk::EFFK_TIER {
namespace {

// A row's sparse sum has 16 partial sums, entry i going to partial i mod 16 by a fused multiply-add, folded by halves at the
// end: the same for every tier and for any number of rows of x.
//
// Few rows of x. Entries of a tile are gathered by one loop of scalar loads without a branch per row (a loop per row costs
// three times that in mispredicted exits and chain latency, vector gathers no less), then each row is a masked vector
// product.
constexpr int kPiece = 2048;
// Through a general register: g++ otherwise collects vectors by lane insertions, which take twice as long.
EFFK_INLINE void copy_float(float* to, const float* from) {
  uint32_t word;
  std::memcpy(&word, from, 4);
  __asm__("" : "+r"(word));
  std::memcpy(to, &word, 4);
}
template <class Col>
inline void gather_piece(const WqWeight& w, const float* x, int64_t j, int count, float* values, float* picked) {
  const Col* cols = static_cast<const Col*>(w.out_col) + j;
  int i = 0;
  for (; i + 16 <= count; i += 16) {
    store_f32(values + i, load_f16(w.out_val + j + i));
    unroll<16>([&](auto q) { copy_float(picked + i + q, x + cols[i + q]); });
  }
  if (i < count) store_f32(values + i, load_f16_part(w.out_val + j + i, count - i));
  for (; i < count; ++i) picked[i] = x[cols[i]];
}
EFFK_INLINE vf sparse_dot(const float* values, const float* picked, int count, vf acc) {
  for (int i = 0; i < count; i += 16) acc = fma(load_f32_part(values + i, count - i), load_f32_part(picked + i, count - i), acc);
  return acc;
}
template <class Col> inline void sparse_few(const Tile& t, int64_t n0, int lanes, const float* x, float* sum) {
  const WqWeight& w = *t.w;
  alignas(64) float values[kPiece], picked[kPiece];
  const int64_t first = w.out_ptr[n0], last = w.out_ptr[n0 + lanes];
  const bool whole = last - first <= kPiece;
  if (whole) gather_piece<Col>(w, x, first, int(last - first), values, picked);
  for (int lane = 0; lane < lanes; ++lane) {
    int64_t j = w.out_ptr[n0 + lane];
    const int64_t end = w.out_ptr[n0 + lane + 1];
    vf acc = zero_f();
    if (whole) acc = sparse_dot(values + (j - first), picked + (j - first), int(end - j), acc);
    else
      for (; j < end; j += kPiece) {  // a tile with very many entries: row by row, pieces of whole vectors
        const int count = int(end - j < kPiece ? end - j : kPiece);
        gather_piece<Col>(w, x, j, count, values, picked);
        acc = sparse_dot(values, picked, count, acc);
      }
    sum[lane] += reduce_add_f(acc);
  }
}
// Many rows of x: vectors over 16 of them, read from the transposed copy; added to acc[rows][16].
template <class Col> inline void sparse_many(const Tile& t, int64_t n0, int lanes, int64_t m0, int rows, float* acc) {
  const WqWeight& w = *t.w;
  const Col* cols = static_cast<const Col*>(w.out_col);
  for (int lane = 0; lane < lanes; ++lane) {
    const int64_t first = w.out_ptr[n0 + lane], end = w.out_ptr[n0 + lane + 1];
    for (int64_t mb = m0 / 16; mb * 16 < m0 + rows && first < end; ++mb) {
      const float* x = t.dense_x + mb * w.k * 16;
      vf part[16];
      unroll<16>([&](auto i) { part[i] = zero_f(); });
      for (int64_t j = first; j < end; j += 16)
        for (int64_t i = j; i < end && i < j + 16; ++i)
          part[i - j] = fma(set_f(f16_to_float(w.out_val[i])), load_f32(x + int64_t(cols[i]) * 16), part[i - j]);
      for (int half = 8; half; half /= 2) for (int i = 0; i < half; ++i) part[i] = add_f(part[i], part[i + half]);
      float sum[16];
      store_f32(sum, part[0]);
      for (int i = 0; i < 16; ++i) {
        const int64_t r = mb * 16 + i - m0;
        if (r >= 0 && r < rows) acc[r * 16 + lane] += sum[i];
      }
    }
  }
}
EFFK_INLINE int lanes_of(const WqWeight& w, int64_t tile) { return int(w.n - tile * 16 < 16 ? w.n - tile * 16 : 16); }

// One row of x and columns of 16 bits: the entries of a few tiles are gathered beside the weight stream of the first of
// them, some at each span. The stream waits for memory and the gather for caches, so that together they take little longer
// than the stream. Few tiles, so that the result stays in the first-level cache; not one, because x has to return to it
// each time (a gather beside every tile: 45 us of a 4096 x 4096 product at 4 bits).
class Streamed {
 public:
  static constexpr int kMax = 4096;  // entries
  static constexpr int kTiles = 8;   // tuned on Zen 5
  static int64_t entries(const WqWeight& w, int64_t tile, int tiles) {
    const int64_t end = (tile + tiles) * 16;
    return w.out_ptr[end < w.n ? end : w.n] - w.out_ptr[tile * 16];
  }
  void start(const Tile& t, int64_t tile, int tiles, int64_t spans) {
    const WqWeight& w = *t.w;
    first_ = w.out_ptr[tile * 16];
    left_ = int(entries(w, tile, tiles));
    at_ = 0;
    cols_ = static_cast<const uint16_t*>(w.out_col) + first_;
    values_ = w.out_val + first_;
    x_ = t.dense_x;
    step_ = int((left_ + 16 * spans - 1) / (16 * spans)) * 16;
  }
  bool pending() const { return left_ > 0; }
  // Not inlined: it would take registers from the loop over spans.
  __attribute__((noinline)) void step() {
    const uint16_t *cols = cols_ + at_, *values = values_ + at_;
    const float* x = x_;
    float* picked = picked_ + at_;
    int count = step_ < left_ ? step_ : left_;
    at_ += count;
    left_ -= count;
    for (; count >= 16; count -= 16, cols += 16, values += 16, picked += 16) {
      prefetch(cols + kAhead);
      prefetch(values + kAhead);
      unroll<16>([&](auto q) { copy_float(picked + q, x + cols[q]); });
    }
    for (int q = 0; q < count; ++q) copy_float(picked + q, x + cols[q]);
  }
  // Sums of the 16 rows of a tile.
  __attribute__((noinline)) vf rows(const WqWeight& w, int64_t tile) const {
    const int lanes = lanes_of(w, tile);
    const int32_t* p = w.out_ptr + tile * 16;
    int32_t last[17];
    if (lanes < 16) {
      for (int i = 0; i < 17; ++i) last[i] = p[i < lanes ? i : lanes];
      p = last;
    }
    const int longest = reduce_max_i(sub_i(load_unit(p + 1), load_unit(p)));
    return reduce_rows([&](auto row) {
      const int32_t j = p[row] - first_, count = p[row + 1] - p[row];
      vf acc = fma(load_f16_part(values_ + j, count), load_f32_part(picked_ + j, count), zero_f());
      for (int e = 16; e < longest; e += 16)  // as often for all rows: a row's own length would be mispredicted
        acc = fma(load_f16_part(values_ + j + e, count - e), load_f32_part(picked_ + j + e, count - e), acc);
      return acc;
    });
  }

 private:
  static constexpr int kAhead = 512;  // entries, a kilobyte of each list: both are too slow a stream for hardware prefetchers
  alignas(64) float picked_[kMax];
  const uint16_t *cols_, *values_;
  const float* x_;
  int32_t first_;
  int at_, left_, step_;
};

template <class Col> inline void add_outliers(const Tile& t, int64_t tile, int64_t m0, int rows, float* acc) {
  const int lanes = lanes_of(*t.w, tile);
  if (t.rows->m >= wq::kTransposeRows) return sparse_many<Col>(t, tile * 16, lanes, m0, rows, acc);
  for (int r = 0; r < rows; ++r) sparse_few<Col>(t, tile * 16, lanes, t.dense_x + (m0 + r) * t.w->k, acc + r * 16);
}

EFFK_INLINE vf bias_of(const WqWeight& w, int64_t tile, int64_t row) {
  alignas(64) char part[64] = {};
  const int64_t bytes = width(w.bias_dtype);
  std::memcpy(part, static_cast<const char*>(w.bias) + (row * w.bias_row + tile * 16) * bytes, size_t(lanes_of(w, tile) * bytes));
  return load_any(part, w.bias_dtype, 0);
}
// Outliers, bias, rounding, store. acc[tile][row][16], `stride` floats from tile to tile. Rows outside, tiles inside: rows of
// y lie far apart, and one visit to each of their pages should serve all tiles.
template <int NT> inline void finish_tiles(const Tile& t, int64_t m0, int rows, float* acc, int64_t stride, bool outliers) {
  const WqWeight& w = *t.w;
  const int64_t size = width(t.y_dtype);
  vf bias[NT];
  for (int i = 0; i < t.tiles; ++i) {
    const int64_t tile = t.tile + i;
    float* a = acc + i * stride;
    if (outliers) w.col32 ? add_outliers<int32_t>(t, tile, m0, rows, a) : add_outliers<uint16_t>(t, tile, m0, rows, a);
    bias[i] = w.bias ? bias_of(w, tile, m0) : zero_f();
  }
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < t.tiles; ++i) {
      const int64_t n0 = (t.tile + i) * 16;
      vf v = load_f32(acc + i * stride + r * 16);
      if (w.bias) v = add_f(v, w.bias_row ? bias_of(w, t.tile + i, m0 + r) : bias[i]);
      char* out = static_cast<char*>(t.y) + ((m0 + r) * w.n + n0) * size;
      if (n0 + 16 <= w.n) {
        store_any(out, t.y_dtype, 0, v);
      } else {
        alignas(64) char part[64];
        store_any(part, t.y_dtype, 0, v);
        std::memcpy(out, part, size_t((w.n - n0) * size));
      }
    }
  }
}

}  // namespace
}  // namespace effk::EFFK_TIER
