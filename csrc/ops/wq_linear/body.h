// The kernels of wq_linear, written once over the vector vocabulary of csrc/simd. A tier file defines EFFK_TIER, includes
// its vocabulary and this file, and lists what it offers; everything here has internal linkage.
//
// One idea serves all forms: a step is a 64-byte weight operand for 16 rows and a 32-bit operand of x, broadcast. Forms
// differ in how a unit of 64 codes becomes operands (`expand`) and in what a step does with them.
//   gemv  one to four rows of x, results in registers over all of K. Bound: weight bytes / bandwidth.
//   gemm  span by span (<= 128 k), a register block of up to 8 rows x 2 tiles for each row block. Codes are unpacked in
//         registers again for each block: beside 16 multiply-adds a unit that is nearly free, and cheaper than writing a
//         panel and reading it back; only table look-ups of a whole weight go through a panel. Bound: multiply-add rate.
#pragma once
#include <cmath>
#include <cstring>
#include <type_traits>

#include "common/half.h"
#include "ops/wq_linear/kernels.h"

namespace effk::EFFK_TIER {
namespace {

using wq::Form;
using wq::Rows;
using wq::Tile;

template <int I> using Index = std::integral_constant<int, I>;
template <int N, int I = 0, class F> EFFK_INLINE void unroll(const F& f) {
  if constexpr (I < N) { f(Index<I>()); unroll<N, I + 1>(f); }
}

// One chunk as loaded, and unit U of it: 64 codes, one per byte.
template <int Bits> struct Chunk { vi line[t16::chunk_bytes(Bits) / 64]; };
template <int Bits> EFFK_INLINE Chunk<Bits> load_chunk(const uint8_t* p) {
  Chunk<Bits> c;
  unroll<t16::chunk_bytes(Bits) / 64>([&](auto i) { c.line[i] = load_unit(p + 64 * i); });
  return c;
}
template <int Bits, int U> EFFK_INLINE vi unit_of(const Chunk<Bits>& c) {
  if constexpr (Bits == 8) return c.line[0];
  else if constexpr (Bits == 4) return bits_and(shift_right<4 * U>(c.line[0]), set_i(0x0f0f0f0f));
  else if constexpr (Bits == 2) return bits_and(shift_right<2 * U>(c.line[0]), set_i(0x03030303));
  else {
    const vi low = bits_and(shift_right<2 * (U % 4)>(c.line[U / 4]), set_i(0x03030303)), top = set_i(0x04040404);
    if constexpr (U < 2) return and_or(shift_left<2 - U>(c.line[2]), top, low);
    else return and_or(shift_right<U - 2>(c.line[2]), top, low);
  }
}
template <int Bits> constexpr int kUnits = t16::chunk_k(Bits) / 4;

// Constants of one weight, prepared once per kernel call.
struct Codes {
  Table table;      // fp32 value of a code: q - 2^(b-1), or the shared codebook
  vi table16;       // the same in bf16, twice; for the int8 form with a codebook the 16 bytes rint(T * 127 / max|T|) + 128
  int32_t zero;     // the int8 form's zero point when it is one number for the weight
  float rescale;    // int8 form with a codebook: max|T| / 127
};
// Of one tile and span: zero points as integers, and for the float forms less the 2^(b-1) that the table takes off.
struct Zeros { vi i; vf f; const float* codebook; };

template <bool Wide> struct Int8 {
  static constexpr Form kForm = Form::int8;
  static constexpr int kSteps = 1;
  using Acc = vi;
  template <int Bits, int Step> static EFFK_INLINE vi expand(vi unit, const Codes&, const Zeros&) { return unit; }
  static EFFK_INLINE Acc step(Acc a, vi w, vi x) { return dot_u8s8<Wide>(a, w, x); }
  // Zero points cost nothing inside the span: sum q xq - z sum xq starts at the second term.
  static EFFK_INLINE Acc init(const WqWeight& w, const Codes& c, const Zeros& z, int32_t sum) {
    return w.zeros ? sub_i(zero_i(), mul_i(z.i, set_i(sum))) : set_i(-c.zero * sum);
  }
  static EFFK_INLINE vf finish(Acc a, const WqWeight&, const Zeros&, vf s, float scale, int32_t, vf y) {
    return fma(to_float(a), mul_f(s, set_f(scale)), y);
  }
};

// Both float forms: multiply q - 2^(b-1), exact in either type, and take (z - 2^(b-1)) * sum x off once per span.
struct FloatForm {
  using Acc = vf;
  static EFFK_INLINE Acc init(const WqWeight&, const Codes&, const Zeros&, int32_t) { return zero_f(); }
  static EFFK_INLINE vf finish(Acc a, const WqWeight& w, const Zeros& z, vf s, float, int32_t sum, vf y) {
    if (w.zeros) a = fnma(z.f, as_float(set_i(sum)), a);
    return fma(a, s, y);
  }
};

struct Fp32 : FloatForm {
  static constexpr Form kForm = Form::fp32;
  static constexpr int kSteps = 4;
  template <int Bits, int Step> static EFFK_INLINE vi expand(vi unit, const Codes& c, const Zeros&) {
    const vi q = shift_right<8 * Step>(unit);
    if constexpr (Bits == 8) return as_int(sub_f(to_float(bits_and(q, set_i(255))), set_f(128.0f)));
    else return as_int(lookup(q, c.table));
  }
  static EFFK_INLINE Acc step(Acc a, vi w, vi x) { return fma(as_float(w), as_float(x), a); }
};

// One table a row: entry (code, row) of a tile lies at code * 16 + row.
struct Fp32Rows : Fp32 {
  template <int Bits, int Step> static EFFK_INLINE vi expand(vi unit, const Codes&, const Zeros& z) {
    const vi q = bits_and(shift_right<8 * Step>(unit), set_i(15));
    return as_int(gather(z.codebook, add_i(shift_left<4>(q), lane_index())));
  }
};

#ifdef __AVX512BF16__
// Integer codes only: q - 2^(b-1) is exact in bf16 (at most 8 significant bits), a codebook in general is not.
struct Bf16 : FloatForm {
  static constexpr Form kForm = Form::bf16;
  static constexpr int kSteps = 2;
  template <int Bits, int Step> static EFFK_INLINE vi expand(vi unit, const Codes& c, const Zeros&) {
    if constexpr (Bits < 8) return lookup16(shift_right<8 * Step>(unit), c.table16);
    const vi byte = set_i(255);
    const vf half = set_f(128.0f);
    const vf lo = sub_f(to_float(bits_and(shift_right<8 * Step>(unit), byte)), half);
    const vf hi = sub_f(to_float(shift_right<8 * Step + 16>(unit)), half);
    if constexpr (Step == 0) return bf16_pair(sub_f(to_float(bits_and(shift_right<16>(unit), byte)), half), lo);
    else return bf16_pair(hi, lo);
  }
  static EFFK_INLINE vi bf16_pair(vf hi, vf lo) { return and_or(as_int(hi), set_i(int32_t(0xffff0000u)), shift_right<16>(as_int(lo))); }
  static EFFK_INLINE Acc step(Acc a, vi w, vi x) { return dot_bf16(a, w, x); }
};
#endif

// Values of the integer codes, as fp32 and twice as bf16 (exact: bf16 is the upper half of these floats).
template <int Bits> struct IntegerTable {
  float fp32[16];
  uint16_t bf16[32];
  constexpr IntegerTable() : fp32{}, bf16{} {
    for (int i = 0; i < 32; ++i) {
      const int v = i % (1 << (Bits < 4 ? Bits : 4)) - (1 << (Bits - 1));
      if (i < 16) fp32[i] = float(v);
      unsigned m = unsigned(v < 0 ? -v : v), e = 0;
      while (m >> (e + 1)) ++e;
      bf16[i] = v == 0 ? 0 : uint16_t((v < 0 ? 0x8000u : 0u) | (127 + e) << 7 | ((m << (7 - e)) & 0x7fu));
    }
  }
};
template <int Bits> alignas(64) constexpr IntegerTable<Bits> kIntegers{};

template <class D, int Bits> EFFK_INLINE Codes codes_of(const WqWeight& w) {
  Codes c{};
  c.zero = 1 << (Bits - 1);
  c.rescale = 1.0f;
  if constexpr (Bits < 8) {
    const bool book = w.codebook && !w.codebook_per_row;
    constexpr int n = 1 << Bits;
    if constexpr (D::kForm == Form::fp32) {
      float t[16];
      if (book) for (int i = 0; i < 16; ++i) t[i] = w.codebook[i % n];
      c.table = load_float_table(book ? t : kIntegers<Bits>.fp32);
    } else if constexpr (D::kForm == Form::bf16) {
      c.table16 = load_unit(kIntegers<Bits>.bf16);
    } else if (book) {
      float top = 0;
      for (int i = 0; i < n; ++i) top = std::fabs(w.codebook[i]) > top ? std::fabs(w.codebook[i]) : top;
      uint8_t bytes[16];
      for (int i = 0; i < 16; ++i) bytes[i] = uint8_t(128 + (top > 0 ? int(std::nearbyintf(w.codebook[i % n] * (127.0f / top))) : 0));
      c.rescale = top / 127.0f;
      c.zero = 128;
      c.table16 = load_table(bytes);
    }
  }
  return c;
}

// Scales and zero points of (tile, span); vectors of 16 rows. Half a cache line a span is too slow a stream for hardware
// prefetchers: without asking for the next tile's line here, a fixed 35 us of a 4096 x 4096 product is waiting for scales.
EFFK_INLINE vf scales_of(const WqWeight& w, int64_t tile, int64_t group, int64_t groups) {
  const int64_t at = (tile * groups + group) * 16;
  prefetch(static_cast<const char*>(w.scales) + (at + groups * 16) * (w.scales_f32 ? 4 : 2));
  return w.scales_f32 ? load_f32(static_cast<const float*>(w.scales) + at) : load_f16(static_cast<const uint16_t*>(w.scales) + at);
}
EFFK_INLINE Zeros zeros_of(const WqWeight& w, int64_t tile, int64_t group, int64_t groups) {
  Zeros z{zero_i(), zero_f(), nullptr};
  if (w.zeros) {
    const uint8_t* p = w.zeros + (tile * groups + group) * 16;
    prefetch(p + groups * 16);
    z.i = load_u8(p);
    z.f = to_float(sub_i(z.i, set_i(1 << (w.bits - 1))));
  }
  if (w.codebook_per_row) z.codebook = w.codebook + tile * (int64_t(16) << w.bits);
  return z;
}

// K as spans of full_chunks chunks (the last may be shorter). Divisions are done once: at 2 bits a span lasts 50 cycles.
struct Spans {
  int full_chunks, last_chunks, group_shift;
  int64_t count;
  int chunks(int64_t h) const { return h + 1 < count ? full_chunks : last_chunks; }
  int64_t group(int64_t h) const { return h >> group_shift; }
};
template <int Bits> EFFK_INLINE Spans spans_of(const WqWeight& w, const Rows& r) {
  constexpr int ck = t16::chunk_k(Bits);
  const int last = int((w.k - (r.spans - 1) * r.span + ck - 1) / ck);
  return {r.span / ck, last, w.group == 0 ? 62 : w.group > r.span ? 1 : 0, r.spans};
}

// ---- preparing x ------------------------------------------------------------------------------------------------------

EFFK_INLINE vf load_any(const void* p, DType t, int64_t i) {
  const char* c = static_cast<const char*>(p);
  return t == DType::f32 ? load_f32(c + 4 * i) : t == DType::bf16 ? load_bf16(c + 2 * i) : load_f16(c + 2 * i);
}
EFFK_INLINE void store_any(void* p, DType t, int64_t i, vf v) {
  char* c = static_cast<char*>(p);
  if (t == DType::f32) store_f32(c + 4 * i, v);
  else if (t == DType::bf16) store_bf16(c + 2 * i, v);
  else store_f16(c + 2 * i, v);
}
EFFK_INLINE int64_t width(DType t) { return t == DType::f32 ? 4 : 2; }

// x[0 .. count) as fp32, zero-padded to a multiple of 32.
inline int load_span(const char* x, DType t, int count, float* out) {
  const int padded = (count + wq::kPadK - 1) / wq::kPadK * wq::kPadK;
  int i = 0;
  for (; i + 16 <= count; i += 16) store_f32(out + i, load_any(x, t, i));
  if (i < padded) {
    alignas(64) char tail[64] = {};
    if (i < count) std::memcpy(tail, x + i * width(t), size_t((count - i) * width(t)));
    store_f32(out + i, load_any(tail, t, 0));
    if (i + 16 < padded) store_f32(out + i + 16, zero_f());
  }
  return padded;
}

struct Quantised { float scale; int32_t sum; };
// v = max|x|, q = rint(x * (127 / v)): |q| <= 127 follows, -128 never occurs. Maxima are taken over the bit patterns, in
// which NaN and infinity are larger than every finite number.
inline Quantised quantise_span(const float* x, int padded, int8_t* q) {
  const vi magnitude = set_i(0x7fffffff);
  vi top = zero_i();
  for (int i = 0; i < padded; i += 16) top = max_i(top, bits_and(as_int(load_f32(x + i)), magnitude));
  const int32_t bits = reduce_max_i(top);
  const float v = bits_float(uint32_t(bits));
  const bool finite = bits < 0x7f800000;
  if (!finite || bits < 0x04000000) {  // 0x04000000 is 2^-119: below it 127 / v is not finite
    std::memset(q, 0, t16::kMaxActGroup);
    return {finite ? 0.0f : bits_float(0x7fc00000u), 0};
  }
  const vf inverse = set_f(127.0f / v);
  alignas(64) int8_t whole[t16::kMaxActGroup] = {};
  for (int i = 0; i < padded; i += 16) store_s8(whole + i, round_to_int(mul_f(load_f32(x + i), inverse)));
  vi sum = zero_i();
  for (int i = 0; i < padded; i += 64) sum = add_i(sum, sum_s8(load_unit(whole + i)));
  std::memcpy(q, whole, size_t(padded));
  return {v / 127.0f, reduce_add_i(sum)};
}

template <Form F> void prepare(const void* x, DType dtype, int block, const Rows& r) {
  const int rows = r.rows_in(block);
  const int64_t row0 = r.first_row(block);
  for (int64_t h = 0; h < r.spans; ++h) {
    for (int m = 0; m < rows; ++m) {
      const char* row = static_cast<const char*>(x) + (row0 + m) * r.k * width(dtype);
      const int64_t k0 = h * r.span, at = r.scale_at(block, h) + m;
      const int count = int(r.k - k0 < r.span ? r.k - k0 : r.span);
      alignas(64) float value[t16::kMaxActGroup];
      const int padded = load_span(row + k0 * width(dtype), dtype, count, value);
      int32_t* out = r.data + r.data_at(block, h, wq::steps_per_unit(F)) + m;
      if constexpr (F == Form::int8) {
        alignas(64) int32_t word[t16::kMaxActGroup / 4];
        const Quantised q = quantise_span(value, padded, reinterpret_cast<int8_t*>(word));
        r.scale[at] = q.scale;
        r.sum[at] = q.sum;
        for (int i = 0; i < padded / 4; ++i) out[i * rows] = word[i];
      } else {
        float sum = 0;
        for (int i = 0; i < padded; ++i) sum += value[i];
        r.sum[at] = int32_t(float_bits(sum));
        if constexpr (F == Form::fp32) {
          for (int i = 0; i < padded; ++i) out[i * rows] = int32_t(float_bits(value[i]));
        } else {
          for (int i = 0; i < padded; i += 4) {
            const uint32_t a = float_bits(value[i]) >> 16, b = float_bits(value[i + 1]) >> 16;
            out[(i / 2) * rows] = int32_t(a | (float_bits(value[i + 2]) & 0xffff0000u));
            out[(i / 2 + 1) * rows] = int32_t(b | (float_bits(value[i + 3]) & 0xffff0000u));
          }
        }
      }
    }
  }
}

// ---- outliers, and the last step of a tile -------------------------------------------------------------

// Asks for a tile's outliers before its dense part runs: their three short streams are too short for hardware prefetchers.
inline void prefetch_outliers(const WqWeight& w, int64_t tile) {
  const int64_t n0 = tile * 16, n1 = n0 + 16 < w.n ? n0 + 16 : w.n, size = w.col32 ? 4 : 2;
  const char* cols = static_cast<const char*>(w.out_col);
  const char* values = reinterpret_cast<const char*>(w.out_val);
  prefetch(w.out_ptr + n1 + 16);
  for (int64_t at = w.out_ptr[n0] * size; at < w.out_ptr[n1] * size; at += 64) prefetch(cols + at);
  for (int64_t at = w.out_ptr[n0] * 2; at < w.out_ptr[n1] * 2; at += 64) prefetch(values + at);
}

// A row's sparse sum has 16 partial sums, entry i going to partial i mod 16 by a fused multiply-add, folded by halves at the
// end: the same for every tier and for any number of rows of x.
//
// Few rows of x. All entries of a tile are gathered by one loop of scalar loads without a branch per row (a loop per row
// costs three times that in mispredicted exits and chain latency, vector gathers no less), then each row is a masked
// vector product.
constexpr int kPiece = 2048;
template <class Col>
inline void gather_piece(const WqWeight& w, const float* x, int64_t j, int count, float* values, float* picked) {
  const Col* cols = static_cast<const Col*>(w.out_col) + j;
  int i = 0;
  for (; i + 16 <= count; i += 16) {
    store_f32(values + i, load_f16(w.out_val + j + i));
    unroll<16>([&](auto q) { picked[i + q] = x[cols[i + q]]; });
  }
  if (i < count) store_f32(values + i, load_f16_part(w.out_val + j + i, count - i));
  for (; i < count; ++i) picked[i] = x[cols[i]];
}
EFFK_INLINE vf sparse_dot(const float* values, const float* picked, int count, vf acc) {
  for (int i = 0; i < count; i += 16) acc = fma(load_f32_part(values + i, count - i), load_f32_part(picked + i, count - i), acc);
  return acc;
}
template <class Col> inline void sparse_few(const Tile& t, int64_t n0, int lanes, const float* x, float* sum) {
  const WqWeight& w = *t.w;
  alignas(64) float values[kPiece], picked[kPiece];
  const int64_t first = w.out_ptr[n0], last = w.out_ptr[n0 + lanes];
  const bool whole = last - first <= kPiece;
  if (whole) gather_piece<Col>(w, x, first, int(last - first), values, picked);
  for (int lane = 0; lane < lanes; ++lane) {
    int64_t j = w.out_ptr[n0 + lane];
    const int64_t end = w.out_ptr[n0 + lane + 1];
    vf acc = zero_f();
    if (whole) acc = sparse_dot(values + (j - first), picked + (j - first), int(end - j), acc);
    else
      for (; j < end; j += kPiece) {  // a tile with very many entries: row by row, pieces of whole vectors
        const int count = int(end - j < kPiece ? end - j : kPiece);
        gather_piece<Col>(w, x, j, count, values, picked);
        acc = sparse_dot(values, picked, count, acc);
      }
    sum[lane] += reduce_add_f(acc);
  }
}
// Many rows of x: vectors over 16 of them, read from the transposed copy; added to acc[rows][16].
template <class Col> inline void sparse_many(const Tile& t, int64_t n0, int lanes, int64_t m0, int rows, float* acc) {
  const WqWeight& w = *t.w;
  const Col* cols = static_cast<const Col*>(w.out_col);
  for (int lane = 0; lane < lanes; ++lane) {
    const int64_t first = w.out_ptr[n0 + lane], end = w.out_ptr[n0 + lane + 1];
    for (int64_t mb = m0 / 16; mb * 16 < m0 + rows && first < end; ++mb) {
      const float* x = t.dense_x + mb * w.k * 16;
      vf part[16];
      unroll<16>([&](auto i) { part[i] = zero_f(); });
      for (int64_t j = first; j < end; j += 16)
        for (int64_t i = j; i < end && i < j + 16; ++i)
          part[i - j] = fma(set_f(f16_to_float(w.out_val[i])), load_f32(x + int64_t(cols[i]) * 16), part[i - j]);
      for (int half = 8; half; half /= 2) for (int i = 0; i < half; ++i) part[i] = add_f(part[i], part[i + half]);
      float sum[16];
      store_f32(sum, part[0]);
      for (int i = 0; i < 16; ++i) {
        const int64_t r = mb * 16 + i - m0;
        if (r >= 0 && r < rows) acc[r * 16 + lane] += sum[i];
      }
    }
  }
}
EFFK_INLINE int lanes_of(const WqWeight& w, int64_t tile) { return int(w.n - tile * 16 < 16 ? w.n - tile * 16 : 16); }

template <class Col> inline void add_outliers(const Tile& t, int64_t tile, int64_t m0, int rows, float* acc) {
  const int lanes = lanes_of(*t.w, tile);
  if (t.rows->m >= wq::kTransposeRows) return sparse_many<Col>(t, tile * 16, lanes, m0, rows, acc);
  for (int r = 0; r < rows; ++r) sparse_few<Col>(t, tile * 16, lanes, t.dense_x + (m0 + r) * t.w->k, acc + r * 16);
}

// Outliers, bias, rounding, store. acc[tile][row][16], `stride` floats from tile to tile. Rows outside, tiles inside: rows of
// y lie far apart, and one visit to each of their pages should serve all tiles.
template <int NT> inline void finish_tiles(const Tile& t, int64_t m0, int rows, float* acc, int64_t stride) {
  const WqWeight& w = *t.w;
  const int64_t size = width(t.y_dtype);
  vf bias[NT];
  for (int i = 0; i < t.tiles; ++i) {
    const int64_t tile = t.tile + i;
    float* a = acc + i * stride;
    if (w.out_ptr) w.col32 ? add_outliers<int32_t>(t, tile, m0, rows, a) : add_outliers<uint16_t>(t, tile, m0, rows, a);
    bias[i] = zero_f();
    if (!w.bias) continue;
    alignas(64) char part[64] = {};
    const int64_t bytes = width(w.bias_dtype);
    std::memcpy(part, static_cast<const char*>(w.bias) + tile * 16 * bytes, size_t(lanes_of(w, tile) * bytes));
    bias[i] = load_any(part, w.bias_dtype, 0);
  }
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < t.tiles; ++i) {
      const int64_t n0 = (t.tile + i) * 16;
      vf v = load_f32(acc + i * stride + r * 16);
      if (w.bias) v = add_f(v, bias[i]);
      char* out = static_cast<char*>(t.y) + ((m0 + r) * w.n + n0) * size;
      if (n0 + 16 <= w.n) {
        store_any(out, t.y_dtype, 0, v);
      } else {
        alignas(64) char part[64];
        store_any(part, t.y_dtype, 0, v);
        std::memcpy(out, part, size_t((w.n - n0) * size));
      }
    }
  }
}

