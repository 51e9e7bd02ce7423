// Norms, gates and sums over rows of fp32, in the vector vocabulary of csrc/simd. They read what the product before them left in a
// first- or second-level cache: 0.1 us a row of 576, under 2 % of a step.
#pragma once
#include "ops/decoder/kernels.h"
#include "simd/activation.h"
#include "simd/convert.h"

namespace effk::EFFK_TIER {
namespace {

EFFK_INLINE vf part_at(const float* x, int64_t i, int64_t d) { return d - i >= 16 ? load_f32(x + i) : load_f32_part(x + i, int(d - i)); }

// sum of f(x[i], which are there) over a row, 4 chains of 16 lanes
template <class F> EFFK_INLINE float row_sum(const float* x, int64_t d, const F& f) {
  vf acc[4] = {zero_f(), zero_f(), zero_f(), zero_f()};
  int64_t i = 0;
  for (; i + 64 <= d; i += 64)
    for (int c = 0; c < 4; ++c) acc[c] = f(load_f32(x + i + 16 * c), acc[c], 16);
  for (; i < d; i += 16) acc[0] = f(part_at(x, i, d), acc[0], int(d - i < 16 ? d - i : 16));
  return reduce_add_f(add_f(add_f(acc[0], acc[1]), add_f(acc[2], acc[3])));
}

void norm(const decoder::Norm& n, const float* x, int64_t d, float* y) {
  float mean = 0;
  if (n.centred) mean = row_sum(x, d, [](vf v, vf acc, int) { return add_f(acc, v); }) / float(d);
  const vf middle = set_f(mean);
  const float squares = row_sum(x, d, [&](vf v, vf acc, int count) {
    float some[16];
    vf c = sub_f(v, middle);
    if (n.centred && count < 16) {  // lanes beyond the row are 0 - mean
      store_f32(some, c);
      c = load_f32_part(some, count);
    }
    return mac(c, c, acc);
  });
  const vf factor = set_f(1.0f / __builtin_sqrtf(squares / float(d) + n.eps));
  for (int64_t i = 0; i < d; i += 16) {
    vf v = mul_f(mul_f(sub_f(part_at(x, i, d), middle), factor), part_at(n.weight, i, d));
    if (n.bias) v = add_f(v, part_at(n.bias, i, d));
    store_some<DType::f32>(y + i, int(d - i < 16 ? d - i : 16), v);
  }
}

template <Activation A> EFFK_INLINE void gate_as(const float* g, const float* u, int64_t count, float* y) {
  for (int64_t i = 0; i < count; i += 16) {
    vf v = activate(part_at(g, i, count), A);
    if (u) v = mul_f(v, part_at(u, i, count));
    store_some<DType::f32>(y + i, int(count - i < 16 ? count - i : 16), v);
  }
}
void gate(Activation act, const float* g, const float* u, int64_t count, float* y) {
  switch (act) {
    case Activation::silu: return gate_as<Activation::silu>(g, u, count, y);
    case Activation::relu: return gate_as<Activation::relu>(g, u, count, y);
    case Activation::gelu: return gate_as<Activation::gelu>(g, u, count, y);
    case Activation::gelu_tanh: return gate_as<Activation::gelu_tanh>(g, u, count, y);
    default: return gate_as<Activation::none>(g, u, count, y);
  }
}

void add(const float* y, int64_t count, float* x) {
  for (int64_t i = 0; i < count; i += 16)
    store_some<DType::f32>(x + i, int(count - i < 16 ? count - i : 16), add_f(part_at(x, i, count), part_at(y, i, count)));
}

#define EFFK_DECODER_KERNEL tier::norm, tier::gate, tier::add, tier::read_floats, tier::write_floats

}  // namespace
}  // namespace effk::EFFK_TIER
