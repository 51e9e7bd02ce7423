// The key-value cache of one attention layer: preallocated, written in place, never copied while it grows. Version 1.
//
// A slot is a sequence. Of every slot and kv head, with positions p, channels c < D (a multiple of 16) and P = capacity rounded up to
// whole tiles of 16 positions:
//
//   keys    f16, f32   [P / 16][D][16]        element ((p / 16) * D + c) * 16 + p % 16
//           i8         [P / 16][D / 4][16][4] byte (((p / 16) * D / 4 + c / 4) * 16 + p % 16) * 4 + c % 4: code + 128, unsigned
//   values  f16, f32   [P][D]                 element p * D + c
//           i8         [P][D]                 byte p * D + c: code, signed
//   scales  i8 only    [P] fp32, of keys and of values: x = code * scale, code in [-127, 127]
//
// Every array is [slots][kv heads] of these. What lies beyond a sequence's length is never used, whatever it is.
// Why keys are transposed: 16 positions are the lanes of a vector, so a dot product of a query with 16 keys ends without a sum over lanes;
// 4 channels together in i8: what one int8 dot-product instruction consumes, and unsigned: its first operand is. Why tiles of 16 and not
// longer columns: a sequence grows inside one place of 32 D bytes. Why one scale a position: it is known when a token is appended.
#pragma once
#include <cstdint>

namespace effk::kv {

constexpr int kVersion = 1;
constexpr int64_t kTile = 16;       // positions of a tile of keys
constexpr int64_t kMaxHeadDim = 256;
enum class Type : int32_t { f16 = 0, i8 = 1, f32 = 2 };
constexpr const char* kTypeNames[] = {"fp16", "int8", "fp32"};

constexpr bool valid_head_dim(int64_t d) { return d >= 16 && d <= kMaxHeadDim && d % 16 == 0; }
constexpr int64_t element_bytes(Type t) { return t == Type::f32 ? 4 : t == Type::f16 ? 2 : 1; }
constexpr int64_t padded(int64_t capacity) { return (capacity + kTile - 1) / kTile * kTile; }
constexpr int64_t tile_bytes(Type t, int64_t d) { return kTile * d * element_bytes(t); }             // of keys, and of 16 positions of values
constexpr int64_t head_bytes(Type t, int64_t capacity, int64_t d) { return padded(capacity) * d * element_bytes(t); }  // of one slot and head
// Where channel c of the key of position p lies in its slot and head; neighbours in c are `kTile` elements apart, or i8 bytes in groups of 4.
constexpr int64_t key_byte(Type t, int64_t d, int64_t p, int64_t c) {
  if (t == Type::i8) return (((p / kTile) * (d / 4) + c / 4) * kTile + p % kTile) * 4 + c % 4;
  return (((p / kTile) * d + c) * kTile + p % kTile) * element_bytes(t);
}
constexpr int64_t value_byte(Type t, int64_t d, int64_t p, int64_t c) { return (p * d + c) * element_bytes(t); }

}  // namespace effk::kv
