// CUDA side of quik_linear: the launch functions of cuda*.cu in this folder, free of torch and of CUDA headers; formulas
// and layouts are those of quik_linear.h, every pointer is device memory. They launch on `stream` of the current device,
// wait for nothing, allocate nothing, and return a cudaError_t (0: launched).
//
// Tensor cores multiply signed operands: the sign bit of an unsigned code of t16 is flipped on its way into a register,
// so no sum of activations is needed. Which operands:
//
//   operands   weights      activations   instruction                      where
//   int8       8 bits       int8          m16n8k32.s8                      everywhere
//   int8       4 bits       int8          the same: a code in the upper    everywhere
//                                         half of a byte is 16 times it
//   int4       4 bits       4 bits        m16n8k64.s4                      compute capability 8.x only
//
// Order of sums: the integers are exact; s_a s_w A is added to (z + h s_a) R in fp32, then the outlier columns in steps
// of 32 by the tensor core, then y_in, then bias, then one rounding. It depends on neither the tile nor the other rows.
#pragma once
#include "common/dtype.h"
#include "formats/t16.h"
#include "ops/quik_linear/quik_linear.h"

namespace effk::cuda::quik {

using Stream = void*;

constexpr int kRowUnit = 64;              // rows of codes that a product reads are filled with zeros to this many bytes
constexpr int64_t kMaxRows = 1 << 30;     // of activations and weights
constexpr int64_t kAlignment = 16;        // of packed weights and scales, and of what product() and quantise() exchange

// How codes of activations lie in a row.
enum class Form : int32_t {
  bytes,    // int8
  nibbles,  // column 2j in the low half of byte j, 2j + 1 in the high half
  units,    // of eight columns 0 4 1 5 2 6 3 7, low half first: as t16 has them, for the int4 operands
};
constexpr int64_t row_bytes(int64_t columns, Form form) {
  const int64_t bytes = form == Form::bytes ? columns : (columns + 1) / 2;
  return (bytes + kRowUnit - 1) / kRowUnit * kRowUnit;
}

struct Quantise {
  const void* x;                           // [m, k]
  DType dtype;
  int64_t m;
  QuikSplit split;
  int bits;
  QuikMode mode;
  Form form;
  uint8_t* codes;                          // [m, row_bytes]; what is behind the last code becomes zero
  int64_t row_bytes;
  float *scale, *zero;                     // [m]; an index out of range is as bad as a value that is not finite: NaN
  void* x_out;                             // [m, out_ld]; what is behind column n_out becomes zero
  int64_t out_ld;
};
int quantise(const Quantise& q, Stream stream);

// Codes of rows [m, columns] without padding, in `from`, to rows of row_bytes(columns, to). Not from units.
int repack(const uint8_t* codes, Form from, int64_t m, int64_t columns, Form to, uint8_t* out, Stream stream);

struct Product {
  const uint8_t* packed;                   // t16 of `bits`
  int64_t n, n_base;
  int bits;
  bool int4;                               // int4 operands: bits = 4 and codes as units; else codes as bytes
  const uint8_t* codes;                    // [m, row_bytes]
  int64_t m;
  int32_t* sums;                           // [m, n]: only the integers, or null
  // What follows is for y.
  const float *scale, *zero;               // [m]
  const float *w_scale, *w_reduced;        // t16 [tiles, 16]; [n]
  float half;                              // h
  const void *x_out, *w_out;               // [m, out_ld], [n, out_ld] of 16 bits, rows at multiples of 16 bytes; zeros behind n_out
  DType out_type;
  int64_t out_ld;                          // 0: no outliers
  const uint32_t* header;                  // not null: eight words that must be `expected`; else y is NaN
  uint32_t expected[8];
  const float* y_in;                       // [m, n] or null
  const void* bias;                        // [n] or null
  DType bias_type;
  void* y;                                 // [m, n]
  DType y_type;
  int shape;                               // 0: chosen; 1 large tiles, 2 small ones, for tests and timing
};
int product(const Product& p, Stream stream);

// The columns of x in the order of the split: out[m, j], j < columns, is base column j or, behind those, an outlier; zero up
// to ld. Elements of 2 or 4 bytes. An index out of range gives NaN.
struct Split {
  const void* x;                           // [m, split.k]
  DType dtype;
  int64_t m;
  QuikSplit split;
  int64_t columns, ld;
  void* out;
};
int split_columns(const Split& s, Stream stream);

// y[m, n] = sum over outliers of x and w_out, fp32: what wq_linear adds to its sums where activations are not quantised.
// Few rows; lanes take every 32nd outlier, ascending, and are added in a tree.
struct Outliers {
  const void* x;                           // [m, split.k]
  DType dtype;
  int64_t m;
  QuikSplit split;
  const void* w_out;                       // [n, ld]
  DType out_type;
  int64_t n, ld;
  const uint32_t* header;                  // as in Product
  uint32_t expected[8];
  float* y;
};
int outlier_sums(const Outliers& o, Stream stream);

// The weight in `dtype`, columns in the order of the split: [n, n_base + n_out], each value rounded once.
struct Assemble {
  const uint8_t* packed;
  const float* w_scale;
  int64_t n, n_base, n_out;
  int bits;
  const void* w_out;                       // [n, ld] of out_type
  DType out_type;
  int64_t ld;
  const uint32_t* header;
  uint32_t expected[8];
  DType dtype;
  void* out;
};
int assemble(const Assemble& a, Stream stream);

// Whether the current device multiplies int4.
int has_int4(bool& answer);

// y = s_a s_w A + (z + h s_a) R + y_in: the epilogue alone.
struct Dequantise {
  const int32_t* sums;
  const float *scale, *zero, *w_scale, *w_reduced;
  const void* y_in;                        // or null
  DType in_type;
  int64_t m, n;
  float half;
  void* y;
  DType y_type;
};
int dequantise(const Dequantise& d, Stream stream);

const char* error_text(int error);

}  // namespace effk::cuda::quik
