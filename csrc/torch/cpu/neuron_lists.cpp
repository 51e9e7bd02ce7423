// CPU binding of the lists, listed products and masks of neurons: checks the arguments, allocates, and calls ops/neuron_lists.
#include "ops/neuron_lists/neuron_lists.h"

#include <cmath>
#include <tuple>

#include "torch/relu_ffn_args.h"

namespace effk::binding {
namespace {

using neuron_lists::mask_bytes;

Tokens matrix(const char* op, const Tensor& x) {
  Tokens t = make_tokens(op, x, kCpu);
  if (t.x.dim != 2) Arg{op, "x"}.fail("[tokens, d]", t.x.text());
  return t;
}
// fp32 [tokens, n].
View scores(const Arg& arg, const Tensor& x) {
  const View v(x);
  if (v.dim != 2 || v.sizes[1] < 1) arg.fail("float32 [tokens, n]", v.text());
  expect(arg, v, {dtypes().f32}, {v.sizes[0], v.sizes[1]});
  return v;
}
Tensor new_mask(int64_t rows, int64_t n) { return result({rows, mask_bytes(n)}, dtypes().u8); }
uint8_t* bytes_of(const Tensor& t) { return static_cast<uint8_t*>(t.mutable_data_ptr()); }
float* floats_of(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
int32_t* ints_of(const Tensor& t) { return static_cast<int32_t*>(t.mutable_data_ptr()); }

std::tuple<Tensor, Tensor, Tensor> nz_compact(const Tensor& x, const OptionalTensor& threshold) {
  constexpr const char* op = "nz_compact";
  const Tokens t = matrix(op, x);
  neuron_lists::CompactArgs a{t.x.data(), t.dtype, t.count, t.d, nullptr, false, nullptr, nullptr, nullptr};
  if (threshold) {
    const Arg arg{op, "threshold"};
    a.threshold = values(arg, threshold, t.d, a.threshold_each, kCpu);
    for (int64_t i = 0; i < (a.threshold_each ? t.d : 1); ++i)
      if (!(a.threshold[i] >= 0)) arg.fail("values of at least 0", std::to_string(a.threshold[i]));
  }
  const Tensor index = result({t.count, t.d}, dtypes().i32), value = result({t.count, t.d}, dtypes().f32), count = result({t.count}, dtypes().i32);
  a.index = ints_of(index), a.value = floats_of(value), a.count = ints_of(count);
  neuron_lists::compact(a, scratch(neuron_lists::compact_workspace(a)), torch_pool());
  return {index, value, count};
}

// index [n] and count [1], of rows that there are, in order: a wrong list would read what is not there.
void check_list(const char* op, const Tensor& index, const Tensor& count, int64_t f, neuron_lists::RowsArgs& a) {
  const View i(index), c(count);
  const Arg arg{op, "index"};
  if (i.dim != 1) arg.fail("int32 [n]", i.text());
  expect(arg, i, {dtypes().i32}, {i.sizes[0]});
  expect(Arg{op, "count"}, c, {dtypes().i32}, {1});
  a.index = i.data<int32_t>(), a.capacity = i.sizes[0], a.count = *c.data<int32_t>();
  EFFK_CHECK(a.count >= 0 && a.count <= a.capacity, op, ": count: expected 0 to ", a.capacity, ", got ", a.count);
  for (int64_t j = 0; j < a.count; ++j)
    EFFK_CHECK(a.index[j] > (j ? a.index[j - 1] : -1) && a.index[j] < f, op, ": index: expected rising numbers below ", f, ", got ", a.index[j], " at ", j);
}

Tensor rows_dot(const Tensor& x, const Tensor& w, const OptionalTensor& scales, const OptionalTensor& bias, const Tensor& index, const Tensor& count,
                const std::string& rows) {
  constexpr const char* op = "rows_dot";
  const Tokens t = matrix(op, x);
  neuron_lists::RowsArgs a{};
  a.type = parse_rows(op, "rows", rows), a.tokens = t.count, a.d = t.d;
  int64_t f = -1;
  const NeuronLayer layer = make_rows(op, "w", "scales", "bias", w, scales, bias, -1, a.type, f, t.d, kCpu);
  a.w = layer.rows, a.group = layer.group;
  check_list(op, index, count, f, a);
  const Tensor out = result({t.count, a.capacity}, dtypes().f32);
  neuron_lists::dot(a, t.x.data(), t.dtype, floats_of(out), scratch(neuron_lists::dot_workspace(a)), torch_pool());
  return out;
}

Tensor rows_axpy(const Tensor& value, const Tensor& index, const Tensor& count, const Tensor& w, const OptionalTensor& scales, const OptionalTensor& bias,
                 const std::string& rows, int64_t d, const std::string& dtype) {
  constexpr const char* op = "rows_axpy";
  EFFK_CHECK(d >= 1, op, ": d: expected at least 1, got ", d);
  EFFK_CHECK(dtype == "fp32" || dtype == "bf16" || dtype == "fp16", op, ": dtype: expected 'fp32', 'bf16' or 'fp16', got '", dtype, "'");
  const DType type = dtype == "fp32" ? DType::f32 : dtype == "bf16" ? DType::bf16 : DType::f16;
  neuron_lists::RowsArgs a{};
  a.type = parse_rows(op, "rows", rows), a.d = d;
  int64_t f = -1;
  const NeuronLayer layer = make_rows(op, "w", "scales", "bias", w, scales, bias, d, a.type, f, d, kCpu);
  a.w = layer.rows, a.group = layer.group;
  check_list(op, index, count, f, a);
  const View v(value);
  const Arg arg{op, "value"};
  if (v.dim != 2) arg.fail("float32 [tokens, " + std::to_string(a.capacity) + "]", v.text());
  expect(arg, v, {dtypes().f32}, {v.sizes[0], a.capacity});
  a.tokens = v.sizes[0];
  const Tensor y = result({a.tokens, d}, type == DType::f32 ? dtypes().f32 : type == DType::bf16 ? dtypes().bf16 : dtypes().f16);
  neuron_lists::axpy(a, v.data<float>(), y.mutable_data_ptr(), type, scratch(neuron_lists::axpy_workspace(a)), torch_pool());
  return y;
}

Tensor mask_lowrank(const Tensor& x, const Tensor& p1, const Tensor& p2, const OptionalTensor& s1, const OptionalTensor& s2, const std::string& act,
                    const Tensor& threshold, const std::string& rows, int64_t r) {
  constexpr const char* op = "mask_lowrank";
  const Tokens t = matrix(op, x);
  EFFK_CHECK(act == "none" || act == "relu", op, ": act: expected 'none' or 'relu', got '", act, "'");
  EFFK_CHECK(r >= 1, op, ": r: expected at least 1, got ", r);
  neuron_lists::LowRankArgs a{};
  a.type = parse_rows(op, "rows", rows);
  int64_t f = -1, rank = r;
  const NeuronLayer first = make_rows(op, "p1", "s1", "", p1, s1, std::nullopt, 0, a.type, rank, t.d, kCpu);
  const NeuronLayer second = make_rows(op, "p2", "s2", "", p2, s2, std::nullopt, 0, a.type, f, r, kCpu);
  a.first = first.rows, a.second = second.rows, a.group_first = first.group, a.group_second = second.group;
  a.x = t.x.data(), a.dtype = t.dtype, a.tokens = t.count, a.d = t.d, a.r = r, a.f = f, a.relu = act == "relu";
  a.threshold = values(Arg{op, "threshold"}, threshold, f, a.threshold_each, kCpu);
  const Tensor mask = new_mask(t.count, f);
  a.mask = bytes_of(mask);
  neuron_lists::low_rank(a, scratch(neuron_lists::low_rank_workspace(a)), torch_pool());
  return mask;
}

Tensor mask_sign(const Tensor& x, const Tensor& signs, const Tensor& alpha) {
  constexpr const char* op = "mask_sign";
  const Tokens t = matrix(op, x);
  const View s(signs);
  const Arg arg{op, "signs"};
  if (s.dim != 2 || s.sizes[0] < 1) arg.fail("uint8 [f, " + std::to_string(mask_bytes(t.d)) + "]", s.text());
  const int64_t f = s.sizes[0], width = mask_bytes(t.d);
  expect(arg, s, {dtypes().u8}, {f, width});
  for (int64_t i = 0; t.d % 8 && i < f; ++i)
    EFFK_CHECK(s.data<uint8_t>()[i * width + width - 1] >> (t.d % 8) == 0, op, ": signs: expected zeros beyond bit ", t.d, " of a row, got ones in row ", i);
  neuron_lists::SignArgs a{t.x.data(), t.dtype, t.count, t.d, f, s.data<uint8_t>(), nullptr, false, nullptr};
  a.alpha = values(Arg{op, "alpha"}, alpha, f, a.alpha_each, kCpu);
  const Tensor mask = new_mask(t.count, f);
  a.mask = bytes_of(mask);
  neuron_lists::sign(a, scratch(neuron_lists::sign_workspace(a)), torch_pool());
  return mask;
}

std::tuple<Tensor, Tensor> mask_dynk(const Tensor& r, double tau, const std::string& rule) {
  constexpr const char* op = "mask_dynk";
  const View v = scores(Arg{op, "r"}, r);
  EFFK_CHECK(rule == "largest" || rule == "share", op, ": rule: expected 'largest' or 'share', got '", rule, "'");
  EFFK_CHECK(tau >= 0 && tau <= 1, op, ": tau: expected 0 to 1, got ", tau);
  for (int64_t i = 0; i < v.numel(); ++i)
    EFFK_CHECK(std::isfinite(v.data<float>()[i]) && v.data<float>()[i] >= 0, op, ": r: expected finite values of at least 0, got ", v.data<float>()[i], " at ", i);
  const Tensor mask = new_mask(v.sizes[0], v.sizes[1]), count = result({v.sizes[0]}, dtypes().i32);
  neuron_lists::dynamic_k(v.data<float>(), v.sizes[0], v.sizes[1], float(tau), rule == "largest", static_cast<int32_t*>(scratch(size_t(v.sizes[1]) * 4)),
                          bytes_of(mask), ints_of(count));
  return {mask, count};
}

Tensor mask_topk(const Tensor& score, int64_t k, int64_t group) {
  constexpr const char* op = "mask_topk";
  const View v = scores(Arg{op, "score"}, score);
  EFFK_CHECK(group >= 1, op, ": group: expected at least 1, got ", group);
  const int64_t groups = (v.sizes[1] - 1) / group + 1;
  EFFK_CHECK(k >= 0 && k <= groups, op, ": k: expected 0 to ", groups, ", got ", k);
  const Tensor mask = new_mask(v.sizes[0], groups);
  float* largest = static_cast<float*>(scratch(size_t(groups) * 8));
  neuron_lists::top_k(v.data<float>(), v.sizes[0], v.sizes[1], k, group, largest, reinterpret_cast<int32_t*>(largest + groups), bytes_of(mask));
  return mask;
}

std::tuple<Tensor, Tensor> mask_union(const Tensor& mask) {
  constexpr const char* op = "mask_union";
  const View v(mask);
  const Arg arg{op, "mask"};
  if (v.dim != 2 || v.sizes[1] < 1) arg.fail("uint8 [tokens, bytes]", v.text());
  expect(arg, v, {dtypes().u8}, {v.sizes[0], v.sizes[1]});
  const Tensor any = result({1, v.sizes[1]}, dtypes().u8), bits = result({1}, dtypes().i32);
  neuron_lists::any_of(v.data<uint8_t>(), v.sizes[0], v.sizes[1], bytes_of(any), ints_of(bits));
  return {any, bits};
}

}  // namespace
}  // namespace effk::binding

STABLE_TORCH_LIBRARY_IMPL(effk, CPU, m) {
  using namespace effk::binding;
  m.impl("nz_compact", TORCH_BOX(&nz_compact));
  m.impl("rows_dot", TORCH_BOX(&rows_dot));
  m.impl("rows_axpy", TORCH_BOX(&rows_axpy));
  m.impl("mask_lowrank", TORCH_BOX(&mask_lowrank));
  m.impl("mask_sign", TORCH_BOX(&mask_sign));
  m.impl("mask_dynk", TORCH_BOX(&mask_dynk));
  m.impl("mask_topk", TORCH_BOX(&mask_topk));
  m.impl("mask_union", TORCH_BOX(&mask_union));
}
