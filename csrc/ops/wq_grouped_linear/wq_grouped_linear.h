// Contract of wq_grouped_linear: experts, each a low-bit weight of one shape, over rows sorted by expert.
//
//   y[m] = x[m] W_e^T + bias_e   for offsets[e] <= m < offsets[e + 1],   every row bit for bit what wq_linear gives for it
//
// What a weight is, the two forms and the order of every sum are those of ops/wq_linear/wq_linear.h; results depend on
// neither the thread count nor the other rows. All experts' tiles are one parallel region, cut into shares of equal
// estimated cost: an expert without rows costs nothing, and one that holds all rows keeps every thread busy.
// Nothing here allocates, starts threads or throws: arguments are checked by the caller. y must not overlap any input.
#pragma once
#include <cstddef>
#include <cstdint>

#include "ops/wq_linear/wq_linear.h"

namespace effk {

struct WqGroupedArgs {
  const void* x;             // [m, k], rows contiguous, sorted by expert
  DType x_dtype;             // y has it too
  int64_t m, k;
  const int32_t* offsets;    // [experts + 1], ascending from 0 to m
  int64_t experts;
  WqWeight first;            // expert 0; the others follow in each array: whole tiles of t16 arrays, n biases.
                             // No codebook, no outliers.
  void* y;                   // [m, first.n]
  Compute compute;
};

size_t wq_grouped_linear_workspace(const WqGroupedArgs&);  // bytes; the caller allocates, 64-byte aligned
void wq_grouped_linear(const WqGroupedArgs&, void* workspace, const ParallelFor&);

WqWeight wq_expert(const WqWeight& first, int64_t expert);  // a view

}  // namespace effk