// ---- gemv -------------------------------------------------------------------------------------------------------------

// Prefetch distance in bytes on the weight stream of each tile: tuned on Zen 5 (1 and 2 threads, 2 to 8 bits).
constexpr int kPrefetch = 2048;

// The inner loop: MR rows of x times one span of NT tiles, into acc. Exact sums may be split into parts to shorten chains.
template <class D, int Bits, int MR, int NT, int Parts>
EFFK_INLINE void dot_span(typename D::Acc (&acc)[MR][NT][Parts], const uint8_t* const* tile, int chunks, const int32_t* x, const Codes& codes,
                          const Zeros* z) {
  for (int c = 0; c < chunks; ++c) {
    Chunk<Bits> chunk[NT];
    unroll<NT>([&](auto i) {
      const uint8_t* p = tile[i] + c * t16::chunk_bytes(Bits);
      chunk[i] = load_chunk<Bits>(p);
      unroll<t16::chunk_bytes(Bits) / 64>([&](auto line) { prefetch_once(p + kPrefetch + 64 * line); });
    });
    unroll<kUnits<Bits>>([&](auto u) {
      vi unit[NT];
      unroll<NT>([&](auto i) { unit[i] = unit_of<Bits, u>(chunk[i]); });
      unroll<D::kSteps>([&](auto st) {
        vi w[NT];
        unroll<NT>([&](auto i) { w[i] = D::template expand<Bits, st>(unit[i], codes, z[i]); });
        unroll<MR>([&](auto m) {
          const vi xv = broadcast(x + (u * D::kSteps + st) * MR + m);
          unroll<NT>([&](auto i) { acc[m][i][u % Parts] = D::step(acc[m][i][u % Parts], w[i], xv); });
        });
      });
    });
    x += kUnits<Bits> * D::kSteps * MR;
  }
}

