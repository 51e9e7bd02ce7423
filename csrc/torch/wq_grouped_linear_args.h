// The weights of wq_grouped_linear, checked, as the kernels take them: for the CPU and the CUDA binding.
#pragma once
#include "torch/wq_linear_args.h"

namespace effk::binding {

// The stack of experts that an op was given; `first` is expert 0, and the others follow in each of its arrays.
struct Experts { WqWeight first; int64_t count; };

inline Experts make_experts(const char* op, const Tensor& packed, const Tensor& scales, const OptionalTensor& zeros,
                            int64_t n, int64_t k, int64_t bits, int64_t group, const Home& home = kCpu) {
  check_geometry(op, n, k, bits, group);
  WqWeight w{};
  w.n = n;
  w.k = k;
  w.bits = int32_t(bits);
  w.group = int32_t(group);
  const Dtypes& d = dtypes();
  const int64_t tiles = t16::tiles(n), groups = t16::groups(k, group);

  const View p(packed), s(scales);
  const int64_t count = p.dim == 4 ? p.sizes[0] : 1;  // of other dimensions: the check below says what is wrong
  expect(Arg{op, "packed"}, p, {d.u8}, {count, tiles, t16::chunks(k, w.bits), t16::chunk_bytes(w.bits)}, home);
  if (count < 1) Arg{op, "packed"}.fail("at least one expert", p.text());
  expect(Arg{op, "scales"}, s, {d.f16, d.f32}, {count, tiles, groups, t16::kTileRows}, home);
  w.packed = p.data<uint8_t>();
  w.scales = s.data();
  w.scales_f32 = s.dtype == d.f32;
  present(zeros, [&](const View& z) {
    expect(Arg{op, "zeros"}, z, {d.u8}, {count, tiles, groups, t16::kTileRows}, home);
    w.zeros = z.data<uint8_t>();
  });
  return {w, count};
}

inline void add_biases(const char* op, const OptionalTensor& bias, Experts& experts, const Home& home = kCpu) {
  if (!bias) return;
  const View b(*bias);
  const Arg arg{op, "bias"};
  experts.first.bias_dtype = float_dtype(arg, b);
  expect(arg, b, {b.dtype}, {experts.count, experts.first.n}, home);
  experts.first.bias = b.data();
}

// Where each expert's rows begin. The contents of device memory are not looked at: kernels clamp them.
inline const int32_t* make_offsets(const char* op, const Tensor& offsets, int64_t experts, int64_t rows,
                                   const Home& home = kCpu) {
  const View view(offsets);
  const Arg arg{op, "offsets"};
  expect(arg, view, {dtypes().i32}, {experts + 1}, home);
  const int32_t* at = view.data<int32_t>();
  if (home.type != kCpu.type) return at;
  bool ok = at[0] == 0 && at[experts] == rows;
  for (int64_t e = 0; e < experts; ++e) ok &= at[e] <= at[e + 1];
  if (!ok) arg.fail("ascending offsets from 0 to " + std::to_string(rows) + ", the rows of x", "other values");
  return at;
}

}  // namespace effk::binding
