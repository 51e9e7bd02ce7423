// The kernels of wq_linear, written once over the vector vocabulary of csrc/simd. A tier file defines EFFK_TIER, includes
// its vocabulary and this file, and lists what it offers; everything here has internal linkage.
//
// One idea serves all forms: a step is a 64-byte weight operand for 16 rows and a 32-bit operand of x, broadcast. Forms
// differ in how a unit of 64 codes becomes operands (`expand`) and in what a step does with them.
//   gemv  unpacks in registers and uses each operand for up to four rows of x at once. Bound: weight bytes / bandwidth.
//   gemm  expands one span (<= 128 k) of a pair of tiles into a panel in L1 and runs a register-blocked loop of
//         block_rows x 2 tiles over it for every row block. Bound: multiply-add rate; per span 4 operations an output.
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

// Calls f(Index<u>, codes) for each unit u of a chunk: 64 codes, one per byte.
template <int Bits, class F> EFFK_INLINE void each_unit(const uint8_t* p, const F& f) {
  if constexpr (Bits == 8) {
    f(Index<0>(), load_unit(p));
  } else if constexpr (Bits == 4) {
    const vi v = load_unit(p), low = set_i(0x0f0f0f0f);
    f(Index<0>(), bits_and(v, low));
    f(Index<1>(), bits_and(shift_right<4>(v), low));
  } else if constexpr (Bits == 2) {
    const vi v = load_unit(p), low = set_i(0x03030303);
    unroll<4>([&](auto u) { f(u, bits_and(shift_right<2 * u>(v), low)); });
  } else {
    const vi lo0 = load_unit(p), lo1 = load_unit(p + 64), hi = load_unit(p + 128), low = set_i(0x03030303), top = set_i(0x04040404);
    unroll<8>([&](auto u) {
      const vi lo = bits_and(shift_right<2 * (u % 4)>(u < 4 ? lo0 : lo1), low);
      vi h;
      if constexpr (u < 2) h = shift_left<2 - u>(hi); else h = shift_right<u - 2>(hi);
      f(u, and_or(h, top, lo));
    });
  }
}

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

inline Codes codes_of(const WqWeight& w, Form form) {
  Codes c{};
  const int half = 1 << (w.bits - 1), n = w.bits < 8 ? 1 << w.bits : 16;
  const bool book = w.codebook && !w.codebook_per_row;
  float t[16];
  for (int i = 0; i < 16; ++i) t[i] = book ? w.codebook[i % n] : float(i % n - half);
  c.table = load_float_table(t);
  c.zero = half;
  c.rescale = 1.0f;
  uint8_t bytes[64] = {};
  if (form == Form::int8 && book) {
    float top = 0;
    for (int i = 0; i < n; ++i) top = std::fabs(t[i]) > top ? std::fabs(t[i]) : top;
    c.rescale = top / 127.0f;
    for (int i = 0; i < 16; ++i) bytes[i] = uint8_t(128 + (top > 0 ? int(std::nearbyintf(t[i] * (127.0f / top))) : 0));
    c.zero = 128;
    c.table16 = load_table(bytes);
  } else if (form == Form::bf16) {
    for (int i = 0; i < 32; ++i) { const uint16_t h = float_to_bf16(t[i % 16]); std::memcpy(bytes + 2 * i, &h, 2); }
    c.table16 = load_unit(bytes);
  }
  return c;
}

// Scales and zero points of (tile, span); vectors of 16 rows.
EFFK_INLINE vf scales_of(const WqWeight& w, int64_t tile, int64_t group, int64_t groups) {
  const int64_t at = (tile * groups + group) * 16;
  return w.scales_f32 ? load_f32(static_cast<const float*>(w.scales) + at) : load_f16(static_cast<const uint16_t*>(w.scales) + at);
}
EFFK_INLINE Zeros zeros_of(const WqWeight& w, int64_t tile, int64_t group, int64_t groups) {
  Zeros z{zero_i(), zero_f(), nullptr};
  if (w.zeros) {
    z.i = load_u8(w.zeros + (tile * groups + group) * 16);
    z.f = to_float(sub_i(z.i, set_i(1 << (w.bits - 1))));
  }
  if (w.codebook_per_row) z.codebook = w.codebook + tile * (int64_t(16) << w.bits);
  return z;
}