// Tiles beyond the last one repeat it: their results are dropped, and no second set of kernels is needed for the remainder.
template <int NT> EFFK_INLINE int64_t tile_index(const Tile& t, int i) { return t.tile + (i < t.tiles ? i : t.tiles - 1); }

// What is the same for all tiles of a weight, worked out once per call: a tile may last no more than a few hundred cycles.
template <class D, int Bits> struct Layout {
  Codes codes;
  Spans spans;
  int64_t groups, tile_bytes;
  Layout(const WqWeight& w, const Rows& r)
      : codes(codes_of<D, Bits>(w)), spans(spans_of<Bits>(w, r)), groups(t16::groups(w.k, w.group)),
        tile_bytes(t16::chunks(w.k, Bits) * t16::chunk_bytes(Bits)) {}
};

// NT tiles from t.tile on: out[tile][row of x][16].
template <class D, int Bits, int MR, int NT> void gemv_tiles(const Tile& t, const Layout<D, Bits>& layout, float* out) {
  const WqWeight& w = *t.w;
  const Rows& r = *t.rows;
  const Codes& codes = layout.codes;
  const Spans& spans = layout.spans;
  const int64_t groups = layout.groups, tile_bytes = layout.tile_bytes;
  constexpr int kParts = D::kForm == Form::int8 && MR * NT <= 4 ? 2 : 1;
  vf y[MR][NT];
  unroll<MR>([&](auto m) { unroll<NT>([&](auto i) { y[m][i] = zero_f(); }); });
  if (w.out_ptr) for (int i = 0; i < t.tiles; ++i) prefetch_outliers(w, t.tile + i);
  const uint8_t* p[NT];
  unroll<NT>([&](auto i) { p[i] = w.packed + tile_index<NT>(t, i) * tile_bytes; });
  const int32_t* x = r.data;
  for (int64_t h = 0; h < spans.count; ++h) {
    const int chunks = spans.chunks(h);
    const int64_t group = spans.group(h);
    typename D::Acc acc[MR][NT][kParts];
    Zeros z[NT];
    unroll<NT>([&](auto i) {
      z[i] = zeros_of(w, tile_index<NT>(t, i), group, groups);
      unroll<MR>([&](auto m) {
        acc[m][i][0] = D::init(w, codes, z[i], r.sum[h * MR + m]);
        if constexpr (kParts == 2) acc[m][i][1] = zero_i();
      });
    });
    dot_span<D, Bits, MR, NT, kParts>(acc, p, chunks, x, codes, z);
    x += chunks * kUnits<Bits> * D::kSteps * MR;
    unroll<NT>([&](auto i) {
      p[i] += chunks * t16::chunk_bytes(Bits);
      const vf scale = scales_of(w, tile_index<NT>(t, i), group, groups);
      unroll<MR>([&](auto m) {
        if constexpr (kParts == 2) acc[m][i][0] = add_i(acc[m][i][0], acc[m][i][1]);
        y[m][i] = D::finish(acc[m][i][0], w, z[i], scale, r.scale[h * MR + m], r.sum[h * MR + m], y[m][i]);
      });
    });
  }
  unroll<NT>([&](auto i) { unroll<MR>([&](auto m) { store_f32(out + (i * MR + m) * 16, y[m][i]); }); });
}

