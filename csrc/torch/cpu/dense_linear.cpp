// CPU binding of the dense_* ops: checks the arguments, allocates, and calls csrc/gemm.
#include "ops/dense_linear/dense_linear.h"

#include "gemm/gemm.h"
#include "torch/dyad_linear_args.h"

namespace effk::binding {
namespace {

Tensor pack(const Tensor& w, const std::string& dtype) {
  constexpr const char* op = "dense_pack";
  const DType to = parse_dtype(op, dtype);
  const View view(w);
  const Arg arg{op, "w"};
  const DType from = float_dtype(arg, view);
  const bool ok = view.dim == 2 && view.sizes[0] >= 1 && view.sizes[1] >= 1 && view.sizes[0] <= kMaxSide && view.sizes[1] <= kMaxSide;
  if (!ok || !view.contiguous || !(view.home == kCpu)) arg.fail("[f_out, f_in] with sides of at least 1, contiguous, on cpu", view.text());
  const panel::Shape s{panel::Kind::dense, to, 1, view.sizes[0], view.sizes[1]};
  Tensor packed = weights({s.bytes()}, dtypes().u8);
  uint8_t* bytes = static_cast<uint8_t*>(packed.mutable_data_ptr());
  panel::write_header(s, bytes);
  gemm::pack(s, view.data(), nullptr, from, false, bytes + panel::kHeaderBytes, torch_pool());
  return packed;
}

Tensor linear(const Tensor& x, const Tensor& packed, int64_t f_out, const OptionalTensor& bias, const std::string& act) {
  constexpr const char* op = "dense_linear";
  const Activation activation = parse_act(op, act);
  const View panels(packed);
  const panel::Shape s = read_panels(Arg{op, "packed"}, panels, panel::Kind::dense, -1, f_out);
  const Input in = make_input(Arg{op, "x"}, x, s.d_in);
  const Bias b = make_bias(op, "bias", bias, f_out);
  Tensor y = output_like(in, f_out);
  const gemm::LinearArgs args{s, panels.data<uint8_t>() + panel::kHeaderBytes, in.view.data(), in.dtype, false, in.m, b.data, b.dtype,
                              activation, y.mutable_data_ptr()};
  const ParallelFor pool = torch_pool();
  gemm::linear(args, scratch(gemm::linear_workspace(args, pool.threads)), pool);
  return y;
}

Tensor unpack(const Tensor& packed, int64_t f_out, int64_t f_in) {
  constexpr const char* op = "dense_unpack";
  const View panels(packed);
  EFFK_CHECK(f_in >= 1, op, ": f_in: expected 1 or more, got ", f_in);
  const panel::Shape s = read_panels(Arg{op, "packed"}, panels, panel::Kind::dense, f_in, f_out);
  Tensor w = result({f_out, f_in}, dtypes().f32);
  dense_unpack(s, panels.data<uint8_t>() + panel::kHeaderBytes, static_cast<float*>(w.mutable_data_ptr()));
  return w;
}

}  // namespace
}  // namespace effk::binding

STABLE_TORCH_LIBRARY_IMPL(effk, CPU, m) {
  using namespace effk::binding;
  m.impl("dense_pack", TORCH_BOX(&pack));
  m.impl("dense_linear", TORCH_BOX(&linear));
  m.impl("dense_unpack", TORCH_BOX(&unpack));
}
