// CUDA side of depthwise_conv1d, free of torch and of CUDA headers: depthwise_conv1d.h has formulas and layouts; every pointer is
// device memory. Launches on `stream` of the current device, waits for nothing, allocates nothing, returns a cudaError_t.
// fp32 sums, taps in order; sums over batch and time have a fixed order, the same for every call of a shape.
#pragma once
#include <cstdint>

#include "ops/depthwise_conv1d/depthwise_conv1d.h"

namespace effk::cuda::depthwise {

using Stream = void*;

struct Convolution {
  DepthwiseArgs a;
  bool reversed;        // taps from last to first
  const void* gy;       // not null: y = gy silu'(sum) instead, gy of x's type
};
int convolve(const Convolution&, Stream);

// `partial`: taps_workspace() floats.
int64_t taps_workspace(const DepthwiseTapsArgs&);
int sum_taps(const DepthwiseTapsArgs&, float* partial, Stream);

const char* error_text(int error);

}  // namespace effk::cuda::depthwise
