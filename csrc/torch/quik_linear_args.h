// The arguments of the quik_* ops, checked, as the kernels take them: for the CPU and the CUDA binding. What they mean is in
// csrc/ops/quik_linear/quik_linear.h.
#pragma once
#include <string>
#include <vector>

#include "formats/panel.h"
#include "ops/quik_linear/quik_linear.h"
#include "torch/dyad_linear_args.h"

namespace effk::binding {

inline QuikMode parse_quik_mode(const char* op, const std::string& mode) {
  if (mode == "kernel") return QuikMode::kernel;
  EFFK_CHECK(mode == "sim", op, ": mode: expected 'kernel' or 'sim', got '", mode, "'");
  return QuikMode::sim;
}
inline int32_t check_bits(const char* op, const char* name, int64_t bits, bool float_too = false, int index = -1) {
  if (!(bits == 4 || bits == 8 || (float_too && bits == 16)))
    Arg{op, name, index}.fail(float_too ? "4, 8 or 16" : "4 or 8", std::to_string(bits));
  return int32_t(bits);
}
// The bound of the accumulator is that of 8-bit operands, whatever the bits.
inline void check_base(const char* op, int64_t n_base) {
  EFFK_CHECK(n_base >= 1 && n_base <= kQuikMaxBase, op, ": n_base: expected 1 to ", kQuikMaxBase, ", got ", n_base);
}

inline int64_t last_side(const char* op, const Tensor& x) {
  const View view(x);
  if (view.dim < 1) Arg{op, "x"}.fail("[..., K]", view.text());
  return view.sizes[view.dim - 1];
}

// The usual split, known at a fraction of the cost of looking at columns one by one: both lists ascend, so that the base columns
// are the runs between outliers.
inline bool is_ascending_split(const QuikSplit& s) {
  int64_t at = 0, column = 0;
  for (int64_t o = 0; o <= s.n_out; ++o) {
    const int64_t end = o < s.n_out ? s.outlier[o] : s.k, length = end - column;
    if (length < 0 || at + length > s.n_base) return false;
    int32_t other = 0;
    for (int64_t i = 0; i < length; ++i) other |= s.base[at + i] ^ int32_t(column + i);
    if (other) return false;
    at += length;
    column = end + 1;
  }
  return at == s.n_base;
}

// Which columns of x [.., k] are base and which outliers. Index tensors are checked element by element where they lie in CPU
// memory; kernels elsewhere guard every index.
inline QuikSplit make_split(const char* op, const OptionalTensor& int_idx, const OptionalTensor& fp_idx, int64_t k, int64_t n_base,
                            const Home& home = kCpu) {
  check_base(op, n_base);
  EFFK_CHECK(n_base <= k && k <= kMaxSide, op, ": n_base: expected at most the ", k, " columns of x, got ", n_base);
  QuikSplit s{nullptr, nullptr, k, n_base, k - n_base};
  if (int_idx.has_value() != fp_idx.has_value()) {
    EFFK_CHECK(fp_idx.has_value() || s.n_out == 0, op, ": fp_idx: expected int32 [", s.n_out, "] beside int_idx, got None");
    EFFK_CHECK(int_idx.has_value(), op, ": int_idx: expected int32 [", n_base, "] beside fp_idx, got None");
  }
  if (!int_idx) return s;
  const View base(*int_idx);
  expect(Arg{op, "int_idx"}, base, {dtypes().i32}, {n_base}, home);
  s.base = base.data<int32_t>();
  if (fp_idx) {
    const View outlier(*fp_idx);
    expect(Arg{op, "fp_idx"}, outlier, {dtypes().i32}, {s.n_out}, home);
    s.outlier = outlier.data<int32_t>();
  }
  if (home.type != kCpu.type || is_ascending_split(s)) return s;
  std::vector<uint8_t> seen(static_cast<size_t>(k), uint8_t{0});
  const auto mark = [&](const char* name, const int32_t* index, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t c = index[i];
      if (c < 0 || c >= k) Arg{op, name}.fail("columns of x, 0 to " + std::to_string(k - 1), std::to_string(c));
      if (seen[size_t(c)]++) Arg{op, name}.fail("every column of x once in int_idx and fp_idx", "column " + std::to_string(c) + " twice");
    }
  };
  mark("int_idx", s.base, n_base);
  mark("fp_idx", s.outlier, s.n_out);
  return s;
}

