// The kernels of cuda_mma.h for 4-bit weights as int8.
#include "ops/quik_linear/cuda_mma.h"

template cudaError_t effk::cuda::quik::launch_product<effk::cuda::quik::Operands::w4>(const MmaArgs&, bool, cudaStream_t);
