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
    {"wq_grouped_linear",
     "(Tensor x, Tensor offsets, Tensor packed, Tensor scales, Tensor? zeros, Tensor? bias, int n, int k, int bits, int group_size,"
     " str compute) -> Tensor"},
    {"wq_grouped_linear_backward",
     "(Tensor grad, Tensor offsets, Tensor packed, Tensor scales, Tensor? zeros, int n, int k, int bits, int group_size) -> Tensor"},
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
    {"dense_pack", "(Tensor w, str dtype) -> Tensor"},
    {"dense_linear", "(Tensor x, Tensor packed, int f_out, Tensor? bias, str act) -> Tensor"},
    {"dense_unpack", "(Tensor packed, int f_out, int f_in) -> Tensor"},
    {"dyad_linear", "(Tensor x, Tensor wl, Tensor wu, Tensor? bias, str variant, str layout, str act) -> Tensor"},
    {"dyad_linear_backward",
     "(Tensor gy, Tensor x, Tensor wl, Tensor wu, str variant, str layout, bool[] mask)"
     " -> (Tensor gx, Tensor gwl, Tensor gwu, Tensor gb)"},
    {"dyad_pack", "(Tensor wl, Tensor wu, str variant, str dtype) -> Tensor"},
    {"dyad_linear_packed",
     "(Tensor x, Tensor packed, int f_out, Tensor? bias, str variant, str layout, str act) -> Tensor"},
    {"dyad_ff",
     "(Tensor x, Tensor packed1, Tensor? b1, Tensor packed2, Tensor? b2, int f_hidden, int f_out, str act, str variant)"
     " -> Tensor"},
    {"dyad_to_dense", "(Tensor wl, Tensor wu, str variant) -> Tensor"},
    {"dyad_wq_linear",
     "(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor? codebook, Tensor? bias, int n_dyad, int f_out,"
     " int f_in, int bits, int group_size, str variant, str compute) -> Tensor"},
    {"quik_quantize",
     "(Tensor x, Tensor? int_idx, Tensor? fp_idx, int n_base, int bits, str mode)"
     " -> (Tensor qx, Tensor scale, Tensor zero, Tensor x_out)"},
    {"quik_int_matmul", "(Tensor qx, Tensor packed, int f_out, int n_base, int bits_w, int bits_a) -> Tensor"},
    {"quik_dequantize",
     "(Tensor acc, Tensor scale, Tensor zero, Tensor w_scale, Tensor w_reduced, Tensor? y_in, int bits_a, str dtype)"
     " -> Tensor"},
    {"quik_linear",
     "(Tensor x, Tensor packed, Tensor w_scale, Tensor w_reduced, Tensor? w_out, Tensor? bias, Tensor? int_idx,"
     " Tensor? fp_idx, int f_out, int n_base, int bits_w, int bits_a, str mode) -> Tensor"},
    {"quik_multi_linear",
     "(Tensor x, Tensor[] packed, Tensor[] w_scale, Tensor[] w_reduced, Tensor?[] w_out, Tensor?[] bias, Tensor? int_idx,"
     " Tensor? fp_idx, int[] f_out, int n_base, int[] bits_w, int bits_a, str mode) -> Tensor[]"},
    {"sp24_compress", "(Tensor w, str pattern) -> (Tensor values, Tensor meta)"},
    {"sp24_decompress", "(Tensor values, Tensor meta, int k, str pattern) -> Tensor"},
    {"sp24_matmul", "(Tensor qx, Tensor values, Tensor meta, str pattern) -> Tensor"},
    {"fftconv_decode_prepare", "(Tensor k, int tile) -> Tensor"},
    {"fftconv_decode_step", "(Tensor x_t, Tensor(a!) xbuf, Tensor(b!) ybuf, Tensor k, Tensor[] specs, int t) -> Tensor"},
    {"relu_ffn_pack", "(Tensor w, bool transpose, str rows, int group) -> (Tensor rows, Tensor scales)"},
    {"relu_ffn_unpack", "(Tensor rows, Tensor? scales, str kind, int d) -> Tensor"},
    {"relu_ffn",
     "(Tensor x, Tensor? wg, Tensor wu, Tensor wd, Tensor? sg, Tensor? su, Tensor? sd, Tensor? bg, Tensor? bu, Tensor? bd,"
     " str rows, str gate, Tensor? param, Tensor? mask, int mask_group, str mode) -> (Tensor y, Tensor nnz)"},
    {"bitmask_pack",
     "(Tensor w, Tensor? keep, Tensor? scale, str values, int group)"
     " -> (Tensor values, Tensor masks, Tensor ptr, Tensor scale, Tensor row_sum)"},
    {"bitmask_unpack", "(Tensor values, Tensor masks, Tensor ptr, Tensor? scale, int n, int k) -> Tensor"},
    {"bitmask_linear",
     "(Tensor x, Tensor values, Tensor masks, Tensor ptr, Tensor? scale, Tensor? row_sum, Tensor? bias, int n, int k, str compute)"
     " -> Tensor"},
    {"bitmask_validate", "(Tensor values, Tensor masks, Tensor ptr, int n, int k) -> Tensor"},
    {"decoder_create",
     "(Tensor embedding, Tensor? scales, Tensor? positions, int vocab, int width, int layers, int heads, int kv_heads, int head_dim,"
     " int inner, str act, bool gated, float scale, int window, Tensor? cosine, Tensor? sine, str dtype, int group_size) -> Tensor"},
    {"decoder_norm",
     "(Tensor(a!) decoder, int layer, str place, Tensor weight, Tensor? bias, float eps, bool centred) -> ()"},
    {"decoder_dense", "(Tensor(a!) decoder, int layer, str place, Tensor packed, int f_out, Tensor? bias) -> ()"},
    {"decoder_wq",
     "(Tensor(a!) decoder, int layer, str place, " WQ_WEIGHT ", Tensor? bias, int n, int k, int bits, int group_size, str compute)"
     " -> ()"},
    {"decoder_quik",
     "(Tensor(a!) decoder, int layer, str place, Tensor packed, Tensor w_scale, Tensor w_reduced, Tensor? w_out, Tensor? bias,"
     " Tensor? int_idx, Tensor? fp_idx, int f_out, int n_base, int bits_w, int bits_a, str mode) -> ()"},
    {"decoder_relu_ffn",
     "(Tensor(a!) decoder, int layer, Tensor? wg, Tensor wu, Tensor wd, Tensor? sg, Tensor? su, Tensor? sd, Tensor? bg, Tensor? bu,"
     " Tensor? bd, str rows, str gate, Tensor? param, Tensor? mask, int mask_group, str mode) -> ()"},
    {"decoder_finish", "(Tensor(a!) decoder) -> ()"},
    {"decoder_step",
     "(Tensor decoder, Tensor tokens, Tensor runs, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? k_scale, Tensor(d!)? v_scale,"
     " str which, Tensor(e!) logits) -> ()"},
    {"input_sparse_linear",
     "(Tensor x, Tensor w, Tensor? scales, Tensor? bias, Tensor? threshold, str rows, int f_out) -> (Tensor y, Tensor nnz)"},
    {"nz_compact", "(Tensor x, Tensor? threshold) -> (Tensor index, Tensor value, Tensor count)"},
    {"rows_dot", "(Tensor x, Tensor w, Tensor? scales, Tensor? bias, Tensor index, Tensor count, str rows) -> Tensor"},
    {"rows_axpy",
     "(Tensor value, Tensor index, Tensor count, Tensor w, Tensor? scales, Tensor? bias, str rows, int d, str dtype) -> Tensor"},
    {"mask_lowrank",
     "(Tensor x, Tensor p1, Tensor p2, Tensor? s1, Tensor? s2, str act, Tensor threshold, str rows, int r) -> Tensor"},
    {"mask_sign", "(Tensor x, Tensor signs, Tensor alpha) -> Tensor"},
    {"mask_dynk", "(Tensor r, float tau, str rule) -> (Tensor mask, Tensor count)"},
    {"mask_topk", "(Tensor score, int k, int group) -> Tensor"},
    {"mask_union", "(Tensor mask) -> (Tensor any, Tensor count)"},
    {"attention",
     "(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? k_scale, Tensor(d!)? v_scale,"
     " Tensor runs, Tensor? cosine, Tensor? sine, float scale, int window) -> Tensor"},
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
