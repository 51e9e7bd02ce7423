// t16: the packed layout of low-bit weights that every kernel reads, on every CPU tier and on CUDA. Version 1.
//
// A weight W[N, K] of b-bit unsigned codes is cut into tiles of 16 rows and, along K, into chunks. A *unit* is 64 bytes:
// byte (row, kk) = row * 4 + kk for 16 rows and 4 consecutive k, so that one 512-bit register (or two 256-bit halves,
// rows 0-7 and 8-15, or one 32-bit word per row in a CUDA lane) holds 16 dot products of length 4.
//
//   b = 8   chunk = 1 unit,   4 k:   byte(row, kk)          = code of k = 4*chunk + kk
//   b = 4   chunk = 1 unit,   8 k:   bits 4f..4f+3, f < 2   = code of k = 8*chunk + 4f + kk
//   b = 2   chunk = 1 unit,  16 k:   bits 2f..2f+1, f < 4   = code of k = 16*chunk + 4f + kk
//   b = 3   chunk = 3 units, 32 k:   units 0 and 1: low two bits, as b = 2, of the first and the second 16 k;
//                                    unit 2: bit f, f < 8   = high bit of k = 32*chunk + 4f + kk
//
//   packed [tiles][chunks][chunk bytes]                tiles = ceil(N / 16), chunks = ceil(K / chunk k)
//   scales [tiles][groups][16]  fp16 or fp32           groups = ceil(K / group)
//   zeros  [tiles][groups][16]  uint8, optional        absent: the zero point is 2^(b-1) everywhere (symmetric)
//   codebook, optional: fp32 [2^b] for the whole weight, or fp32 [tiles][2^b][16] one table a row; replaces the integer
//   value of a code; such weights have no zeros.
//   out_ptr [N + 1], out_col [nnz], out_val [nnz], optional: sparse entries. Row n has out_ptr[n + 1] - out_ptr[n] of them,
//   columns ascending; those of a tile, from out_ptr[16 tile] on, lie rank by rank: the first of each row that has one, rows
//   ascending, then the second ones, and so on. So a vector of rows meets a run of entries, and no row waits for its sum.
//
// Padding: rows beyond N have code 0, scale 0; k beyond K has code 0 and meets a zero activation. Cutting: tiles
// [t0, t1) of every array are the weight's rows [16*t0, 16*t1); chunks and groups cut K at multiples of one group. The
// outer index of each array is the tile, so a cut by rows is a view.
// Why 4 k deep: it is what one int8 dot-product instruction consumes; why 16 rows: a 512-bit register of results, no
// horizontal sums; why unsigned codes: the first operand of the x86 instruction is unsigned, and zero points leave the
// inner loop as one term per group. Why 3 bits as 2 + 1: both parts unpack with aligned shifts and masks.
#pragma once
#include <cstddef>
#include <cstdint>

namespace effk::t16 {

constexpr int kVersion = 1;
constexpr int kTileRows = 16;
constexpr int kUnitBytes = 64;
constexpr int kMaxActGroup = 128;  // activations are quantised in groups of at most this many k

constexpr bool valid_bits(int bits) { return bits == 2 || bits == 3 || bits == 4 || bits == 8; }
constexpr int chunk_k(int bits) { return bits == 3 ? 32 : 32 / bits; }
constexpr int chunk_bytes(int bits) { return bits == 3 ? 3 * kUnitBytes : kUnitBytes; }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t tiles(int64_t n) { return ceil_div(n, kTileRows); }
constexpr int64_t chunks(int64_t k, int bits) { return ceil_div(k, chunk_k(bits)); }
constexpr int64_t padded_k(int64_t k, int bits) { return chunks(k, bits) * chunk_k(bits); }
constexpr int64_t packed_bytes(int64_t n, int64_t k, int bits) { return tiles(n) * chunks(k, bits) * chunk_bytes(bits); }

// group: 32, 64, 128, 256, or 0 for one group per row.
constexpr bool valid_group(int64_t g) { return g == 0 || g == 32 || g == 64 || g == 128 || g == 256; }
constexpr int64_t groups(int64_t k, int64_t group) { return group == 0 ? 1 : ceil_div(k, group); }
// Activation group of the int8 form: a divisor of the weight group, so that one scale pair covers it.
constexpr int act_group(int64_t group) { return group == 0 || group > kMaxActGroup ? kMaxActGroup : int(group); }

// Where the code of (row n, column k) lies: byte offset of its low bits and their shift; for b = 3 also the high bit.
struct Place { int64_t byte; int shift; int64_t high_byte; int high_shift; };
constexpr Place place(int64_t n, int64_t k, int64_t K, int bits) {
  const int64_t tile = n / kTileRows, row = n % kTileRows, c = k / chunk_k(bits), r = k % chunk_k(bits);
  const int64_t base = (tile * chunks(K, bits) + c) * chunk_bytes(bits), lane = row * 4 + r % 4;
  const int f = int(r / 4);
  if (bits == 3) return {base + (f / 4) * kUnitBytes + lane, 2 * (f % 4), base + 2 * kUnitBytes + lane, f};
  return {base + lane, bits * f, -1, 0};
}

// Where entry `rank` of row n lies in out_col and out_val. rows: N.
constexpr int64_t entry_place(const int32_t* out_ptr, int64_t rows, int64_t n, int64_t rank) {
  const int64_t first = n / kTileRows * kTileRows;
  int64_t at = out_ptr[first];
  for (int64_t r = first; r < first + kTileRows && r < rows; ++r) {
    const int64_t length = int64_t(out_ptr[r + 1]) - out_ptr[r];
    at += (length < rank ? length : rank) + (r < n && length > rank ? 1 : 0);
  }
  return at;
}

static_assert(packed_bytes(16, 128, 2) == 512 && packed_bytes(16, 128, 3) == 768 && packed_bytes(16, 128, 4) == 1024, "density");

}  // namespace effk::t16
