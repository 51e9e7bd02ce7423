// What the fuzz programs share: seeds, random numbers, storage types, a pool that hands out odd ranges, and the loop of calls.
#pragma once
#include <atomic>
#include <cmath>
#include <csignal>
#include <initializer_list>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "common/activation.h"
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

// Half a unit of the last place, relative: what one rounding to storage costs.
inline double storage_step(DType t) { return t == DType::f32 ? 0x1p-24 : t == DType::bf16 ? 0x1p-8 : 0x1p-11; }

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "seed %llu: %s\n", static_cast<unsigned long long>(current_seed), what);
  std::_Exit(1);
}

// Numbers in guarded memory, and what they are worth.
struct Values {
  uint8_t* at = nullptr;
  std::vector<double> value;
  const float* floats() const { return reinterpret_cast<const float*>(at); }
};
template <class Draw> Values values(Random& r, Guarded& memory, DType t, int64_t count, const Draw& draw) {
  Values v{memory.place(size_t(count) * width(t), r.chance(70)), std::vector<double>(size_t(count))};
  for (int64_t i = 0; i < count; ++i) {
    store(v.at, t, i, draw());
    v.value[size_t(i)] = load(v.at, t, i);
  }
  return v;
}
inline Values random_values(Random& r, Guarded& memory, DType t, int64_t count) {
  return values(r, memory, t, count, [&] { return r.normal(); });
}
template <class T> T* place(Random& r, Guarded& memory, int64_t count) {
  return reinterpret_cast<T*>(memory.place(size_t(count) * sizeof(T), r.chance(70)));
}

// A workspace ends at the inaccessible page; its beginning is aligned by contract, so its size is rounded up.
inline void* room(Guarded& memory, size_t bytes) { return memory.place((bytes + 63) / 64 * 64, true); }
inline std::vector<uint8_t> bytes_at(const void* p, size_t count) {
  const uint8_t* b = static_cast<const uint8_t*>(p);
  return {b, b + count};
}
inline void expect_intact(const char* what, std::initializer_list<const Guarded*> places) {
  for (const Guarded* p : places)
    if (!p->margin_intact()) fail(what);
}
inline void expect_equal(const char* what, const void* got, const std::vector<uint8_t>& want) {
  if (!want.empty() && std::memcmp(got, want.data(), want.size()) != 0) fail(what);
}
// A result stored as t; `bound` is what may be off before that rounding. What may lie beyond the range of fp16 is let go.
inline void expect_within(const char* what, double got, double want, double bound, DType t) {
  if (t == DType::f16 && std::fabs(want) + bound > 60000) return;
  const double least = t == DType::f16 ? 0x1p-24 : 0x1p-126;
  if (std::fabs(got - want) <= bound + storage_step(t) * (std::fabs(want) + bound) + least) return;
  std::fprintf(stderr, "%.9g, expected %.9g within %.3g\n", got, want, bound);
  fail(what);
}

inline double activated(double v, Activation act) {
  switch (act) {
    case Activation::relu: return v > 0 ? v : 0;
    case Activation::silu: return v / (1 + std::exp(-v));
    case Activation::gelu: return 0.5 * v * std::erfc(-v / std::sqrt(2.0));
    case Activation::gelu_tanh: return 0.5 * v * (1 + std::tanh(std::sqrt(2 / 3.14159265358979323846) * (v + 0.044715 * v * v * v)));
    default: return v;
  }
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

// Two threads that take the same ranges in turn, so that what they must not share shows.
inline void concurrent(void* pool, int64_t n, int64_t, RangeBody body, void* ctx) {
  std::vector<std::pair<int64_t, int64_t>> ranges;
  for (int64_t end = n; end > 0; end = ranges.back().first) ranges.emplace_back(end - 1 - static_cast<Random*>(pool)->below(end), end);
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i; (i = next++) < ranges.size();) body(ctx, ranges[i].first, ranges[i].second);
  };
  std::thread other(work);
  work();
  other.join();
}
inline ParallelFor random_pool(Random& r, int64_t most = 6) {
  const int threads = 1 + int(r.below(most));
  return {r.chance(10) ? concurrent : scattered, &r, threads};
}
inline void random_tier(Random& r) { isa::force(isa::Tier(r.below(int64_t(isa::detected()) + 1)), r.chance(70)); }

inline void on_signal(int signal) {
  char text[96];
  const int length = std::snprintf(text, sizeof text, "seed %llu: signal %d\n", static_cast<unsigned long long>(current_seed), signal);
  if (write(STDERR_FILENO, text, size_t(length)) < 0) std::_Exit(3);
  std::_Exit(1);
}

// calls [first seed] from the command line, call(random) for each seed. A failure prints the seed, and `<program> 1 <seed>` repeats it.
template <class Call> int run_calls(int argc, char** argv, const Call& call) {
  const uint64_t calls = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 10000;
  const uint64_t first = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  for (const int signal : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) std::signal(signal, on_signal);
  for (uint64_t i = 0; i < calls; ++i) {
    current_seed = first + i;
    Random r{std::mt19937_64(first + i)};
    call(r);
  }
  std::printf("%llu calls from seed %llu on, tiers up to %s: no finding\n", static_cast<unsigned long long>(calls),
              static_cast<unsigned long long>(first), isa::name(isa::detected()));
  return 0;
}

}  // namespace effk::test
