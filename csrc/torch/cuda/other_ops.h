// What several CUDA bindings call: torch's own product and copies, and our ops on the CPU.
#pragma once
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <cstdint>
#include <vector>

#include "common/dtype.h"
#include "torch/tensor.h"

namespace effk::binding {

using torch::headeronly::ScalarType;

inline ScalarType scalar_type(DType type) {
  return type == DType::f32 ? ScalarType::Float : type == DType::f16 ? ScalarType::Half : ScalarType::BFloat16;
}

// torch's own x W^T + bias, on the stream that is current.
inline Tensor library_linear(const Tensor& x, const Tensor& w, const OptionalTensor& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(w), torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Kernels copy 16 bytes at a time: an array that does not start at a multiple of that is copied.
template <class P>
void align(P& pointer, const Tensor& owner, std::vector<Tensor>& copies) {
  if (!pointer || reinterpret_cast<uintptr_t>(pointer) % 16 == 0) return;
  copies.push_back(torch::stable::clone(owner));
  pointer = static_cast<P>(copies.back().const_data_ptr());
}

#ifndef EFFK_CUEMU
// Packing happens once, when a model is loaded: copies to the CPU, calls the op there and copies back, which waits.
template <size_t Results, size_t Arguments>
std::array<Tensor, Results> call_on_cpu(const char* op, std::array<StableIValue, Arguments> stack, const Home& home) {
  static_assert(Results <= Arguments, "results replace the arguments");
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  std::array<Tensor, Results> results;
  const torch::stable::Device device(torch::headeronly::DeviceType::CUDA, home.index);
  for (size_t i = 0; i < Results; ++i) results[i] = torch::stable::to(torch::stable::detail::to<Tensor>(stack[i]), device);
  return results;
}

inline StableIValue cpu_argument(const Tensor& t) {
  return torch::stable::detail::from(torch::stable::to(t, torch::stable::Device(torch::headeronly::DeviceType::CPU)));
}
inline StableIValue cpu_argument(const OptionalTensor& t) {
  if (!t) return torch::stable::detail::from(OptionalTensor());
  return torch::stable::detail::from(OptionalTensor(torch::stable::to(*t, torch::stable::Device(torch::headeronly::DeviceType::CPU))));
}
#endif

}  // namespace effk::binding