// The outliers of all tiles come last and together: between the tiles they would break the weight stream 256 times in a
// 4096 x 4096 product, and x would have to return to the first-level cache each time.
template <class D, int Bits, int NT> void gemv_run(const Tile& t) {
  const Layout<D, Bits> layout(*t.w, *t.rows);
  alignas(64) float y[(wq::kMaxGemvTiles + NT) * 4 * 16];
  const int m = int(t.rows->m);
  for (int i = 0; i < t.tiles; i += NT) {
    Tile part = t;
    part.tile = t.tile + i;
    part.tiles = t.tiles - i < NT ? t.tiles - i : NT;
    float* out = y + i * m * 16;
    switch (m) {
      case 1: gemv_tiles<D, Bits, 1, NT>(part, layout, out); break;
      case 2: gemv_tiles<D, Bits, 2, NT>(part, layout, out); break;
      case 3: gemv_tiles<D, Bits, 3, NT>(part, layout, out); break;
      default: gemv_tiles<D, Bits, 4, NT>(part, layout, out);
    }
  }
  finish_tiles<wq::kMaxGemvTiles>(t, 0, m, y, m * 16);
}
template <class D, class D8, int NT> void gemv(const Tile& t) {
  switch (t.w->bits) {
    case 2: return gemv_run<D, 2, NT>(t);
    case 3: return gemv_run<D, 3, NT>(t);
    case 4: return gemv_run<D, 4, NT>(t);
    default: return gemv_run<D8, 8, NT>(t);
  }
}

