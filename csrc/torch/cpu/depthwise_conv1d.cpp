// CPU binding of depthwise_conv1d: checks the arguments, allocates, and calls ops/depthwise_conv1d.
#include "ops/depthwise_conv1d/depthwise_conv1d.h"

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "common/half.h"
#include "torch/fftconv_args.h"

namespace effk::binding {
namespace {

// Sizes and borrowed data of one call; the taps in fp32 in `taps`, whatever type they came in.
struct Problem {
  View x, w;
  DType dtype;
  bool channels_last;
  Activation act;
  int64_t b, h, l, k, l_out, pad_left;
  std::vector<float> taps, bias;

  int64_t offset() const { return k - 1 - pad_left; }
  std::vector<int64_t> shape(int64_t length) const {
    return channels_last ? std::vector<int64_t>{b, length, h} : std::vector<int64_t>{b, h, length};
  }
};

std::vector<float> to_floats(const View& t, DType dtype) {
  std::vector<float> out(size_t(t.numel()));
  for (size_t i = 0; i < out.size(); ++i)
    out[i] = dtype == DType::f32 ? t.data<float>()[i]
             : dtype == DType::bf16 ? bf16_to_float(t.data<uint16_t>()[i]) : f16_to_float(t.data<uint16_t>()[i]);
  return out;
}

Problem make_problem(const char* op, const Tensor& x, const Tensor& w, const OptionalTensor& bias, int64_t pad_left,
                     int64_t pad_right, const std::string& layout, const std::string& act) {
  Problem p{View(x), View(w), DType::f32, false, Activation::none, 0, 0, 0, 0, 0, pad_left, {}, {}};
  p.dtype = float_dtype_of(Arg{op, "x"}, p.x);
  EFFK_CHECK(layout == "bhl" || layout == "blh", op, ": layout: expected 'bhl' or 'blh', got '", layout, "'");
  EFFK_CHECK(act == "none" || act == "silu", op, ": act: expected 'none' or 'silu', got '", act, "'");
  p.channels_last = layout == "blh";
  p.act = act == "silu" ? Activation::silu : Activation::none;
  if (p.x.dim != 3 || !p.x.contiguous || !(p.x.home == kCpu)) Arg{op, "x"}.fail("3 dimensions, contiguous, on cpu", p.x.text());
  p.b = p.x.sizes[0];
  p.h = p.x.sizes[p.channels_last ? 2 : 1];
  p.l = p.x.sizes[p.channels_last ? 1 : 2];
  const Arg arg{op, "w"};
  if (p.w.dim != 2 || p.w.sizes[1] < 1) arg.fail("[H, K] with K >= 1", p.w.text());
  p.k = p.w.sizes[1];
  expect(arg, p.w, {dtypes().f32, p.x.dtype}, {p.h, p.k});
  p.taps = to_floats(p.w, float_dtype_of(arg, p.w));
  if (bias) {
    const View view(*bias);
    expect(Arg{op, "bias"}, view, {dtypes().f32, p.x.dtype}, {p.h});
    p.bias = to_floats(view, float_dtype_of(Arg{op, "bias"}, view));
  }
  EFFK_CHECK(pad_left >= 0 && pad_right >= 0, op, ": pad_left, pad_right: expected 0 or more, got ", pad_left, ", ", pad_right);
  p.l_out = p.l + pad_left + pad_right - p.k + 1;
  EFFK_CHECK(p.l_out >= 1, op, ": w: expected at most L + pad_left + pad_right = ", p.l + pad_left + pad_right, " taps, got ", p.k);
  return p;
}

Tensor convolve(const Problem& p, const std::vector<float>& bias, Activation act, int32_t out_dtype, DType out) {
  const std::vector<int64_t> shape = p.shape(p.l_out);
  Tensor y = result(shape.data(), 3, out_dtype);
  const DepthwiseArgs args{p.x.data(), y.mutable_data_ptr(), p.dtype, out, p.taps.data(), bias.empty() ? nullptr : bias.data(),
                           p.b, p.h, p.k, p.l, p.l_out, p.offset(), p.channels_last, act};
  const ParallelFor pool = torch_pool();
  depthwise_conv1d(args, scratch(depthwise_conv1d_workspace(p.h, p.k, pool.threads)), pool);
  return y;
}

Tensor forward(const Tensor& x, const Tensor& w, const OptionalTensor& bias, int64_t pad_left, int64_t pad_right,
               const std::string& layout, const std::string& act) {
  const Problem p = make_problem("depthwise_conv1d", x, w, bias, pad_left, pad_right, layout, act);
  return convolve(p, p.bias, p.act, p.x.dtype, p.dtype);
}

// gy silu'(z), in fp32; z = x * w + bias is computed again.
Tensor through_silu(const Problem& p, const View& gy) {
  Tensor z = convolve(p, p.bias, Activation::none, dtypes().f32, DType::f32);
  float* g = static_cast<float*>(z.mutable_data_ptr());
  const auto value = [&](int64_t i) {
    return p.dtype == DType::f32 ? gy.data<float>()[i]
           : p.dtype == DType::bf16 ? bf16_to_float(gy.data<uint16_t>()[i]) : f16_to_float(gy.data<uint16_t>()[i]);
  };
  parallel_for(torch_pool(), gy.numel(), 32768, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float s = 1.0f / (1.0f + std::exp(-g[i]));
      g[i] = value(i) * s * (1.0f + g[i] * (1.0f - s));
    }
  });
  return z;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& gy, const Tensor& x, const Tensor& w, const OptionalTensor& bias,
                                            int64_t pad_left, int64_t pad_right, const std::string& layout,
                                            const std::string& act, std::vector<bool> mask) {
  constexpr const char* op = "depthwise_conv1d_backward";
  Problem p = make_problem(op, x, w, bias, pad_left, pad_right, layout, act);
  const View grad(gy);
  const std::vector<int64_t> shape = p.shape(p.l_out);
  expect(Arg{op, "gy"}, grad, {p.x.dtype}, {shape[0], shape[1], shape[2]});
  EFFK_CHECK(mask.size() == 3, op, ": mask: expected 3 entries (x, w, bias), got ", mask.size());
  EFFK_CHECK(!mask[2] || bias, op, ": mask: expected no gradient of bias without one, got true");
  const Dtypes& d = dtypes();
  std::optional<Tensor> turned;
  const void* g = grad.data();
  DType g_dtype = p.dtype;
  if (p.act == Activation::silu) {
    turned = through_silu(p, grad);
    g = turned->mutable_data_ptr();
    g_dtype = DType::f32;
  }
  const ParallelFor pool = torch_pool();
  void* room = scratch(depthwise_conv1d_workspace(p.h, p.k, pool.threads));
  const std::vector<int64_t> in = p.shape(p.l);
  Tensor gx = mask[0] ? result(in.data(), 3, p.x.dtype) : empty({0}, p.x.dtype);
  if (mask[0]) {  // the same sum with the taps reversed
    std::vector<float> reversed(p.taps.size());
    for (int64_t h = 0; h < p.h; ++h) std::reverse_copy(&p.taps[h * p.k], &p.taps[h * p.k] + p.k, &reversed[h * p.k]);
    depthwise_conv1d({g, gx.mutable_data_ptr(), g_dtype, p.dtype, reversed.data(), nullptr, p.b, p.h, p.k, p.l_out, p.l, p.pad_left,
                      p.channels_last, Activation::none}, room, pool);
  }
  Tensor gw = mask[1] ? empty({p.h, p.k}, d.f32) : empty({0}, d.f32);
  Tensor gb = mask[2] ? empty({p.h}, d.f32) : empty({0}, d.f32);
  if (mask[1] || mask[2])
    depthwise_conv1d_taps({g, p.x.data(), g_dtype, p.dtype, mask[1] ? static_cast<float*>(gw.mutable_data_ptr()) : nullptr,
                           mask[2] ? static_cast<float*>(gb.mutable_data_ptr()) : nullptr, p.b, p.h, p.k, p.l, p.l_out, p.offset(),
                           p.channels_last}, room, pool);
  return {gx, torch::stable::to(gw, w.scalar_type()), torch::stable::to(gb, bias ? bias->scalar_type() : w.scalar_type())};
}

}  // namespace
}  // namespace effk::binding

STABLE_TORCH_LIBRARY_IMPL(effk, CPU, m) {
  using namespace effk::binding;
  m.impl("depthwise_conv1d", TORCH_BOX(&forward));
  m.impl("depthwise_conv1d_backward", TORCH_BOX(&backward));
}
