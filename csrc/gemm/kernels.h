// What the blocking of csrc/gemm asks of a tier, and the table of everything there is. dense_linear and dyad_linear
// run on it. A kernel does arithmetic on a block; memory, threads and the choice of kernel belong to the driver.
#pragma once
#include <cstdint>

#include "common/activation.h"
#include "common/dtype.h"
#include "common/export.h"
#include "formats/panel.h"
#include "isa/isa.h"

namespace effk::gemm {

// How activations meet weights: fp32 multiply-adds (weights of 16 bits are widened in registers), or dot products of
// bf16 pairs, for activations and weights in bf16.
enum class Form : int32_t { fp32 = 0, bf16 = 1 };
constexpr int kUnitBytes = 64;                                         // of a packed row: 16 steps
constexpr int64_t unit_k(Form f) { return f == Form::bf16 ? 32 : 16; }
constexpr int kMaxRows = 8, kMaxTiles = 4;

// Element (i, k) of an operand: data[i * row + k * k_step], strides in elements; i is a row of a or a column of b.
struct Source {
  const void* data;
  DType dtype;
  int64_t row, k_step;
};

// One block of rows of a times some tiles of b over a range of k; the sums are described in simd/gemm.h.
struct Product {
  const void* a;            // first of `rows` rows of 64 bytes
  int64_t a_unit;           // bytes between units of a
  const uint8_t* b;         // first step of the first tile
  int64_t b_tile, units;    // bytes between tiles
  const float* init;        // [tiles][16] to start from, or null: zero
  bool accumulate;          // add to c instead
  float* c;
  int64_t ldc;              // floats between rows
  int rows, tiles, last;    // last: columns of the last tile, 1 to 16; nothing beyond is touched
  DType b_dtype;
  const uint8_t* ahead;     // fetched into the second-level cache meanwhile, `ahead_unit` bytes per unit, or null
  int64_t ahead_unit;
};

// Where finished results go: act(c[r][j]) to data[r * row + j * column], rounded to dtype.
struct Output {
  void* data;
  DType dtype;
  int64_t row, column;
  Activation act;
};

struct Kernel {
  isa::Tier tier;
  bool needs_bf16;
  Form form;
  const char* name;
  int rows, tiles;      // of the largest block
  // Rows [0, rows <= 16) and k elements of a to [units][rows][64 bytes], zero beyond k. The bf16 form takes bf16 only.
  void (*pack_rows)(const Source&, int rows, int64_t k, int64_t units, void* to);
  // Columns [0, columns <= 16) and k elements of b to one part of one tile, zero beyond.
  void (*pack_tile)(const Source&, int columns, int64_t k, DType panel, void* to);
  void (*multiply)(const Product&);
  void (*finish)(const float* c, int64_t ldc, int64_t rows, int64_t columns, const Output&);
  // Element i < d of class r < n, row[i * n + r], to to[r * to_row + i / unit * to_unit + i % unit]; elements of `bytes` bytes,
  // `unit` of them in 64 bytes.
  void (*deinterleave)(const void* row, int bytes, int64_t d, int64_t n, void* to, int64_t to_row, int64_t to_unit);
  // y[i * n + r] += z[r * z_row + i].
  void (*interleave_add)(const float* z, int64_t z_row, int64_t d, int64_t n, float* y);
  // sum[j] = sum_{i < count} of element (j, i), j < columns <= 16: pieces of 64 in fp32, then the pieces, both in order.
  void (*sums)(const Source&, int columns, int64_t count, float* sum);
};

EFFK_EXPORT extern const Kernel* const kKernels[];  // best first
EFFK_EXPORT extern const int kKernelCount;

}  // namespace effk::gemm
