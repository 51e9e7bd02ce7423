// The one way a driver gets threads: a callback owned by the caller (torch's pool in the op library, a plain loop or
// std::thread in the C++ tests). The body must not throw and must accept any [begin, end) inside [0, n).
#pragma once
#include <cstdint>

namespace effk {

using RangeBody = void (*)(void* ctx, int64_t begin, int64_t end);

struct ParallelFor {
  void (*run)(void* pool, int64_t n, int64_t grain, RangeBody body, void* ctx);
  void* pool;
  int threads;  // upper bound, for choosing a grain; results never depend on it
};

// Adapts a lambda (int64 begin, int64 end) to the callback.
template <class F>
static inline void parallel_for(const ParallelFor& pf, int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  if (pf.threads <= 1 || n <= grain) { f(int64_t(0), n); return; }
  pf.run(pf.pool, n, grain, [](void* c, int64_t b, int64_t e) { (*static_cast<const F*>(c))(b, e); }, const_cast<F*>(&f));
}

}  // namespace effk
