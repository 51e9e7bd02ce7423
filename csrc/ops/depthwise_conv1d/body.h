// Short depthwise filters, for every tier alike. Bound: 2 K flops and one unaligned load per tap and 16 results, 8 bytes of
// input and output a result: memory at K <= 7 when rows are cold, loads beyond.
#pragma once
#include <cmath>
#include <cstring>

#include "ops/depthwise_conv1d/kernels.h"
#include "simd/convert.h"

#include "simd/fir.h"

namespace effk::EFFK_TIER {
namespace {

using depthwise::history;
using depthwise::kPiece;

float activate(float v, Activation act) { return act == Activation::silu ? v / (1.0f + std::exp(-v)) : v; }

// x[begin + i] for i < count (a multiple of 16) of row (b, h), zero outside the row.
void read_row(const void* x, DType t, int64_t row, int64_t length, int64_t begin, int64_t count, float* to) {
  const char* at = static_cast<const char*>(x) + row * length * int64_t(bytes_of(t));
  read_floats(at, t, length, begin, count, to);
}
// The same of one channel of [b, l, h].
void read_channel(const void* x, DType t, int64_t b, int64_t h, int64_t channels, int64_t length, int64_t begin, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t n = begin + i;
    to[i] = n >= 0 && n < length ? float_at(x, t, (b * length + n) * channels + h) : 0.0f;
  }
}

void row(const DepthwiseArgs& a, int64_t b, int64_t h, int64_t t0, int64_t t1, float* room) {
  const int64_t before = history(a.k), count = (t1 - t0 + 15) / 16 * 16;
  float* y = room + before + kPiece;
  read_row(a.x, a.x_dtype, b * a.h + h, a.l_in, t0 + a.offset - before, before + count, room);
  fir(room + before, a.taps + h * a.k, a.k, y, count);
  const float bias = a.bias ? a.bias[h] : 0.0f;
  if (a.bias)
    for (int64_t i = 0; i < count; ++i) y[i] += bias;
  if (a.act != Activation::none)
    for (int64_t i = 0; i < count; ++i) y[i] = activate(y[i], a.act);
  char* out = static_cast<char*>(a.y) + ((b * a.h + h) * a.l_out + t0) * int64_t(bytes_of(a.y_dtype));
  write_floats(out, a.y_dtype, t1 - t0, y);
}

void channels(const DepthwiseArgs& a, int64_t b, int64_t t0, int64_t t1, const float* taps_t) {
  const int64_t width = (a.h + 15) / 16 * 16, in = int64_t(bytes_of(a.x_dtype)), out = int64_t(bytes_of(a.y_dtype));
  for (int64_t t = t0; t < t1; ++t)
    for (int64_t h = 0; h < a.h; h += 16) {
      const int count = int(a.h - h < 16 ? a.h - h : 16);
      vf acc = a.bias ? load_f32_part(a.bias + h, count) : zero_f();
      for (int64_t j = 0; j < a.k; ++j) {
        const int64_t n = t + a.offset - j;
        if (n < 0 || n >= a.l_in) continue;
        const char* x = static_cast<const char*>(a.x) + ((b * a.l_in + n) * a.h + h) * in;
        acc = fma(load_f32(taps_t + j * width + h), load_floats(x, a.x_dtype, count), acc);
      }
      if (a.act != Activation::none) {
        float part[16];
        store_f32(part, acc);
        for (int i = 0; i < 16; ++i) part[i] = activate(part[i], a.act);
        acc = load_f32(part);
      }
      store_floats(static_cast<char*>(a.y) + ((b * a.l_out + t) * a.h + h) * out, a.y_dtype, count, acc);
    }
}

void taps(const DepthwiseTapsArgs& a, int64_t b, int64_t h, double* sum, float* room) {
  const int64_t before = history(a.k);
  float* g = room + before + kPiece;
  for (int64_t t = 0; t < a.l_out; t += kPiece) {
    const int64_t left = a.l_out - t, count = left < kPiece ? (left + 15) / 16 * 16 : kPiece;
    if (a.channels_last) {
      read_channel(a.x, a.x_dtype, b, h, a.h, a.l_in, t + a.offset - before, before + count, room);
      read_channel(a.g, a.g_dtype, b, h, a.h, a.l_out, t, count, g);
    } else {
      read_row(a.x, a.x_dtype, b * a.h + h, a.l_in, t + a.offset - before, before + count, room);
      read_row(a.g, a.g_dtype, b * a.h + h, a.l_out, t, count, g);
    }
    if (a.taps_sum) fir_taps(g, room + before, a.k, count, sum);
    if (a.bias_sum)
      for (int64_t i = 0; i < count; ++i) sum[a.k] += double(g[i]);
  }
}

}  // namespace
}  // namespace effk::EFFK_TIER
