// Discrete Fourier transforms of 3, 4, 5 and 8 points, of 16 in two steps, on registers, and the complex product. Straight-line code: each
// multiplication by a constant phase is folded into the additions after it, as tangent and cosine (w b = cos (b + i tan b)),
// which is 2 + 4 fused operations a butterfly instead of 4 + 4.
// Included inside the namespace of a tier, after its vector header.
#pragma once

namespace effk::EFFK_TIER {
namespace {

struct Complex { vr re, im; };

EFFK_INLINE Complex operator+(Complex a, Complex b) { return {add_f(a.re, b.re), add_f(a.im, b.im)}; }
EFFK_INLINE Complex operator-(Complex a, Complex b) { return {sub_f(a.re, b.re), sub_f(a.im, b.im)}; }
EFFK_INLINE Complex mul(Complex a, vr c, vr s) {  // a (c + i s)
  return {fnma(a.im, s, mul_f(a.re, c)), fma(a.re, s, mul_f(a.im, c))};
}
EFFK_INLINE Complex mul_conj(Complex a, vr c, vr s) {  // a (c - i s)
  return {fma(a.im, s, mul_f(a.re, c)), fnma(a.re, s, mul_f(a.im, c))};
}
// a -+ i b: minus forward, plus in the inverse transform.
template <bool Inv> EFFK_INLINE Complex turn_add(Complex a, Complex b) {
  if constexpr (Inv) return {sub_f(a.re, b.im), add_f(a.im, b.re)};
  else return {add_f(a.re, b.im), sub_f(a.im, b.re)};
}
template <bool Inv> EFFK_INLINE void butterfly(Complex& a, Complex& b) { const Complex d = a - b; a = a + b; b = d; }

// a, b <- a + w b, a - w b with w = exp(-+ i pi p / 16), given as its cosine and tangent, |tan| <= 1.
EFFK_INLINE void butterfly_tan(Complex& a, Complex& b, float cosine, float tangent) {
  const vr c = set_r(cosine), t = set_r(tangent);
  const vr u = fnma(t, b.im, b.re), v = fma(t, b.re, b.im);
  const Complex s{fma(c, u, a.re), fma(c, v, a.im)};
  b = {fnma(c, u, a.re), fnma(c, v, a.im)};
  a = s;
}
// The same with w given as its sine and cotangent: w b = sin (cot b + i b).
EFFK_INLINE void butterfly_cot(Complex& a, Complex& b, float sine, float cotangent) {
  const vr s = set_r(sine), t = set_r(cotangent);
  const vr u = fms(t, b.re, b.im), v = fma(t, b.im, b.re);
  const Complex r{fma(s, u, a.re), fma(s, v, a.im)};
  b = {fnma(s, u, a.re), fnma(s, v, a.im)};
  a = r;
}
// Multiples of a quarter turn and of an eighth.
template <bool Inv> EFFK_INLINE void butterfly_i(Complex& a, Complex& b) {
  const Complex s = turn_add<Inv>(a, b);
  b = turn_add<!Inv>(a, b);
  a = s;
}
template <bool Inv> EFFK_INLINE void butterfly_8(Complex& a, Complex& b) {  // w = exp(-+ i pi / 4)
  const vr c = set_r(0.70710678118654752f);
  const vr u = Inv ? sub_f(b.re, b.im) : add_f(b.re, b.im), v = Inv ? add_f(b.im, b.re) : sub_f(b.im, b.re);
  const Complex s{fma(c, u, a.re), fma(c, v, a.im)};
  b = {fnma(c, u, a.re), fnma(c, v, a.im)};
  a = s;
}
template <bool Inv> EFFK_INLINE void butterfly_38(Complex& a, Complex& b) {  // w = exp(-+ 3 i pi / 4)
  const vr c = set_r(0.70710678118654752f);
  const vr u = Inv ? add_f(b.re, b.im) : sub_f(b.im, b.re), v = Inv ? sub_f(b.re, b.im) : add_f(b.re, b.im);
  const Complex s = Inv ? Complex{fnma(c, u, a.re), fma(c, v, a.im)} : Complex{fma(c, u, a.re), fnma(c, v, a.im)};
  b = Inv ? Complex{fma(c, u, a.re), fnma(c, v, a.im)} : Complex{fnma(c, u, a.re), fma(c, v, a.im)};
  a = s;
}

// x <- transform of x, both in natural order.
template <bool Inv> EFFK_INLINE void dft4(Complex& x0, Complex& x1, Complex& x2, Complex& x3) {
  const Complex s = x0 + x2, d = x0 - x2, t = x1 + x3, e = x1 - x3;
  x0 = s + t;
  x2 = s - t;
  x1 = turn_add<Inv>(d, e);
  x3 = turn_add<!Inv>(d, e);
}
template <bool Inv> EFFK_INLINE void dft8(Complex& x0, Complex& x1, Complex& x2, Complex& x3, Complex& x4, Complex& x5,
                                          Complex& x6, Complex& x7) {
  dft4<Inv>(x0, x2, x4, x6);  // even: results 0..3 in x0 x2 x4 x6
  dft4<Inv>(x1, x3, x5, x7);
  butterfly<Inv>(x0, x1);       // results 0, 4
  butterfly_8<Inv>(x2, x3);     // 1, 5
  butterfly_i<Inv>(x4, x5);     // 2, 6
  butterfly_38<Inv>(x6, x7);    // 3, 7
  // x0 x1 x2 x3 x4 x5 x6 x7 hold 0 4 1 5 2 6 3 7
  const Complex y1 = x2, y2 = x4, y3 = x6, y4 = x1, y5 = x3, y6 = x5;
  x1 = y1; x2 = y2; x3 = y3; x4 = y4; x5 = y5; x6 = y6;
}

constexpr float kCos16 = 0.92387953251128674f, kTan16 = 0.41421356237309503f;  // pi / 8: cosine and tangent

// The second half of a 16-point transform: x_j times w^(j q), w = exp(-+ i pi / 8), then 4 points over j. The phases pair up:
// (x0, w^2q x2), (x1, w^2q x3), then with w^q and -+i w^q.
template <bool Inv, int Q> EFFK_INLINE void dft4_turned(Complex& x0, Complex& x1, Complex& x2, Complex& x3) {
  constexpr float sign = Inv ? -1.0f : 1.0f;
  if constexpr (Q == 0) {
    dft4<Inv>(x0, x1, x2, x3);
  } else {
    if constexpr (Q == 1) {
      butterfly_8<Inv>(x0, x2);
      butterfly_8<Inv>(x1, x3);
      butterfly_tan(x0, x1, kCos16, -sign * kTan16);          // w
      butterfly_cot(x2, x3, -sign * kCos16, sign * kTan16);   // w^5
    } else if constexpr (Q == 2) {
      butterfly_i<Inv>(x0, x2);
      butterfly_i<Inv>(x1, x3);
      butterfly_8<Inv>(x0, x1);                               // w^2
      butterfly_38<Inv>(x2, x3);                              // w^6
    } else {
      butterfly_38<Inv>(x0, x2);
      butterfly_38<Inv>(x1, x3);
      butterfly_cot(x0, x1, -sign * kCos16, -sign * kTan16);  // w^3
      butterfly_tan(x2, x3, -kCos16, sign * kTan16);          // w^7
    }
    // x0 x1 x2 x3 hold results 0 2 1 3
    const Complex t = x1;
    x1 = x2;
    x2 = t;
  }
}

template <int R, bool Inv> struct Dft;
template <bool Inv> struct Dft<4, Inv> {
  static EFFK_INLINE void run(Complex (&x)[4]) { dft4<Inv>(x[0], x[1], x[2], x[3]); }
};
template <bool Inv> struct Dft<8, Inv> {
  static EFFK_INLINE void run(Complex (&x)[8]) { dft8<Inv>(x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]); }
};
template <bool Inv> struct Dft<3, Inv> {
  static EFFK_INLINE void run(Complex (&x)[3]) {
    const vr half = set_r(0.5f), s = set_r(0.86602540378443865f);
    const Complex t = x[1] + x[2], d = x[1] - x[2];
    const Complex m{fnma(half, t.re, x[0].re), fnma(half, t.im, x[0].im)}, e{mul_f(s, d.re), mul_f(s, d.im)};
    x[0] = x[0] + t;
    x[1] = turn_add<Inv>(m, e);
    x[2] = turn_add<!Inv>(m, e);
  }
};
template <bool Inv> struct Dft<5, Inv> {
  static EFFK_INLINE void run(Complex (&x)[5]) {
    const vr c1 = set_r(0.30901699437494742f), c2 = set_r(-0.80901699437494742f);
    const vr s1 = set_r(0.95105651629515357f), s2 = set_r(0.58778525229247313f);
    const Complex p = x[1] + x[4], d = x[1] - x[4], q = x[2] + x[3], e = x[2] - x[3];
    const Complex a{fma(c1, p.re, fma(c2, q.re, x[0].re)), fma(c1, p.im, fma(c2, q.im, x[0].im))};
    const Complex b{fma(c2, p.re, fma(c1, q.re, x[0].re)), fma(c2, p.im, fma(c1, q.im, x[0].im))};
    const Complex f{fma(s1, d.re, mul_f(s2, e.re)), fma(s1, d.im, mul_f(s2, e.im))};
    const Complex g{fms(s2, d.re, mul_f(s1, e.re)), fms(s2, d.im, mul_f(s1, e.im))};
    x[0] = x[0] + p + q;
    x[1] = turn_add<Inv>(a, f);
    x[4] = turn_add<!Inv>(a, f);
    x[2] = turn_add<Inv>(b, g);
    x[3] = turn_add<!Inv>(b, g);
  }
};

}  // namespace
}  // namespace effk::EFFK_TIER
