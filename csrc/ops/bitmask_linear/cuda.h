// CUDA side of bitmask_linear: the launch functions of cuda.cu, free of torch and of CUDA headers. Arguments, formulas and layouts are
// those of bitmask_linear.h, every pointer is device memory. They launch on `stream` of the current device, wait for nothing, allocate
// nothing, and return a cudaError_t (0: launched).
//
// Values beyond `stored`, which only a damaged weight asks for, are not read: the rows of its panel become NaN.
//
// Order of float sums: a lane has two neighbouring columns of every block of 64 of its warp's share of the row, ascending; then the
// tree over lanes, then 8 warps in order. It depends on k and the group alone. The int8 form has the bits of the CPU.
#pragma once
#include "ops/bitmask_linear/bitmask_linear.h"

namespace effk::cuda::bitmask {

using Stream = void*;

constexpr int64_t kMaxSide = 1 << 28;  // of n, k and m: a panel's values are counted in 32 bits
constexpr int64_t kFewRows = 64;       // above it a weight that meets float activations is better written out

size_t workspace(const effk::bitmask::Args& a);  // bytes, on the device, at a multiple of 256
// Two launches: x in fp32 or int8 with padded rows, then the product, four tokens at a time.
int linear(const effk::bitmask::Args& a, int64_t stored, void* memory, Stream stream);

// Dense [n, k]. codes: as they are stored; else times their scales, if there are any, and rounded to `dtype`.
int expand(const effk::bitmask::Weight& w, int64_t stored, bool codes, DType dtype, void* out, Stream stream);

const char* error_text(int error);

}  // namespace effk::cuda::bitmask
