// decoder runs on the CPU only: a message that says so, and not torch's list of backends.
#include <torch/csrc/stable/library.h>

#include "torch/check.h"

#ifndef EFFK_CUEMU
namespace {
void no_kernel(StableIValue*, uint64_t, uint64_t) {
  effk::binding::fail("decoder: expected tensors on cpu (there is no CUDA runtime yet), got some on cuda");
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(effk, CUDA, m) {
  for (const char* op : {"decoder_create", "decoder_norm", "decoder_dense", "decoder_wq", "decoder_quik", "decoder_relu_ffn", "decoder_finish", "decoder_step"})
    m.impl(op, &no_kernel);
}
#endif
