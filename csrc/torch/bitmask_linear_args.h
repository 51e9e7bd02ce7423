// The arguments of the bitmask_* ops, checked, as the kernels take them: for the CPU and the CUDA binding. What lies in ptr and masks
// on a device cannot be looked at without waiting for it: kernels there do not follow them out of bounds.
#pragma once
#include <string>

#include "ops/bitmask_linear/bitmask_linear.h"
#include "torch/fftconv_args.h"

namespace effk::binding {

inline constexpr int64_t kMaxColumns = 131071;  // of int8 values: 127 * 128 * k < 2^31

inline bitmask::Values values_of(const Arg& arg, const View& v) {
  if (v.dtype == dtypes().f32) return bitmask::Values::f32;
  if (v.dtype == dtypes().bf16) return bitmask::Values::bf16;
  if (v.dtype == dtypes().i8) return bitmask::Values::i8;
  arg.fail("float32, bfloat16 or int8", dtype_name(v.dtype));
}

// The size of groups of scales [n, groups]: there is one for each number of groups, up to equal cuts; 0: one a row.
inline int64_t bitmask_group_of(const Arg& arg, const View& s, int64_t n, int64_t k) {
  if (s.dim == 2 && s.sizes[0] == n) {
    if (s.sizes[1] == 1) return 0;
    const int64_t blocks = bitmask::blocks(k);
    for (int64_t g = 1; g < blocks; ++g)
      if (bitmask::groups(k, g * bitmask::kBlock) == s.sizes[1]) return g * bitmask::kBlock;
  }
  arg.fail("float32 [" + std::to_string(n) + ", groups] with one group a row, or groups of a multiple of 64 of " + std::to_string(k) + " columns", s.text());
}

inline void check_sides(const char* op, int64_t n, int64_t k, bitmask::Values type) {
  EFFK_CHECK(n >= 1, op, ": n: expected at least 1, got ", n);
  EFFK_CHECK(k >= 1, op, ": k: expected at least 1, got ", k);
  EFFK_CHECK(type != bitmask::Values::i8 || k <= kMaxColumns, op, ": k: expected at most ", kMaxColumns, " for int8 values, got ", k);
}

// `stored`: values without the bytes behind them.
inline bitmask::Weight make_bitmask(const char* op, const Tensor& values, const Tensor& masks, const Tensor& ptr, int64_t n, int64_t k, int64_t* stored,
                                    const Home& home) {
  const View v(values), m(masks), p(ptr);
  const Arg arg{op, "values"};
  bitmask::Weight w{};
  w.type = values_of(arg, v);
  check_sides(op, n, k, w.type);
  if (v.dim != 1 || v.sizes[0] < bitmask::tail(w.type) || !v.contiguous || !(v.home == home))
    arg.fail("[values and 64 bytes behind them], contiguous, on " + home.text(), v.text());
  expect(Arg{op, "masks"}, m, {dtypes().i64}, {bitmask::panels(n), bitmask::blocks(k), bitmask::kRows}, home);
  expect(Arg{op, "ptr"}, p, {dtypes().i64}, {bitmask::panels(n) + 1}, home);
  w.values = v.data<uint8_t>(), w.masks = m.data<uint64_t>(), w.ptr = p.data<int64_t>(), w.n = n, w.k = k;
  *stored = v.sizes[0] - bitmask::tail(w.type);
  return w;
}
inline void set_scale(const char* op, bitmask::Weight& w, const OptionalTensor& scale, const Home& home) {
  const Arg arg{op, "scale"};
  if (w.type != bitmask::Values::i8) {
    if (scale) arg.fail(std::string("none for values of ") + bitmask::kValueNames[int(w.type)], View(*scale).text());
    return;
  }
  if (!scale) arg.fail("one for int8 values", "none");
  const View s(*scale);
  w.group = bitmask_group_of(arg, s, w.n, w.k);
  expect(arg, s, {dtypes().f32}, {w.n, bitmask::groups(w.k, w.group)}, home);
  w.scale = s.data<float>();
}

// A product without its result.
inline bitmask::Args make_bitmask_linear(const char* op, const Tensor& x, const Tensor& values, const Tensor& masks, const Tensor& ptr,
                                         const OptionalTensor& scale, const OptionalTensor& row_sum, const OptionalTensor& bias, int64_t n, int64_t k,
                                         const std::string& compute, int64_t* stored, const Home& home) {
  bitmask::Args a{};
  a.w = make_bitmask(op, values, masks, ptr, n, k, stored, home);
  set_scale(op, a.w, scale, home);
  EFFK_CHECK(compute == "float" || compute == "int8", op, ": compute: expected 'float' or 'int8', got '", compute, "'");
  a.int8 = compute == "int8";
  EFFK_CHECK(!a.int8 || a.w.type == bitmask::Values::i8, op, ": compute: expected 'float' for values of ", bitmask::kValueNames[int(a.w.type)], ", got 'int8'");
  if (a.int8) {
    const Arg arg{op, "row_sum"};
    if (!row_sum) arg.fail("one for compute 'int8'", "none");
    const View s(*row_sum);
    expect(arg, s, {dtypes().i32}, {n, bitmask::groups(k, a.w.group)}, home);
    a.w.row_sum = s.data<int32_t>();
  }
  const View in(x);
  const Arg arg{op, "x"};
  a.dtype = float_dtype_of(arg, in);
  if (in.dim < 1 || in.sizes[in.dim - 1] != k || !in.contiguous || !(in.home == home))
    arg.fail("[..., " + std::to_string(k) + "], contiguous, on " + home.text(), in.text());
  a.x = in.data(), a.m = in.numel() / k;
  if (bias) {
    const View b(*bias);
    a.bias_dtype = float_dtype_of(Arg{op, "bias"}, b);
    expect(Arg{op, "bias"}, b, {b.dtype}, {n}, home);
    a.bias = b.data();
  }
  return a;
}

}  // namespace effk::binding
