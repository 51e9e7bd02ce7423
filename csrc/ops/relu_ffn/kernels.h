// What the driver asks of a tier.
#pragma once
#include "common/export.h"
#include "isa/isa.h"
#include "ops/relu_ffn/relu_ffn.h"

namespace effk::relu_ffn {

// Some rows: index[i], or first + i without a list.
struct List {
  const uint8_t* rows;
  int64_t row_bytes, units;
  const float* scales;      // [all rows, groups], or null
  int64_t groups, group;    // group: columns, 0: the row
  const int32_t* index;
  int64_t first, count;
};

struct Kernel {
  isa::Tier tier;
  const char* name;
  // out[b * out_row + i] = row i . x[b * x_row ..], b < tokens <= 8
  void (*dot[5])(const List&, const float* x, int64_t x_row, int tokens, float* out, int64_t out_row);
  // y[b * y_row + c] += sum_i h[b * h_row + i] row_i[c] for the columns of units [u0, u1), i ascending
  void (*add_rows[5])(const List&, const float* h, int64_t h_row, int tokens, int64_t u0, int64_t u1, float* y, int64_t y_row);
  // The active among gates g[b * g_row + j], j < count: how many are active for any token. position[n] = base + j, ascending,
  // a[b * a_row + n] the values, 0 for tokens where that one is inactive; nnz[b] grows. cut[b] or null: see Gate::gelu_gauss.
  // allowed[b * allowed_row + j / 16] or null: bit j % 16 of tokens that may be active.
  int64_t (*compact)(Gate, const float* g, int64_t g_row, int64_t count, const float* param, bool param_each, const float* cut, int tokens,
                     const uint16_t* allowed, int64_t allowed_row, int32_t base, int32_t* position, float* a, int64_t a_row, int32_t* nnz);
  // Values of any type to fp32, and back, rounded.
  void (*read)(const void* p, DType, int64_t length, int64_t begin, int64_t count, float* to);
  void (*write)(void* p, DType, int64_t count, const float* from);
};

EFFK_EXPORT extern const Kernel* const kKernels[];
EFFK_EXPORT extern const int kKernelCount;
const Kernel& kernel();  // of the tier in force

}  // namespace effk::relu_ffn
