// Contract of decoder: one step of a transformer decoder, all layers in one call.
//
//   h[t] = embedding[token t] (+ positions[p])                                                     fp32, as every value between products
//   per layer:  q, k, v = W (norm h);   h += W_o attention(q, k, v, cache);   h += feed-forward(norm h)
//   feed-forward: W_d (act(W_g x) * W_u x), or W_d act(W_u x), or relu_ffn
//   logits = W_head norm h, of the last token of every run, of all, or of none
// norm: x / sqrt(mean x^2 + eps) * w, or (x - mean x) / sqrt(var x + eps) * w + b. rope, cache and softmax: ops/attention.
//
// Products are those of dense_linear, wq_linear and quik_linear with x in `dtype` (rounded to it where that is bf16), all in one
// order of summation, so that a row's result depends neither on the number of threads nor on the other rows of a step.
// Why one call: a layer of SmolLM2 takes 60 us; five calls through torch's dispatcher and Python take as long.
// Nothing here checks, allocates or throws. Cost: the bytes of all weights and of the sequences' cache; 2 flops a weight and row.
#pragma once
#include <cstddef>
#include <cstdint>

#include "common/activation.h"
#include "common/dtype.h"
#include "common/parallel.h"
#include "gemm/gemm.h"
#include "ops/attention/attention.h"
#include "ops/quik_linear/quik_linear.h"
#include "ops/relu_ffn/relu_ffn.h"
#include "ops/wq_linear/wq_linear.h"

namespace effk::decoder {

struct Norm {
  const float *weight, *bias;  // [d]; bias or null
  float eps;
  bool centred;                // layer norm; else root mean square
};

struct DenseWeight {
  panel::Shape shape;
  const uint8_t* panels;
  const void* bias;
  DType bias_dtype;
};

// Weights of one kind over one x; the outputs are numbers first .. first + count - 1 of their place.
enum class Kind : int32_t { dense, wq, quik };
struct Part {
  Kind kind;
  int first, count;
  const DenseWeight* dense;
  const WqWeight* wq;
  Compute compute;
  const QuikWeight* quik;
  QuikSplit split;
  int32_t bits_a;
  QuikMode mode;
};
constexpr int kMaxOutputs = 3;
struct Place {  // all products of one x, y[i] [rows, width[i]]
  const Part* parts;
  int n_parts, outputs;
  int64_t k, width[kMaxOutputs];
  int64_t total() const { int64_t sum = 0; for (int i = 0; i < outputs; ++i) sum += width[i]; return sum; }
};

struct Layer {
  Norm attention_norm, ffn_norm;
  Place qkv;                   // three outputs, or one: q, k and v beside each other
  Place out, up, down;         // up: gate and up, or up alone
  const relu_ffn::Args* sparse;  // without x, y, nnz and tokens; or null
};

struct Embedding {             // rows [vocab, d] of a type, or 8-bit codes of wq_linear
  const void* table;
  DType dtype;
  const WqWeight* codes;
  const float* positions;      // [max positions, d], or null
};

struct Model {
  int64_t width, vocab, n_layers;
  int64_t heads, kv_heads, head_dim, window, rotary;
  float scale;
  const float *cosine, *sine;
  Activation act;
  bool gated;
  DType dtype;                 // of x in products: f32 or bf16
  Embedding embedding;
  const Layer* layers;
  Norm final_norm;
  Place head;
};

enum class Logits : int32_t { none, last, all };
struct Step {
  const int64_t* tokens;
  int64_t rows;
  const attention::Run* runs;
  int64_t n_runs;
  attention::Cache cache;      // of layer 0
  int64_t k_layer, v_layer;    // bytes from one layer's to the next
  int64_t scale_layer;         // floats
  Logits which;
  float* logits;               // [n_runs or rows, vocab]
};
size_t workspace(const Model&, const Step&, int threads);
void step(const Model&, const Step&, void* workspace, const ParallelFor&);

}  // namespace effk::decoder
