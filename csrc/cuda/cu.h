// The CUDA header that a kernel file includes, with ptx.h: nvcc gets CUDA, g++ (EFFK_CUEMU) the emulation of csrc/emu.
// docs/cuda.md has the rules that keep a kernel compilable by both.
#pragma once
#ifdef EFFK_CUEMU
#include "emu/cuemu.h"
// Names the block's dynamic shared memory, aligned to 128 bytes.
#define EFFK_DYN_SMEM(name) unsigned char* const name = ::cuemu::dyn_smem()
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define EFFK_DYN_SMEM(name) extern __shared__ __align__(128) unsigned char name[]
#endif
#include <cstdint>
#include <utility>

namespace effk::cuda {

struct Launch {
  dim3 grid, block;
  size_t smem = 0;          // dynamic shared memory, bytes
  cudaStream_t stream = nullptr;
  int cluster = 1;          // blocks of a cluster along y; more than one needs compute capability 9.0
  bool overlap = false;     // may start while the kernel before it ends (9.0): the kernel calls ptx::grid_wait
};

// kernel<<<...>>>(args...), which g++ cannot parse. Returns what the launch returned: the error is the caller's to report.
template <class... P, class... A>
inline cudaError_t launch(void (*kernel)(P...), const Launch& at, A&&... args) {
#ifdef EFFK_CUEMU
  return ::cuemu::launch(kernel, at.grid, at.block, at.smem, at.cluster, std::forward<A>(args)...);
#else
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (at.smem > kWithoutAsking) {
    const cudaError_t e = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                               cudaFuncAttributeMaxDynamicSharedMemorySize, int(at.smem));
    if (e != cudaSuccess) return e;
  }
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (at.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {1, unsigned(at.cluster), 1};
  }
  if (at.overlap) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = at.grid;
  config.blockDim = at.block;
  config.dynamicSmemBytes = at.smem;
  config.stream = at.stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, P(std::forward<A>(args))...);
#endif
}

}  // namespace effk::cuda
