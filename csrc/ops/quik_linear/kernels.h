// What the driver asks of a tier beside the products of csrc/gemm, and the table of everything there is.
#pragma once
#include <cstdint>

#include "isa/isa.h"
#include "ops/quik_linear/quik_linear.h"

namespace effk::quik {

// Columns of x that lie beside each other: the base columns as the weight has them are `count` runs.
struct Run { int32_t from, length; };
struct Columns {
  const Run* runs;
  int64_t count;
  QuikSplit split;
};
constexpr int64_t padded(int64_t k) { return (k + 63) / 64 * 64; }
// Floats that quantize needs: a row of base columns, and what the last whole vector of a run writes beyond.
constexpr int64_t room_floats(int64_t n_base) { return padded(n_base) + 16; }

struct Row {
  const void* x;        // whole row of x, k values
  DType dtype;
  float* room;
  int8_t* codes;        // 64 columns at codes + i * unit_step, i < padded / 64; 0 behind the last
  int64_t unit_step;
  float *scale, *zero;
  int32_t* sum;         // of the codes; or null
  void* x_out;          // [n_out]
};

struct Dequantize {
  const int32_t* acc;   // [rows][lda], whole vectors of 16 columns
  int64_t lda, rows, columns;
  const float *scale, *zero;
  float half;
  const float *w_scale, *w_reduced;  // of the first column; w_scale padded to 16
  const void* add;      // [rows] lines of `columns`, add_row elements apart (0: the same for all); or null
  DType add_dtype;
  int64_t add_row;
  float* to;            // [rows][lda], may be acc; columns beyond the last hold anything
};

struct Kernel {
  isa::Tier tier;
  const char* name;
  void (*quantize)(const Columns&, int bits, bool sim, const Row&);
  // Row of x to its base columns and its outliers, in its dtype.
  void (*split)(const Columns&, const void* x, DType, void* base, void* x_out);
  void (*dequantize)(const Dequantize&);
};
EFFK_EXPORT extern const Kernel* const kKernels[];  // best first
EFFK_EXPORT extern const int kKernelCount;

}  // namespace effk::quik
