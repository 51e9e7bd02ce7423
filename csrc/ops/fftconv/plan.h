// Transform plans: made once per size, shared by all threads, kept for the life of the process.
#pragma once
#include <string>

#include "ops/fftconv/kernels.h"

namespace effk::fft {

// The plan of m points (spectrum::valid_points), from a cache; null when memory runs out.
const Plan* plan_of(int64_t m);

// Scheme and size that serve a filter: what `automatic` resolves to. points = 0: direct.
struct Choice {
  spectrum::Scheme scheme;
  int64_t points;
};
Choice choose(int64_t taps, int64_t n_fft, spectrum::Mode mode, spectrum::Scheme scheme);

// One line: the scheme, the size, its factors, and what works at a time.
EFFK_EXPORT std::string describe(int64_t taps, int64_t n_fft, spectrum::Mode mode, spectrum::Scheme scheme);

}  // namespace effk::fft