// ---- gemm -------------------------------------------------------------------------------------------------------------

// Operands of one span, for weights whose codes need a table look-up that is worth doing once.
template <class D, int Bits> inline void build_panel(const uint8_t* p, int chunks, const Codes& codes, const Zeros& z, uint8_t* panel) {
  for (int c = 0; c < chunks; ++c, p += t16::chunk_bytes(Bits), panel += kUnits<Bits> * D::kSteps * 64) {
    const Chunk<Bits> chunk = load_chunk<Bits>(p);
    unroll<kUnits<Bits>>([&](auto u) {
      vi unit = unit_of<Bits, u>(chunk);
      if constexpr (D::kForm == Form::int8) unit = shuffle_bytes(codes.table16, unit);
      unroll<D::kSteps>([&](auto st) { store_unit(panel + (u * D::kSteps + st) * 64, D::template expand<Bits, st>(unit, codes, z)); });
    });
  }
}
template <class D, int MR, int NT>
EFFK_INLINE void dot_panel(typename D::Acc (&acc)[MR][NT][1], const uint8_t* const* panel, int steps, const int32_t* x) {
  for (int k = 0; k < steps; ++k) {
    vi w[NT];
    unroll<NT>([&](auto i) { w[i] = load_unit(panel[i] + k * 64); });
    unroll<MR>([&](auto m) {
      const vi xv = broadcast(x + k * MR + m);
      unroll<NT>([&](auto i) { acc[m][i][0] = D::step(acc[m][i][0], w[i], xv); });
    });
  }
}

