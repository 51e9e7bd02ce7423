// Chooses a kernel and cuts rows among threads. Compiled with baseline flags.
#include <algorithm>

#include "ops/depthwise_conv1d/kernels.h"

namespace effk {
namespace depthwise {

extern const Kernel kScalar;
#ifdef EFFK_X86
extern const Kernel kAvx2, kAvx512;
#endif
const Kernel* const kKernels[] = {
#ifdef EFFK_X86
    &kAvx512, &kAvx2,
#endif
    &kScalar,
};
const int kKernelCount = int(sizeof(kKernels) / sizeof(kKernels[0]));

namespace {

constexpr int64_t kTapsPerThread = 1 << 17;  // multiply-adds that are worth a thread, about 10 us

const Kernel& kernel() {
  for (const Kernel* k : kKernels)
    if (k->tier <= isa::active()) return *k;
  return kScalar;
}
int64_t slots(int64_t items, int64_t work, int threads) {
  return std::max<int64_t>(1, std::min<int64_t>({int64_t(threads), items, work / kTapsPerThread}));
}
size_t slot_floats(int64_t k) { return (piece_floats(k) + size_t(2 * (k + 1)) + 15) / 16 * 16; }

template <class F> void over_items(const ParallelFor& pf, int64_t count, int64_t items, float* workspace, size_t floats, const F& body) {
  parallel_for(pf, count, 1, [&](int64_t s0, int64_t s1) {
    for (int64_t s = s0; s < s1; ++s)
      for (int64_t i = items * s / count; i < items * (s + 1) / count; ++i) body(workspace + s * floats, i);
  });
}

}  // namespace
}  // namespace depthwise

using namespace depthwise;

size_t depthwise_conv1d_workspace(int64_t h, int64_t k, int threads) {
  const size_t taps = size_t((h + 15) / 16 * 16 * k);  // channels last: the taps, transposed
  return std::max(size_t(threads) * slot_floats(k), taps) * 4 + 64;
}

void depthwise_conv1d(const DepthwiseArgs& a, void* workspace, const ParallelFor& pf) {
  if (a.b * a.h * a.l_out <= 0) return;
  const Kernel& kern = kernel();
  float* room = static_cast<float*>(workspace);
  const int64_t work = a.b * a.h * a.l_out * a.k;
  if (a.channels_last) {
    const int64_t width = (a.h + 15) / 16 * 16;
    std::fill_n(room, width * a.k, 0.0f);
    for (int64_t h = 0; h < a.h; ++h)
      for (int64_t j = 0; j < a.k; ++j) room[j * width + h] = a.taps[h * a.k + j];
    constexpr int64_t kSteps = 32;
    const int64_t pieces = (a.l_out + kSteps - 1) / kSteps, items = a.b * pieces;
    over_items(pf, slots(items, work, pf.threads), items, room, 0, [&](float* taps_t, int64_t i) {
      const int64_t t0 = i % pieces * kSteps;
      kern.channels(a, i / pieces, t0, std::min(t0 + kSteps, a.l_out), taps_t);
    });
    return;
  }
  const int64_t pieces = (a.l_out + kPiece - 1) / kPiece, items = a.b * a.h * pieces;
  over_items(pf, slots(items, work, pf.threads), items, room, slot_floats(a.k), [&](float* piece, int64_t i) {
    const int64_t row = i / pieces, t0 = i % pieces * kPiece;
    kern.row(a, row / a.h, row % a.h, t0, std::min(t0 + kPiece, a.l_out), piece);
  });
}

void depthwise_conv1d_taps(const DepthwiseTapsArgs& a, void* workspace, const ParallelFor& pf) {
  const Kernel& kern = kernel();
  const int64_t count = slots(a.h, a.b * a.h * a.l_out * a.k, pf.threads);
  over_items(pf, count, a.h, static_cast<float*>(workspace), slot_floats(a.k), [&](float* room, int64_t h) {
    double* sum = reinterpret_cast<double*>(room + (piece_floats(a.k) + 1) / 2 * 2);
    std::fill_n(sum, a.k + 1, 0.0);
    for (int64_t b = 0; b < a.b; ++b) kern.taps(a, b, h, sum, room);  // in order: the same for any number of threads
    for (int64_t j = 0; a.taps_sum && j < a.k; ++j) a.taps_sum[h * a.k + j] = float(sum[j]);
    if (a.bias_sum) a.bias_sum[h] = float(sum[a.k]);
  });
}

}  // namespace effk
