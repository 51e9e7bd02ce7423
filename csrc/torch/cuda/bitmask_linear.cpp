// bitmask_linear has no CUDA kernels yet: a message that says so, and not torch's list of backends.
#include <torch/csrc/stable/library.h>

#include "torch/check.h"

#ifndef EFFK_CUEMU
namespace {
void no_kernel(StableIValue*, uint64_t, uint64_t) {
  effk::binding::fail("bitmask_linear: x: expected tensors on cpu (there is no CUDA kernel yet), got some on cuda");
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(effk, CUDA, m) {
  for (const char* op : {"bitmask_pack", "bitmask_unpack", "bitmask_linear", "bitmask_validate"}) m.impl(op, &no_kernel);
}
#endif
