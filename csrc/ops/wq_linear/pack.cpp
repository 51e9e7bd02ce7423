// Canonical rows <-> t16, and back to fp32: portable code that follows t16::place byte by byte. Packing happens once, at
// load; a tile is done row by row so that reads stream.
#include <cstring>

#include "common/half.h"
#include "ops/wq_linear/wq_linear.h"

namespace effk {
namespace {

int get_code(const uint8_t* row, int64_t k, int bits) {
  const int64_t at = k * bits;
  int v = row[at / 8] >> (at % 8);
  if (at % 8 + bits > 8) v |= row[at / 8 + 1] << (8 - at % 8);
  return v & ((1 << bits) - 1);
}
void put_code(uint8_t* row, int64_t k, int bits, int code) {
  const int64_t at = k * bits;
  row[at / 8] = uint8_t(row[at / 8] | (code << (at % 8)));
  if (at % 8 + bits > 8) row[at / 8 + 1] = uint8_t(row[at / 8 + 1] | (code >> (8 - at % 8)));
}
int code_at(const uint8_t* packed, int64_t n, int64_t k, int64_t K, int bits) {
  const t16::Place p = t16::place(n, k, K, bits);
  if (bits == 3) return ((packed[p.byte] >> p.shift) & 3) | (((packed[p.high_byte] >> p.high_shift) & 1) << 2);
  return (packed[p.byte] >> p.shift) & ((1 << bits) - 1);
}
// [n][groups] <-> [tiles][groups][16] of `size`-byte items; padding rows are zero.
void to_tiles(const void* from, void* to, int64_t n, int64_t groups, int size) {
  std::memset(to, 0, size_t(t16::tiles(n) * groups * 16 * size));
  for (int64_t r = 0; r < n; ++r)
    for (int64_t g = 0; g < groups; ++g)
      std::memcpy(static_cast<char*>(to) + ((r / 16 * groups + g) * 16 + r % 16) * size,
                  static_cast<const char*>(from) + (r * groups + g) * size, size_t(size));
}
void from_tiles(const void* from, void* to, int64_t n, int64_t groups, int size) {
  for (int64_t r = 0; r < n; ++r)
    for (int64_t g = 0; g < groups; ++g)
      std::memcpy(static_cast<char*>(to) + (r * groups + g) * size,
                  static_cast<const char*>(from) + ((r / 16 * groups + g) * 16 + r % 16) * size, size_t(size));
}

}  // namespace

void wq_pack(const uint8_t* qweight, const void* scales, const uint8_t* zeros, int64_t n, int64_t k, int bits, int64_t group,
             int scale_bytes, uint8_t* packed, void* scales_p, uint8_t* zeros_p) {
  const int64_t row_bytes = t16::ceil_div(k * bits, 8), groups = t16::groups(k, group);
  std::memset(packed, 0, size_t(t16::packed_bytes(n, k, bits)));
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t c = 0; c < k; ++c) {
      const int code = get_code(qweight + r * row_bytes, c, bits);
      const t16::Place p = t16::place(r, c, k, bits);
      if (bits == 3) {
        packed[p.byte] = uint8_t(packed[p.byte] | ((code & 3) << p.shift));
        packed[p.high_byte] = uint8_t(packed[p.high_byte] | ((code >> 2) << p.high_shift));
      } else {
        packed[p.byte] = uint8_t(packed[p.byte] | (code << p.shift));
      }
    }
  }
  to_tiles(scales, scales_p, n, groups, scale_bytes);
  if (zeros) to_tiles(zeros, zeros_p, n, groups, 1);
}

void wq_unpack(const uint8_t* packed, const void* scales_p, const uint8_t* zeros_p, int64_t n, int64_t k, int bits, int64_t group,
               int scale_bytes, uint8_t* qweight, void* scales, uint8_t* zeros) {
  const int64_t row_bytes = t16::ceil_div(k * bits, 8), groups = t16::groups(k, group);
  std::memset(qweight, 0, size_t(n * row_bytes));
  for (int64_t r = 0; r < n; ++r)
    for (int64_t c = 0; c < k; ++c) put_code(qweight + r * row_bytes, c, bits, code_at(packed, r, c, k, bits));
  from_tiles(scales_p, scales, n, groups, scale_bytes);
  if (zeros_p) from_tiles(zeros_p, zeros, n, groups, 1);
}

WqWeight wq_cut(WqWeight w, int64_t begin, int64_t end) {
  const int64_t first = begin * t16::kTileRows;
  const int64_t group_rows = t16::groups(w.k, w.group) * t16::kTileRows;
  w.packed += begin * t16::chunks(w.k, w.bits) * t16::chunk_bytes(w.bits);
  w.scales = static_cast<const uint8_t*>(w.scales) + begin * group_rows * (w.scales_f32 ? 4 : 2);
  if (w.zeros) w.zeros += begin * group_rows;
  if (w.codebook_per_row) w.codebook += begin * (int64_t(1) << w.bits) * t16::kTileRows;
  if (w.out_ptr) w.out_ptr += first;  // its entries stay offsets into the whole list
  if (w.bias) w.bias = static_cast<const uint8_t*>(w.bias) + first * (w.bias_dtype == DType::f32 ? 4 : 2);
  w.n = (w.n < end * t16::kTileRows ? w.n : end * t16::kTileRows) - first;
  return w;
}

void wq_dequantize(const WqWeight& w, float* out) {
  const int64_t groups = t16::groups(w.k, w.group), span = w.group ? w.group : w.k;
  for (int64_t r = 0; r < w.n; ++r) {
    for (int64_t c = 0; c < w.k; ++c) {
      const int q = code_at(w.packed, r, c, w.k, w.bits);
      const int64_t at = (r / 16 * groups + c / span) * 16 + r % 16;
      const float s = w.scales_f32 ? static_cast<const float*>(w.scales)[at] : f16_to_float(static_cast<const uint16_t*>(w.scales)[at]);
      float v;
      if (w.codebook) v = w.codebook_per_row ? w.codebook[((r / 16 << w.bits) + q) * 16 + r % 16] : w.codebook[q];
      else v = float(q - (w.zeros ? w.zeros[at] : 1 << (w.bits - 1)));
      out[r * w.k + c] = s * v;
    }
    if (!w.out_ptr) continue;
    for (int32_t rank = 0; rank < w.out_ptr[r + 1] - w.out_ptr[r]; ++rank) {
      const int64_t j = t16::entry_place(w.out_ptr, w.n, r, rank);
      const int64_t c = w.col32 ? static_cast<const int32_t*>(w.out_col)[j] : static_cast<const uint16_t*>(w.out_col)[j];
      out[r * w.k + c] += f16_to_float(w.out_val[j]);
    }
  }
}

}  // namespace effk
