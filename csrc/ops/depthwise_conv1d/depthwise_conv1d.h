// Contract of depthwise_conv1d: a short filter per channel, taps in FIR order (w[h, 0] multiplies the newest value).
//
//   y[b, h, t] = act(bias[h] + sum_{j < K} w[h, j] x[b, h, t + K - 1 - pad_left - j]),   x = 0 outside [0, L)
//   t < L_out = L + pad_left + pad_right - K + 1;   causal: pad_left = K - 1, pad_right = 0
//
// Layout bhl: [B, H, L], vectors run along the sequence; blh: [B, L, H], vectors run along the channels. fp32 arithmetic
// whatever the storage type. The gradient with respect to x is the same convolution with reversed taps and the other
// offset; a row's result depends neither on the others nor on the number of threads. Nothing here checks or throws.
#pragma once
#include <cstddef>
#include <cstdint>

#include "common/activation.h"
#include "common/dtype.h"
#include "common/parallel.h"

namespace effk {

struct DepthwiseArgs {
  const void* x;
  void* y;
  DType x_dtype, y_dtype;
  const float* taps;          // [h, k]
  const float* bias;          // [h] or null
  int64_t b, h, k;
  int64_t l_in, l_out;
  int64_t offset;             // y[t] meets x[t + offset - j]
  bool channels_last;
  Activation act;             // none or silu
};

// taps_sum[h, j] = sum_{b,t} g[b, h, t] x[b, h, t + offset - j];  bias_sum[h] = sum_{b,t} g[b, h, t]; either may be null.
struct DepthwiseTapsArgs {
  const void* g;              // of l_out values a row
  const void* x;              // of l_in values a row
  DType g_dtype, x_dtype;
  float *taps_sum, *bias_sum;
  int64_t b, h, k, l_in, l_out, offset;
  bool channels_last;
};

size_t depthwise_conv1d_workspace(int64_t h, int64_t k, int threads);  // of both, bytes
void depthwise_conv1d(const DepthwiseArgs&, void* workspace, const ParallelFor&);
void depthwise_conv1d_taps(const DepthwiseTapsArgs&, void* workspace, const ParallelFor&);

}  // namespace effk
