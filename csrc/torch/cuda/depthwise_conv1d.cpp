// CUDA binding of depthwise_conv1d: checks the arguments, allocates, and launches ops/depthwise_conv1d/cuda.cu on the current
// stream. No call waits for the device.
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "ops/depthwise_conv1d/cuda.h"
#include "torch/cuda/stream.h"
#include "torch/fftconv_args.h"

namespace effk::binding {
namespace {

namespace dw = cuda::depthwise;

constexpr int64_t kMaxSide = 65535;  // of a grid, but for its first

void check_launch(const char* op, int error) {
  EFFK_CHECK(error == 0, op, ": CUDA error ", error, ": ", dw::error_text(error), cuda_build_text());
}

// One call, checked; taps and bias in fp32, whatever type they came in.
struct Call {
  const char* op;
  Home home;
  View x;
  dw::Convolution c{};
  int64_t pad_left;
  Activation act;
  dw::Stream stream;
  Tensor taps;
  OptionalTensor bias;

  Call(const char* name, const OnDevice& device, const Tensor& x_t, const Tensor& w, const OptionalTensor& bias_t, int64_t left, int64_t right,
       const std::string& layout, const std::string& act_text)
      : op(name), home(device.home), x(x_t), pad_left(left), stream(device.stream()), taps(w), bias(bias_t) {
    DepthwiseArgs& a = c.a;
    a.x_dtype = a.y_dtype = float_dtype_of(Arg{op, "x"}, x);
    EFFK_CHECK(layout == "bhl" || layout == "blh", op, ": layout: expected 'bhl' or 'blh', got '", layout, "'");
    EFFK_CHECK(act_text == "none" || act_text == "silu", op, ": act: expected 'none' or 'silu', got '", act_text, "'");
    a.channels_last = layout == "blh";
    a.act = act = act_text == "silu" ? Activation::silu : Activation::none;
    if (x.dim != 3 || !x.contiguous || !(x.home == home)) Arg{op, "x"}.fail("3 dimensions, contiguous, on " + home.text(), x.text());
    a.b = x.sizes[0];
    a.h = x.sizes[a.channels_last ? 2 : 1];
    a.l_in = x.sizes[a.channels_last ? 1 : 2];
    a.x = x.data();
    const View view(w);
    const Arg arg{op, "w"};
    if (view.dim != 2 || view.sizes[1] < 1) arg.fail("[H, K] with K >= 1", view.text());
    a.k = view.sizes[1];
    expect(arg, view, {dtypes().f32, x.dtype}, {a.h, a.k}, home);
    if (view.dtype != dtypes().f32) taps = torch::stable::to(w, torch::headeronly::ScalarType::Float);
    a.taps = View(taps).data<float>();
    if (bias) {
      const View b(*bias);
      expect(Arg{op, "bias"}, b, {dtypes().f32, x.dtype}, {a.h}, home);
      if (b.dtype != dtypes().f32) bias = torch::stable::to(*bias, torch::headeronly::ScalarType::Float);
      a.bias = View(*bias).data<float>();
    }
    EFFK_CHECK(left >= 0 && right >= 0, op, ": pad_left, pad_right: expected 0 or more, got ", left, ", ", right);
    a.l_out = a.l_in + left + right - a.k + 1;
    EFFK_CHECK(a.l_out >= 1, op, ": w: expected at most L + pad_left + pad_right = ", a.l_in + left + right, " taps, got ", a.k);
    a.offset = a.k - 1 - left;
    EFFK_CHECK(a.b <= kMaxSide && a.h <= kMaxSide && a.k <= kMaxSide, op, ": x, w: expected at most ", kMaxSide, " batch entries, channels and taps, got ",
               x.text(), " and K = ", a.k);
  }

