// CUDA side of relu_ffn: the launch functions of cuda*.cu in this folder, free of torch and of CUDA headers. Arguments, formulas and
// layouts are those of relu_ffn.h, every pointer is device memory, rows of neurons start at multiples of kAlignment. They launch on
// `stream` of the current device, wait for nothing, allocate nothing, and return a cudaError_t (0: launched).
//
// Three launches for up to kRound tokens, of a grid that depends on shapes alone, so that a graph can hold them:
//
//   gate      a block of threads has 16 neurons: their gates, the list of those that are active for any token of its group, and
//             u for that list. Nothing is agreed on between blocks: a list is a run of 16 places and a count
//   down      a warp has the lists of 4 blocks and 256 columns; 8 warps, then slices of 32 blocks, are added in order
//   finish    slices and bias, one rounding, nnz
//
// gelu_gauss and top_k look at all gates first: two launches more. Neurons i, i + blocks, i + 2 blocks, ... share a block, so that
// runs of active neurons (hot ones sorted to the front, groups of a mask) are dealt evenly.
//
// Order of sums: gate and u by lane (columns ascending), then the tree over lanes; u in four parts of the columns. Down: neurons of
// a block ascending, 4 blocks in a row, 8 such chains in order, slices in order. No place in a sum depends on which neurons are
// active, on other tokens or on the number of tokens: skipping is exact here too, and a token's bits are those of the token alone.
#pragma once
#include "ops/relu_ffn/relu_ffn.h"

namespace effk::cuda::relu_ffn {

using Stream = void*;

constexpr int64_t kAlignment = 16;
constexpr int kRound = 64;              // tokens of a set of launches; its weights come from memory once, for later groups from L2
constexpr int64_t kMaxSide = 1 << 30;   // of d, f and tokens

size_t workspace(const effk::relu_ffn::Args& a);  // bytes, on the device, at a multiple of 256
int run(const effk::relu_ffn::Args& a, void* memory, Stream stream);

// Three launches: the list, then down and finish as above.
size_t input_sparse_workspace(const effk::relu_ffn::InputSparseArgs& a);
int input_sparse(const effk::relu_ffn::InputSparseArgs& a, void* memory, Stream stream);

const char* error_text(int error);

}  // namespace effk::cuda::relu_ffn
