// The kernel of a call, and small helpers of the drivers of csrc/gemm.
#pragma once
#include "gemm/kernels.h"
#include "common/parallel.h"

namespace effk::gemm {

using panel::bytes_of;
using panel::ceil_div;

const Kernel& choose(DType x, DType panels);

constexpr int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }
inline const char* shifted(const void* p, int64_t elements, DType t) { return static_cast<const char*>(p) + elements * bytes_of(t); }
inline char* shifted(void* p, int64_t elements, DType t) { return static_cast<char*>(p) + elements * bytes_of(t); }

// Tiles of the next block of columns when `left` remain: no block of one tile behind full ones.
constexpr int64_t next_tiles(int64_t left, int64_t most) { return left <= most ? left : left == most + 1 ? (most + 1) / 2 : most; }

// Runs body(slot, item) over all items, `slots` of them side by side, each with memory of its own.
template <class F> void over_slots(const ParallelFor& pf, int64_t slots, int64_t items, const F& body) {
  parallel_for(pf, slots, 1, [&](int64_t s0, int64_t s1) {
    for (int64_t s = s0; s < s1; ++s)
      for (int64_t i = items * s / slots; i < items * (s + 1) / slots; ++i) body(s, i);
  });
}

}  // namespace effk::gemm
