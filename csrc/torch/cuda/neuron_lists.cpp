// The lists and masks of neurons have no CUDA kernels yet: a message that says so, and not torch's list of backends.
#include <torch/csrc/stable/library.h>

#include "torch/check.h"

#ifndef EFFK_CUEMU
namespace {
void no_kernel(StableIValue*, uint64_t, uint64_t) {
  effk::binding::fail("neuron_lists: x: expected tensors on cpu (there is no CUDA kernel yet), got some on cuda");
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(effk, CUDA, m) {
  for (const char* op : {"nz_compact", "rows_dot", "rows_axpy", "mask_lowrank", "mask_sign", "mask_dynk", "mask_topk", "mask_union"})
    m.impl(op, &no_kernel);
}
#endif