// One span as gemm sees it: packed tiles (or panels), scales and zero points.
template <int NT> struct SpanOfTiles { const uint8_t* p[NT]; vf scale[NT]; Zeros z[NT]; int chunks, steps; };

// One block of MR rows over one span; y[i] holds the block's results so far. Bits = 0: panels.
template <class D, int Bits, int MR, int NT>
void micro(const WqWeight& w, const Codes& codes, const SpanOfTiles<NT>& s, const int32_t* x, const float* scale, const int32_t* sum, float* y,
           int64_t y_stride) {
  typename D::Acc acc[MR][NT][1];
  unroll<MR>([&](auto m) { unroll<NT>([&](auto i) { acc[m][i][0] = D::init(w, codes, s.z[i], sum[m]); }); });
  if constexpr (Bits == 0) dot_panel<D, MR, NT>(acc, s.p, s.steps, x);
  else dot_span<D, Bits, MR, NT, 1>(acc, s.p, s.chunks, x, codes, s.z);
  unroll<MR>([&](auto m) {
    unroll<NT>([&](auto i) {
      float* p = y + i * y_stride + m * 16;
      store_f32(p, D::finish(acc[m][i][0], w, s.z[i], s.scale[i], scale[m], sum[m], load_f32(p)));
    });
  });
}
template <class D, int Bits, int NT, int MR = 1, class... A> inline void micro_rows(int rows, const A&... a) {
  if (rows == MR) return micro<D, Bits, MR, NT>(a...);
  if constexpr (MR < EFFK_BLOCK_ROWS) micro_rows<D, Bits, NT, MR + 1>(rows, a...);
}

