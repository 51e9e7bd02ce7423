// CUDA binding of the bitmask_* ops: checks the arguments (torch/bitmask_linear_args.h), allocates, and launches
// ops/bitmask_linear/cuda.cu on the current stream. Only packing and validation wait for the device.
#include "ops/bitmask_linear/cuda.h"

#include <tuple>
#include <utility>
#include <vector>

#include "torch/bitmask_linear_args.h"
#include "torch/cuda/other_ops.h"
#include "torch/cuda/stream.h"

namespace effk::binding {
namespace {

namespace device_bitmask = cuda::bitmask;

void check_launch(const char* op, int error) {
  EFFK_CHECK(error == 0, op, ": CUDA error ", error, ": ", device_bitmask::error_text(error), cuda_build_text());
}
void check_limits(const char* op, int64_t m, int64_t n, int64_t k) {
  for (const auto& [name, side] : {std::pair{"x", m}, {"n", n}, {"k", k}})
    if (side > device_bitmask::kMaxSide) Arg{op, name}.fail("at most " + std::to_string(device_bitmask::kMaxSide) + " on CUDA", std::to_string(side));
}

// Values in pairs of bytes and masks in words are read at their own alignment, which torch's tensors have.
Tensor linear(const Tensor& x, const Tensor& values, const Tensor& masks, const Tensor& ptr, const OptionalTensor& scale,
              const OptionalTensor& row_sum, const OptionalTensor& bias, int64_t n, int64_t k, const std::string& compute) {
  constexpr const char* op = "bitmask_linear";
  const OnDevice device(Arg{op, "x"}, x);
  int64_t stored;
  bitmask::Args a = make_bitmask_linear(op, x, values, masks, ptr, scale, row_sum, bias, n, k, compute, &stored, device.home);
  check_limits(op, a.m, n, k);
  if (!a.int8 && a.m > device_bitmask::kFewRows) {
    const Tensor w = empty({n, k}, View(x).dtype, device.home);
    check_launch(op, device_bitmask::expand(a.w, stored, false, a.dtype, w.mutable_data_ptr(), device.stream()));
    OptionalTensor b = bias;
    if (b) b = torch::stable::to(*b, scalar_type(a.dtype));
    return library_linear(x, w, b);
  }
  const View in(x);
  std::vector<int64_t> shape(in.sizes, in.sizes + in.dim);
  shape.back() = n;
  const Tensor y = empty(shape.data(), in.dim, in.dtype, device.home), memory = empty({int64_t(device_bitmask::workspace(a))}, dtypes().u8, device.home);
  a.y = y.mutable_data_ptr();
  check_launch(op, device_bitmask::linear(a, stored, memory.mutable_data_ptr(), device.stream()));
  return y;
}

Tensor unpack(const Tensor& values, const Tensor& masks, const Tensor& ptr, const OptionalTensor& scale, int64_t n, int64_t k) {
  constexpr const char* op = "bitmask_unpack";
  const OnDevice device(Arg{op, "values"}, values);
  int64_t stored;
  bitmask::Weight w = make_bitmask(op, values, masks, ptr, n, k, &stored, device.home);
  check_limits(op, 0, n, k);
  if (scale) set_scale(op, w, scale, device.home);
  const Tensor out = empty({n, k}, scale ? dtypes().f32 : View(values).dtype, device.home);
  check_launch(op, device_bitmask::expand(w, stored, !scale, DType::f32, out.mutable_data_ptr(), device.stream()));
  return out;
}

#ifndef EFFK_CUEMU
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pack(const Tensor& w, const OptionalTensor& keep, const OptionalTensor& scale,
                                                        const std::string& values, int64_t group) {
  using torch::stable::detail::from;
  const OnDevice device(Arg{"bitmask_pack", "w"}, w);
  auto r = call_on_cpu<5, 5>("effk::bitmask_pack", {cpu_argument(w), cpu_argument(keep), cpu_argument(scale), from(values), from(group)}, device.home);
  return {r[0], r[1], r[2], r[3], r[4]};
}

Tensor validate(const Tensor& values, const Tensor& masks, const Tensor& ptr, int64_t n, int64_t k) {
  using torch::stable::detail::from;
  const OnDevice device(Arg{"bitmask_validate", "values"}, values);
  return call_on_cpu<1, 5>("effk::bitmask_validate", {cpu_argument(values), cpu_argument(masks), cpu_argument(ptr), from(n), from(k)}, device.home)[0];
}
#endif

}  // namespace
}  // namespace effk::binding

EFFK_CUDA_LIBRARY(m) {
  using namespace effk::binding;
#ifndef EFFK_CUEMU
  m.impl("bitmask_pack", TORCH_BOX(&pack));
  m.impl("bitmask_validate", TORCH_BOX(&validate));
#endif
  m.impl("bitmask_unpack", TORCH_BOX(&unpack));
  m.impl("bitmask_linear", TORCH_BOX(&linear));
}