  Tensor rows(int64_t length, int32_t dtype) const {
    return c.a.channels_last ? empty({c.a.b, length, c.a.h}, dtype, home) : empty({c.a.b, c.a.h, length}, dtype, home);
  }
  bool nothing() const { return c.a.b * c.a.h == 0; }
};

Tensor forward(const Tensor& x, const Tensor& w, const OptionalTensor& bias, int64_t pad_left, int64_t pad_right, const std::string& layout,
               const std::string& act) {
  constexpr const char* op = "depthwise_conv1d";
  const OnDevice device(Arg{op, "x"}, x);
  Call call(op, device, x, w, bias, pad_left, pad_right, layout, act);
  Tensor y = call.rows(call.c.a.l_out, call.x.dtype);
  call.c.a.y = y.mutable_data_ptr();
  if (!call.nothing()) check_launch(op, dw::convolve(call.c, call.stream));
  return y;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& gy, const Tensor& x, const Tensor& w, const OptionalTensor& bias, int64_t pad_left,
                                            int64_t pad_right, const std::string& layout, const std::string& act, std::vector<bool> mask) {
  constexpr const char* op = "depthwise_conv1d_backward";
  const OnDevice device(Arg{op, "x"}, x);
  Call call(op, device, x, w, bias, pad_left, pad_right, layout, act);
  const DepthwiseArgs& a = call.c.a;
  const View grad(gy);
  if (a.channels_last) expect(Arg{op, "gy"}, grad, {call.x.dtype}, {a.b, a.l_out, a.h}, call.home);
  else expect(Arg{op, "gy"}, grad, {call.x.dtype}, {a.b, a.h, a.l_out}, call.home);
  EFFK_CHECK(mask.size() == 3, op, ": mask: expected 3 entries (x, w, bias), got ", mask.size());
  EFFK_CHECK(!mask[2] || bias, op, ": mask: expected no gradient of bias without one, got true");
  const int32_t f32 = dtypes().f32;
  Tensor gx = mask[0] ? call.rows(a.l_in, call.x.dtype) : empty({0}, call.x.dtype, call.home);
  Tensor gw = mask[1] ? empty({a.h, a.k}, f32, call.home) : empty({0}, f32, call.home);
  Tensor gb = empty({mask[2] ? a.h : 0}, f32, call.home);
  if (call.nothing()) {
    gw = torch::stable::fill_(gw, 0.0);
    gb = torch::stable::fill_(gb, 0.0);
  } else {
    const void* g = grad.data();
    DType g_dtype = a.x_dtype;
    OptionalTensor turned;  // gy silu'(sum), in fp32
    if (call.act == Activation::silu) {
      turned = call.rows(a.l_out, f32);
      dw::Convolution c = call.c;
      c.gy = g;
      c.a.y = turned->mutable_data_ptr();
      c.a.y_dtype = g_dtype = DType::f32;
      g = c.a.y;
      check_launch(op, dw::convolve(c, call.stream));
    }
    if (mask[0]) {  // the same sum with the taps reversed
      dw::Convolution c = call.c;
      c.reversed = true;
      c.a.x = g, c.a.x_dtype = g_dtype, c.a.y = gx.mutable_data_ptr();
      c.a.bias = nullptr, c.a.act = Activation::none;
      c.a.l_in = a.l_out, c.a.l_out = a.l_in, c.a.offset = call.pad_left;
      if (c.a.l_out) check_launch(op, dw::convolve(c, call.stream));
    }
    if (mask[1] || mask[2]) {
      const DepthwiseTapsArgs sums{g, a.x, g_dtype, a.x_dtype, mask[1] ? static_cast<float*>(gw.mutable_data_ptr()) : nullptr,
                                   mask[2] ? static_cast<float*>(gb.mutable_data_ptr()) : nullptr, a.b, a.h, a.k, a.l_in, a.l_out, a.offset,
                                   a.channels_last};
      const Tensor partial = empty({dw::taps_workspace(sums)}, f32, call.home);
      check_launch(op, dw::sum_taps(sums, static_cast<float*>(partial.mutable_data_ptr()), call.stream));
    }
  }
  return {gx, torch::stable::to(gw, w.scalar_type()), torch::stable::to(gb, bias ? bias->scalar_type() : w.scalar_type())};
}

}  // namespace
}  // namespace effk::binding

EFFK_CUDA_LIBRARY(m) {
  using namespace effk::binding;
  m.impl("depthwise_conv1d", TORCH_BOX(&forward));
  m.impl("depthwise_conv1d_backward", TORCH_BOX(&backward));
}