// K as spans; a span's chunks are contiguous.
struct Span { int64_t index, group, chunk; int chunks, steps; int64_t step; };
template <class D> EFFK_INLINE Span span_of(const WqWeight& w, const Rows& r, int64_t h) {
  const int ck = t16::chunk_k(w.bits);
  const int64_t k0 = h * r.span, k1 = k0 + r.span < w.k ? k0 + r.span : w.k;
  const int chunks = int((k1 - k0 + ck - 1) / ck);
  return {h, w.group ? k0 / w.group : 0, k0 / ck, chunks, chunks * (ck / 4) * D::kSteps, k0 / 4 * D::kSteps};
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
  const int64_t row0 = int64_t(block) * r.block_rows, steps = r.kpad / 4 * wq::steps_per_unit(F);
  int32_t* data = r.data + row0 * steps;
  for (int m = 0; m < rows; ++m) {
    const char* row = static_cast<const char*>(x) + (row0 + m) * r.k * width(dtype);
    for (int64_t h = 0; h < r.spans; ++h) {
      const int64_t k0 = h * r.span, at = row0 * r.spans + h * rows + m;
      const int count = int(r.k - k0 < r.span ? r.k - k0 : r.span);
      alignas(64) float value[t16::kMaxActGroup];
      const int padded = load_span(row + k0 * width(dtype), dtype, count, value);
      int32_t* out = data + k0 / 4 * wq::steps_per_unit(F) * rows + m;
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

// ---- last step of a tile: outliers, bias, rounding, store -------------------------------------------------------------

// Adds the sparse part of one tile to acc[rows][16]. Row by row of W in CSR order, one accumulator each: the order of the
// sum does not depend on how many rows of x there are. Few rows of x: scalar gathers, whose chains overlap across rows of
// W. Many: vectors over 16 rows of x, read from the transposed copy.
template <class Col> inline void add_outliers(const Tile& t, int64_t n0, int lanes, int64_t m0, int rows, float* acc) {
  const WqWeight& w = *t.w;
  const Col* cols = static_cast<const Col*>(w.out_col);
  constexpr int kPiece = 64;
  float values[kPiece + 16];
  for (int lane = 0; lane < lanes; ++lane) {
    int64_t j = w.out_ptr[n0 + lane];
    const int64_t end = w.out_ptr[n0 + lane + 1];
    if (j == end) continue;
    if (t.rows->m < wq::kTransposeRows) {
      float sum[wq::kTransposeRows] = {};
      for (; j < end; j += kPiece) {
        const int count = int(end - j < kPiece ? end - j : kPiece);
        int i = 0;
        for (; i + 16 <= count; i += 16) store_f32(values + i, load_f16(w.out_val + j + i));
        for (; i < count; ++i) values[i] = f16_to_float(w.out_val[j + i]);
        for (int r = 0; r < rows; ++r) {
          const float* x = t.dense_x + (m0 + r) * w.k;
          float s = sum[r];
          for (i = 0; i < count; ++i) s = std::fmaf(values[i], x[cols[j + i]], s);
          sum[r] = s;
        }
      }
      for (int r = 0; r < rows; ++r) acc[r * 16 + lane] += sum[r];
    } else {
      for (int64_t mb = m0 / 16; mb * 16 < m0 + rows; ++mb) {
        const float* x = t.dense_x + mb * w.k * 16;
        vf s = zero_f();
        for (int64_t i = j; i < end; ++i) s = fma(set_f(f16_to_float(w.out_val[i])), load_f32(x + int64_t(cols[i]) * 16), s);
        float sum[16];
        store_f32(sum, s);
        for (int i = 0; i < 16; ++i) {
          const int64_t r = mb * 16 + i - m0;
          if (r >= 0 && r < rows) acc[r * 16 + lane] += sum[i];
        }
      }
    }
  }
}

inline void finish_tile(const Tile& t, int64_t tile, int64_t m0, int rows, float* acc) {
  const WqWeight& w = *t.w;
  const int64_t n0 = tile * 16;
  const int lanes = int(w.n - n0 < 16 ? w.n - n0 : 16);
  if (w.out_ptr) {
    if (w.col32) add_outliers<int32_t>(t, n0, lanes, m0, rows, acc);
    else add_outliers<uint16_t>(t, n0, lanes, m0, rows, acc);
  }
  alignas(64) char buffer[64];
  vf bias = zero_f();
  if (w.bias) {
    const char* b = static_cast<const char*>(w.bias) + n0 * width(w.bias_dtype);
    std::memset(buffer, 0, 64);
    std::memcpy(buffer, b, size_t(lanes * width(w.bias_dtype)));
    bias = load_any(buffer, w.bias_dtype, 0);
  }
  const int64_t size = width(t.y_dtype);
  for (int r = 0; r < rows; ++r) {
    vf v = load_f32(acc + r * 16);
    if (w.bias) v = add_f(v, bias);
    char* out = static_cast<char*>(t.y) + ((m0 + r) * w.n + n0) * size;
    if (lanes == 16) { store_any(out, t.y_dtype, 0, v); continue; }
    store_any(buffer, t.y_dtype, 0, v);
    std::memcpy(out, buffer, size_t(lanes * size));
  }
}

// ---- gemv -------------------------------------------------------------------------------------------------------------

// Prefetch distance in bytes on the weight stream of each tile: tuned on Zen 5 (1 and 2 threads, 2 to 8 bits).
constexpr int kPrefetch = 2048;

template <class D, int Bits, int MR, int NT> void gemv_tiles(const Tile& t) {
  const WqWeight& w = *t.w;
  const Rows& r = *t.rows;
  const Codes codes = codes_of(w, D::kForm);
  const int64_t groups = t16::groups(w.k, w.group), tile_bytes = t16::chunks(w.k, Bits) * t16::chunk_bytes(Bits);
  constexpr int kParts = D::kForm == Form::int8 && MR * NT < 4 ? 2 : 1;  // exact sums may be split to shorten the chains
  vf y[NT][MR];
  for (int i = 0; i < NT; ++i) for (int m = 0; m < MR; ++m) y[i][m] = zero_f();
  const uint8_t* base = w.packed + t.tile * tile_bytes;
  for (int64_t h = 0; h < r.spans; ++h) {
    const Span s = span_of<D>(w, r, h);
    typename D::Acc acc[NT][MR][kParts];
    Zeros z[NT];
    for (int i = 0; i < NT; ++i) {
      z[i] = zeros_of(w, t.tile + i, s.group, groups);
      for (int m = 0; m < MR; ++m) {
        acc[i][m][0] = D::init(w, codes, z[i], r.sum ? r.sum[h * MR + m] : 0);
        for (int p = 1; p < kParts; ++p) acc[i][m][p] = typename D::Acc{};
      }
    }
    const int32_t* x = r.data + s.step * MR;
    const uint8_t* p = base + s.chunk * t16::chunk_bytes(Bits);
    for (int c = 0; c < s.chunks; ++c) {
      unroll<NT>([&](auto i) {
        const uint8_t* q = p + i * tile_bytes;
        for (int line = 0; line < t16::chunk_bytes(Bits); line += 64) prefetch(q + kPrefetch + line);
        each_unit<Bits>(q, [&](auto u, vi unit) {
          unroll<D::kSteps>([&](auto st) {
            const vi wv = D::template expand<Bits, st>(unit, codes, z[i]);
            for (int m = 0; m < MR; ++m)
              acc[i][m][u % kParts] = D::step(acc[i][m][u % kParts], wv, broadcast(x + (u * D::kSteps + st) * MR + m));
          });
        });
      });
      p += t16::chunk_bytes(Bits);
      x += t16::chunk_k(Bits) / 4 * D::kSteps * MR;
    }
    for (int i = 0; i < NT; ++i) {
      const vf scale = scales_of(w, t.tile + i, s.group, groups);
      for (int m = 0; m < MR; ++m) {
        if constexpr (kParts == 2) acc[i][m][0] = add_i(acc[i][m][0], acc[i][m][1]);
        y[i][m] = D::finish(acc[i][m][0], w, z[i], scale, r.scale ? r.scale[h * MR + m] : 1.0f, r.sum ? r.sum[h * MR + m] : 0, y[i][m]);
      }
    }
  }
  for (int i = 0; i < NT; ++i) {
    alignas(64) float out[MR * 16];
    for (int m = 0; m < MR; ++m) store_f32(out + m * 16, y[i][m]);
    finish_tile(t, t.tile + i, 0, MR, out);
  }
}

template <class D, int Bits, int NT> void gemv_rows(const Tile& t) {
  switch (t.rows->m) {
    case 1: return gemv_tiles<D, Bits, 1, NT>(t);
    case 2: return gemv_tiles<D, Bits, 2, NT>(t);
    case 3: return gemv_tiles<D, Bits, 3, NT>(t);
    default: return gemv_tiles<D, Bits, 4, NT>(t);
  }
}
template <class D, class D8, int NT> void gemv_bits(const Tile& t) {
  switch (t.w->bits) {
    case 2: return gemv_rows<D, 2, NT>(t);
    case 3: return gemv_rows<D, 3, NT>(t);
    case 4: return gemv_rows<D, 4, NT>(t);
    default: return gemv_rows<D8, 8, NT>(t);
  }
}
template <class D, class D8, int NT> void gemv(const Tile& t) {
  if (t.tiles == NT) return gemv_bits<D, D8, NT>(t);
  Tile one = t;
  one.tiles = 1;
  for (int i = 0; i < t.tiles; ++i, ++one.tile) gemv_bits<D, D8, 1>(one);
}

// ---- gemm -------------------------------------------------------------------------------------------------------------

template <class D, int Bits>
inline void build_panel(const uint8_t* p, int chunks, const Codes& codes, const Zeros& z, bool book, uint8_t* panel) {
  constexpr int kUnits = t16::chunk_k(Bits) / 4;
  for (int c = 0; c < chunks; ++c, p += t16::chunk_bytes(Bits), panel += kUnits * D::kSteps * 64) {
    each_unit<Bits>(p, [&](auto u, vi unit) {
      if constexpr (D::kForm == Form::int8 && Bits < 8) { if (book) unit = shuffle_bytes(codes.table16, unit); }
      unroll<D::kSteps>([&](auto st) { store_unit(panel + (u * D::kSteps + st) * 64, D::template expand<Bits, st>(unit, codes, z)); });
    });
  }
}

// One block of MR rows against NT panels over one span.
template <class D, int MR, int NT>
inline void micro(const Tile& t, const Codes& codes, const uint8_t* const* panel, int steps, const int32_t* x, const float* scale,
                  const int32_t* sum, const vf* s, const Zeros* z, float* const* y) {
  typename D::Acc acc[MR][NT];
  const WqWeight& w = *t.w;
  for (int m = 0; m < MR; ++m) for (int i = 0; i < NT; ++i) acc[m][i] = D::init(w, codes, z[i], sum ? sum[m] : 0);
  for (int k = 0; k < steps; ++k) {
    vi wv[NT];
    for (int i = 0; i < NT; ++i) wv[i] = load_unit(panel[i] + k * 64);
    for (int m = 0; m < MR; ++m) {
      const vi xv = broadcast(x + k * MR + m);
      for (int i = 0; i < NT; ++i) acc[m][i] = D::step(acc[m][i], wv[i], xv);
    }
  }
  for (int m = 0; m < MR; ++m) {
    for (int i = 0; i < NT; ++i) {
      float* p = y[i] + m * 16;
      store_f32(p, D::finish(acc[m][i], w, z[i], s[i], scale ? scale[m] : 1.0f, sum ? sum[m] : 0, load_f32(p)));
    }
  }
}

template <class D, int NT, int MR = 1, class... A> inline void micro_rows(int rows, const A&... a) {
  if (rows == MR) return micro<D, MR, NT>(a...);
  if constexpr (MR < wq::kMaxBlockRows) micro_rows<D, NT, MR + 1>(rows, a...);
}

template <class D, int Bits, int NT> void gemm_tiles(const Tile& t) {
  const WqWeight& w = *t.w;
  const Rows& r = *t.rows;
  const Codes codes = codes_of(w, D::kForm);
  const bool book = D::kForm == Form::int8 && w.codebook;
  const int64_t groups = t16::groups(w.k, w.group), tile_bytes = t16::chunks(w.k, Bits) * t16::chunk_bytes(Bits);
  const int64_t m0 = int64_t(t.block) * r.block_rows;
  constexpr bool kDirect = D::kForm == Form::int8 && Bits == 8;  // the packed units are the operands already
  alignas(64) uint8_t panel[kDirect ? 64 : NT * (t16::kMaxActGroup / 4) * D::kSteps * 64];
  alignas(64) float y[NT][wq::kMaxBlocks * wq::kMaxBlockRows * 16];
  int total = 0;
  for (int b = 0; b < t.blocks; ++b) total += r.rows_in(t.block + b);
  for (int i = 0; i < NT; ++i) std::memset(y[i], 0, size_t(total) * 64);
  for (int64_t h = 0; h < r.spans; ++h) {
    const Span s = span_of<D>(w, r, h);
    vf scale[NT];
    Zeros z[NT];
    const uint8_t* operand[NT];
    for (int i = 0; i < NT; ++i) {
      const uint8_t* p = w.packed + (t.tile + i) * tile_bytes + s.chunk * t16::chunk_bytes(Bits);
      z[i] = zeros_of(w, t.tile + i, s.group, groups);
      scale[i] = mul_f(scales_of(w, t.tile + i, s.group, groups), set_f(codes.rescale));
      operand[i] = kDirect ? p : panel + i * (t16::kMaxActGroup / 4) * D::kSteps * 64;
      if constexpr (!kDirect) build_panel<D, Bits>(p, s.chunks, codes, z[i], book, panel + i * (t16::kMaxActGroup / 4) * D::kSteps * 64);
    }
    const int64_t steps = r.kpad / 4 * D::kSteps;
    for (int b = 0; b < t.blocks; ++b) {
      const int rows = r.rows_in(t.block + b);
      const int64_t row = m0 + int64_t(b) * r.block_rows;
      float* out[NT];
      for (int i = 0; i < NT; ++i) out[i] = y[i] + (row - m0) * 16;
      const int64_t at = row * r.spans + h * rows;
      const int32_t* x = r.data + row * steps + s.step * rows;
      micro_rows<D, NT>(rows, t, codes, operand, s.steps, x, r.scale ? r.scale + at : nullptr, r.sum ? r.sum + at : nullptr, scale, z, out);
    }
  }
  for (int i = 0; i < NT; ++i) finish_tile(t, t.tile + i, m0, total, y[i]);
}

// D below 8 bits, D8 at 8 bits, DBook where codes go through a table of the weight.
template <class D, class D8, class DBook, int NT> void gemm_bits(const Tile& t) {
  const bool book = t.w->codebook && !std::is_same_v<D, DBook>;
  switch (t.w->bits) {
    case 2: return book ? gemm_tiles<DBook, 2, NT>(t) : gemm_tiles<D, 2, NT>(t);
    case 3: return book ? gemm_tiles<DBook, 3, NT>(t) : gemm_tiles<D, 3, NT>(t);
    case 4: return book ? gemm_tiles<DBook, 4, NT>(t) : gemm_tiles<D, 4, NT>(t);
    default: return gemm_tiles<D8, 8, NT>(t);
  }
}
template <class D, class D8, class DBook, int NT> void gemm(const Tile& t) {
  if (t.tiles == NT) return gemm_bits<D, D8, DBook, NT>(t);
  Tile one = t;
  one.tiles = 1;
  for (int i = 0; i < t.tiles; ++i, ++one.tile) gemm_bits<D, D8, DBook, 1>(one);
}

}  // namespace
}  // namespace effk::EFFK_TIER
