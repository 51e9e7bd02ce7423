// Neuron rows: the weights of a feed-forward layer with one neuron behind the other, so that an inactive one is not read. Version 1.
//
// gate and up are stored as they are, W[f, d]; down transposed, so that row i is what neuron i adds to the output. A row is a whole
// number of units of 64 bytes, zeros beyond column d; rows lie one behind the other.
//
//   f32, bf16, f16   column c at byte c * size
//   i8               column c at byte c; w = code * scale
//   i4               unit c / 128, 32-bit word c % 16, bits 4s..4s+3 with s = c % 128 / 16; w = (code - 8) * scale
//
// scales fp32 [f, groups]: a group is G = 32, 64 or 128 columns of one row, or the whole row (G = 0). Groups lie inside a row:
// along neurons, one active neuron would need the scales of all outputs.
// Why 16 words of nibbles 16 columns apart: a shift and a table look-up give 16 neighbouring columns.
#pragma once
#include <cstdint>

namespace effk::neuron {

constexpr int kVersion = 1;
constexpr int64_t kUnitBytes = 64, kChunk = 16;  // columns of one vector
enum class Rows : int32_t { f32 = 0, bf16 = 1, f16 = 2, i8 = 3, i4 = 4 };
constexpr const char* kRowNames[] = {"fp32", "bf16", "fp16", "int8", "int4"};

constexpr int64_t unit_columns(Rows r) { return r == Rows::f32 ? 16 : r == Rows::i8 ? 64 : r == Rows::i4 ? 128 : 32; }
constexpr int64_t units(Rows r, int64_t d) { return (d + unit_columns(r) - 1) / unit_columns(r); }
constexpr int64_t row_bytes(Rows r, int64_t d) { return units(r, d) * kUnitBytes; }
constexpr bool quantised(Rows r) { return r == Rows::i8 || r == Rows::i4; }
constexpr bool valid_group(int64_t g) { return g == 0 || g == 32 || g == 64 || g == 128; }
constexpr int64_t groups(int64_t d, int64_t group) { return group == 0 ? 1 : (d + group - 1) / group; }
constexpr int64_t padded(int64_t d) { return (d + 127) / 128 * 128; }  // of activations that meet rows of any kind

}  // namespace effk::neuron
