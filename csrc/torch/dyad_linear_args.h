// The arguments of the dense_* and dyad_* ops, checked, as the kernels take them: for the CPU and the CUDA binding. What they
// mean is in csrc/gemm/gemm.h and csrc/ops/dyad_linear/dyad_linear.h, how panels are laid out in csrc/formats/panel.h.
#pragma once
#include <string>

#include "common/activation.h"
#include "formats/panel.h"
#include "torch/wq_linear_args.h"

namespace effk::binding {

inline panel::Kind parse_variant(const char* op, const std::string& variant) {
  if (variant == "it") return panel::Kind::it;
  if (variant == "ot") return panel::Kind::ot;
  EFFK_CHECK(variant == "dt", op, ": variant: expected 'it', 'ot' or 'dt', got '", variant, "'");
  return panel::Kind::dt;
}
inline const char* kind_name(int kind) {
  const char* const names[] = {"dense", "it", "ot", "dt"};
  return kind >= 0 && kind < 4 ? names[kind] : "unknown";
}
inline bool parse_features(const char* op, const std::string& layout) {
  if (layout == "tokens") return false;
  EFFK_CHECK(layout == "features", op, ": layout: expected 'tokens' or 'features', got '", layout, "'");
  return true;
}
inline Activation parse_act(const char* op, const std::string& act) {
  const struct { const char* name; Activation act; } known[] = {{"none", Activation::none},   {"relu", Activation::relu},
                                                                {"gelu", Activation::gelu},   {"gelu_tanh", Activation::gelu_tanh},
                                                                {"silu", Activation::silu}};
  for (const auto& k : known)
    if (act == k.name) return k.act;
  binding::fail(op, ": act: expected 'none', 'relu', 'gelu', 'gelu_tanh' or 'silu', got '", act, "'");
}
inline DType parse_dtype(const char* op, const std::string& dtype) {
  if (dtype == "fp32") return DType::f32;
  if (dtype == "bf16") return DType::bf16;
  EFFK_CHECK(dtype == "fp16", op, ": dtype: expected 'fp32', 'bf16' or 'fp16', got '", dtype, "'");
  return DType::f16;
}
inline const char* short_name(DType t) { return t == DType::f32 ? "fp32" : t == DType::bf16 ? "bf16" : "fp16"; }

// The two components of a layer, on `home`.
struct Components {
  View wl, wu;
  DType dtype;
  int64_t n, d_out, d_in;
  int64_t f_in() const { return n * d_in; }
  int64_t f_out() const { return n * d_out; }
};
inline Components make_components(const char* op, const Tensor& wl, const Tensor& wu, const Home& home = kCpu) {
  Components c{View(wl), View(wu), DType::f32, 0, 0, 0};
  const Arg arg{op, "wl"};
  c.dtype = float_dtype(arg, c.wl);
  const bool ok = c.wl.dim == 3 && c.wl.sizes[0] >= 1 && c.wl.sizes[1] >= 1 && c.wl.sizes[2] >= 1 && c.wl.contiguous && c.wl.home == home;
  if (!ok) arg.fail("[n, d_out, d_in] with sides of at least 1, contiguous, on " + home.text(), c.wl.text());
  c.n = c.wl.sizes[0], c.d_out = c.wl.sizes[1], c.d_in = c.wl.sizes[2];
  const auto fits = [&](int64_t side) { return side <= kMaxSide / c.n; };
  if (!fits(c.d_out) || !fits(c.d_in)) arg.fail("n d_out and n d_in up to 2147483647", c.wl.text());
  expect(Arg{op, "wu"}, c.wu, {c.wl.dtype}, {c.n, c.d_out, c.d_in}, home);
  return c;
}

// x or gy: [..., width], or [width, tokens] with features first; a tensor that is not contiguous is copied.
inline Input make_rows(const Arg& arg, const Tensor& x, int64_t width, bool features, const Home& home = kCpu) {
  if (!features) return make_input(arg, x, width, home);
  const View given(x);
  const DType dtype = float_dtype(arg, given);
  if (!(given.home == home) || given.dim != 2 || given.sizes[0] != width)
    arg.fail("[" + std::to_string(width) + ", tokens] on " + home.text(), given.text());
  if (given.contiguous) return {x, given, dtype, given.sizes[1]};
  Tensor copy = torch::stable::contiguous(x);
  const View view(copy);
  return {std::move(copy), view, dtype, view.sizes[1]};
}

struct Bias {
  const void* data = nullptr;
  DType dtype = DType::f32;
};
// Of any of the three types: weights that were packed may have been rounded, and what they were is not kept.
inline Bias make_bias(const char* op, const char* name, const OptionalTensor& bias, int64_t width, const Home& home = kCpu) {
  if (!bias) return {};
  const View view(*bias);
  const Arg arg{op, name};
  expect(arg, view, {dtypes().f32, dtypes().bf16, dtypes().f16}, {width}, home);
  return {view.data(), float_dtype(arg, view)};
}

// Panels that an op was given: the header must be ours, of this kind and of f_out (and f_in, unless negative), and the
// length what it says. Reads the header, so CPU memory only.
inline panel::Shape read_panels(const Arg& arg, const View& packed, panel::Kind kind, int64_t f_in, int64_t f_out) {
  if (packed.dim != 1 || packed.dtype != dtypes().u8 || !packed.contiguous || !(packed.home == kCpu) || packed.sizes[0] < panel::kHeaderBytes)
    arg.fail("uint8 [bytes] from dense_pack or dyad_pack, contiguous, on cpu", packed.text());
  const panel::Header h = panel::read_header(packed.data<uint8_t>());
  if (h.magic != panel::kMagic) arg.fail("a buffer from dense_pack or dyad_pack", "other bytes");
  if (h.version != panel::kVersion) arg.fail("panels of version " + std::to_string(panel::kVersion), "version " + std::to_string(h.version));
  if (h.kind != int32_t(kind)) arg.fail(std::string("panels of variant '") + kind_name(int(kind)) + "'", std::string("'") + kind_name(h.kind) + "'");
  const bool sane = h.dtype >= 0 && h.dtype <= 2 && h.n >= 1 && h.d_out >= 1 && h.d_in >= 1 && h.n <= kMaxSide && h.d_out <= kMaxSide / h.n &&
                    h.d_in <= kMaxSide / h.n && (kind != panel::Kind::dense || h.n == 1);
  if (!sane || !panel::intact(packed.data<uint8_t>())) arg.fail("a header with valid sizes", "a damaged one");
  const panel::Shape s{kind, DType(h.dtype), h.n, h.d_out, h.d_in};
  if (s.n * s.d_out != f_out) arg.fail("panels of f_out = " + std::to_string(f_out), std::to_string(s.n * s.d_out));
  if (f_in >= 0 && s.n * s.d_in != f_in) arg.fail("panels of f_in = " + std::to_string(f_in), std::to_string(s.n * s.d_in));
  // In floating point first: the product of damaged sides need not fit 64 bits.
  const double bytes = double(s.matrices()) * double(panel::tiles(s.d_out)) * double(s.depth()) * panel::kColumns * double(panel::bytes_of(s.dtype));
  if (bytes > 9e18 || s.bytes() != packed.sizes[0])
    arg.fail(std::to_string(bytes > 9e18 ? -1 : s.bytes()) + " bytes as the header says", std::to_string(packed.sizes[0]));
  return s;
}

}  // namespace effk::binding
