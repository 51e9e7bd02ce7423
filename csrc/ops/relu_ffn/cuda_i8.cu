// The kernels of cuda_neurons.h for int8 rows.
#include "ops/relu_ffn/cuda_neurons.h"

template cudaError_t effk::cuda::relu_ffn::launch_gates<effk::neuron::Rows::i8>(const Step&, bool, cudaStream_t);
template cudaError_t effk::cuda::relu_ffn::launch_down<effk::neuron::Rows::i8>(const Step&, bool, cudaStream_t);
