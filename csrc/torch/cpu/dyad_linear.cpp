// CPU binding of the dyad_* ops: checks the arguments (torch/dyad_linear_args.h), allocates, and calls csrc/gemm and
// ops/dyad_linear.
#include "ops/dyad_linear/dyad_linear.h"

#include <tuple>
#include <vector>

#include "gemm/gemm.h"
#include "torch/dyad_linear_args.h"

namespace effk::binding {
namespace {

panel::Shape shape_of(const Components& c, panel::Kind kind, DType dtype) { return {kind, dtype, c.n, c.d_out, c.d_in}; }

Tensor output(const Input& in, bool features, int64_t width) {
  return features ? result({width, in.m}, in.view.dtype) : output_like(in, width);
}
size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Weights as they are trained: packed for this call, behind the rest of the scratch.
Tensor linear(const Tensor& x, const Tensor& wl, const Tensor& wu, const OptionalTensor& bias, const std::string& variant,
              const std::string& layout, const std::string& act) {
  constexpr const char* op = "dyad_linear";
  const panel::Kind kind = parse_variant(op, variant);
  const bool features = parse_features(op, layout);
  const Activation activation = parse_act(op, act);
  const Components c = make_components(op, wl, wu);
  const Input in = make_rows(Arg{op, "x"}, x, c.f_in(), features);
  const Bias b = make_bias(op, "bias", bias, c.f_out());
  Tensor y = output(in, features, c.f_out());
  const panel::Shape s = shape_of(c, kind, c.dtype);
  gemm::LinearArgs args{s, nullptr, in.view.data(), in.dtype, features, in.m, b.data, b.dtype, activation, y.mutable_data_ptr()};
  if (in.m == 0) return y;
  const ParallelFor pool = torch_pool();
  const size_t own = aligned(gemm::linear_workspace(args, pool.threads));
  char* room = static_cast<char*>(scratch(own + size_t(s.bytes())));
  uint8_t* panels = reinterpret_cast<uint8_t*>(room + own);
  gemm::pack(s, c.wl.data(), c.wu.data(), c.dtype, false, panels, pool);
  args.panels = panels;
  gemm::linear(args, room, pool);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& gy, const Tensor& x, const Tensor& wl, const Tensor& wu,
                                                    const std::string& variant, const std::string& layout, std::vector<bool> mask) {
  constexpr const char* op = "dyad_linear_backward";
  const panel::Kind kind = parse_variant(op, variant);
  const bool features = parse_features(op, layout);
  const Components c = make_components(op, wl, wu);
  EFFK_CHECK(mask.size() == 4, op, ": mask: expected 4 entries (x, wl, wu, bias), got ", mask.size());
  const Input in = make_rows(Arg{op, "x"}, x, c.f_in(), features), grad = make_rows(Arg{op, "gy"}, gy, c.f_out(), features);
  if (grad.view.dtype != in.view.dtype || grad.m != in.m)
    Arg{op, "gy"}.fail(dtype_name(in.view.dtype) + " of " + std::to_string(in.m) + " tokens as x has", grad.view.text());
  const ParallelFor pool = torch_pool();
  Tensor gx = mask[0] ? output(in, features, c.f_in()) : empty({0}, in.view.dtype);
  if (mask[0] && in.m > 0) {  // the same product with the roles of inputs and outputs exchanged: it <-> ot
    const panel::Kind dual = kind == panel::Kind::it ? panel::Kind::ot : kind == panel::Kind::ot ? panel::Kind::it : kind;
    const panel::Shape s{dual, c.dtype, c.n, c.d_in, c.d_out};
    gemm::LinearArgs args{s, nullptr, grad.view.data(), in.dtype, features, in.m, nullptr, DType::f32, Activation::none, gx.mutable_data_ptr()};
    const size_t own = aligned(gemm::linear_workspace(args, pool.threads));
    char* room = static_cast<char*>(scratch(own + size_t(s.bytes())));
    uint8_t* panels = reinterpret_cast<uint8_t*>(room + own);
    gemm::pack(s, c.wl.data(), c.wu.data(), c.dtype, true, panels, pool);
    args.panels = panels;
    gemm::linear(args, room, pool);
  }
  const auto like_w = [&](bool wanted) { return wanted ? result({c.n, c.d_out, c.d_in}, c.wl.dtype) : empty({0}, c.wl.dtype); };
  Tensor gwl = like_w(mask[1]), gwu = like_w(mask[2]);
  if (mask[1] || mask[2]) {
    const gemm::GradientArgs args{kind, c.n, c.d_out, c.d_in, in.view.data(), grad.view.data(), in.dtype, features, in.m,
                                  mask[1] ? gwl.mutable_data_ptr() : nullptr, mask[2] ? gwu.mutable_data_ptr() : nullptr, c.dtype};
    gemm::gradient(args, scratch(gemm::gradient_workspace(args, pool.threads)), pool);
  }
  Tensor gb = empty({mask[3] ? c.f_out() : 0}, dtypes().f32);
  if (mask[3]) gemm::column_sums(grad.view.data(), in.dtype, features, in.m, c.f_out(), static_cast<float*>(gb.mutable_data_ptr()), pool);
  return {gx, gwl, gwu, gb};
}

Tensor pack(const Tensor& wl, const Tensor& wu, const std::string& variant, const std::string& dtype) {
  constexpr const char* op = "dyad_pack";
  const panel::Kind kind = parse_variant(op, variant);
  const DType to = parse_dtype(op, dtype);
  const Components c = make_components(op, wl, wu);
  const panel::Shape s = shape_of(c, kind, to);
  Tensor packed = weights({s.bytes()}, dtypes().u8);
  uint8_t* bytes = static_cast<uint8_t*>(packed.mutable_data_ptr());
  panel::write_header(s, bytes);
  gemm::pack(s, c.wl.data(), c.wu.data(), c.dtype, false, bytes + panel::kHeaderBytes, torch_pool());
  return packed;
}

Tensor linear_packed(const Tensor& x, const Tensor& packed, int64_t f_out, const OptionalTensor& bias, const std::string& variant,
                     const std::string& layout, const std::string& act) {
  constexpr const char* op = "dyad_linear_packed";
  const panel::Kind kind = parse_variant(op, variant);
  const bool features = parse_features(op, layout);
  const Activation activation = parse_act(op, act);
  const View panels(packed);
  const panel::Shape s = read_panels(Arg{op, "packed"}, panels, kind, -1, f_out);
  const Input in = make_rows(Arg{op, "x"}, x, gemm::f_in(s), features);
  const Bias b = make_bias(op, "bias", bias, f_out);
  Tensor y = output(in, features, f_out);
  const gemm::LinearArgs args{s, panels.data<uint8_t>() + panel::kHeaderBytes, in.view.data(), in.dtype, features, in.m, b.data, b.dtype,
                              activation, y.mutable_data_ptr()};
  const ParallelFor pool = torch_pool();
  gemm::linear(args, scratch(gemm::linear_workspace(args, pool.threads)), pool);
  return y;
}

Tensor ff(const Tensor& x, const Tensor& packed1, const OptionalTensor& b1, const Tensor& packed2, const OptionalTensor& b2, int64_t f_hidden,
          int64_t f_out, const std::string& act, const std::string& variant) {
  constexpr const char* op = "dyad_ff";
  const panel::Kind kind = parse_variant(op, variant);
  const Activation activation = parse_act(op, act);
  const View first(packed1), second(packed2);
  const panel::Shape s1 = read_panels(Arg{op, "packed1"}, first, kind, -1, f_hidden);
  const panel::Shape s2 = read_panels(Arg{op, "packed2"}, second, kind, f_hidden, f_out);
  const Input in = make_input(Arg{op, "x"}, x, gemm::f_in(s1));
  const Bias bias1 = make_bias(op, "b1", b1, f_hidden);
  const Bias bias2 = make_bias(op, "b2", b2, f_out);
  Tensor y = output(in, false, f_out);
  const gemm::LinearArgs one{s1, first.data<uint8_t>() + panel::kHeaderBytes, in.view.data(), in.dtype, false, in.m, bias1.data, bias1.dtype,
                             activation, nullptr};
  const gemm::LinearArgs two{s2, second.data<uint8_t>() + panel::kHeaderBytes, nullptr, in.dtype, false, in.m, bias2.data, bias2.dtype,
                             Activation::none, y.mutable_data_ptr()};
  const ParallelFor pool = torch_pool();
  gemm::linear_pair(one, two, scratch(gemm::linear_pair_workspace(one, two, pool.threads)), pool);
  return y;
}

Tensor to_dense(const Tensor& wl, const Tensor& wu, const std::string& variant) {
  constexpr const char* op = "dyad_to_dense";
  const panel::Kind kind = parse_variant(op, variant);
  const Components c = make_components(op, wl, wu);
  Tensor w = result({c.f_out(), c.f_in()}, c.wl.dtype);
  dyad_to_dense(kind, c.n, c.d_out, c.d_in, c.wl.data(), c.wu.data(), c.dtype, w.mutable_data_ptr(), torch_pool());
  return w;
}

Tensor wq_linear(const Tensor& x, const Tensor& packed, const Tensor& scales, const OptionalTensor& zeros, const OptionalTensor& codebook,
                 const OptionalTensor& bias, int64_t n_dyad, int64_t f_out, int64_t f_in, int64_t bits, int64_t group_size,
                 const std::string& variant, const std::string& compute) {
  constexpr const char* op = "dyad_wq_linear";
  const panel::Kind kind = parse_variant(op, variant);
  const Compute form = parse_compute(op, compute);
  EFFK_CHECK(n_dyad >= 1, op, ": n_dyad: expected 1 or more, got ", n_dyad);
  const auto divided = [&](const char* name, int64_t side) {
    EFFK_CHECK(side >= 1 && side <= kMaxSide / 2 && side % n_dyad == 0, op, ": ", name, ": expected a positive multiple of n_dyad = ", n_dyad,
               ", got ", side);
    return side / n_dyad;
  };
  const int64_t d_out = divided("f_out", f_out), d_in = divided("f_in", f_in);
  EFFK_CHECK(d_out % t16::kTileRows == 0, op, ": f_out: expected blocks of a multiple of ", t16::kTileRows, " rows, got ", d_out);
  const bool joined = kind == panel::Kind::it;
  WqWeight w = make_weight(op, -1, packed, scales, zeros, codebook, joined ? f_out : 2 * f_out, joined ? 2 * d_in : d_in, bits, group_size);
  check_form(op, -1, w, form);
  const Input in = make_input(Arg{op, "x"}, x, f_in);
  const Bias b = make_bias(op, "bias", bias, f_out);
  w.bias = b.data;
  w.bias_dtype = b.dtype;
  Tensor y = output(in, false, f_out);
  const DyadWqArgs args{kind, n_dyad, d_out, d_in, in.view.data(), in.dtype, in.m, w, form, y.mutable_data_ptr()};
  dyad_wq_linear(args, scratch(dyad_wq_workspace(args)), torch_pool());
  return y;
}

}  // namespace
}  // namespace effk::binding

STABLE_TORCH_LIBRARY_IMPL(effk, CPU, m) {
  using namespace effk::binding;
  m.impl("dyad_linear", TORCH_BOX(&linear));
  m.impl("dyad_linear_backward", TORCH_BOX(&backward));
  m.impl("dyad_pack", TORCH_BOX(&pack));
  m.impl("dyad_linear_packed", TORCH_BOX(&linear_packed));
  m.impl("dyad_ff", TORCH_BOX(&ff));
  m.impl("dyad_to_dense", TORCH_BOX(&to_dense));
  m.impl("dyad_wq_linear", TORCH_BOX(&wq_linear));
}
