// What the driver asks of a tier.
#pragma once
#include "isa/isa.h"
#include "ops/depthwise_conv1d/depthwise_conv1d.h"

namespace effk::depthwise {

constexpr int64_t kPiece = 2048;    // results of a row at a time, between conversions
constexpr int kChannels = 16;       // channels last: channels that are copied into rows for the gradient of the taps

constexpr int64_t history(int64_t k) { return (k - 1 + 15) / 16 * 16; }
constexpr size_t piece_floats(int64_t k) { return size_t(history(k) + 2 * kPiece + 16); }

struct Kernel {
  isa::Tier tier;
  const char* name;
  // Results [t0, t1) of one row (bhl), t1 - t0 <= kPiece; room is piece_floats(k).
  void (*row)(const DepthwiseArgs&, int64_t b, int64_t h, int64_t t0, int64_t t1, float* room);
  // Results [t0, t1) of all channels (blh); taps_t is the taps as [k][h rounded up to 16].
  void (*channels)(const DepthwiseArgs&, int64_t b, int64_t t0, int64_t t1, const float* taps_t);
  // Adds one row's share to sum[k + 1], the last for the bias.
  void (*taps)(const DepthwiseTapsArgs&, int64_t b, int64_t h, double* sum, float* room);
};

EFFK_EXPORT extern const Kernel* const kKernels[];
EFFK_EXPORT extern const int kKernelCount;

}  // namespace effk::depthwise
