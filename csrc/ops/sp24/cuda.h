// CUDA side of sp24: the launch function of cuda.cu in this folder; layouts are those of sp24.h, every pointer is device
// memory. A pruned weight is expanded and then multiplied as a dense one (ops/quik_linear/cuda.h): it is smaller in
// memory, not faster. mma.sp, which would skip the zeros, takes its places four columns a time from one register of
// metadata, an order that these plain places would have to be brought to first.
#pragma once
#include "ops/sp24/sp24.h"

namespace effk::cuda::sp24 {

using Stream = void*;

// w[n, k] int8, or, with `tiled`, the 8-bit t16 form of it (codes w + 128, rows filled up to 16 with code 0).
int expand(const int8_t* values, const uint8_t* meta, int64_t n, int64_t k, Sp24 pattern, bool tiled, void* w, Stream stream);

}  // namespace effk::cuda::sp24
