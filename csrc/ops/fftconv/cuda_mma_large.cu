#include "ops/fftconv/cuda_mma.h"

namespace effk::cuda::fftconv {

cudaError_t launch_fused_large(const FusedArgs& p, int log, cudaStream_t stream) {
  switch (log) {
    case 12: return launch_fused<Shape4K>(p, stream);
    case 13: return launch_fused<Shape8K>(p, stream);
    case 14: return launch_fused<Shape16K>(p, stream);
    default: return launch_fused<Shape32K>(p, stream);
  }
}

}  // namespace effk::cuda::fftconv
