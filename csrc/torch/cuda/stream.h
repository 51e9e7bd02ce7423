// The device of a call: its guard and its current stream. With EFFK_CUEMU the "device" is the CPU.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "torch/check.h"
#include "torch/tensor.h"

// Where an op's kernels are registered.
#ifdef EFFK_CUEMU
#define EFFK_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(effk_emu, CPU, m)
#else
#define EFFK_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(effk, CUDA, m)
#endif

namespace effk::binding {

// Makes a tensor's device the current one for its lifetime.
struct OnDevice {
  Home home;
#ifdef EFFK_CUEMU
  OnDevice(const Arg&, const Tensor& t) : home(View(t).home) {}
#else
  OnDevice(const Arg& arg, const Tensor& t) : home(cuda_home(arg, t)), guard(home.index) {}
#endif
  void* stream() const;  // a cudaStream_t

 private:
#ifndef EFFK_CUEMU
  static Home cuda_home(const Arg& arg, const Tensor& t) {
    const View view(t);
    if (view.home.type != aoti_torch_device_type_cuda()) arg.fail("a tensor on cuda, as others are", view.text());
    return view.home;
  }
  torch::stable::accelerator::DeviceGuard guard;
#endif
};

// For the end of an error message: which architectures this build has kernels for.
std::string cuda_build_text();

}  // namespace effk::binding
