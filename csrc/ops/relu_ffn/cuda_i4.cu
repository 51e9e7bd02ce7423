// The kernels of cuda_neurons.h for int4 rows.
#include "ops/relu_ffn/cuda_neurons.h"

template cudaError_t effk::cuda::relu_ffn::launch_gates<effk::neuron::Rows::i4>(const Step&, bool, cudaStream_t);
template cudaError_t effk::cuda::relu_ffn::launch_down<effk::neuron::Rows::i4>(const Step&, bool, cudaStream_t);
