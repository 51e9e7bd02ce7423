// How a unit of 64 codes becomes operands and what a step does with them, for each form; the constants of a weight, a tile
// and a span. Part of body.h.
#pragma once
#include <cmath>
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
  else if constexpr (Bits == 4) return bits_of_bytes<4 * U, 4>(c.line[0]);
  else if constexpr (Bits == 2) return bits_of_bytes<2 * U, 2>(c.line[0]);
  else {
    const vi low = bits_of_bytes<2 * (U % 4), 2>(c.line[U / 4]), top = set_i(0x04040404);
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
// `at` is (tile * groups + group) * 16.
EFFK_INLINE vf scales_at(const WqWeight& w, int64_t at, int64_t groups) {
  prefetch(static_cast<const char*>(w.scales) + (at + groups * 16) * (w.scales_f32 ? 4 : 2));
  return w.scales_f32 ? load_f32(static_cast<const float*>(w.scales) + at) : load_f16(static_cast<const uint16_t*>(w.scales) + at);
}
EFFK_INLINE vf scales_of(const WqWeight& w, int64_t tile, int64_t group, int64_t groups) {
  return scales_at(w, (tile * groups + group) * 16, groups);
}
EFFK_INLINE void zeros_at(const WqWeight& w, int64_t at, int64_t groups, Zeros& z) {
  prefetch(w.zeros + at + groups * 16);
  z.i = load_u8(w.zeros + at);
  z.f = to_float(sub_i(z.i, set_i(1 << (w.bits - 1))));
}
EFFK_INLINE Zeros zeros_of(const WqWeight& w, int64_t tile, int64_t group, int64_t groups) {
  Zeros z{zero_i(), zero_f(), nullptr};
  if (w.zeros) zeros_at(w, (tile * groups + group) * 16, groups, z);
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

}  // namespace
}  // namespace effk::EFFK_TIER
