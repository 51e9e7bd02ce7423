// CUDA binding of the dyad_* ops: checks the arguments, allocates outputs and copies of residues where those pay, and
// launches ops/dyad_linear/cuda.cu on the current stream. No call waits for the device.
#include "ops/dyad_linear/cuda.h"

#include <torch/csrc/stable/accelerator.h>

#include <string>
#include <tuple>
#include <vector>

#include "torch/cuda/device_pack.h"
#include "torch/cuda/wq_weight.h"

namespace effk::binding {
namespace {

namespace dyad = cuda::dyad;

Tensor output(const Input& in, bool features, int64_t width) {
  return features ? empty({width, in.m}, in.view.dtype, in.view.home) : output_like(in, width);
}

// Copies of arrays in the order of residues, which live as long as the call: memory given back is reused in the order
// of the stream.
struct Copies {
  const char* op;
  const OnDevice& device;
  std::vector<Tensor> owned;

  const void* order(bool wanted, const void* from, DType type, int32_t dtype, int64_t rows, int64_t length, int64_t n) {
    if (!wanted || rows == 0) return nullptr;
    owned.push_back(empty({rows, length}, dtype, device.home));
    void* const to = owned.back().mutable_data_ptr();
    check_gemm_launch(op, dyad::deinterleave(from, type, rows, length, n, to, device.stream()));
    return to;
  }
};

dyad::Weights packed_weights(const cuda::Packed& what, const void* packed) {
  const char* const rows = static_cast<const char*>(packed) + cuda::kPackHeader;
  dyad::Weights w{rows, rows + what.rows() / 2 * what.ld() * what.element(), what.dtype, what.ld(), static_cast<const uint32_t*>(packed)};
  what.words(w.expected);
  return w;
}

// y of a layer whose arguments are checked.
Tensor forward(const char* op, const dyad::Shape& s, const Input& in, const dyad::Weights& w, const dyad::Epilogue& e, const OnDevice& device) {
  check_side(Arg{op, "x"}, s.tokens);
  check_side(Arg{op, "x"}, s.f_in());
  check_side(Arg{op, "f_out"}, s.f_out());
  Tensor y = output(in, s.features, s.f_out());
  if (in.m == 0) return y;
  Copies copies{op, device, {}};
  dyad::Residues r;
  r.x = copies.order(dyad::wants_x_residues(s), in.view.data(), in.dtype, in.view.dtype, in.m, s.f_in(), s.n);
  check_gemm_launch(op, dyad::forward(s, in.view.data(), in.dtype, w, e, r, y.mutable_data_ptr(), device.stream()));
  return y;
}

Tensor linear(const Tensor& x, const Tensor& wl, const Tensor& wu, const OptionalTensor& bias, const std::string& variant,
              const std::string& layout, const std::string& act) {
  constexpr const char* op = "dyad_linear";
  const panel::Kind kind = parse_variant(op, variant);
  const bool features = parse_features(op, layout);
  const Activation activation = parse_act(op, act);
  const OnDevice device(Arg{op, "x"}, x);
  const Components c = make_components(op, wl, wu, device.home);
  const Input in = make_rows(Arg{op, "x"}, x, c.f_in(), features, device.home);
  const Bias b = make_bias(op, "bias", bias, c.f_out(), device.home);
  return forward(op, {c.n, c.d_out, c.d_in, in.m, kind, features}, in, {c.wl.data(), c.wu.data(), c.dtype, c.d_in}, {b.data, b.dtype, activation},
                 device);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& gy, const Tensor& x, const Tensor& wl, const Tensor& wu,
                                                    const std::string& variant, const std::string& layout, std::vector<bool> mask) {
  constexpr const char* op = "dyad_linear_backward";
  const panel::Kind kind = parse_variant(op, variant);
  const bool features = parse_features(op, layout);
  const OnDevice device(Arg{op, "x"}, x);
  const Home& home = device.home;
  const Components c = make_components(op, wl, wu, home);
  EFFK_CHECK(mask.size() == 4, op, ": mask: expected 4 entries (x, wl, wu, bias), got ", mask.size());
  const Input in = make_rows(Arg{op, "x"}, x, c.f_in(), features, home), grad = make_rows(Arg{op, "gy"}, gy, c.f_out(), features, home);
  if (grad.view.dtype != in.view.dtype || grad.m != in.m)
    Arg{op, "gy"}.fail(dtype_name(in.view.dtype) + " of " + std::to_string(in.m) + " tokens as x has", grad.view.text());
  const dyad::Shape s{c.n, c.d_out, c.d_in, in.m, kind, features};
  check_side(Arg{op, "x"}, s.tokens);
  check_side(Arg{op, "x"}, s.f_in());
  check_side(Arg{op, "gy"}, s.f_out());

  const auto like_w = [&](bool wanted) { return wanted ? empty({c.n, c.d_out, c.d_in}, c.wl.dtype, home) : empty({0}, c.wl.dtype, home); };
  Tensor gx = mask[0] ? output(in, features, c.f_in()) : empty({0}, in.view.dtype, home);
  Tensor gwl = like_w(mask[1]), gwu = like_w(mask[2]), gb = empty({mask[3] ? c.f_out() : 0}, dtypes().f32, home);
  if (in.m == 0) return {gx, torch::stable::fill_(gwl, 0.0), torch::stable::fill_(gwu, 0.0), torch::stable::fill_(gb, 0.0)};

  Copies copies{op, device, {}};
  dyad::Residues r;
  r.gy = copies.order((mask[0] && dyad::wants_gy_residues(s)) || (mask[2] && dyad::wants_residues_for_weights(s, true)), grad.view.data(),
                      grad.dtype, grad.view.dtype, in.m, c.f_out(), c.n);
  r.x = copies.order(mask[2] && dyad::wants_residues_for_weights(s, false), in.view.data(), in.dtype, in.view.dtype, in.m, c.f_in(), c.n);
  if (mask[0]) {
    r.wl = copies.order(dyad::wants_wl_residues(s), c.wl.data(), c.dtype, c.wl.dtype, c.f_out(), c.d_in, c.n);
    check_gemm_launch(op, dyad::input_gradient(s, grad.view.data(), in.dtype, {c.wl.data(), c.wu.data(), c.dtype, c.d_in}, r, gx.mutable_data_ptr(),
                                               device.stream()));
  }
  check_gemm_launch(op, dyad::weight_gradient(s, grad.view.data(), in.view.data(), in.dtype, r, mask[1] ? gwl.mutable_data_ptr() : nullptr,
                                              mask[2] ? gwu.mutable_data_ptr() : nullptr, c.dtype, device.stream()));
  if (mask[3]) check_gemm_launch(op, dyad::bias_gradient(s, grad.view.data(), in.dtype, static_cast<float*>(gb.mutable_data_ptr()), device.stream()));
  return {gx, gwl, gwu, gb};
}

Tensor pack(const Tensor& wl, const Tensor& wu, const std::string& variant, const std::string& dtype) {
  constexpr const char* op = "dyad_pack";
  const panel::Kind kind = parse_variant(op, variant);
  const DType to = parse_dtype(op, dtype);
  const OnDevice device(Arg{op, "wl"}, wl);
  const Components c = make_components(op, wl, wu, device.home);
  return new_pack(op, {kind, to, c.n, c.d_out, c.d_in}, c.wl.data(), c.wu.data(), c.dtype, device);
}

Tensor linear_packed(const Tensor& x, const Tensor& packed, int64_t f_out, const OptionalTensor& bias, const std::string& variant,
                     const std::string& layout, const std::string& act) {
  constexpr const char* op = "dyad_linear_packed";
  const panel::Kind kind = parse_variant(op, variant);
  const bool features = parse_features(op, layout);
  const Activation activation = parse_act(op, act);
  const OnDevice device(Arg{op, "x"}, x);
  const View view(x);
  if (features && view.dim != 2) Arg{op, "x"}.fail("[f_in, tokens] on " + device.home.text(), view.text());
  const int64_t f_in = features ? view.sizes[0] : last_side(Arg{op, "x"}, x);
  const cuda::Packed what = device_pack(Arg{op, "packed"}, packed, kind, f_out, f_in, device.home);
  const Input in = make_rows(Arg{op, "x"}, x, f_in, features, device.home);
  const Bias b = make_bias(op, "bias", bias, f_out, device.home);
  return forward(op, {what.n, what.d_out, what.d_in, in.m, kind, features}, in, packed_weights(what, View(packed).data()),
                 {b.data, b.dtype, activation}, device);
}

// Two launches: a tile of hidden features needs all of the layer ahead, and the widths of these layers exceed shared
// memory. What is fused: activation and bias, and the copy of the hidden features in the order of residues that the
// second layer reads. Between the layers they have the type of x.
Tensor ff(const Tensor& x, const Tensor& packed1, const OptionalTensor& b1, const Tensor& packed2, const OptionalTensor& b2, int64_t f_hidden,
          int64_t f_out, const std::string& act, const std::string& variant) {
  constexpr const char* op = "dyad_ff";
  const panel::Kind kind = parse_variant(op, variant);
  const Activation activation = parse_act(op, act);
  const OnDevice device(Arg{op, "x"}, x);
  const Home& home = device.home;
  const int64_t f_in = last_side(Arg{op, "x"}, x);
  const cuda::Packed one = device_pack(Arg{op, "packed1"}, packed1, kind, f_hidden, f_in, home);
  const cuda::Packed two = device_pack(Arg{op, "packed2"}, packed2, kind, f_out, f_hidden, home);
  const Input in = make_input(Arg{op, "x"}, x, f_in, home);
  check_side(Arg{op, "x"}, in.m);
  const Bias bias1 = make_bias(op, "b1", b1, f_hidden, home), bias2 = make_bias(op, "b2", b2, f_out, home);
  Tensor y = output(in, false, f_out);
  if (in.m == 0) return y;
  const dyad::Shape s1{one.n, one.d_out, one.d_in, in.m, kind, false}, s2{two.n, two.d_out, two.d_in, in.m, kind, false};
  const bool ordered = dyad::wants_x_residues(s2);
  Tensor hidden = empty({in.m, f_hidden}, in.view.dtype, home), copy = empty({ordered ? in.m : 0, f_hidden}, in.view.dtype, home);
  Copies copies{op, device, {}};
  dyad::Residues r1, r2;
  r1.x = copies.order(dyad::wants_x_residues(s1), in.view.data(), in.dtype, in.view.dtype, in.m, f_in, one.n);
  if (ordered) r2.x = copy.mutable_data_ptr();
  const dyad::Epilogue e1{bias1.data, bias1.dtype, activation, ordered ? copy.mutable_data_ptr() : nullptr, int(two.n)}, e2{bias2.data, bias2.dtype};
  check_gemm_launch(op, dyad::forward(s1, in.view.data(), in.dtype, packed_weights(one, View(packed1).data()), e1, r1, hidden.mutable_data_ptr(),
                                      device.stream()));
  check_gemm_launch(op, dyad::forward(s2, hidden.const_data_ptr(), in.dtype, packed_weights(two, View(packed2).data()), e2, r2,
                                      y.mutable_data_ptr(), device.stream()));
  return y;
}

Tensor to_dense(const Tensor& wl, const Tensor& wu, const std::string& variant) {
  constexpr const char* op = "dyad_to_dense";
  const panel::Kind kind = parse_variant(op, variant);
  const OnDevice device(Arg{op, "wl"}, wl);
  const Components c = make_components(op, wl, wu, device.home);
  Tensor w = empty({c.f_out(), c.f_in()}, c.wl.dtype, device.home);
  check_gemm_launch(op, dyad::to_dense({c.n, c.d_out, c.d_in, 0, kind, false}, {c.wl.data(), c.wu.data(), c.dtype, c.d_in}, w.mutable_data_ptr(),
                                       device.stream()));
  return w;
}

// The slow path, as for more than 64 rows in wq_linear: the weight is written out in the type of x, then multiplied as
// DYAD.
Tensor wq_linear(const Tensor& x, const Tensor& packed, const Tensor& scales, const OptionalTensor& zeros, const OptionalTensor& codebook,
                 const OptionalTensor& bias, int64_t n_dyad, int64_t f_out, int64_t f_in, int64_t bits, int64_t group_size,
                 const std::string& variant, const std::string& compute) {
  constexpr const char* op = "dyad_wq_linear";
  const panel::Kind kind = parse_variant(op, variant);
  EFFK_CHECK(parse_compute(op, compute) == Compute::fp, op, ": compute: expected 'float' for CUDA tensors, got 'int8': the int8 form is a CPU form");
  EFFK_CHECK(n_dyad >= 1, op, ": n_dyad: expected 1 or more, got ", n_dyad);
  const auto divided = [&](const char* name, int64_t side) {
    EFFK_CHECK(side >= 1 && side <= cuda::kGemmMaxSide && side % n_dyad == 0, op, ": ", name, ": expected a positive multiple of n_dyad = ", n_dyad,
               ", got ", side);
    return side / n_dyad;
  };
  const int64_t d_out = divided("f_out", f_out), d_in = divided("f_in", f_in);
  EFFK_CHECK(d_out % t16::kTileRows == 0, op, ": f_out: expected blocks of a multiple of ", t16::kTileRows, " rows, got ", d_out);
  const bool joined = kind == panel::Kind::it;
  const OnDevice device(Arg{op, "x"}, x);
  const OptionalTensor none;
  const DeviceWeight w = device_weight(op, -1, {packed, scales, zeros, codebook, none, none, none}, joined ? f_out : 2 * f_out,
                                       joined ? 2 * d_in : d_in, bits, group_size, device.home);
  const Input in = make_input(Arg{op, "x"}, x, f_in, device.home);
  const Bias b = make_bias(op, "bias", bias, f_out, device.home);
  const Tensor rows = dequantized(op, w, device.home, in.dtype, device.stream());
  const char* const wl = static_cast<const char*>(rows.const_data_ptr());
  const int64_t to_wu = (joined ? d_in : f_out * d_in) * (in.dtype == DType::f32 ? 4 : 2);
  return forward(op, {n_dyad, d_out, d_in, in.m, kind, false}, in, {wl, wl + to_wu, in.dtype, joined ? 2 * d_in : d_in}, {b.data, b.dtype}, device);
}

}  // namespace
}  // namespace effk::binding

EFFK_CUDA_LIBRARY(m) {
  using namespace effk::binding;
  m.impl("dyad_linear", TORCH_BOX(&linear));
  m.impl("dyad_linear_backward", TORCH_BOX(&backward));
  m.impl("dyad_pack", TORCH_BOX(&pack));
  m.impl("dyad_linear_packed", TORCH_BOX(&linear_packed));
  m.impl("dyad_ff", TORCH_BOX(&ff));
  m.impl("dyad_to_dense", TORCH_BOX(&to_dense));
  m.impl("dyad_wq_linear", TORCH_BOX(&wq_linear));
}
