// The device of a call: its guard and its current stream. With EFFK_CUEMU the "device" is the CPU.
#pragma once
#include <torch/csrc/stable/accelerator.h>

#include <string>

#include "torch/tensor.h"

namespace effk::binding {

// Makes a tensor's device the current one for its lifetime.
struct OnDevice {
  Home home;
  explicit OnDevice(const Tensor& t) : home(View(t).home)
#ifndef EFFK_CUEMU
      , guard(home.index)
#endif
  {}
  void* stream() const;  // a cudaStream_t

 private:
#ifndef EFFK_CUEMU
  torch::stable::accelerator::DeviceGuard guard;
#endif
};

// For the end of an error message: which architectures this build has kernels for.
std::string cuda_build_text();

}  // namespace effk::binding
