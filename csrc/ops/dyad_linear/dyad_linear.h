// Contract of dyad_linear: a linear map that is the sum of two block-diagonal matrices around stride permutations (Chandy et
// al., arXiv:2312.06881). What the variants compute, and how, is in gemm/gemm.h, which does the products; here is what only
// this family needs.
//
// Support of W [f_out, f_in], block d, 0 <= o < d_out, 0 <= i < d_in:
//   wl   row d d_out + o, column d d_in + i       all variants
//   wu   row d d_out + o, column i n + d          it
//        row o n + d,     column d d_in + i       ot
//        row o n + d,     column i n + d          dt
#pragma once
#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "common/parallel.h"
#include "formats/panel.h"
#include "ops/wq_linear/wq_linear.h"

namespace effk {

// W in the type of the weights; where both components meet, their sum, rounded once.
void dyad_to_dense(panel::Kind kind, int64_t n, int64_t d_out, int64_t d_in, const void* wl, const void* wu, DType dtype, void* w,
                   const ParallelFor&);

// Quantised blocks, one weight of wq_linear: it, rows d d_out + o = [wl[d, o, :] | wu[d, o, :]]; ot and dt, rows d d_out + o =
// wl[d, o, :] and rows f_out + d d_out + o = wu[d, o, :]. d_out is a multiple of 16, so that blocks are views. wq_linear runs
// once a block: it on x as it is stored, ot and dt in fp32, because their two sums are added before they are rounded.
// Cost beside wq_linear: a copy of 2 f_in values of x and of the results, per token.
struct DyadWqArgs {
  panel::Kind kind;
  int64_t n, d_out, d_in;
  const void* x;              // [tokens, n d_in]
  DType dtype;                // of x and y
  int64_t tokens;
  WqWeight weight;            // bias: [n d_out]
  Compute compute;
  void* y;                    // [tokens, n d_out]
};
size_t dyad_wq_workspace(const DyadWqArgs&);
void dyad_wq_linear(const DyadWqArgs&, void* workspace, const ParallelFor&);

}  // namespace effk
