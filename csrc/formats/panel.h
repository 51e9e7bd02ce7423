// panel: packed weights of dense_linear and dyad_linear, the same for every CPU tier. Version 1.
//
//   bytes [0, 64)   header: struct Header, little endian, zeros behind it; its checksum is FNV-1a of the 40 bytes before it
//   then            [matrix][tile][k][16 columns]
//
// A matrix B[K, N] multiplies rows of activations from the right: column o is output o. Tiles hold 16 columns, K-major, so
// that one 512-bit load meets one broadcast activation:
//   fp32   [k][16] floats          fp16   [k][16] halves           unit_k = 16
//   bf16   [k / 2][16][2]          pairs (k, k + 1) beside each other, what a bf16 dot product consumes; unit_k = 32
// K is a sequence of parts, each padded with zeros to a multiple of unit_k; columns are padded with zeros to 16.
//   dense  1 matrix,    one part f_in:           B[i, o] = W[o, i]
//   it     n matrices,  two parts of d_in:       B_d = [wl_d | wu_d]^T, one product over both
//   ot, dt 2 n matrices, one part of d_in:       wl_0 .. wl_(n-1), wu_0 .. wu_(n-1): their results go to different rows
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "common/dtype.h"

namespace effk::panel {

constexpr uint32_t kMagic = 0x4c4e5045, kVersion = 1;  // "EPNL"
constexpr int64_t kHeaderBytes = 64;
constexpr int kColumns = 16;

enum class Kind : int32_t { dense = 0, it = 1, ot = 2, dt = 3 };

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t bytes_of(DType t) { return t == DType::f32 ? 4 : 2; }
constexpr int64_t unit_k(DType t) { return t == DType::bf16 ? 32 : 16; }
constexpr int64_t padded(int64_t k, DType t) { return ceil_div(k, unit_k(t)) * unit_k(t); }
constexpr int64_t tiles(int64_t columns) { return ceil_div(columns, kColumns); }

struct Shape {
  Kind kind;
  DType dtype;
  int64_t n, d_out, d_in;  // dense: n = 1, the whole sides
  constexpr int64_t matrices() const { return kind == Kind::ot || kind == Kind::dt ? 2 * n : n; }
  constexpr int64_t parts() const { return kind == Kind::it ? 2 : 1; }
  constexpr int64_t depth() const { return parts() * padded(d_in, dtype); }
  constexpr int64_t tile_bytes() const { return depth() * kColumns * bytes_of(dtype); }
  constexpr int64_t matrix_bytes() const { return tiles(d_out) * tile_bytes(); }
  constexpr int64_t bytes() const { return kHeaderBytes + matrices() * matrix_bytes(); }
};

struct Header {
  uint32_t magic, version;
  int32_t kind, dtype;
  int64_t n, d_out, d_in;
  uint64_t checksum;
};
static_assert(sizeof(Header) == 48 && sizeof(Header) <= kHeaderBytes, "header");

static inline uint64_t checksum(const uint8_t* header) {
  uint64_t hash = 0xcbf29ce484222325;
  for (size_t i = 0; i < offsetof(Header, checksum); ++i) hash = (hash ^ header[i]) * 0x100000001b3;
  return hash;
}
static inline void write_header(const Shape& s, uint8_t* to) {
  Header h{kMagic, kVersion, int32_t(s.kind), int32_t(s.dtype), s.n, s.d_out, s.d_in, 0};
  std::memset(to, 0, kHeaderBytes);
  std::memcpy(to, &h, sizeof h);
  h.checksum = checksum(to);
  std::memcpy(to, &h, sizeof h);
}
static inline Header read_header(const uint8_t* from) {
  Header h;
  std::memcpy(&h, from, sizeof h);
  return h;
}
static inline bool intact(const uint8_t* from) {
  for (int64_t i = sizeof(Header); i < kHeaderBytes; ++i)
    if (from[i]) return false;
  return read_header(from).checksum == checksum(from);
}

// Byte offset, behind the header, of (matrix, part, k inside the part, column).
constexpr int64_t place(const Shape& s, int64_t matrix, int64_t part, int64_t k, int64_t column) {
  const int64_t tile = matrix * s.matrix_bytes() + column / kColumns * s.tile_bytes(), lane = column % kColumns;
  const int64_t row = part * padded(s.d_in, s.dtype) + k;
  if (s.dtype == DType::bf16) return tile + (row / 2 * kColumns + lane) * 4 + row % 2 * 2;
  return tile + (row * kColumns + lane) * bytes_of(s.dtype);
}

}  // namespace effk::panel
