// Contract of sp24: int8 weights of which half the columns are zero in a fixed pattern, at 5/8 of the bytes (9/16 in pairs).
//
//   "2:4"      of 4 adjacent columns at most 2 are not zero: 2 values, each with the 2 bits of its place
//   "pair4:8"  of 4 adjacent pairs of columns at most 2 are not zero: 2 pairs, each with the 2 bits of its place
//
//   values int8 [n, k / 2]                 kept columns in ascending order
//   meta   uint8 [n, ceil(kept / 4)]       place i of a row in bits 2 (i % 4), 2 (i % 4) + 1 of byte i / 4; kept: k / 2, or k / 4 pairs
// A group with fewer columns than it may keep fills up with the lowest of its other places, so that places always ascend.
// Place (2:4): column 4 (i / 2) + p;  (pair4:8): columns 8 (i / 2) + 2 p and the next.
#pragma once
#include <cstddef>
#include <cstdint>

#include "common/parallel.h"

namespace effk {

enum class Sp24 : int32_t { elements = 0, pairs = 1 };

constexpr int64_t sp24_period(Sp24 p) { return p == Sp24::pairs ? 8 : 4; }                  // k is a multiple of it
constexpr int64_t sp24_kept(Sp24 p, int64_t k) { return p == Sp24::pairs ? k / 4 : k / 2; } // places in a row
constexpr int64_t sp24_meta_bytes(Sp24 p, int64_t k) { return (sp24_kept(p, k) + 3) / 4; }

// False, and nothing promised about the results, when a row breaks the pattern; *row is then the first that does.
bool sp24_compress(const int8_t* w, int64_t n, int64_t k, Sp24, int8_t* values, uint8_t* meta, int64_t* row);
void sp24_decompress(const int8_t* values, const uint8_t* meta, int64_t n, int64_t k, Sp24, int8_t* w, const ParallelFor&);

// acc[m, n] = sum_k qx[m, k] w[n, k], exact int32 for k <= 131071. Weights are expanded a few tiles at a time, once for all rows.
struct Sp24MatmulArgs {
  const int8_t* qx;         // [m, k]
  int64_t m, k;
  const int8_t* values;
  const uint8_t* meta;
  Sp24 pattern;
  int64_t n;
  int32_t* acc;             // [m, n]
};
size_t sp24_matmul_workspace(const Sp24MatmulArgs&, int threads);
void sp24_matmul(const Sp24MatmulArgs&, void* workspace, const ParallelFor&);

}  // namespace effk
