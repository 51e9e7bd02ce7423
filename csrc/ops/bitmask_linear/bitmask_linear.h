// Contract of bitmask_linear: y = x W^T + bias for weights of which most are zero (formats/bitmask.h).
//
//   float   y[m, n] = scale[n] sum_k x[m, k] w[n, k] + bias[n]     fp32; with groups of scales w = code * scale, rounded once
//   int8    sx = max|x| / 127 of a token (1 if that is 0), q = clip(rint(x / sx), -127, 127), ties to even
//           y[m, n] = (sum_g scale[n, g] float(sum_k q[m, k] code[n, k])) sx + bias[n]
//           integers exact, each other operation fp32 and rounded by itself, groups ascending: equal bits on all tiers. A token with
//           NaN or infinity has sx = NaN.
//
// One rounding to the type of x at the end. Float sums: 16 lanes, lane l takes columns l, l + 16, .. ascending, lanes are folded by
// halves; so results depend neither on the number of threads nor on the other tokens, and one row of many has the bits of one alone.
//
// Few tokens read the weight once: (1 - s) size + 1/8 bytes a weight. From two tokens on a panel is expanded into a first-level
// cache, a piece at a time, and met by all tokens of a tile; the dense product that follows has both operands along k, unlike that of
// csrc/gemm, because it has to add up in the order of a single token.
// Nothing here checks arguments, allocates or throws; tensors need no alignment; m = 0 is legal.
#pragma once
#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "common/parallel.h"
#include "formats/bitmask.h"

namespace effk {
namespace bitmask {

struct Weight {
  Values type;
  const uint8_t* values;
  const uint64_t* masks;
  const int64_t* ptr;
  const float* scale;      // int8: [n, groups]; else null
  const int32_t* row_sum;  // compute int8: [n, groups]
  int64_t n, k, group;     // group: 0, one scale a row
};

struct Args {
  Weight w;
  bool int8;               // activations in int8
  const void* x;           // [m, k]
  DType dtype;             // of x, y and bias
  int64_t m;
  const void* bias;        // [n] of bias_dtype, or null
  DType bias_dtype;
  void* y;                 // [m, n]
};
size_t workspace(const Args&, int threads);  // bytes
void run(const Args&, void* workspace, const ParallelFor&);

// Packing, in two steps because the number of values is known in between: `count` writes scales, masks and ptr, `fill` the values.
struct PackArgs {
  const void* w;           // [n, k] of dtype, or int8 codes
  DType dtype;
  bool codes;              // w are int8 codes, scale is given
  const uint8_t* keep;     // [n, k], 0: pruned; or null: what is not zero. Codes 0 are dropped in any case
  Values type;
  int64_t n, k, group;
};
void count(const PackArgs&, float* scale, uint64_t* masks, int64_t* ptr, const ParallelFor&);
void fill(const PackArgs&, const float* scale, const uint64_t* masks, const int64_t* ptr, uint8_t* values, int32_t* row_sum, const ParallelFor&);

// Dense [n, k]: of the type of values without scales, fp32 with.
void unpack(const Weight&, uint8_t* w, const ParallelFor&);

// What is wrong with a weight whose shapes fit: null, or a sentence; `at` the panel. `stored`: values without the tail.
const char* validate(const Weight&, int64_t stored, int64_t* at);

}  // namespace bitmask
}  // namespace effk
