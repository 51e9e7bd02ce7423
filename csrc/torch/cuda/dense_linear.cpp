// CUDA binding of the dense_* ops: checks the arguments, allocates, and launches ops/dense_linear/cuda*.cu on the
// current stream. No call waits for the device.
#include <torch/csrc/stable/accelerator.h>

#include <string>

#include "torch/cuda/device_pack.h"

namespace effk::binding {
namespace {

Tensor pack(const Tensor& w, const std::string& dtype) {
  constexpr const char* op = "dense_pack";
  const DType to = parse_dtype(op, dtype);
  const OnDevice device(Arg{op, "w"}, w);
  const View view(w);
  const Arg arg{op, "w"};
  const DType from = float_dtype(arg, view);
  if (view.dim != 2 || view.sizes[0] < 1 || view.sizes[1] < 1 || !view.contiguous)
    arg.fail("[f_out, f_in] with sides of at least 1, contiguous, on " + device.home.text(), view.text());
  return new_pack(op, {panel::Kind::dense, to, 1, view.sizes[0], view.sizes[1]}, view.data(), nullptr, from, device);
}

Tensor linear(const Tensor& x, const Tensor& packed, int64_t f_out, const OptionalTensor& bias, const std::string& act) {
  constexpr const char* op = "dense_linear";
  const Activation activation = parse_act(op, act);
  const OnDevice device(Arg{op, "x"}, x);
  const int64_t f_in = last_side(Arg{op, "x"}, x);
  const cuda::Packed what = device_pack(Arg{op, "packed"}, packed, panel::Kind::dense, f_out, f_in, device.home);
  const Input in = make_input(Arg{op, "x"}, x, f_in, device.home);
  check_side(Arg{op, "x"}, in.m);
  const Bias b = make_bias(op, "bias", bias, f_out, device.home);
  Tensor y = output_like(in, f_out);
  if (in.m)
    check_gemm_launch(op, cuda::dense_linear(what, View(packed).data(), in.view.data(), in.dtype, in.m, b.data, b.dtype, activation,
                                             y.mutable_data_ptr(), device.stream()));
  return y;
}

Tensor unpack(const Tensor& packed, int64_t f_out, int64_t f_in) {
  constexpr const char* op = "dense_unpack";
  const OnDevice device(Arg{op, "packed"}, packed);
  const cuda::Packed what = device_pack(Arg{op, "packed"}, packed, panel::Kind::dense, f_out, f_in, device.home);
  Tensor w = empty({f_out, f_in}, dtypes().f32, device.home);
  check_gemm_launch(op, cuda::dense_unpack(what, View(packed).data(), static_cast<float*>(w.mutable_data_ptr()), device.stream()));
  return w;
}

}  // namespace
}  // namespace effk::binding

EFFK_CUDA_LIBRARY(m) {
  using namespace effk::binding;
  m.impl("dense_pack", TORCH_BOX(&pack));
  m.impl("dense_linear", TORCH_BOX(&linear));
  m.impl("dense_unpack", TORCH_BOX(&unpack));
}
