// Bitmask weights ("R8"): the values that are not zero, one stream, and a bit for every weight. Version 1.
//
// Rows come in panels of 8, columns in blocks of 64; rows beyond n are empty, bits beyond column k are 0.
//
//   masks   uint64 [panels][blocks][8 rows]   bit c of a word: column 64 block + c; the 8 words of a block are one cache line
//   values  [..]                              panel by panel, block by block, row 0 to 7: the values of the word's set bits, ascending;
//                                             fp32, bf16 or int8, and kTailBytes more that may be read
//   ptr     int64 [panels + 1]                where the values of a panel begin, in values; ptr[0] = 0
//   scales  fp32 [n][groups]                  int8 only: w = code * scale; a group is G columns of a row, G a multiple of 64, or the row
//   row_sum int32 [n][groups]                 int8 only: the sum of the codes of a group
//
// Example: the row 0 0 5 0 -1 0 0 2 has the mask 0x94 and the values 5 -1 2.
// Bytes a weight at sparsity s: (1 - s) size + 1/8. Why panels: eight independent popcount-to-address chains in one stream from
// memory, and one block of x for eight rows. Why no 16-byte alignment of panels: loads are of 64 bytes and unaligned anyway.
//
// In files the plain form ("R1", row by row, that of compressed-tensors) is kept: python/effk/formats/bitmask.py.
#pragma once
#include <cstdint>

namespace effk::bitmask {

constexpr int kVersion = 1;
constexpr int64_t kRows = 8, kBlock = 64, kTailBytes = 64;
enum class Values : int32_t { f32 = 0, bf16 = 1, i8 = 2 };
constexpr const char* kValueNames[] = {"fp32", "bf16", "int8"};

constexpr int64_t bytes_of(Values v) { return v == Values::f32 ? 4 : v == Values::bf16 ? 2 : 1; }
constexpr int64_t tail(Values v) { return kTailBytes / bytes_of(v); }  // elements
constexpr int64_t panels(int64_t n) { return (n + kRows - 1) / kRows; }
constexpr int64_t blocks(int64_t k) { return (k + kBlock - 1) / kBlock; }
constexpr bool valid_group(int64_t group, int64_t k) { return group == 0 || (group > 0 && group % kBlock == 0 && group < blocks(k) * kBlock); }
constexpr int64_t groups(int64_t k, int64_t group) { return group == 0 ? 1 : (k + group - 1) / group; }
constexpr int64_t word(int64_t blocks, int64_t row, int64_t block) { return (row / kRows * blocks + block) * kRows + row % kRows; }

}  // namespace effk::bitmask
