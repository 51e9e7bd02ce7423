// The last step of a tile: bias, rounding, store. Part of body.h.
#pragma once
#include <cstring>

#include "ops/wq_linear/outliers.h"

namespace effk::EFFK_TIER {
namespace {

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
  if (outliers) add_outliers(t, m0, rows, acc, stride);
  vf bias[NT];
  for (int i = 0; i < t.tiles; ++i) {
    const int64_t tile = t.tile + i;
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
