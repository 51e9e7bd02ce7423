#include "torch/cuda/stream.h"

#include <dlfcn.h>

namespace effk::binding {

#ifdef EFFK_CUEMU

void* OnDevice::stream() const { return nullptr; }
std::string cuda_build_text() { return ""; }

#else

// The function lives in libtorch_cuda.so, which only a CUDA build of torch has and `import torch` has loaded by then.
// Looking it up at run time lets one binary serve both builds: a weak symbol would stay null, as we link to libtorch_cpu.
void* OnDevice::stream() const {
  using Fn = AOTITorchError (*)(int32_t device, void** stream);
  static const Fn current_stream = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return library ? reinterpret_cast<Fn>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  EFFK_CHECK(current_stream, "effk: this build of torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(current_stream(home.index, &stream));
  return stream;
}

std::string cuda_build_text() { return " (effk was built for the CUDA architectures " EFFK_CUDA_ARCHS ")"; }

#endif

}  // namespace effk::binding
