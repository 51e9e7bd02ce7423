// The passes of a right-angle transform over a work buffer of complex points, stored in vectors of 16: [re 16, im 16].
// Forward passes decimate in frequency (butterflies, then twiddles); inverse passes mirror them. Nothing is permuted.
#pragma once
#include "ops/fftconv/codelets.h"
#include "ops/fftconv/kernels.h"

namespace effk::EFFK_TIER {
namespace {

using fft::Ahead;
using fft::Level;
using fft::Plan;
constexpr int kVec = 32;                      // floats per vector of 16 points
constexpr int kAhead = 128;                   // floats: what the next strip but one reads or writes
constexpr int kCoefAhead = 2048;              // floats of the spectrum
constexpr int64_t kNearPoints = 4096;         // blocks of this size stay in the first-level cache: 32 KiB

// One step of a phase fetches its share of the lines that the next row needs.
EFFK_INLINE void fetch(const Ahead& a, const Ahead::Share& share, int64_t step) {
  const int64_t from = (share.at + step * share.rate) >> 16, to = (share.at + (step + 1) * share.rate) >> 16;
  for (int r = 0; r < a.rows; ++r)
    for (int64_t j = from; j < to; ++j) prefetch_far(a.row[r] + j * 64);
}

EFFK_INLINE Complex load_c(const float* p) { return {load_r(p), load_r(p + 16)}; }
EFFK_INLINE void store_c(float* p, Complex v) { store_r(p, v.re); store_r(p + 16, v.im); }

// The twiddle of (vector v, row k) at lane h: from the table, or as the product of a scalar and a vector.
template <bool TwoFactor> EFFK_INLINE Complex twiddle(const Level& l, int rows, int64_t v, int k, int h) {
  if constexpr (!TwoFactor) return load_c(l.table + (v * rows + k) * kVec + h);
  const float* b = l.base + (v * rows + k) * 2;
  return mul(load_c(l.lane + k * kVec + h), set_r(b[0]), set_r(b[1]));
}

// One level of one block: columns are vectors [v0, v1) of each of R rows. Shifted: the first level, where row 0 has
// twiddles too. Quads: the last level, whose rows of 16 points leave (and come back) with their 4 x 4 quads transposed.
template <int R> EFFK_INLINE void transpose_quads(Complex (&z)[R]) {
  for (int a = 0; a + 3 < R; a += 4) {
    transpose_quads(z[a].re, z[a + 1].re, z[a + 2].re, z[a + 3].re);
    transpose_quads(z[a].im, z[a + 1].im, z[a + 2].im, z[a + 3].im);
  }
}
template <int R, bool Inv, bool TwoFactor, bool Quads>
void pass_columns(const Level& l, float* x, int64_t v0, int64_t v1, int64_t blocks = 1) {
  const int64_t row = l.row * 2;
  for (; blocks > 0; --blocks, x += l.size * 2)
   for (int64_t v = v0; v < v1; ++v)
    for (int h = 0; h < 16; h += kLanes) {
      Complex z[R];
      float* p = x + v * kVec + h;
      for (int a = 0; a < R; ++a) z[a] = load_c(p + a * row);
      if constexpr (Inv) {
        if constexpr (Quads) transpose_quads(z);
        for (int a = 1; a < R; ++a) {
          const Complex t = twiddle<TwoFactor>(l, R - 1, v, a - 1, h);
          z[a] = mul_conj(z[a], t.re, t.im);
        }
      }
      Dft<R, Inv>::run(z);
      if constexpr (!Inv) {
        for (int a = 1; a < R; ++a) {
          const Complex t = twiddle<TwoFactor>(l, R - 1, v, a - 1, h);
          z[a] = mul(z[a], t.re, t.im);
        }
        if constexpr (Quads) transpose_quads(z);
      }
      for (int a = 0; a < R; ++a) store_c(p + a * row, z[a]);
    }
}

// `blocks` adjacent blocks of one level.
template <int R, bool Inv> void pass_radix(const Level& l, float* x, int64_t blocks) {
  const int64_t vecs = l.size / R / 16;
  if (vecs == 1) pass_columns<R, Inv, false, true>(l, x, 0, 1, blocks);
  else if (l.table) pass_columns<R, Inv, false, false>(l, x, 0, vecs, blocks);
  else pass_columns<R, Inv, true, false>(l, x, 0, vecs, blocks);
}
template <bool Inv> void pass(const Level& l, float* x, int64_t blocks) {
  if (l.radix == 8) pass_radix<8, Inv>(l, x, blocks);
  else pass_radix<4, Inv>(l, x, blocks);
}

// First pass: rows of the source (real, times a gate in `im`, or complex), weighted, transformed, times twiddles, to the work
// buffer. `re` and `im` point at column 16 v0 of row 0.
enum class In { real, gated, complex };
template <int R, bool TwoFactor, In I>
void first_columns(const Level& l, const float* weight, const float* re, const float* im, int64_t in_row, float* x, int64_t v0,
                   int64_t vecs, const Ahead& ahead) {
  const int64_t row = l.row * 2;
  for (int64_t v = 0; v < vecs; ++v) {
    fetch(ahead, ahead.first, v0 + v);
    for (int h = 0; h < 16; h += kLanes) {
      Complex z[R];
      for (int a = 0; a < R; ++a) {
        const int64_t at = a * in_row + v * 16 + h;
        if (h == 0) {
          prefetch(re + at + kAhead);
          if constexpr (I == In::gated) prefetch(im + at + kAhead);
        }
        const vr c = set_r(weight[2 * a]), s = set_r(weight[2 * a + 1]);
        vr u = load_r(re + at);
        if constexpr (I == In::gated) u = mul_f(u, load_r(im + at));
        if constexpr (I == In::complex) {
          const vr b = load_r(im + at);  // (u - i b)(c + i s)
          z[a] = {fma(b, s, mul_f(u, c)), fnma(b, c, mul_f(u, s))};
        }
        else z[a] = {mul_f(u, c), mul_f(u, s)};
      }
      Dft<R, false>::run(z);
      float* p = x + v * kVec + h;
      for (int a = 0; a < R; ++a) {
        const Complex t = twiddle<TwoFactor>(l, R, v0 + v, a, h);
        store_c(p + a * row, mul(z[a], t.re, t.im));
      }
    }
  }
}

// Last pass, its mirror: `re` receives the results [0, M), times a gate in `im` or not; or `im` receives (minus the imaginary
// part) the results [M, 2 M); or both.
enum class Out { re, gated, im, both };
template <int R, bool TwoFactor, Out O>
void last_columns(const Level& l, const float* weight, const float* x, float* re, float* im, int64_t out_row, int64_t v0,
                  int64_t vecs, const Ahead& ahead) {
  const int64_t row = l.row * 2;
  for (int64_t v = 0; v < vecs; ++v) {
    fetch(ahead, ahead.last, v0 + v);
    for (int h = 0; h < 16; h += kLanes) {
      Complex z[R];
      const float* p = x + v * kVec + h;
      for (int a = 0; a < R; ++a) {
        const int64_t at = a * out_row + v * 16 + h;
        if (h == 0) {
          prefetch_write((O == Out::im ? im : re) + at + kAhead);
          if constexpr (O == Out::gated) prefetch(im + at + kAhead);
        }
        const Complex t = twiddle<TwoFactor>(l, R, v0 + v, a, h);
        z[a] = mul_conj(load_c(p + a * row), t.re, t.im);
      }
      Dft<R, true>::run(z);
      for (int a = 0; a < R; ++a) {
        const vr c = set_r(weight[2 * a]), s = set_r(weight[2 * a + 1]);
        const int64_t at = a * out_row + v * 16 + h;
        if constexpr (O != Out::im) {
          vr y = fma(z[a].im, s, mul_f(z[a].re, c));
          if constexpr (O == Out::gated) y = mul_f(y, load_r(im + at));
          store_r(re + at, y);
        }
        if constexpr (O == Out::im || O == Out::both) store_r(im + at, fms(z[a].re, s, mul_f(z[a].im, c)));
      }
    }
  }
}

// The last 16 points of 16 rows at once. A block of 256 points arrives with its 4 x 4 quads transposed (the pass before did
// that in registers); column n of the rows is point n of 16 transforms, side by side. As 4 x 4 points: columns j, j + 4,
// j + 8, j + 12 give place q of buf[j][q] by a transform over 4; places (0..3, q) give the results q + 4 s. Each step
// needs 8 registers of data, and the spectrum is met between the two halves of the convolution.
using Places = float[4][4][kVec];

EFFK_INLINE void columns_forward(const float* x, int g, Places& buf) {
  for (int j = 0; j < 4; ++j) {
    vr re[4], im[4];
    load_columns(x, kVec, g, j, re);
    load_columns(x + 16, kVec, g, j, im);
    Complex z[4];
    for (int i = 0; i < 4; ++i) z[i] = {re[i], im[i]};
    Dft<4, false>::run(z);
    for (int q = 0; q < 4; ++q) store_c(buf[j][q], z[q]);
  }
}
template <int J> EFFK_INLINE void column_inverse(float* x, int g, const Places& buf) {
  Complex z[4];
  for (int q = 0; q < 4; ++q) z[q] = load_c(buf[J][q]);
  dft4_turned<true, J>(z[0], z[1], z[2], z[3]);
  vr re[4], im[4];
  for (int i = 0; i < 4; ++i) { re[i] = z[i].re; im[i] = z[i].im; }
  store_columns(x, kVec, g, J, re);
  store_columns(x + 16, kVec, g, J, im);
}
EFFK_INLINE void columns_inverse(float* x, int g, const Places& buf) {
  column_inverse<0>(x, g, buf);
  column_inverse<1>(x, g, buf);
  column_inverse<2>(x, g, buf);
  column_inverse<3>(x, g, buf);
}
template <int Q> EFFK_INLINE void places_forward(const Places& buf, Complex (&z)[4]) {
  for (int j = 0; j < 4; ++j) z[j] = load_c(buf[j][Q]);
  dft4_turned<false, Q>(z[0], z[1], z[2], z[3]);
}
template <int Q> EFFK_INLINE void places_inverse(Places& buf, Complex (&z)[4]) {
  Dft<4, true>::run(z);
  for (int j = 0; j < 4; ++j) store_c(buf[j][Q], z[j]);
}

// What happens to a block between the two halves of the convolution; `at` is its first point.
template <bool Conjugate> struct Multiply {  // by the spectrum of one channel
  static constexpr bool kForward = true, kInverse = true, kPair = false;
  const float* coef;
  const Ahead& ahead;

  template <int Q> EFFK_INLINE void places(Places& buf, const float* c, int g) const {
    Complex z[4];
    places_forward<Q>(buf, z);
    for (int s = 0; s < 4; ++s) {
      const float* at = c + (Q + 4 * s) * kVec;
      if (g == 0) { prefetch(at + kCoefAhead); prefetch(at + kCoefAhead + 16); }
      const Complex t = load_c(at + g);
      z[s] = Conjugate ? mul_conj(z[s], t.re, t.im) : mul(z[s], t.re, t.im);
    }
    places_inverse<Q>(buf, z);
  }
  EFFK_INLINE void operator()(float* x, int64_t at) const {
    alignas(64) Places buf;
    const float* c = coef + at * 2;
    const int64_t step = at / (spectrum::kBlockPoints / 4);
    for (int g = 0; g < 16; g += kLanes) {
      columns_forward(x, g, buf);
      if (g == 0) fetch(ahead, ahead.middle, step);
      places<0>(buf, c, g);
      if (g == 0) fetch(ahead, ahead.middle, step + 1);
      places<1>(buf, c, g);
      if (g == 0) fetch(ahead, ahead.middle, step + 2);
      places<2>(buf, c, g);
      if (g == 0) fetch(ahead, ahead.middle, step + 3);
      places<3>(buf, c, g);
      columns_inverse(x, g, buf);
    }
  }
};
struct ToSpectrum {
  static constexpr bool kForward = true, kInverse = false, kPair = false;
  float* spec;
  float scale;
  template <int Q> EFFK_INLINE void places(const Places& buf, float* to, int g) const {
    Complex z[4];
    places_forward<Q>(buf, z);
    const vr f = set_r(scale);
    for (int s = 0; s < 4; ++s) store_c(to + (Q + 4 * s) * kVec + g, {mul_f(z[s].re, f), mul_f(z[s].im, f)});
  }
  EFFK_INLINE void operator()(float* x, int64_t at) const {
    alignas(64) Places buf;
    float* to = spec + at * 2;
    for (int g = 0; g < 16; g += kLanes) {
      columns_forward(x, g, buf);
      places<0>(buf, to, g);
      places<1>(buf, to, g);
      places<2>(buf, to, g);
      places<3>(buf, to, g);
    }
  }
};
enum class Other { none, conjugate };
template <Other B> struct FromSpectrum {  // a times b
  static constexpr bool kForward = false, kInverse = true, kPair = false;
  const float* a;
  const float* b;
  template <int Q> EFFK_INLINE void places(Places& buf, int64_t from, int g) const {
    Complex z[4];
    for (int s = 0; s < 4; ++s) {
      const int64_t at = from + (Q + 4 * s) * kVec + g;
      z[s] = load_c(a + at);
      if constexpr (B != Other::none) {
        const Complex t = load_c(b + at);
        z[s] = mul_conj(z[s], t.re, t.im);
      }
    }
    places_inverse<Q>(buf, z);
  }
  EFFK_INLINE void operator()(float* x, int64_t at) const {
    alignas(64) Places buf;
    for (int g = 0; g < 16; g += kLanes) {
      places<0>(buf, at * 2, g);
      places<1>(buf, at * 2, g);
      places<2>(buf, at * 2, g);
      places<3>(buf, at * 2, g);
      columns_inverse(x, g, buf);
    }
  }
};

// The backward pass, over two buffers in step, the second `other` floats behind the first: the spectra G of the gradient and V of
// the input. Second buffer: G conj(V), the gradient of the taps, or with Sum added to `sum` instead. First buffer: with Grad G times
// the filter's conjugate, the gradient of the input.
template <bool Sum, bool Grad> struct Pair {
  static constexpr bool kForward = true, kInverse = Grad, kPair = true, kInverseOther = !Sum;
  int64_t other;
  const float* coef;
  float* sum;
  float scale;
  EFFK_INLINE void operator()(float* x, int64_t at) const {
    alignas(64) float g[spectrum::kBlockPoints * 2], v[spectrum::kBlockPoints * 2];
    ToSpectrum{g, 1.0f}(x, 0);
    ToSpectrum{v, scale}(x + other, 0);
    if constexpr (Sum) {
      for (int i = 0; i < spectrum::kBlockPoints * 2; i += kVec)
        for (int h = 0; h < 16; h += kLanes) {
          float* to = sum + at * 2 + i + h;
          const Complex t = load_c(v + i + h);
          store_c(to, load_c(to) + mul_conj(load_c(g + i + h), t.re, t.im));
        }
    } else {
      FromSpectrum<Other::conjugate>{g, v}(x + other, 0);
    }
    if constexpr (Grad) FromSpectrum<Other::conjugate>{g, coef + at * 2}(x, 0);
  }
};

// Levels [level, p.levels) of `size` points in blocks of p.level[level].size, the first at point `at`: forward, middle, inverse.
// Level by level in what the first-level cache holds, otherwise one block after the other.
template <class Middle> EFFK_INLINE void pass_forward(const Level& l, float* x, int64_t blocks, const Middle& middle) {
  if constexpr (Middle::kForward) pass<false>(l, x, blocks);
  if constexpr (Middle::kPair) pass<false>(l, x + middle.other, blocks);
}
template <class Middle> EFFK_INLINE void pass_inverse(const Level& l, float* x, int64_t blocks, const Middle& middle) {
  if constexpr (Middle::kInverse) pass<true>(l, x, blocks);
  if constexpr (Middle::kPair)
    if constexpr (Middle::kInverseOther) pass<true>(l, x + middle.other, blocks);
}
template <class Middle>
void inner(const Plan& p, int level, int64_t size, float* x, int64_t at, const Middle& middle) {
  if (size <= (Middle::kPair ? kNearPoints / 2 : kNearPoints)) {
    for (int i = level; i < p.levels; ++i) pass_forward(p.level[i], x, size / p.level[i].size, middle);
    for (int64_t o = 0; o < size; o += spectrum::kBlockPoints) middle(x + o * 2, at + o);
    for (int i = p.levels - 1; i >= level; --i) pass_inverse(p.level[i], x, size / p.level[i].size, middle);
    return;
  }
  const Level& l = p.level[level];
  if (size > l.size) {
    for (int64_t o = 0; o < size; o += l.size) inner(p, level, l.size, x + o * 2, at + o, middle);
    return;
  }
  const int64_t row = size / l.radix;
  pass_forward(l, x, 1, middle);
  for (int k = 0; k < l.radix; ++k) inner(p, level + 1, row, x + k * row * 2, at + k * row, middle);
  pass_inverse(l, x, 1, middle);
}

}  // namespace
}  // namespace effk::EFFK_TIER
