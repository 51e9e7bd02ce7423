// CPU binding of attention: checks the arguments, allocates, and calls ops/attention.
#include "torch/attention_args.h"

#include <algorithm>
#include <vector>

#include "common/half.h"
#include "torch/fftconv_args.h"

namespace effk::binding {
namespace {

constexpr const char* kOp = "attention";

void to_floats(const View& t, DType dtype, float* to) {
  const int64_t n = t.numel();
  const uint16_t* from = t.data<uint16_t>();
  for (int64_t i = 0; i < n; ++i) to[i] = dtype == DType::bf16 ? bf16_to_float(from[i]) : f16_to_float(from[i]);
}

Tensor forward(const Tensor& q, const Tensor& k, const Tensor& v, Tensor k_cache, Tensor v_cache, OptionalTensor k_scale, OptionalTensor v_scale,
               const Tensor& runs, const OptionalTensor& cosine, const OptionalTensor& sine, double scale, int64_t window) {
  const View query(q), key(k), value(v), keys(k_cache), values(v_cache);
  std::optional<View> k_scales, v_scales;
  if (k_scale) k_scales.emplace(*k_scale);
  if (v_scale) v_scales.emplace(*v_scale);
  attention::Args a{};
  a.cache = make_cache(kOp, keys, values, k_scales, v_scales, 0);
  const int64_t d = a.cache.head_dim, kv_heads = a.cache.kv_heads;
  const DType dtype = float_dtype_of(Arg{kOp, "q"}, query);
  if (query.dim != 3 || query.sizes[2] != d || query.sizes[1] < 1 || query.sizes[1] % kv_heads)
    Arg{kOp, "q"}.fail("[tokens, heads, " + std::to_string(d) + "] with a multiple of " + std::to_string(kv_heads) + " heads", query.text());
  const int64_t tokens = query.sizes[0];
  a.heads = query.sizes[1];
  expect(Arg{kOp, "q"}, query, {query.dtype}, {tokens, a.heads, d});
  expect(Arg{kOp, "k"}, key, {query.dtype}, {tokens, kv_heads, d});
  expect(Arg{kOp, "v"}, value, {query.dtype}, {tokens, kv_heads, d});
  const View run_view(runs);
  const std::vector<attention::Run> list = make_runs(kOp, run_view, a.cache, tokens);
  a.runs = list.data(), a.n_runs = int64_t(list.size());
  EFFK_CHECK(bool(cosine) == bool(sine), kOp, ": sine: expected one with cosine and none without, got the other");
  if (cosine) {
    const View c(*cosine), s(*sine);
    int64_t positions = 0;
    for (const attention::Run& r : list) positions = std::max(positions, r.start + r.count);
    if (c.dim != 2 || c.sizes[0] < positions || c.sizes[1] < 1 || 2 * c.sizes[1] > d)
      Arg{kOp, "cosine"}.fail("[positions, channels], at least " + std::to_string(positions) + " and at most " + std::to_string(d / 2), c.text());
    expect(Arg{kOp, "cosine"}, c, {dtypes().f32}, {c.sizes[0], c.sizes[1]});
    expect(Arg{kOp, "sine"}, s, {dtypes().f32}, {c.sizes[0], c.sizes[1]});
    a.cosine = c.data<float>(), a.sine = s.data<float>(), a.rotary = 2 * c.sizes[1];
  }
  EFFK_CHECK(window >= 0, kOp, ": window: expected 0 (none) or more, got ", window);
  a.scale = float(scale), a.window = window;
  a.cache.k = k_cache.mutable_data_ptr(), a.cache.v = v_cache.mutable_data_ptr();
  if (k_scale) a.cache.k_scale = static_cast<float*>(k_scale->mutable_data_ptr());
  if (v_scale) a.cache.v_scale = static_cast<float*>(v_scale->mutable_data_ptr());

  Tensor out = result({tokens, a.heads, d}, query.dtype);
  a.q_stride = a.out_stride = a.heads * d, a.k_stride = a.v_stride = kv_heads * d;
  const ParallelFor pool = torch_pool();
  const size_t work = (attention::workspace(a, pool.threads) + 63) / 64 * 64;
  if (dtype == DType::f32) {
    a.q = query.data<float>(), a.k = key.data<float>(), a.v = value.data<float>();
    a.out = static_cast<float*>(out.mutable_data_ptr());
    attention::run(a, scratch(work), pool);
    return out;
  }
  const int64_t q_count = query.numel(), k_count = key.numel();
  char* room = static_cast<char*>(scratch(work + size_t(2 * q_count + 2 * k_count) * 4));
  float* floats = reinterpret_cast<float*>(room + work);
  to_floats(query, dtype, floats);
  to_floats(key, dtype, floats + q_count);
  to_floats(value, dtype, floats + q_count + k_count);
  a.q = floats, a.k = floats + q_count, a.v = floats + q_count + k_count, a.out = floats + q_count + 2 * k_count;
  attention::run(a, room, pool);
  auto* to = static_cast<uint16_t*>(out.mutable_data_ptr());
  for (int64_t i = 0; i < q_count; ++i) to[i] = dtype == DType::bf16 ? float_to_bf16(a.out[i]) : float_to_f16(a.out[i]);
  return out;
}

}  // namespace
}  // namespace effk::binding

STABLE_TORCH_LIBRARY_IMPL(effk, CPU, m) { m.impl("attention", TORCH_BOX(&effk::binding::forward)); }
