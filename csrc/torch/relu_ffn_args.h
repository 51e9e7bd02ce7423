// The arguments of relu_ffn and input_sparse_linear, checked, as the kernels take them: for the CPU and the CUDA binding. Values that
// lie on a device cannot be looked at without waiting for it: parameters and masks are checked on the CPU only.
#pragma once
#include <cmath>
#include <limits>
#include <string>

#include "ops/relu_ffn/relu_ffn.h"
#include "torch/fftconv_args.h"

namespace effk::binding {

inline neuron::Rows parse_rows(const char* op, const char* name, const std::string& text) {
  for (int i = 0; i < 5; ++i)
    if (text == neuron::kRowNames[i]) return neuron::Rows(i);
  fail(op, ": ", name, ": expected 'fp32', 'bf16', 'fp16', 'int8' or 'int4', got '", text, "'");
}
inline Gate parse_gate(const char* op, const std::string& text) {
  std::string known;
  for (int i = 0; i < kGates; ++i) {
    if (text == kGateNames[i]) return Gate(i);
    known += std::string(i ? ", '" : "'") + kGateNames[i] + "'";
  }
  fail(op, ": gate: expected one of ", known, ", got '", text, "'");
}

// The group of scales [f, groups]: there is one size for every number of groups.
inline int64_t group_of(const Arg& arg, const View& scales, int64_t d) {
  if (scales.dim == 2) {
    if (scales.sizes[1] == 1) return 0;
    for (int64_t g : {32, 64, 128})
      if (neuron::groups(d, g) == scales.sizes[1]) return g;
  }
  arg.fail("[f, groups] with one group a row or groups of 32, 64 or 128 of " + std::to_string(d) + " columns", scales.text());
}

struct NeuronLayer {
  relu_ffn::NeuronRows rows;
  int64_t group;
};
// Rows [f, row bytes] of length d with their scales and bias; f is taken from the tensor when it is below 0.
inline NeuronLayer make_rows(const char* op, const char* name, const char* scales_name, const char* bias_name, const Tensor& w,
                             const OptionalTensor& scales, const OptionalTensor& bias, int64_t bias_length, neuron::Rows kind, int64_t& f, int64_t d,
                             const Home& home) {
  const View rows(w);
  const Arg arg{op, name};
  if (f < 0) {
    if (rows.dim != 2 || rows.sizes[0] < 1 || rows.sizes[0] > std::numeric_limits<int32_t>::max())
      arg.fail("uint8 [f, " + std::to_string(neuron::row_bytes(kind, d)) + "] from relu_ffn_pack", rows.text());
    f = rows.sizes[0];
  }
  expect(arg, rows, {dtypes().u8}, {f, neuron::row_bytes(kind, d)}, home);
  NeuronLayer layer{{rows.data<uint8_t>(), nullptr, nullptr}, 0};
  const Arg scales_arg{op, scales_name};
  if (neuron::quantised(kind)) {
    if (!scales) scales_arg.fail(std::string("scales for rows of ") + neuron::kRowNames[int(kind)], "none");
    const View s(*scales);
    layer.group = group_of(scales_arg, s, d);
    expect(scales_arg, s, {dtypes().f32}, {f, neuron::groups(d, layer.group)}, home);
    layer.rows.scales = s.data<float>();
  } else if (scales) {
    scales_arg.fail(std::string("none for rows of ") + neuron::kRowNames[int(kind)], View(*scales).text());
  }
  if (bias) {
    const View b(*bias);
    expect(Arg{op, bias_name}, b, {dtypes().f32}, {bias_length < 0 ? f : bias_length}, home);
    layer.rows.bias = b.data<float>();
  }
  return layer;
}

// x [..., d] as tokens.
struct Tokens {
  View x;
  DType dtype;
  int64_t count, d;
};
inline Tokens make_tokens(const char* op, const Tensor& x, const Home& home) {
  const Arg arg{op, "x"};
  Tokens t{View(x), DType::f32, 1, 0};
  t.dtype = float_dtype_of(arg, t.x);
  if (t.x.dim < 1 || t.x.sizes[t.x.dim - 1] < 1 || !t.x.contiguous || !(t.x.home == home)) arg.fail("[..., d], contiguous, on " + home.text(), t.x.text());
  t.d = t.x.sizes[t.x.dim - 1];
  for (int64_t i = 0; i + 1 < t.x.dim; ++i) t.count *= t.x.sizes[i];
  return t;
}
// fp32, one or one of f.
inline const float* values(const Arg& arg, const OptionalTensor& t, int64_t f, bool& each, const Home& home) {
  const View v(*t);
  each = v.dim == 1 && v.sizes[0] == f && f != 1;
  expect(arg, v, {dtypes().f32}, {each ? f : 1}, home);
  return v.data<float>();
}

// A call without its results.
struct ReluFfnCall {
  Tokens t;
  relu_ffn::Args a;
};
inline ReluFfnCall make_relu_ffn(const char* op, const Tensor& x, const OptionalTensor& wg, const Tensor& wu, const Tensor& wd, const OptionalTensor& sg,
                                 const OptionalTensor& su, const OptionalTensor& sd, const OptionalTensor& bg, const OptionalTensor& bu,
                                 const OptionalTensor& bd, const std::string& rows, const std::string& gate, const OptionalTensor& param,
                                 const OptionalTensor& mask, int64_t mask_group, const std::string& mode, const Home& home) {
  ReluFfnCall call{make_tokens(op, x, home), {}};
  const Tokens& t = call.t;
  relu_ffn::Args& a = call.a;
  a.type = parse_rows(op, "rows", rows);
  a.kind = parse_gate(op, gate);
  EFFK_CHECK(mode == "auto" || mode == "sparse" || mode == "dense", op, ": mode: expected 'auto', 'sparse' or 'dense', got '", mode, "'");
  int64_t f = -1;
  const NeuronLayer up = make_rows(op, "wu", "su", "bu", wu, su, bu, -1, a.type, f, t.d, home);
  const NeuronLayer down = make_rows(op, "wd", "sd", "bd", wd, sd, bd, t.d, a.type, f, t.d, home);
  EFFK_CHECK(down.group == up.group, op, ": sd: expected groups of the same size as su, got another");
  if (wg) {
    const NeuronLayer g = make_rows(op, "wg", "sg", "bg", *wg, sg, bg, -1, a.type, f, t.d, home);
    EFFK_CHECK(g.group == up.group, op, ": sg: expected groups of the same size as su, got another");
    a.gate = g.rows;
    a.up = up.rows;
  } else {
    EFFK_CHECK(!sg && !bg, op, ": wg: expected the gate that sg or bg belongs to, got none");
    EFFK_CHECK(a.kind != Gate::drelu, op, ": gate: expected a layer with wg for 'drelu', got none");
    a.gate = up.rows;
  }
  a.down = down.rows;
  a.group = up.group;
  const bool takes = a.kind == Gate::shifted_relu || a.kind == Gate::fatrelu || a.kind == Gate::silu_threshold || a.kind == Gate::gelu_gauss ||
                     a.kind == Gate::top_k;
  EFFK_CHECK(takes == bool(param), op, ": param: expected ", takes ? "one for gate '" : "none for gate '", gate, takes ? "', got none" : "', got one");
  if (param) {
    const Arg arg{op, "param"};
    a.param = values(arg, param, f, a.param_each, home);
    if (a.param_each && (a.kind == Gate::gelu_gauss || a.kind == Gate::top_k)) arg.fail("one value", View(*param).text());
    for (int64_t i = 0; home == kCpu && i < (a.param_each ? f : 1); ++i) {
      const float p = a.param[i];
      const bool sign_ok = a.kind == Gate::shifted_relu || a.kind == Gate::gelu_gauss || p >= 0;
      if (!std::isfinite(p) || !sign_ok) arg.fail(sign_ok ? "finite values" : "finite values of at least 0", std::to_string(p));
      if (a.kind == Gate::top_k && (p > float(f) || p != std::floor(p))) arg.fail("a whole number up to " + std::to_string(f), std::to_string(p));
    }
  }
  if (mask) {
    EFFK_CHECK(mask_group >= 1, op, ": mask_group: expected at least 1, got ", mask_group);
    const View m(*mask);
    const int64_t bits = (f + mask_group - 1) / mask_group, bytes = (bits + 7) / 8;
    const Arg arg{op, "mask"};
    if (m.dim != 2 || (m.sizes[0] != 1 && m.sizes[0] != t.count))
      arg.fail("uint8 [1 or " + std::to_string(t.count) + ", " + std::to_string(bytes) + "]", m.text());
    expect(arg, m, {dtypes().u8}, {m.sizes[0], bytes}, home);
    a.mask = m.data<uint8_t>(), a.mask_rows = m.sizes[0], a.mask_bytes = bytes, a.mask_group = mask_group;
    for (int64_t r = 0; home == kCpu && bits % 8 && r < a.mask_rows; ++r)
      EFFK_CHECK(a.mask[r * bytes + bytes - 1] >> (bits % 8) == 0, op, ": mask: expected zeros beyond bit ", bits, " of a row, got ones in row ", r);
  }
  a.x = t.x.data(), a.dtype = t.dtype, a.tokens = t.count, a.d = t.d, a.f = f;
  a.dense = mode == "dense", a.fall_back = mode == "auto";
  return call;
}

struct InputSparseCall {
  Tokens t;
  relu_ffn::InputSparseArgs a;
};
inline InputSparseCall make_input_sparse(const char* op, const Tensor& x, const Tensor& w, const OptionalTensor& scales, const OptionalTensor& bias,
                                         const OptionalTensor& threshold, const std::string& rows, int64_t f_out, const Home& home) {
  InputSparseCall call{make_tokens(op, x, home), {}};
  const Tokens& t = call.t;
  relu_ffn::InputSparseArgs& a = call.a;
  EFFK_CHECK(f_out >= 1, op, ": f_out: expected at least 1, got ", f_out);
  a.type = parse_rows(op, "rows", rows);
  int64_t d_in = t.d;
  const NeuronLayer layer = make_rows(op, "w", "scales", "bias", w, scales, bias, f_out, a.type, d_in, f_out, home);
  a.w = layer.rows, a.group = layer.group;
  if (threshold) {
    const Arg arg{op, "threshold"};
    a.threshold = values(arg, threshold, t.d, a.threshold_each, home);
    for (int64_t i = 0; home == kCpu && i < (a.threshold_each ? t.d : 1); ++i)
      if (!(a.threshold[i] >= 0)) arg.fail("values of at least 0", std::to_string(a.threshold[i]));
  }
  a.x = t.x.data(), a.dtype = t.dtype, a.tokens = t.count, a.d_in = t.d, a.d_out = f_out;
  return call;
}

}  // namespace effk::binding
