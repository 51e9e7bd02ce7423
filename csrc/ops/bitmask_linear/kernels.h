// What the driver asks of a tier.
#pragma once
#include "common/export.h"
#include "isa/isa.h"
#include "ops/bitmask_linear/bitmask_linear.h"

namespace effk::bitmask {

constexpr int64_t kPieceBytes = 4096;  // of an expanded row: a panel's piece is 32 KiB, three tokens beside it 12

// Some tokens, ready for the products.
struct Tokens {
  const void* x;           // float: fp32 [count][x_row]; int8: uint8, q + 128; x_row: blocks * 64
  int64_t x_row;
  const float* sx;         // int8: [count]
  int64_t count;
};

struct Kernel {
  isa::Tier tier;
  const char* name;
  // One token as above; its columns in the order in which the tier expands values of this type.
  void (*read)(const void* x, DType, int64_t k, Values, float* to, int64_t x_row);
  void (*quantize)(const void* x, DType, int64_t k, uint8_t* to, int64_t x_row, float* sx);
  // Panels [p0, p1) for all tokens; y: that of the first token. room: room_bytes(count).
  void (*multiply)(const Args&, const Tokens&, int64_t p0, int64_t p1, char* y, char* room);
};
// Of a panel: the expanded piece, then for each token and row a vector of sums (float), or an integer and a float (int8).
constexpr int64_t room_bytes(int64_t tokens) { return kRows * kPieceBytes + tokens * kRows * 64; }

EFFK_EXPORT extern const Kernel* const kKernels[];
EFFK_EXPORT extern const int kKernelCount;

}  // namespace effk::bitmask
