// CPU binding of the quik_* ops: checks the arguments (torch/quik_linear_args.h), allocates, and calls ops/quik_linear.
#include "torch/quik_linear_args.h"

#include <tuple>
#include <vector>

namespace effk::binding {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize(const Tensor& x, const OptionalTensor& int_idx, const OptionalTensor& fp_idx, int64_t n_base,
                                                    int64_t bits, const std::string& mode) {
  constexpr const char* op = "quik_quantize";
  const QuikMode how = parse_quik_mode(op, mode);
  const int32_t b = check_bits(op, "bits", bits);
  const Input in = make_input(Arg{op, "x"}, x, last_side(op, x));
  const QuikSplit split = make_split(op, int_idx, fp_idx, in.view.sizes[in.view.dim - 1], n_base);
  Tensor qx = result({in.m, b == 8 ? n_base : t16::ceil_div(n_base, 2)}, b == 8 ? dtypes().i8 : dtypes().u8);
  Tensor scale = result({in.m}, dtypes().f32), zero = result({in.m}, dtypes().f32), x_out = result({in.m, split.n_out}, in.view.dtype);
  const QuikQuantizeArgs args{in.view.data(), in.dtype, in.m, split, b, how, static_cast<uint8_t*>(qx.mutable_data_ptr()),
                              static_cast<float*>(scale.mutable_data_ptr()), static_cast<float*>(zero.mutable_data_ptr()), x_out.mutable_data_ptr()};
  const ParallelFor pool = torch_pool();
  quik_quantize(args, scratch(quik_quantize_workspace(args, pool.threads)), pool);
  return {qx, scale, zero, x_out};
}

Tensor int_matmul(const Tensor& qx, const Tensor& packed, int64_t f_out, int64_t n_base, int64_t bits_w, int64_t bits_a) {
  constexpr const char* op = "quik_int_matmul";
  check_base(op, n_base);
  const int32_t wide = check_bits(op, "bits_w", bits_w), bits = check_bits(op, "bits_a", bits_a);
  EFFK_CHECK(f_out >= 1 && f_out <= kMaxSide, op, ": f_out: expected 1 to ", kMaxSide, ", got ", f_out);
  const View codes(qx), p(packed);
  const int64_t m = check_codes(Arg{op, "qx"}, codes, n_base, bits);
  expect(Arg{op, "packed"}, p, {dtypes().u8}, {t16::tiles(f_out), t16::chunks(n_base, wide), t16::chunk_bytes(wide)});
  Tensor acc = result({m, f_out}, dtypes().i32);
  const QuikIntMatmulArgs args{codes.data<uint8_t>(), m, n_base, bits, p.data<uint8_t>(), f_out, wide, static_cast<int32_t*>(acc.mutable_data_ptr())};
  const ParallelFor pool = torch_pool();
  quik_int_matmul(args, scratch(quik_int_matmul_workspace(args, pool.threads)), pool);
  return acc;
}

Tensor dequantize(const Tensor& acc, const Tensor& scale, const Tensor& zero, const Tensor& w_scale, const Tensor& w_reduced,
                  const OptionalTensor& y_in, int64_t bits_a, const std::string& dtype) {
  QuikDequantizeArgs args = make_dequantize("quik_dequantize", acc, scale, zero, w_scale, w_reduced, y_in, bits_a, dtype);
  const Dtypes& d = dtypes();
  Tensor y = result({args.m, args.n}, args.y_dtype == DType::f32 ? d.f32 : args.y_dtype == DType::bf16 ? d.bf16 : d.f16);
  args.y = y.mutable_data_ptr();
  quik_dequantize(args, torch_pool());
  return y;
}

// x times several weights that share its split.
std::vector<Tensor> run(const Input& in, const QuikSplit& split, const std::vector<QuikWeight>& weights, int32_t bits_a, QuikMode mode) {
  std::vector<Tensor> ys;
  std::vector<void*> outs;
  ys.reserve(weights.size());
  outs.reserve(weights.size());
  for (const QuikWeight& w : weights) {
    ys.push_back(output_like(in, w.n));
    outs.push_back(ys.back().mutable_data_ptr());
  }
  const QuikLinearArgs args{in.view.data(), in.dtype, in.m, split, weights.data(), outs.data(), int(weights.size()), bits_a, mode};
  const ParallelFor pool = torch_pool();
  if (!weights.empty()) quik_linear(args, scratch(quik_linear_workspace(args, pool.threads)), pool);
  return ys;
}

Tensor linear(const Tensor& x, const Tensor& packed, const Tensor& w_scale, const Tensor& w_reduced, const OptionalTensor& w_out,
              const OptionalTensor& bias, const OptionalTensor& int_idx, const OptionalTensor& fp_idx, int64_t f_out, int64_t n_base, int64_t bits_w,
              int64_t bits_a, const std::string& mode) {
  constexpr const char* op = "quik_linear";
  const QuikMode how = parse_quik_mode(op, mode);
  const int32_t bits = check_bits(op, "bits_a", bits_a, true);
  const Input in = make_input(Arg{op, "x"}, x, last_side(op, x));
  const QuikSplit split = make_split(op, int_idx, fp_idx, in.view.sizes[in.view.dim - 1], n_base);
  QuikWeight w = make_quik_weight(op, -1, packed, w_scale, w_reduced, f_out, n_base, bits_w);
  add_outlier_panels(op, -1, w_out, split.n_out, w);
  add_quik_bias(op, -1, bias, w);
  return run(in, split, {w}, bits, how)[0];
}

using OptionalTensors = std::vector<OptionalTensor>;

std::vector<Tensor> multi_linear(const Tensor& x, std::vector<Tensor> packed, std::vector<Tensor> w_scale, std::vector<Tensor> w_reduced,
                                 OptionalTensors w_out, OptionalTensors bias, const OptionalTensor& int_idx, const OptionalTensor& fp_idx,
                                 std::vector<int64_t> f_out, int64_t n_base, std::vector<int64_t> bits_w, int64_t bits_a, const std::string& mode) {
  constexpr const char* op = "quik_multi_linear";
  const QuikMode how = parse_quik_mode(op, mode);
  const int32_t bits = check_bits(op, "bits_a", bits_a, true);
  const size_t count = packed.size();
  check_lengths(op, count, {{"w_scale", w_scale.size()}, {"w_reduced", w_reduced.size()}, {"w_out", w_out.size()},
                            {"bias", bias.size()},       {"f_out", f_out.size()},         {"bits_w", bits_w.size()}});
  const Input in = make_input(Arg{op, "x"}, x, last_side(op, x));
  const QuikSplit split = make_split(op, int_idx, fp_idx, in.view.sizes[in.view.dim - 1], n_base);
  std::vector<QuikWeight> weights;
  weights.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const int at = int(i);
    weights.push_back(make_quik_weight(op, at, packed[i], w_scale[i], w_reduced[i], f_out[i], n_base, bits_w[i]));
    add_outlier_panels(op, at, w_out[i], split.n_out, weights.back());
    add_quik_bias(op, at, bias[i], weights.back());
  }
  return run(in, split, weights, bits, how);
}

}  // namespace
}  // namespace effk::binding

STABLE_TORCH_LIBRARY_IMPL(effk, CPU, m) {
  using namespace effk::binding;
  m.impl("quik_quantize", TORCH_BOX(&quantize));
  m.impl("quik_int_matmul", TORCH_BOX(&int_matmul));
  m.impl("quik_dequantize", TORCH_BOX(&dequantize));
  m.impl("quik_linear", TORCH_BOX(&linear));
  m.impl("quik_multi_linear", TORCH_BOX(&multi_linear));
}
