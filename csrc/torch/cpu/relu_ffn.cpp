// CPU binding of relu_ffn and input_sparse_linear: checks the arguments, allocates, and calls ops/relu_ffn.
#include "ops/relu_ffn/relu_ffn.h"

#include <cmath>
#include <tuple>

#include "common/half.h"
#include "torch/relu_ffn_args.h"

namespace effk::binding {
namespace {

using neuron::Rows;

std::pair<Tensor, Tensor> make_results(const Tokens& t, int64_t width) {
  std::vector<int64_t> shape(t.x.sizes, t.x.sizes + t.x.dim);
  shape.back() = width;
  return {result(shape.data(), t.x.dim, t.x.dtype), result({t.count}, dtypes().i32)};
}

std::tuple<Tensor, Tensor> relu_ffn_pack(const Tensor& w, bool transpose, const std::string& rows, int64_t group) {
  constexpr const char* op = "relu_ffn_pack";
  const View view(w);
  const Arg arg{op, "w"};
  const DType dtype = float_dtype_of(arg, view);
  if (view.dim != 2 || view.sizes[0] < 1 || view.sizes[1] < 1 || !view.contiguous || !(view.home == kCpu))
    arg.fail("[f, d], or [d, f] when transposed, contiguous, on cpu", view.text());
  const Rows kind = parse_rows(op, "rows", rows);
  EFFK_CHECK(neuron::valid_group(group), op, ": group: expected 0, 32, 64 or 128, got ", group);
  const int64_t f = view.sizes[transpose ? 1 : 0], d = view.sizes[transpose ? 0 : 1];
  for (int64_t i = 0; i < view.numel(); ++i) {
    const float v = dtype == DType::f32 ? view.data<float>()[i] : dtype == DType::bf16 ? bf16_to_float(view.data<uint16_t>()[i]) : f16_to_float(view.data<uint16_t>()[i]);
    EFFK_CHECK(std::isfinite(v), op, ": w: expected finite values, because inactive neurons count as zero, got ", v, " at ", i);
  }
  Tensor packed = weights({f, neuron::row_bytes(kind, d)}, dtypes().u8);
  const bool scaled = neuron::quantised(kind);
  Tensor scales = scaled ? weights({f, neuron::groups(d, group)}, dtypes().f32) : empty({0}, dtypes().f32);
  relu_ffn::pack(view.data(), dtype, transpose, f, d, kind, scaled ? group : 0, static_cast<uint8_t*>(packed.mutable_data_ptr()),
                 static_cast<float*>(scales.mutable_data_ptr()), torch_pool());
  return {packed, scales};
}

Tensor relu_ffn_unpack(const Tensor& rows, const OptionalTensor& scales, const std::string& kind, int64_t d) {
  constexpr const char* op = "relu_ffn_unpack";
  const Rows type = parse_rows(op, "kind", kind);
  EFFK_CHECK(d >= 1, op, ": d: expected at least 1, got ", d);
  int64_t f = -1;
  const NeuronLayer layer = make_rows(op, "rows", "scales", "", rows, scales, std::nullopt, 0, type, f, d, kCpu);
  Tensor w = empty({f, d}, dtypes().f32);
  relu_ffn::unpack(layer.rows.rows, layer.rows.scales, type, layer.group, f, d, static_cast<float*>(w.mutable_data_ptr()), torch_pool());
  return w;
}

std::tuple<Tensor, Tensor> relu_ffn_forward(const Tensor& x, const OptionalTensor& wg, const Tensor& wu, const Tensor& wd, const OptionalTensor& sg,
                                            const OptionalTensor& su, const OptionalTensor& sd, const OptionalTensor& bg, const OptionalTensor& bu,
                                            const OptionalTensor& bd, const std::string& rows, const std::string& gate, const OptionalTensor& param,
                                            const OptionalTensor& mask, int64_t mask_group, const std::string& mode) {
  constexpr const char* op = "relu_ffn";
  ReluFfnCall call = make_relu_ffn(op, x, wg, wu, wd, sg, su, sd, bg, bu, bd, rows, gate, param, mask, mask_group, mode, kCpu);
  relu_ffn::Args& a = call.a;
  auto [y, nnz] = make_results(call.t, a.d);
  a.y = y.mutable_data_ptr();
  a.nnz = static_cast<int32_t*>(nnz.mutable_data_ptr());
  const ParallelFor pool = torch_pool();
  relu_ffn::run(a, scratch(relu_ffn::workspace(a, pool.threads)), pool);
  return {y, nnz};
}

std::tuple<Tensor, Tensor> input_sparse_linear(const Tensor& x, const Tensor& w, const OptionalTensor& scales, const OptionalTensor& bias,
                                               const OptionalTensor& threshold, const std::string& rows, int64_t f_out) {
  constexpr const char* op = "input_sparse_linear";
  InputSparseCall call = make_input_sparse(op, x, w, scales, bias, threshold, rows, f_out, kCpu);
  relu_ffn::InputSparseArgs& a = call.a;
  auto [y, nnz] = make_results(call.t, f_out);
  a.y = y.mutable_data_ptr();
  a.nnz = static_cast<int32_t*>(nnz.mutable_data_ptr());
  const ParallelFor pool = torch_pool();
  relu_ffn::input_sparse(a, scratch(relu_ffn::input_sparse_workspace(a, pool.threads)), pool);
  return {y, nnz};
}

}  // namespace
}  // namespace effk::binding

STABLE_TORCH_LIBRARY_IMPL(effk, CPU, m) {
  using namespace effk::binding;
  m.impl("relu_ffn_pack", TORCH_BOX(&relu_ffn_pack));
  m.impl("relu_ffn_unpack", TORCH_BOX(&relu_ffn_unpack));
  m.impl("relu_ffn", TORCH_BOX(&relu_ffn_forward));
  m.impl("input_sparse_linear", TORCH_BOX(&input_sparse_linear));
}
