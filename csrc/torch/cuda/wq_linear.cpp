// CUDA binding of the wq_* ops: checks the arguments, sets the device, finds the current stream, and launches the kernels
// of ops/wq_linear/cuda*.cu. No call waits for the device, so every product can be captured in a CUDA graph.
//
// Compiled a second time with EFFK_CUEMU it makes torch.ops.effk_emu.*, where the same code runs the same kernels on CPU
// tensors through the emulation of csrc/emu: for tests.
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <cstdint>
#include <vector>

#include "torch/cuda/other_ops.h"
#include "torch/cuda/wq_weight.h"

namespace effk::binding {
namespace {

void check_compute(const char* op, const std::string& compute) {
  EFFK_CHECK(parse_compute(op, compute) == Compute::fp, op, ": compute: expected 'float' for CUDA tensors, got 'int8': the int8 form ",
             "is a CPU form; 'float' keeps the weights exact");
}

Tensor linear_checked(const char* op, const Input& x, const Home& home, const DeviceWeight& d, const OptionalTensor& bias,
                      cuda::Stream stream) {
  // fp32 activations and large batches go through torch's GEMM, with the weight rounded once to the type of x.
  if (x.dtype == DType::f32 || x.m > cuda::kMaxRows) {
    OptionalTensor b = bias;
    if (b) b = torch::stable::to(*b, scalar_type(x.dtype));
    return library_linear(x.owner, dequantized(op, d, home, x.dtype, stream), b);
  }
  Tensor y = output_like(x, d.w.n);
  if (x.m && d.w.n)
    check_wq_launch(op, cuda::wq_linear(d.w, d.outliers, x.view.data(), y.mutable_data_ptr(), x.dtype, int(x.m), stream));
  return y;
}

Tensor linear(const Tensor& x, const Tensor& packed, const Tensor& scales, const OptionalTensor& zeros,
              const OptionalTensor& codebook, const OptionalTensor& out_ptr, const OptionalTensor& out_col,
              const OptionalTensor& out_val, const OptionalTensor& bias, int64_t n, int64_t k, int64_t bits,
              int64_t group_size, const std::string& compute) {
  constexpr const char* op = "wq_linear";
  check_compute(op, compute);
  const OnDevice device(Arg{op, "packed"}, packed);
  DeviceWeight d = device_weight(op, -1, {packed, scales, zeros, codebook, out_ptr, out_col, out_val}, n, k, bits, group_size, device.home);
  add_bias(op, -1, bias, d.w, device.home);
  return linear_checked(op, make_input(Arg{op, "x"}, x, k, device.home), device.home, d, bias, device.stream());
}

using OptionalTensors = std::vector<OptionalTensor>;

std::vector<Tensor> multi_linear(const Tensor& x, std::vector<Tensor> packed, std::vector<Tensor> scales, OptionalTensors zeros,
                                 OptionalTensors codebook, OptionalTensors out_ptr, OptionalTensors out_col,
                                 OptionalTensors out_val, OptionalTensors bias, std::vector<int64_t> n, int64_t k,
                                 std::vector<int64_t> bits, std::vector<int64_t> group_size, const std::string& compute) {
  constexpr const char* op = "wq_multi_linear";
  check_compute(op, compute);
  const size_t count = packed.size();
  check_lengths(op, count, {{"scales", scales.size()},   {"zeros", zeros.size()},     {"codebook", codebook.size()},
                            {"out_ptr", out_ptr.size()}, {"out_col", out_col.size()}, {"out_val", out_val.size()},
                            {"bias", bias.size()},       {"n", n.size()},             {"bits", bits.size()},
                            {"group_size", group_size.size()}});
  const OnDevice device(Arg{op, "x"}, x);
  const Input in = make_input(Arg{op, "x"}, x, k, device.home);
  std::vector<DeviceWeight> weights;
  for (size_t i = 0; i < count; ++i) {  // all of them before any work
    weights.push_back(device_weight(op, int(i), {packed[i], scales[i], zeros[i], codebook[i], out_ptr[i], out_col[i], out_val[i]}, n[i],
                                    k, bits[i], group_size[i], device.home));
    add_bias(op, int(i), bias[i], weights.back().w, device.home);
  }
  std::vector<Tensor> ys;
  for (size_t i = 0; i < count; ++i) ys.push_back(linear_checked(op, in, device.home, weights[i], bias[i], device.stream()));
  return ys;
}

Tensor dequantize(const Tensor& packed, const Tensor& scales, const OptionalTensor& zeros, const OptionalTensor& codebook,
                  const OptionalTensor& out_ptr, const OptionalTensor& out_col, const OptionalTensor& out_val, int64_t n, int64_t k,
                  int64_t bits, int64_t group_size) {
  constexpr const char* op = "wq_dequantize";
  const OnDevice device(Arg{op, "packed"}, packed);
  const DeviceWeight d = device_weight(op, -1, {packed, scales, zeros, codebook, out_ptr, out_col, out_val}, n, k, bits, group_size, device.home);
  return dequantized(op, d, device.home, DType::f32, device.stream());
}

// grad @ W with W rounded to the type of grad: what a training step in that type does with a plain weight.
Tensor linear_backward(const Tensor& grad, const Tensor& packed, const Tensor& scales, const OptionalTensor& zeros,
                       const OptionalTensor& codebook, const OptionalTensor& out_ptr, const OptionalTensor& out_col,
                       const OptionalTensor& out_val, int64_t n, int64_t k, int64_t bits, int64_t group_size) {
  constexpr const char* op = "wq_linear_backward";
  const OnDevice device(Arg{op, "packed"}, packed);
  const DeviceWeight d = device_weight(op, -1, {packed, scales, zeros, codebook, out_ptr, out_col, out_val}, n, k, bits, group_size, device.home);
  const Input in = make_input(Arg{op, "grad"}, grad, n, device.home);
  return torch::stable::matmul(in.owner, dequantized(op, d, device.home, in.dtype, device.stream()));
}

#ifndef EFFK_CUEMU
std::tuple<Tensor, Tensor, Tensor, Tensor> pack(const Tensor& qweight, const Tensor& scales, const OptionalTensor& zeros,
                                                const OptionalTensor& codebook, int64_t n, int64_t k, int64_t bits,
                                                int64_t group_size) {
  using torch::stable::detail::from;
  const auto r = call_on_cpu<4, 8>("effk::wq_pack", {cpu_argument(qweight), cpu_argument(scales), cpu_argument(zeros),
                                                     cpu_argument(codebook), from(n), from(k), from(bits), from(group_size)},
                                   View(qweight).home);
  return {r[0], r[1], r[2], r[3]};
}

std::tuple<Tensor, Tensor, Tensor> unpack(const Tensor& packed, const Tensor& scales, const OptionalTensor& zeros, int64_t n,
                                          int64_t k, int64_t bits, int64_t group_size) {
  using torch::stable::detail::from;
  const auto r = call_on_cpu<3, 7>("effk::wq_unpack", {cpu_argument(packed), cpu_argument(scales), cpu_argument(zeros), from(n),
                                                       from(k), from(bits), from(group_size)},
                                   View(packed).home);
  return {r[0], r[1], r[2]};
}
#endif

}  // namespace
}  // namespace effk::binding

EFFK_CUDA_LIBRARY(m) {
#ifndef EFFK_CUEMU
  m.impl("wq_pack", TORCH_BOX(&effk::binding::pack));
  m.impl("wq_unpack", TORCH_BOX(&effk::binding::unpack));
#endif
  using namespace effk::binding;
  m.impl("wq_dequantize", TORCH_BOX(&dequantize));
  m.impl("wq_linear", TORCH_BOX(&linear));
  m.impl("wq_multi_linear", TORCH_BOX(&multi_linear));
  m.impl("wq_linear_backward", TORCH_BOX(&linear_backward));
}
