// Contract of relu_ffn: a feed-forward layer that reads only the neurons whose gate is not zero.
//
//   g = Wg x + bg          u = Wu x + bu               (without Wg: g = u, and u is not a factor)
//   a_i = gate(g_i)        active: see Gate; NaN is active
//   h_i = a_i u_i (a_i without Wg) where neuron i is active and inside the mask, else 0
//   y = sum_i h_i Wd[:, i] + bd, i ascending;          nnz = number of active neurons
//
// All sums in fp32, in one order that depends neither on the number of threads, nor on the other tokens of the batch, nor on which
// neurons are skipped: skipping adds up the same terms without the zeros, so the result is that of the dense layer, bit for bit,
// for finite weights. One rounding to the type of x at the end.
// Nothing here checks arguments, allocates or throws; rows need no alignment.
#pragma once
#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "common/parallel.h"
#include "formats/neuron.h"

namespace effk {

// a(g), and when a neuron is active; p is the parameter (a value, or one a neuron).
enum class Gate : int32_t {
  relu = 0,         // max(g, 0);                 not g <= 0
  relu2 = 1,        // max(g, 0)^2;               not g <= 0
  shifted_relu = 2, // max(g - p, 0);             not g <= p
  fatrelu = 3,      // g;                         not g <= p
  drelu = 4,        // max(g, 0), times max(u, 0); not g <= 0
  silu_threshold = 5,  // q = g / (1 + e^-g);     not |q| <= p, or |q| = p
  gelu_gauss = 6,   // gelu_tanh(g - c);          not g <= c,  c = mean(g) + p std(g) over all neurons; p is the quantile's z
  top_k = 7,        // g;                         among the p largest |g|, ties to the lower index
  magnitude = 8,    // g;                         not |g| <= p: the inputs of input_sparse, not a gate of relu_ffn
};
constexpr const char* kGateNames[] = {"relu", "relu2", "shifted_relu", "fatrelu", "drelu", "silu_threshold", "gelu_gauss", "top_k"};
constexpr int kGates = 8;

namespace relu_ffn {

constexpr int kMaxTokens = 8;   // of a decoding step share one list of neurons
constexpr int kMostTokens = 32;  // of a prompt, on the CPU: x of 4096 inputs fills half of a second-level cache

struct NeuronRows {
  const uint8_t* rows;      // null: absent
  const float* scales;      // [f, groups] or null
  const float* bias;        // gate, up: [f]; down: [d]; or null
};

struct Args {
  NeuronRows gate, up, down;
  neuron::Rows type;
  int64_t group;
  Gate kind;
  const float* param;       // [1] or [f]
  bool param_each;
  const uint8_t* mask;      // bit i of a row: neurons [i m, i m + m) may be active; or null
  int64_t mask_rows, mask_bytes, mask_group;
  const void* x;            // [tokens, d]
  DType dtype;              // of x and y
  int64_t tokens, d, f;
  bool dense;               // read every neuron of up and down
  bool fall_back;           // do so too where so many are active that reading all in order is faster: the result is the same
  void* y;
  int32_t* nnz;             // [tokens]
};
size_t workspace(const Args&, int threads);  // bytes
void run(const Args&, void* workspace, const ParallelFor&);

// y = sum_j x_j W[j, :] + bias over the inputs j with |x_j| > threshold_j (rows of W are inputs); nnz counts them.
struct InputSparseArgs {
  NeuronRows w;             // rows of length d_out, one an input
  neuron::Rows type;
  int64_t group;
  const float* threshold;   // [1] or [d_in], or null: 0
  bool threshold_each;
  const void* x;            // [tokens, d_in]
  DType dtype;
  int64_t tokens, d_in, d_out;
  void* y;
  int32_t* nnz;
};
size_t input_sparse_workspace(const InputSparseArgs&, int threads);
void input_sparse(const InputSparseArgs&, void* workspace, const ParallelFor&);

// Rows [f, row_bytes] and, for i8 and i4, scales [f, groups] from w [f, d], or w [d, f] when transposed. Symmetric, largest magnitude
// to 127 or 7, rounded to nearest, ties to even.
void pack(const void* w, DType dtype, bool transposed, int64_t f, int64_t d, neuron::Rows, int64_t group, uint8_t* rows, float* scales,
          const ParallelFor&);
void unpack(const uint8_t* rows, const float* scales, neuron::Rows, int64_t group, int64_t f, int64_t d, float* w, const ParallelFor&);

const char* kernel_name();

}  // namespace relu_ffn
}  // namespace effk
