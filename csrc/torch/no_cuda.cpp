// A build without nvcc: a CUDA tensor gets a message that says what to do, not torch's list of backends.
#include <torch/csrc/stable/library.h>

#include "torch/check.h"
#include "torch/schema.h"

namespace {
void no_cuda(StableIValue*, uint64_t, uint64_t) {
  effk::binding::fail(
      "effk was built without CUDA kernels (no nvcc at build time): reinstall with nvcc on PATH and EFFK_CUDA=ON");
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(effk, CUDA, m) {
  for (int i = 0; i < effk::binding::kSchemaCount; ++i) m.impl(effk::binding::kSchemas[i].name, &no_cuda);
}
