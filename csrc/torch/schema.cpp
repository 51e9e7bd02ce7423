// Every op of the library `effk`: the table of contents. Implementations: csrc/torch/cpu/<op>.cpp and csrc/torch/cuda;
// documentation, shape functions, gradients and float64 references: python/effk/ops/<op>.py.
#include "torch/schema.h"

#include <torch/csrc/stable/library.h>

// The weight of wq_linear, as several ops take it.
#define WQ_WEIGHT \
  "Tensor packed, Tensor scales, Tensor? zeros, Tensor? codebook, Tensor? out_ptr, Tensor? out_col, Tensor? out_val"

namespace effk::binding {

const OpSchema kSchemas[] = {
    {"wq_pack",
     "(Tensor qweight, Tensor scales, Tensor? zeros, Tensor? codebook, int n, int k, int bits, int group_size)"
     " -> (Tensor packed, Tensor scales, Tensor zeros, Tensor codebook)"},
    {"wq_unpack",
     "(Tensor packed, Tensor scales, Tensor? zeros, int n, int k, int bits, int group_size)"
     " -> (Tensor qweight, Tensor scales, Tensor zeros)"},
    {"wq_dequantize", "(" WQ_WEIGHT ", int n, int k, int bits, int group_size) -> Tensor"},
    {"wq_linear",
     "(Tensor x, " WQ_WEIGHT ", Tensor? bias, int n, int k, int bits, int group_size, str compute) -> Tensor"},
    {"wq_multi_linear",
     "(Tensor x, Tensor[] packed, Tensor[] scales, Tensor?[] zeros, Tensor?[] codebook, Tensor?[] out_ptr,"
     " Tensor?[] out_col, Tensor?[] out_val, Tensor?[] bias, int[] n, int k, int[] bits, int[] group_size, str compute)"
     " -> Tensor[]"},
    {"wq_linear_backward", "(Tensor grad, " WQ_WEIGHT ", int n, int k, int bits, int group_size) -> Tensor"},
    {"fftconv_prepare", "(Tensor k, int n_fft, str mode, str scheme) -> Tensor"},
    {"fftconv",
     "(Tensor u, Tensor spec, Tensor? pregate, Tensor? postgate, Tensor? skip, int n_fft, str mode, str scheme) -> Tensor"},
    {"fftconv_backward",
     "(Tensor gy, Tensor u, Tensor spec, Tensor? pregate, Tensor? postgate, Tensor? skip, int n_fft, int k_len, str mode,"
     " str scheme, bool[] mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"},
    {"depthwise_conv1d",
     "(Tensor x, Tensor w, Tensor? bias, int pad_left, int pad_right, str layout, str act) -> Tensor"},
    {"depthwise_conv1d_backward",
     "(Tensor gy, Tensor x, Tensor w, Tensor? bias, int pad_left, int pad_right, str layout, str act, bool[] mask)"
     " -> (Tensor, Tensor, Tensor)"},
    {"fftconv_decode_prepare", "(Tensor k, int tile) -> Tensor"},
    {"fftconv_decode_step", "(Tensor x_t, Tensor(a!) xbuf, Tensor(b!) ybuf, Tensor k, Tensor[] specs, int t) -> Tensor"},
};
const int kSchemaCount = sizeof(kSchemas) / sizeof(kSchemas[0]);

}  // namespace effk::binding

#ifdef EFFK_CUEMU
STABLE_TORCH_LIBRARY(effk_emu, m) {  // the CUDA kernels on CPU tensors, for tests
#else
STABLE_TORCH_LIBRARY(effk, m) {
#endif
  for (const auto& op : effk::binding::kSchemas) m.def((std::string(op.name) + op.signature).c_str());
}
