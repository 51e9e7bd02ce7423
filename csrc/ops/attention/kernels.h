// What the driver asks of a tier.
#pragma once
#include "common/export.h"
#include "isa/isa.h"
#include "ops/attention/attention.h"

namespace effk::attention {

constexpr int64_t kBlock = 64;    // positions of one step of the running maximum
constexpr int64_t kChunk = 256;   // positions whose softmax is begun anew; a multiple of kBlock

// Rotary positions of one token; half = 0: none.
struct Turn {
  const float *cosine, *sine;  // [half]
  int64_t half;
};

// Queries of one run that share the keys and values of one kv head: row r is head r % group of query r / group.
struct Tile {
  kv::Type type;
  int64_t d;
  const uint8_t *k, *v;        // of the slot and head
  const float *k_scale, *v_scale;
  const float* q;              // [rows][d], from prepare
  int64_t rows, group;
  int64_t first;               // position of query 0
  int64_t window;
  int64_t end;                 // positions of all calls with these queries end here
  const uint8_t *next_k, *next_v;  // what is read after that, or null
};

// Of each row: sum over positions of e_j v_j and of e_j, e_j = 2^(s_j - max), s the scaled scores in units of log2 e.
struct State { float *sum /* [rows][d] */, *max, *norm /* [rows] */; };
constexpr float kNothing = -1e30f;  // max before the first position

struct Kernel {
  isa::Tier tier;
  const char* name;
  // One head of a query, turned and multiplied by `scale`, to d floats; with i8 keys as two parts of 8 bits, their unit and sum.
  void (*prepare)(const float* x, int64_t d, const Turn&, float scale, kv::Type, float* to);
  // One key, turned, and one value to position p.
  void (*append)(const float* k, const float* v, int64_t d, const Turn&, kv::Type, int64_t p, uint8_t* keys, uint8_t* values, float* k_scale,
                 float* v_scale);
  // The state of all rows over the positions [begin, end) of one chunk. scratch: scratch_floats(rows, d).
  void (*attend)(const Tile&, int64_t begin, int64_t end, float* scratch, const State&);
  void (*merge)(int64_t rows, int64_t d, const State& part, const State& total);  // total = total and then part
  void (*finish)(const float* sum, float norm, int64_t d, float* out);            // of one row
};
constexpr int64_t scratch_floats(int64_t rows, int64_t d) { return 2 * kBlock * d + rows * (kBlock + 16 + 1) + 16; }

EFFK_EXPORT extern const Kernel* const kKernels[];  // best first
EFFK_EXPORT extern const int kKernelCount;

}  // namespace effk::attention
