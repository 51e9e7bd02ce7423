// Contract of the pieces of relu_ffn as operations of their own: lists of neurons, products with listed rows, and masks that
// predictors make. For pipelines and tests; a layer calls relu_ffn, which needs no memory between the pieces.
//
// A list: ascending int32 numbers of neurons and how many there are; the rest of its memory is -1 (values: 0).
// A mask: bits [rows, ceil(n / 8)], bit i % 8 of byte i / 8, zeros beyond n.
// Nothing here checks arguments, allocates or throws. Results do not depend on the number of threads nor on the other tokens.
#pragma once
#include "ops/relu_ffn/relu_ffn.h"

namespace effk::neuron_lists {

constexpr int64_t mask_bytes(int64_t n) { return (n + 7) / 8; }

// Inputs j with not |x_j| <= threshold_j, in order, and their values.
struct CompactArgs {
  const void* x;            // [tokens, n]
  DType dtype;
  int64_t tokens, n;
  const float* threshold;   // [1] or [n], or null: 0
  bool threshold_each;
  int32_t *index, *count;   // [tokens, n], [tokens]
  float* value;             // [tokens, n]
};
size_t compact_workspace(const CompactArgs&);
void compact(const CompactArgs&, void* workspace, const ParallelFor&);

// One list for all tokens.
struct RowsArgs {
  relu_ffn::NeuronRows w;   // rows of length d; bias [f] for dot, [d] for axpy
  neuron::Rows type;
  int64_t group, d;
  const int32_t* index;
  int64_t count, capacity;  // capacity: of the list's memory, the row length of values
  int64_t tokens;
};
// out[b, i] = row index[i] . x[b] + bias; 0 beyond the list.
size_t dot_workspace(const RowsArgs&);
void dot(const RowsArgs&, const void* x, DType, float* out, void* workspace, const ParallelFor&);
// y[b] = sum_i value[b, i] row index[i] + bias, i ascending.
size_t axpy_workspace(const RowsArgs&);
void axpy(const RowsArgs&, const float* value, void* y, DType, void* workspace, const ParallelFor&);

// Bit i: p2_i . act(p1 x) >= threshold_i, act relu or nothing.
struct LowRankArgs {
  relu_ffn::NeuronRows first, second;  // rows of p1 [r, d] and p2 [f, r]
  neuron::Rows type;
  int64_t group_first, group_second;
  const void* x;
  DType dtype;
  int64_t tokens, d, r, f;
  bool relu;
  const float* threshold;   // [1] or [f]
  bool threshold_each;
  uint8_t* mask;            // [tokens, mask_bytes(f)]
};
size_t low_rank_workspace(const LowRankArgs&);
void low_rank(const LowRankArgs&, void* workspace, const ParallelFor&);

// Bit i: not neg > alpha_i (d - neg), neg: of how many inputs the sign differs from the weight's. signs: bit 1 where the weight is
// negative; x: negative below 0, and -0 is not.
struct SignArgs {
  const void* x;
  DType dtype;
  int64_t tokens, d, f;
  const uint8_t* signs;     // [f, mask_bytes(d)]
  const float* alpha;       // [1] or [f]
  bool alpha_each;
  uint8_t* mask;
};
size_t sign_workspace(const SignArgs&);
void sign(const SignArgs&, void* workspace, const ParallelFor&);

// Experts of a router's scores r >= 0 [tokens, experts]. largest: those with r >= (1 - tau) max r; else the shortest prefix of the
// scores in falling order, ties to the lower index, whose shares add up to tau in fp32, one at least.
void dynamic_k(const float* r, int64_t tokens, int64_t experts, float tau, bool largest, int32_t* order, uint8_t* mask, int32_t* count);
// The k groups of `group` scores whose largest score is largest, ties to the lower group; NaN is larger than all. Bits: groups.
void top_k(const float* score, int64_t tokens, int64_t n, int64_t k, int64_t group, float* largest, int32_t* order, uint8_t* mask);
// The bits of any row, and how many there are.
void any_of(const uint8_t* mask, int64_t rows, int64_t bytes, uint8_t* any, int32_t* bits);

}  // namespace effk::neuron_lists