// The base of a weight. Outliers and bias are added by what follows.
inline QuikWeight make_quik_weight(const char* op, int index, const Tensor& packed, const Tensor& w_scale, const Tensor& w_reduced,
                                   int64_t f_out, int64_t n_base, int64_t bits_w, const Home& home = kCpu) {
  QuikWeight w{};
  w.bits = check_bits(op, "bits_w", bits_w, false, index);
  if (f_out < 1 || f_out > kMaxSide) Arg{op, "f_out", index}.fail("1 to 2147483647", std::to_string(f_out));
  w.n = f_out;
  const View p(packed), s(w_scale), r(w_reduced);
  const int64_t tiles = t16::tiles(f_out);
  expect(Arg{op, "packed", index}, p, {dtypes().u8}, {tiles, t16::chunks(n_base, w.bits), t16::chunk_bytes(w.bits)}, home);
  expect(Arg{op, "w_scale", index}, s, {dtypes().f32}, {tiles, 1, t16::kTileRows}, home);
  expect(Arg{op, "w_reduced", index}, r, {dtypes().f32}, {f_out}, home);
  w.packed = p.data<uint8_t>();
  w.scales = s.data<float>();
  w.reduced = r.data<float>();
  return w;
}
inline void add_quik_bias(const char* op, int index, const OptionalTensor& bias, QuikWeight& w, const Home& home = kCpu) {
  if (!bias) return;
  const View b(*bias);
  const Arg arg{op, "bias", index};
  w.bias_dtype = float_dtype(arg, b);
  expect(arg, b, {b.dtype}, {w.n}, home);
  w.bias = b.data();
}
// Outlier columns as dense_pack returns them; on the CPU only, since the header is read.
inline void add_outlier_panels(const char* op, int index, const OptionalTensor& w_out, int64_t n_out, QuikWeight& w) {
  const Arg arg{op, "w_out", index};
  if (!w_out) {
    if (n_out) arg.fail("a packed [" + std::to_string(w.n) + ", " + std::to_string(n_out) + "] weight", "None");
    return;
  }
  if (!n_out) arg.fail("None, since all columns of x are base columns", "a tensor");
  const View panels(*w_out);
  const panel::Shape s = read_panels(arg, panels, panel::Kind::dense, n_out, w.n);
  w.outliers = panels.data<uint8_t>() + panel::kHeaderBytes;
  w.out_dtype = s.dtype;
}

// Codes of activations as quik_quantize returns them: [m, k] in 8 bits or packed in 4; m.
inline int64_t check_codes(const Arg& arg, const View& qx, int64_t k, int32_t bits, const Home& home = kCpu) {
  const int64_t bytes = bits == 8 ? k : t16::ceil_div(k, 2);
  const bool ok = qx.dim == 2 && qx.dtype == (bits == 8 ? dtypes().i8 : dtypes().u8) && qx.sizes[1] == bytes && qx.contiguous && qx.home == home;
  if (!ok) arg.fail(std::string(bits == 8 ? "int8" : "uint8") + " [M, " + std::to_string(bytes) + "], contiguous, on " + home.text(), qx.text());
  return qx.sizes[0];
}

// quik_dequantize without its result.
inline QuikDequantizeArgs make_dequantize(const char* op, const Tensor& acc, const Tensor& scale, const Tensor& zero, const Tensor& w_scale,
                                          const Tensor& w_reduced, const OptionalTensor& y_in, int64_t bits_a, const std::string& dtype,
                                          const Home& home = kCpu) {
  QuikDequantizeArgs a{};
  a.bits_a = check_bits(op, "bits_a", bits_a);
  a.y_dtype = parse_dtype(op, dtype);
  const View c(acc), s(scale), z(zero), ws(w_scale), r(w_reduced);
  if (c.dim != 2 || c.dtype != dtypes().i32 || !c.contiguous || !(c.home == home))
    Arg{op, "acc"}.fail("int32 [M, N], contiguous, on " + home.text(), c.text());
  a.m = c.sizes[0];
  a.n = c.sizes[1];
  expect(Arg{op, "scale"}, s, {dtypes().f32}, {a.m}, home);
  expect(Arg{op, "zero"}, z, {dtypes().f32}, {a.m}, home);
  expect(Arg{op, "w_scale"}, ws, {dtypes().f32}, {t16::tiles(a.n), 1, t16::kTileRows}, home);
  expect(Arg{op, "w_reduced"}, r, {dtypes().f32}, {a.n}, home);
  a.acc = c.data<int32_t>();
  a.scale = s.data<float>();
  a.zero = z.data<float>();
  a.w_scale = ws.data<float>();
  a.w_reduced = r.data<float>();
  if (y_in) {
    const View y(*y_in);
    const Arg arg{op, "y_in"};
    a.y_in_dtype = float_dtype(arg, y);
    expect(arg, y, {y.dtype}, {a.m, a.n}, home);
    a.y_in = y.data();
  }
  return a;
}

}  // namespace effk::binding
