// The kernels of csrc/gemm, written once over the vector vocabulary of csrc/simd. A tier file defines EFFK_TIER, includes
// its vocabulary and this file, and lists what it offers; everything here has internal linkage.
//
//   products  simd/gemm.h. Bound: multiply-adds.
//   packing   copies, or transposes blocks of 16 x 16: bound by the first-level cache, 0.1 to 0.4 cycles a value
//   finish    activation, rounding and the store of results that a product left in the first-level cache
#pragma once
#include <cstring>
#include <type_traits>

#include "gemm/kernels.h"
#include "simd/activation.h"
#include "simd/convert.h"
#include "simd/gemm.h"
#include "simd/interleave.h"
#include "simd/transpose.h"

namespace effk::EFFK_TIER {
namespace {

using gemm::Output;
using gemm::Source;

EFFK_INLINE const char* at(const Source& s, int64_t i, int64_t k) {
  return static_cast<const char*>(s.data) + (i * s.row + k * s.k_step) * int64_t(bytes_of(s.dtype));
}
EFFK_INLINE int upto16(int64_t n) { return int(n < 16 ? n : 16); }

// n lines of `width` <= 16 values that lie `stride` elements apart.
template <DType T> EFFK_INLINE void read_lines_as(const char* from, int64_t stride, int n, int width, float* to) {
  stride *= int64_t(bytes_of(T));
  if (width == 16) {
    for (int l = 0; l < n; ++l, from += stride) store_f32(to + l * 16, load_as<T>(from, 0));
  } else if (T != DType::f16 && width == 8) {  // a block of rows in 512 bits: halves of known size, no copy in part
    for (int l = 0; l < n; ++l, from += stride) {
      typename std::conditional<T == DType::f32, uint32_t, uint16_t>::type bits[8];
      uint32_t wide[16] = {};
      std::memcpy(bits, from, sizeof bits);
      for (int i = 0; i < 8; ++i) wide[i] = T == DType::f32 ? uint32_t(bits[i]) : uint32_t(bits[i]) << 16;
      std::memcpy(to + l * 16, wide, 64);
    }
  } else {
    for (int l = 0; l < n; ++l, from += stride) store_f32(to + l * 16, load_part<T>(from, 0, width));
  }
}
void read_lines(const char* from, DType t, int64_t stride, int n, int width, float* to) {
  switch (t) {
    case DType::bf16: return read_lines_as<DType::bf16>(from, stride, n, width, to);
    case DType::f16: return read_lines_as<DType::f16>(from, stride, n, width, to);
    default: return read_lines_as<DType::f32>(from, stride, n, width, to);
  }
}

// block[i][k] of elements (i0 + i, k0 + k), i < rows, k < count, both at most 16; zero beyond, rows beyond untouched when `by_k`
// is false. by_k: block[k][i].
void read_block(const Source& s, int64_t i0, int rows, int64_t k0, int count, bool by_k, float* block) {
  const bool k_runs = s.k_step == 1, i_runs = s.row == 1;
  if (k_runs || i_runs) {
    alignas(64) float lines[256];
    const bool turn = k_runs == by_k;  // lines run along the other index than wanted
    float* to = turn ? lines : block;
    const int n = k_runs ? rows : count, width = k_runs ? count : rows;
    if (n > 0) read_lines(at(s, i0, k0), s.dtype, k_runs ? s.row : s.k_step, n, width, to);
    for (int l = n; l < 16; ++l) store_f32(to + l * 16, zero_f());
    if (turn) transpose16(lines, block);
    return;
  }
  for (int l = 0; l < 16; ++l) store_f32(block + l * 16, zero_f());
  for (int i = 0; i < rows; ++i)
    for (int k = 0; k < count; ++k) block[by_k ? k * 16 + i : i * 16 + k] = float_at(at(s, i0 + i, k0 + k), s.dtype, 0);
}

EFFK_INLINE vi bf16_pairs(vf low, vf high) { return bits_or(bf16_bits(low), shift_left<16>(bf16_bits(high))); }

// Whole units of rows that lie as they are wanted: one pointer a row, or the copy takes longer than the load.
template <gemm::Form F, DType T> void copy_rows(const Source& s, int rows, int64_t units, char* to) {
  constexpr int kUnit = gemm::unit_k(F);
  for (int r = 0; r < rows; ++r) {
    const char* from = at(s, r, 0);
    char* out = to + r * gemm::kUnitBytes;
    for (int64_t u = 0; u < units; ++u, out += rows * gemm::kUnitBytes, from += kUnit * int64_t(bytes_of(T))) {
      if constexpr (F == gemm::Form::bf16) store_unit(out, load_unit(from));
      else store_f32(out, load_as<T>(from, 0));
    }
  }
}

// Units of 64 bytes: 16 fp32 values, or 32 of bf16.
template <gemm::Form F> void pack_rows(const Source& s, int rows, int64_t k, int64_t units, void* to) {
  constexpr int kUnit = gemm::unit_k(F), kHalves = kUnit / 16;
  char* out = static_cast<char*>(to);
  int64_t u = 0;
  if (s.k_step == 1) {
    u = k / kUnit;
    if constexpr (F == gemm::Form::bf16) copy_rows<F, DType::bf16>(s, rows, u, out);
    else if (s.dtype == DType::f32) copy_rows<F, DType::f32>(s, rows, u, out);
    else if (s.dtype == DType::bf16) copy_rows<F, DType::bf16>(s, rows, u, out);
    else copy_rows<F, DType::f16>(s, rows, u, out);
    out += u * rows * gemm::kUnitBytes;
  }
  for (; u < units; ++u, out += rows * gemm::kUnitBytes) {
    if constexpr (F == gemm::Form::bf16)
      if (s.row == 1 && rows == 16 && u * kUnit + kUnit <= k) {  // pairs of lines are pairs of k: one transpose for 16 x 32 values
        alignas(64) float pairs[256];
        for (int i = 0; i < 16; ++i) {
          const vi even = as_int(load_bf16(at(s, 0, u * kUnit + 2 * i))), odd = as_int(load_bf16(at(s, 0, u * kUnit + 2 * i + 1)));
          store_unit(pairs + i * 16, bits_or(shift_right<16>(even), odd));
        }
        transpose16(pairs, reinterpret_cast<float*>(out));
        continue;
      }
    for (int h = 0; h < kHalves; ++h) {
      alignas(64) float block[256];
      const int count = upto16(k - u * kUnit - 16 * h);
      read_block(s, 0, rows, u * kUnit + 16 * h, count < 0 ? 0 : count, false, block);
      for (int r = 0; r < rows; ++r) {
        if constexpr (F == gemm::Form::bf16) store_bf16(out + r * 64 + h * 32, load_f32(block + r * 16));
        else store_f32(out + r * 64, load_f32(block + r * 16));
      }
    }
  }
}

void pack_tile(const Source& s, int columns, int64_t k, DType panel, void* to) {
  char* out = static_cast<char*>(to);
  const int64_t depth = panel::padded(k, panel);
  for (int64_t k0 = 0; k0 < depth; k0 += 16) {
    alignas(64) float block[256];
    const int count = upto16(k - k0);
    if (panel == DType::bf16 && s.dtype == DType::bf16 && s.row == 1 && columns == 16 && count == 16) {  // pairs of lines as they are
      for (int i = 0; i < 16; i += 2, out += 64)
        store_unit(out, bits_or(shift_right<16>(as_int(load_bf16(at(s, 0, k0 + i)))), as_int(load_bf16(at(s, 0, k0 + i + 1)))));
      continue;
    }
    read_block(s, 0, columns, k0, count < 0 ? 0 : count, true, block);
    if (panel == DType::bf16) {
      for (int i = 0; i < 16; i += 2, out += 64) store_unit(out, bf16_pairs(load_f32(block + i * 16), load_f32(block + i * 16 + 16)));
    } else if (panel == DType::f16) {
      for (int i = 0; i < 16; ++i, out += 32) store_f16(out, load_f32(block + i * 16));
    } else {
      for (int i = 0; i < 16; ++i, out += 64) store_f32(out, load_f32(block + i * 16));
    }
  }
}

template <gemm::Form F> void multiply(const Product& p) {
#ifdef __AVX512BF16__
  if constexpr (F == gemm::Form::bf16) return multiply_rows<StepBf16, EFFK_GEMM_ROWS, EFFK_GEMM_TILES>(p);
#endif
  if constexpr (F == gemm::Form::fp32) {
    switch (p.b_dtype) {
      case DType::bf16: return multiply_rows<StepWide, EFFK_GEMM_ROWS, EFFK_GEMM_TILES>(p);
      case DType::f16: return multiply_rows<StepF16, EFFK_GEMM_ROWS, EFFK_GEMM_TILES>(p);
      default: return multiply_rows<StepF32, EFFK_GEMM_ROWS, EFFK_GEMM_TILES>(p);
    }
  }
}

void finish(const float* c, int64_t ldc, int64_t rows, int64_t columns, const Output& o) {
  const int64_t size = int64_t(bytes_of(o.dtype));
  char* y = static_cast<char*>(o.data);
  if (o.column == 1) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < columns; j += 16) {
        const int count = upto16(columns - j);
        store_floats(y + (r * o.row + j) * size, o.dtype, count, activate(load_f32_part(c + r * ldc + j, count), o.act));
      }
    return;
  }
  for (int64_t r = 0; r < rows; r += 16)  // o.row is 1: 16 rows make the vectors
    for (int64_t j = 0; j < columns; j += 16) {
      alignas(64) float block[256], turned[256];
      const int count = upto16(columns - j), width = upto16(rows - r);
      for (int i = 0; i < 16; ++i)
        store_f32(block + i * 16, i < width ? activate(load_f32_part(c + (r + i) * ldc + j, count), o.act) : zero_f());
      transpose16(block, turned);
      for (int i = 0; i < count; ++i) store_floats(y + (r * o.row + (j + i) * o.column) * size, o.dtype, width, load_f32(turned + i * 16));
    }
}

void sums(const Source& s, int columns, int64_t count, float* sum) {
  vf total = zero_f();
  for (int64_t i0 = 0; i0 < count; i0 += 64) {
    vf piece = zero_f();
    for (int64_t i = i0; i < count && i < i0 + 64; i += 16) {
      alignas(64) float block[256];
      const int n = upto16(count - i);
      read_block(s, 0, columns, i, n, true, block);
      for (int l = 0; l < n; ++l) piece = add_f(piece, load_f32(block + l * 16));
    }
    total = add_f(total, piece);
  }
  store_f32(sum, total);
}

}  // namespace
}  // namespace effk::EFFK_TIER
