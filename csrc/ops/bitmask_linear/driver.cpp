// Cuts panels into runs of equal bytes for the threads, and tokens into tiles. Compiled with baseline flags.
#include <algorithm>

#include "ops/bitmask_linear/kernels.h"

namespace effk::bitmask {

extern const Kernel kScalar;
#ifdef EFFK_X86
extern const Kernel kAvx2, kAvx512, kAvx512Vnni;
#endif
const Kernel* const kKernels[] = {
#ifdef EFFK_X86
    &kAvx512Vnni, &kAvx512, &kAvx2,
#endif
    &kScalar,
};
const int kKernelCount = int(sizeof(kKernels) / sizeof(kKernels[0]));

namespace {

// Tuned on Zen 5 (48 KiB, 1 MiB): tokens whose activations, bytes or fp32, stay in a second-level cache beside the sums.
constexpr int64_t kTileTokens = 128;
constexpr int64_t kGrainBytes = 32 << 10;  // of weight: 1 us from memory, what a second thread has to be worth

const Kernel& kernel() {
  for (const Kernel* k : kKernels)
    if (k->tier <= isa::active()) return *k;
  return kScalar;
}
int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

struct Plan {
  int64_t tile, x_row, x_bytes, sx_bytes, room, slots;
  Plan(const Args& a, int threads) {
    tile = std::min(kTileTokens, a.m);
    x_row = blocks(a.w.k) * kBlock;
    x_bytes = tile * x_row * (a.int8 ? 1 : 4);
    sx_bytes = aligned(tile * 4);
    room = tile == 1 ? 0 : aligned(room_bytes(tile));
    slots = std::min<int64_t>(threads, panels(a.w.n));
  }
};

// Bytes of the panels before p, by which threads share them: rows may hold very different numbers of values.
int64_t bytes_before(const Weight& w, int64_t p) { return w.ptr[p] * bytes_of(w.type) + p * blocks(w.k) * kRows * 8; }
int64_t first_panel(const Weight& w, int64_t slot, int64_t slots) {
  const int64_t all = panels(w.n), wanted = bytes_before(w, all) / slots * slot;
  if (slot == slots) return all;
  int64_t low = 0, high = all;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    bytes_before(w, middle) < wanted ? low = middle + 1 : high = middle;
  }
  return low;
}

}  // namespace

size_t workspace(const Args& a, int threads) {
  const Plan p(a, threads);
  return size_t(p.x_bytes + p.sx_bytes + p.slots * p.room);
}

void run(const Args& a, void* workspace, const ParallelFor& pf) {
  if (a.m == 0) return;
  const Kernel& k = kernel();
  const Plan p(a, pf.threads);
  char* x = static_cast<char*>(workspace);
  float* sx = reinterpret_cast<float*>(x + p.x_bytes);
  char* rooms = x + p.x_bytes + p.sx_bytes;
  const int64_t in_bytes = a.dtype == DType::f32 ? 4 : 2, all = panels(a.w.n), weight_bytes = bytes_before(a.w, all);
  const int64_t slots = std::max<int64_t>(1, std::min(p.slots, weight_bytes * std::min<int64_t>(a.m, 16) / kGrainBytes));
  for (int64_t t0 = 0; t0 < a.m; t0 += p.tile) {
    const Tokens tokens{x, p.x_row, sx, std::min(p.tile, a.m - t0)};
    const char* from = static_cast<const char*>(a.x) + t0 * a.w.k * in_bytes;
    parallel_for(pf, tokens.count, std::max<int64_t>(1, (32 << 10) / a.w.k), [&](int64_t i0, int64_t i1) {
      for (int64_t i = i0; i < i1; ++i) {
        const void* token = from + i * a.w.k * in_bytes;
        if (a.int8) k.quantize(token, a.dtype, a.w.k, reinterpret_cast<uint8_t*>(x) + i * p.x_row, p.x_row, sx + i);
        else k.read(token, a.dtype, a.w.k, a.w.type, reinterpret_cast<float*>(x) + i * p.x_row, p.x_row);
      }
    });
    char* y = static_cast<char*>(a.y) + t0 * a.w.n * in_bytes;
    parallel_for(pf, slots, 1, [&](int64_t s0, int64_t s1) {
      for (int64_t s = s0; s < s1; ++s) k.multiply(a, tokens, first_panel(a.w, s, slots), first_panel(a.w, s + 1, slots), y, rooms + s * p.room);
    });
  }
}

}  // namespace effk::bitmask
