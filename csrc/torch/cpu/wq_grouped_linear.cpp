// CPU binding of wq_grouped_linear: checks the arguments (torch/wq_grouped_linear_args.h), allocates, calls the driver.
#include "ops/wq_grouped_linear/wq_grouped_linear.h"

#include <cstring>

#include "torch/wq_grouped_linear_args.h"

namespace effk::binding {
namespace {

Input make_rows(const Arg& arg, const Tensor& x, int64_t k) {
  const View view(x);
  if (view.dim != 2) arg.fail("[rows, " + std::to_string(k) + "]", view.text());
  return make_input(arg, x, k);
}

Tensor grouped(const Tensor& x, const Tensor& offsets, const Tensor& packed, const Tensor& scales,
               const OptionalTensor& zeros, const OptionalTensor& bias, int64_t n, int64_t k, int64_t bits,
               int64_t group_size, const std::string& compute) {
  constexpr const char* op = "wq_grouped_linear";
  WqGroupedArgs args{};
  args.compute = parse_compute(op, compute);
  Experts experts = make_experts(op, packed, scales, zeros, n, k, bits, group_size);
  add_biases(op, bias, experts);
  const Input in = make_rows(Arg{op, "x"}, x, k);
  args.offsets = make_offsets(op, offsets, experts.count, in.m);
  Tensor y = output_like(in, n);
  if (in.m == 0) return y;
  args.x = in.view.data();
  args.x_dtype = in.dtype;
  args.m = in.m;
  args.k = k;
  args.experts = experts.count;
  args.first = experts.first;
  args.y = y.mutable_data_ptr();
  wq_grouped_linear(args, scratch(wq_grouped_linear_workspace(args)), torch_pool());
  return y;
}

// grad @ W_e for the rows of each expert that has some: one dequantisation and torch's own fp32 product each, as
// wq_linear_backward.
Tensor grouped_backward(const Tensor& grad, const Tensor& offsets, const Tensor& packed, const Tensor& scales,
                        const OptionalTensor& zeros, int64_t n, int64_t k, int64_t bits, int64_t group_size) {
  constexpr const char* op = "wq_grouped_linear_backward";
  const Experts experts = make_experts(op, packed, scales, zeros, n, k, bits, group_size);
  const Input in = make_rows(Arg{op, "grad"}, grad, n);
  const int32_t* at = make_offsets(op, offsets, experts.count, in.m);
  Tensor rows = torch::stable::to(in.owner, torch::headeronly::ScalarType::Float);
  Tensor out = result({in.m, k}, dtypes().f32), weight = result({n, k}, dtypes().f32);
  float* const w = static_cast<float*>(weight.mutable_data_ptr());
  for (int64_t e = 0; e < experts.count; ++e) {
    const int64_t count = at[e + 1] - at[e];
    if (count == 0) continue;
    const WqWeight expert = wq_expert(experts.first, e);
    parallel_for(torch_pool(), t16::tiles(n), 1 + 65536 / (t16::kTileRows * k), [&](int64_t begin, int64_t end) {
      wq_dequantize(wq_cut(expert, begin, end), w + begin * t16::kTileRows * k);
    });
    const Tensor part = torch::stable::narrow(rows, 0, at[e], count);
    const Tensor product = torch::stable::contiguous(torch::stable::matmul(part, weight));
    float* const to = static_cast<float*>(out.mutable_data_ptr()) + at[e] * k;
    std::memcpy(to, View(product).data(), size_t(count * k) * sizeof(float));
  }
  return torch::stable::to(out, grad.scalar_type());
}

}  // namespace
}  // namespace effk::binding

STABLE_TORCH_LIBRARY_IMPL(effk, CPU, m) {
  using namespace effk::binding;
  m.impl("wq_grouped_linear", TORCH_BOX(&grouped));
  m.impl("wq_grouped_linear_backward", TORCH_BOX(&grouped_backward));
}
