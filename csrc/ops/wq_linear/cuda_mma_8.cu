// The 8-bit kernels of cuda_mma.h.
#include "ops/wq_linear/cuda_mma.h"

template cudaError_t effk::cuda::launch_mma<8>(const MmaArgs&, DType, const Device&, cudaStream_t);
