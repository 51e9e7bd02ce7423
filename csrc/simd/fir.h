// Short filters on fp32 rows, shared by fftconv (direct scheme, decoding) and depthwise_conv1d. Included by a tier after its
// vector header. One unaligned load and one fused multiply-add per tap and 16 results; the loads are the bound.
#pragma once
#include <cstdint>

namespace effk::EFFK_TIER {
namespace {

// y[i] = sum_{j < k} taps[j] x[i - j], taps ascending; count is a multiple of 16, x is readable from -(k - 1) to count.
template <int V> EFFK_INLINE void fir_block(const float* x, const float* taps, int64_t k, float* y) {
  vf acc[V];
  for (int v = 0; v < V; ++v) acc[v] = zero_f();
  for (int64_t j = 0; j < k; ++j) {
    const vf w = set_f(taps[j]);
    for (int v = 0; v < V; ++v) acc[v] = fma(w, load_f32(x + v * 16 - j), acc[v]);
  }
  for (int v = 0; v < V; ++v) store_f32(y + v * 16, acc[v]);
}
[[maybe_unused]] void fir(const float* x, const float* taps, int64_t k, float* y, int64_t count) {
  int64_t i = 0;
  for (; i + 128 <= count; i += 128) fir_block<8>(x + i, taps, k, y + i);
  for (; i + 32 <= count; i += 32) fir_block<2>(x + i, taps, k, y + i);
  for (; i < count; i += 16) fir_block<1>(x + i, taps, k, y + i);
}

// sum[j] += sum_i g[i] x[i - j] for j < k, over count (a multiple of 16) values: the gradient of the taps. Each piece is
// summed in fp32 by lanes, pieces in double precision.
template <int V> EFFK_INLINE void taps_block(const float* g, const float* x, int64_t count, double* sum) {
  vf acc[V];
  for (int v = 0; v < V; ++v) acc[v] = zero_f();
  for (int64_t i = 0; i < count; i += 16) {
    const vf w = load_f32(g + i);
    for (int v = 0; v < V; ++v) acc[v] = fma(w, load_f32(x + i - v), acc[v]);
  }
  for (int v = 0; v < V; ++v) sum[v] += double(reduce_add_f(acc[v]));
}
[[maybe_unused]] void fir_taps(const float* g, const float* x, int64_t k, int64_t count, double* sum) {
  int64_t j = 0;
  for (; j + 4 <= k; j += 4) taps_block<4>(g, x - j, count, sum + j);
  for (; j < k; ++j) taps_block<1>(g, x - j, count, sum + j);
}

// y[j] += sum_{i < tile} x[i] taps[tile + j - i] for j < tile: what a tile of inputs adds to the next tile of results. taps
// holds 2 tile values, tile is a power of two.
[[maybe_unused]] void fir_tile(const float* x, const float* taps, int64_t tile, float* y) {
  if (tile < 16) {
    for (int64_t i = 0; i < tile; ++i)
      for (int64_t j = 0; j < tile; ++j) y[j] += x[i] * taps[tile + j - i];
    return;
  }
  for (int64_t j = 0; j < tile; j += 16) {
    vf acc = load_f32(y + j);
    for (int64_t i = 0; i < tile; ++i) acc = fma(set_f(x[i]), load_f32(taps + tile + j - i), acc);
    store_f32(y + j, acc);
  }
}

}  // namespace
}  // namespace effk::EFFK_TIER