template <class D, int Bits, int NT, bool Panel> void gemm_tiles(const Tile& t) {
  const WqWeight& w = *t.w;
  const Rows& r = *t.rows;
  const Layout<D, Bits> layout(w, r);
  const Codes& codes = layout.codes;
  const Spans& spans = layout.spans;
  const int64_t groups = layout.groups, tile_bytes = layout.tile_bytes;
  constexpr int64_t kStride = wq::kMaxBlocks * EFFK_BLOCK_ROWS * 16;
  constexpr int kPanelBytes = (t16::kMaxActGroup / 4) * D::kSteps * 64;
  alignas(64) uint8_t panel[Panel ? NT * kPanelBytes : 1];
  alignas(64) float y[NT * kStride];
  const int64_t m0 = r.first_row(t.block);
  int total = 0;
  for (int b = 0; b < t.blocks; ++b) total += r.rows_in(t.block + b);
  for (int i = 0; i < NT; ++i) std::memset(y + i * kStride, 0, size_t(total) * 64);
  for (int64_t h = 0; h < spans.count; ++h) {
    SpanOfTiles<NT> s;
    s.chunks = spans.chunks(h);
    s.steps = s.chunks * kUnits<Bits> * D::kSteps;
    for (int i = 0; i < NT; ++i) {
      const int64_t tile = tile_index<NT>(t, i);
      s.p[i] = w.packed + tile * tile_bytes + h * spans.full_chunks * t16::chunk_bytes(Bits);
      s.z[i] = zeros_of(w, tile, spans.group(h), groups);
      s.scale[i] = mul_f(scales_of(w, tile, spans.group(h), groups), set_f(codes.rescale));
      if constexpr (Panel) {
        build_panel<D, Bits>(s.p[i], s.chunks, codes, s.z[i], panel + i * kPanelBytes);
        s.p[i] = panel + i * kPanelBytes;
      }
    }
    for (int b = 0; b < t.blocks; ++b) {
      const int block = t.block + b;
      const int64_t at = r.scale_at(block, h);
      micro_rows<D, Panel ? 0 : Bits, NT>(r.rows_in(block), w, codes, s, r.data + r.data_at(block, h, D::kSteps), r.scale + at, r.sum + at,
                                          y + (r.first_row(block) - m0) * 16, kStride);
    }
  }
  finish_tiles<NT>(t, m0, total, y, kStride);
}

// D below 8 bits, D8 at 8 bits, DBook where codes go through a table of the weight.
template <class D, class D8, class DBook, int NT> void gemm(const Tile& t) {
  const bool book = t.w->codebook && (D::kForm == Form::int8 || t.w->codebook_per_row);
  switch (t.w->bits) {
    case 2: return book ? gemm_tiles<DBook, 2, NT, true>(t) : gemm_tiles<D, 2, NT, false>(t);
    case 3: return book ? gemm_tiles<DBook, 3, NT, true>(t) : gemm_tiles<D, 3, NT, false>(t);
    case 4: return book ? gemm_tiles<DBook, 4, NT, true>(t) : gemm_tiles<D, 4, NT, false>(t);
    default: return gemm_tiles<D8, 8, NT, false>(t);
  }
}

}  // namespace
}  // namespace effk::EFFK_TIER
