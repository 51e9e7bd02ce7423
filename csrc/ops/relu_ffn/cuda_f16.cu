// The kernels of cuda_neurons.h for fp16 rows.
#include "ops/relu_ffn/cuda_neurons.h"

template cudaError_t effk::cuda::relu_ffn::launch_gates<effk::neuron::Rows::f16>(const Step&, bool, cudaStream_t);
template cudaError_t effk::cuda::relu_ffn::launch_down<effk::neuron::Rows::f16>(const Step&, bool, cudaStream_t);
