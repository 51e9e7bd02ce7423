// What the fuzz programs share: seeds, random numbers, storage types, a pool that hands out odd ranges, and the loop of calls.
#pragma once
#include <csignal>
#include <random>

#include "common/dtype.h"
#include "common/half.h"
#include "common/parallel.h"
#include "guarded.h"
#include "isa/isa.h"

namespace effk::test {

inline volatile uint64_t current_seed;

struct Random {
  std::mt19937_64 engine;
  int64_t below(int64_t n) { return int64_t(engine() % uint64_t(n)); }
  bool chance(int percent) { return below(100) < percent; }
  float normal() { return std::normal_distribution<float>()(engine); }
};

inline size_t width(DType t) { return t == DType::f32 ? 4 : 2; }

inline void store(uint8_t* p, DType t, int64_t i, float v) {
  if (t == DType::f32) return void(std::memcpy(p + 4 * i, &v, 4));
  const uint16_t h = t == DType::bf16 ? float_to_bf16(v) : float_to_f16(v);
  std::memcpy(p + 2 * i, &h, 2);
}

inline float load(const uint8_t* p, DType t, int64_t i) {
  if (t == DType::f32) {
    float v;
    std::memcpy(&v, p + 4 * i, 4);
    return v;
  }
  uint16_t h;
  std::memcpy(&h, p + 2 * i, 2);
  return t == DType::bf16 ? bf16_to_float(h) : f16_to_float(h);
}

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "seed %llu: %s\n", static_cast<unsigned long long>(current_seed), what);
  std::_Exit(1);
}

// The callback of a pool that gives out ranges of random lengths, last first.
inline void scattered(void* pool, int64_t n, int64_t, RangeBody body, void* ctx) {
  Random& random = *static_cast<Random*>(pool);
  for (int64_t end = n; end > 0;) {
    const int64_t begin = end - 1 - random.below(end);
    body(ctx, begin, end);
    end = begin;
  }
}

inline void on_signal(int signal) {
  char text[96];
  const int length = std::snprintf(text, sizeof text, "seed %llu: signal %d\n", static_cast<unsigned long long>(current_seed), signal);
  if (write(STDERR_FILENO, text, size_t(length)) < 0) std::_Exit(3);
  std::_Exit(1);
}

// calls [first seed] from the command line, one call a seed. A failure prints the seed, and `<program> 1 <seed>` repeats it.
template <class Call> int run_calls(int argc, char** argv, const Call& call) {
  const uint64_t calls = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 10000;
  const uint64_t first = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  for (const int signal : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) std::signal(signal, on_signal);
  for (uint64_t i = 0; i < calls; ++i) call(first + i);
  std::printf("%llu calls from seed %llu on, tiers up to %s: no finding\n", static_cast<unsigned long long>(calls),
              static_cast<unsigned long long>(first), isa::name(isa::detected()));
  return 0;
}

}  // namespace effk::test
