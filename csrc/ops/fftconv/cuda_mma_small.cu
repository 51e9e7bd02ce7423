#include "ops/fftconv/cuda_mma.h"

namespace effk::cuda::fftconv {

cudaError_t launch_fused_small(const FusedArgs& p, int log, cudaStream_t stream) {
  switch (log) {
    case 8: return launch_fused<Shape256>(p, stream);
    case 9: return launch_fused<Shape512>(p, stream);
    case 10: return launch_fused<Shape1K>(p, stream);
    default: return launch_fused<Shape2K>(p, stream);
  }
}

}  // namespace effk::cuda::fftconv
