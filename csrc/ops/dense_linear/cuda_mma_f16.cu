// The kernels of cuda_mma.h for f16.
#include "ops/dense_linear/cuda_mma.h"

template cudaError_t effk::cuda::launch_mma_gemm<__half>(const Gemm&, int, cudaStream_t);
