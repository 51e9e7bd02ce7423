// What lies between the products, as the driver asks it of a tier.
#pragma once
#include "common/export.h"
#include "isa/isa.h"
#include "ops/decoder/decoder.h"

namespace effk::decoder {

struct Kernel {
  isa::Tier tier;
  const char* name;
  void (*norm)(const Norm&, const float* x, int64_t d, float* y);                          // one row
  void (*gate)(Activation, const float* g, const float* u, int64_t count, float* y);     // act(g) u, or act(g) when u is null
  void (*add)(const float* y, int64_t count, float* x);                                     // x += y
  void (*read)(const void* p, DType, int64_t length, int64_t begin, int64_t count, float* to);
  void (*write)(void* p, DType, int64_t count, const float* from);
};

EFFK_EXPORT extern const Kernel* const kKernels[];
EFFK_EXPORT extern const int kKernelCount;

}  // namespace effk::decoder
