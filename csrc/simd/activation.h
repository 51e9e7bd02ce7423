// Activations on 16 fp32 lanes. Included by a tier after its vector header.
//
// exp: 2^n times a polynomial of degree 6 on |r| <= ln 2 / 2, 1e-7 relative on [-87.3, 88.3], clamped to its ends beyond.
// exp2: the same with degree 5, exact in 0, 2e-7 relative on [-126, 127]; 0 for -infinity.
// silu and gelu_tanh x / (1 + exp(-z)): 3e-7 relative, 1e-36 absolute where exp was clamped. gelu max(x, 0) - a Phi(-a),
// a = |x|, Phi(-a) = exp(-a^2/2) t P(t), t = 1 / (1 + 0.35 a): 2e-7 max(1, |x|) absolute. The polynomials were fitted for this file
// (weighted least squares, relative error 3e-9 and 3e-8). NaN stays NaN.
#pragma once
#include "common/activation.h"

namespace effk::EFFK_TIER {
namespace {

EFFK_INLINE vf exp_f(vf x) {
  x = min_f(max_f(x, set_f(-87.3365448f)), set_f(88.3762626f));
  const vi n = round_to_int(mul_f(x, set_f(1.44269504f)));
  const vf nf = to_float(n);
  const vf r = fnma(nf, set_f(-2.12194440e-4f), fnma(nf, set_f(0.693359375f), x));  // ln 2 in two parts, the first exact in n
  vf p = mac(set_f(0.00138131483f), r, set_f(0.00836941879f));
  p = mac(p, r, set_f(0.041668456f));
  p = mac(p, r, set_f(0.166665152f));
  p = mac(p, r, set_f(0.49999994f));
  p = mac(p, mul_f(r, r), add_f(r, set_f(1.0f)));
  return mul_f(p, as_float(shift_left<23>(add_i(n, set_i(127)))));
}
EFFK_INLINE vf exp2_f(vf x) {
  x = max_f(set_f(kZeroPower), x);  // in this order NaN stays
  const vf n = round_f(x), r = sub_f(x, n);
  vf p = mac(set_f(0.0013264727f), r, set_f(0.009671513f));
  p = mac(p, r, set_f(0.055507336f));
  p = mac(p, r, set_f(0.24022242f));
  p = mac(p, r, set_f(0.693147f));
  p = mac(p, r, set_f(1.0f));
  return times_power(p, n);
}
EFFK_INLINE vf over_one_plus_exp(vf x, vf z) { return div_f(x, add_f(set_f(1.0f), exp_f(z))); }
EFFK_INLINE vf gelu_f(vf x) {
  const vf a = min_f(max_f(x, sub_f(zero_f(), x)), set_f(20.0f));
  const vf t = div_f(set_f(1.0f), mac(a, set_f(0.35f), set_f(1.0f)));
  constexpr float c[] = {-0.0291580278f, 0.144031584f, -0.255840331f, 0.159321144f, -0.0232132878f, 0.105552867f, 0.119821206f, 0.139863521f, 0.139621302f};
  vf p = set_f(c[0]);
  for (int i = 1; i < 9; ++i) p = mac(p, t, set_f(c[i]));
  const vf tail = mul_f(mul_f(exp_f(mul_f(mul_f(a, a), set_f(-0.5f))), t), p);
  return sub_f(max_f(zero_f(), x), mul_f(a, tail));
}
EFFK_INLINE vf activate(vf x, Activation act) {
  switch (act) {
    case Activation::relu: return max_f(zero_f(), x);
    case Activation::silu: return over_one_plus_exp(x, sub_f(zero_f(), x));
    case Activation::gelu_tanh: {  // 0.5 x (1 + tanh u) = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
      const vf u = mul_f(x, mac(mul_f(x, x), set_f(-2 * 0.79788456f * 0.044715f), set_f(-2 * 0.79788456f)));
      return over_one_plus_exp(x, u);
    }
    case Activation::gelu: return gelu_f(x);
    default: return x;
  }
}

}  // namespace
}  // namespace effk::EFFK_TIER
