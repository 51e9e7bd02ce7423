// The arguments of the wq_* ops, checked, as the kernels take them: for the CPU and the CUDA binding. What they mean is in
// csrc/ops/wq_linear/wq_linear.h, how they are laid out in csrc/formats/t16.h.
#pragma once
#include <algorithm>
#include <initializer_list>
#include <string>
#include <type_traits>
#include <utility>

#include "ops/wq_linear/wq_linear.h"
#include "torch/check.h"
#include "torch/tensor.h"

namespace effk::binding {

inline constexpr int64_t kMaxSide = INT32_MAX;       // of N and K
inline constexpr int64_t kMaxColumns16 = 65536;      // columns that a uint16 outlier index reaches

inline void check_geometry(const char* op, int64_t n, int64_t k, int64_t bits, int64_t group, int index = -1) {
  const auto require = [&](bool ok, const char* name, const char* expected, int64_t got) {
    if (__builtin_expect(!ok, 0)) Arg{op, name, index}.fail(expected, std::to_string(got));
  };
  require(n >= 0 && n <= kMaxSide, "n", "0 to 2147483647", n);
  require(k >= 1 && k <= kMaxSide, "k", "1 to 2147483647", k);
  require(t16::valid_bits(int(bits)) && bits == int(bits), "bits", "2, 3, 4 or 8", bits);
  require(t16::valid_group(group), "group_size", "32, 64, 128, 256, or 0 for one group per row", group);
}

// The lists of wq_multi_linear must be as long as its first.
struct ListLength { const char* name; size_t length; };
inline void check_lengths(const char* op, size_t count, std::initializer_list<ListLength> lists) {
  for (const auto& list : lists)
    EFFK_CHECK(list.length == count, op, ": ", list.name, ": expected ", count, " entries as packed has, got ", list.length);
}

inline Compute parse_compute(const char* op, const std::string& compute) {
  if (compute == "int8") return Compute::int8;
  EFFK_CHECK(compute == "float", op, ": compute: expected 'float' or 'int8', got '", compute, "'");
  return Compute::fp;
}

// A table a row has no int8 form: its bytes would need a scale a row, and the float form is the exact one anyway.
inline void check_form(const char* op, int index, const WqWeight& w, Compute form) {
  if (__builtin_expect(form == Compute::int8 && w.codebook_per_row, 0))
    Arg{op, "codebook", index}.fail("one table for the whole weight in the int8 form", "one table a row");
}

inline DType float_dtype(const Arg& arg, const View& t) {
  if (t.dtype == dtypes().f32) return DType::f32;
  if (t.dtype == dtypes().bf16) return DType::bf16;
  if (t.dtype == dtypes().f16) return DType::f16;
  arg.fail("float32, bfloat16 or float16", dtype_name(t.dtype));
}

// An optional argument, where a tensor of shape [0] also means "absent": packing returns those.
template <class Use>
bool present(const OptionalTensor& t, const Use& use) {
  if (!t) return false;
  const View view(*t);
  if (view.dim == 1 && view.sizes[0] == 0) return false;
  use(view);
  return true;
}

// Outlier indices address x and the output, so their contents are checked at every call: a scan that vectorises, over
// data that the kernel reads next. Prefetched, so that it brings a cold list into the caches as fast as memory gives it: a
// plain scan of 0.5 % outliers took 10 us of a 4096 x 4096 product.
template <class Index>
bool all_below(const Index* index, int64_t count, int64_t limit) {
  using Unsigned = std::make_unsigned_t<Index>;  // a negative index becomes a large one
  constexpr int64_t kBlock = 256 / sizeof(Index), kAhead = 4096 / sizeof(Index);
  Unsigned largest = 0;
  int64_t i = 0;
  for (; i + kBlock <= count; i += kBlock) {
    for (int line = 0; line < 4; ++line) __builtin_prefetch(index + i + kAhead + line * (kBlock / 4));
    Unsigned block = 0;
    for (int64_t j = 0; j < kBlock; ++j) block = std::max(block, Unsigned(index[i + j]));
    largest = std::max(largest, block);
  }
  for (; i < count; ++i) largest = std::max(largest, Unsigned(index[i]));
  return count == 0 || int64_t(largest) < limit;
}

inline void add_outliers(const char* op, int index, const OptionalTensor& ptr, const OptionalTensor& col,
                         const OptionalTensor& val, WqWeight& w, const Home& home = kCpu) {
  const int given = ptr.has_value() + col.has_value() + val.has_value();
  if (given == 0) return;
  EFFK_CHECK(given == 3, op, ": out_ptr, out_col, out_val: expected all three or none, got ", given);
  const View p(*ptr), c(*col), v(*val);
  if (p.numel() == 0 && c.numel() == 0 && v.numel() == 0) return;

  expect(Arg{op, "out_ptr", index}, p, {dtypes().i32}, {w.n + 1}, home);
  const int64_t nnz = v.numel();
  w.col32 = w.k > kMaxColumns16;
  expect(Arg{op, "out_col", index}, c, {w.col32 ? dtypes().i32 : dtypes().u16}, {nnz}, home);
  expect(Arg{op, "out_val", index}, v, {dtypes().f16}, {nnz}, home);
  w.out_ptr = p.data<int32_t>();
  w.out_col = c.data();
  w.out_val = v.data<uint16_t>();

  // The contents of device memory cannot be looked at without waiting for the device; its kernels guard every index.
  if (home.type != kCpu.type) return;
  const int32_t* offset = w.out_ptr;
  int32_t descents = 0;
  for (int64_t i = 0; i < w.n; ++i) descents += offset[i] > offset[i + 1];
  if (descents != 0 || w.out_ptr[0] != 0 || w.out_ptr[w.n] != nnz)
    Arg{op, "out_ptr", index}.fail("ascending offsets from 0 to " + std::to_string(nnz), "other values");
  const bool columns_ok = w.col32 ? all_below(static_cast<const int32_t*>(w.out_col), nnz, w.k)
                                  : all_below(static_cast<const uint16_t*>(w.out_col), nnz, w.k);
  if (!columns_ok) Arg{op, "out_col", index}.fail("columns below k = " + std::to_string(w.k), "a larger or negative one");
}

// The packed weight that an op was given, checked.
inline WqWeight make_weight(const char* op, int index, const Tensor& packed, const Tensor& scales,
                            const OptionalTensor& zeros, const OptionalTensor& codebook, int64_t n, int64_t k,
                            int64_t bits, int64_t group, const Home& home = kCpu) {
  check_geometry(op, n, k, bits, group, index);
  WqWeight w{};
  w.n = n;
  w.k = k;
  w.bits = int32_t(bits);
  w.group = int32_t(group);
  const Dtypes& d = dtypes();
  const int64_t tiles = t16::tiles(n), groups = t16::groups(k, group);

  const View p(packed), s(scales);
  expect(Arg{op, "packed", index}, p, {d.u8}, {tiles, t16::chunks(k, w.bits), t16::chunk_bytes(w.bits)}, home);
  expect(Arg{op, "scales", index}, s, {d.f16, d.f32}, {tiles, groups, t16::kTileRows}, home);
  w.packed = p.data<uint8_t>();
  w.scales = s.data();
  w.scales_f32 = s.dtype == d.f32;

  const bool has_zeros = present(zeros, [&](const View& z) {
    expect(Arg{op, "zeros", index}, z, {d.u8}, {tiles, groups, t16::kTileRows}, home);
    w.zeros = z.data<uint8_t>();
  });
  const bool has_codebook = present(codebook, [&](const View& c) {
    const int64_t entries = int64_t(1) << bits;
    const Arg arg{op, "codebook", index};
    if (bits == 8) arg.fail("none at 8 bits, where integer codes are as good", c.text());
    w.codebook_per_row = c.dim == 3;
    if (w.codebook_per_row) expect(arg, c, {d.f32}, {tiles, entries, t16::kTileRows}, home);
    else expect(arg, c, {d.f32}, {entries}, home);
    w.codebook = c.data<float>();
  });
  EFFK_CHECK(!(has_zeros && has_codebook), op, ": zeros: expected none with a codebook, got both");
  return w;
}

inline void add_bias(const char* op, int index, const OptionalTensor& bias, WqWeight& w, const Home& home = kCpu) {
  if (!bias) return;
  const View b(*bias);
  const Arg arg{op, "bias", index};
  w.bias_dtype = float_dtype(arg, b);
  expect(arg, b, {b.dtype}, {w.n}, home);
  w.bias = b.data();
}

// x as [m, k] with rows one after the other; `owner` keeps the copy of an x that was not contiguous.
struct Input {
  Tensor owner;
  View view;
  DType dtype;
  int64_t m;
};

inline Input make_input(const Arg& arg, const Tensor& x, int64_t k, const Home& home = kCpu) {
  const View given(x);
  const DType dtype = float_dtype(arg, given);
  const bool ok = given.home == home && given.dim >= 1 && given.sizes[given.dim - 1] == k;
  if (__builtin_expect(!ok, 0)) arg.fail("[..., " + std::to_string(k) + "] on " + home.text(), given.text());
  int64_t m = 1;
  for (int64_t i = 0; i + 1 < given.dim; ++i) m *= given.sizes[i];
  if (given.contiguous) return {x, given, dtype, m};
  Tensor copy = torch::stable::contiguous(x);
  const View view(copy);
  return {std::move(copy), view, dtype, m};
}

inline Tensor output_like(const Input& x, int64_t columns) {
  constexpr int64_t kMaxDim = 64;
  int64_t sizes[kMaxDim];
  std::copy_n(x.view.sizes, x.view.dim, sizes);
  sizes[x.view.dim - 1] = columns;
  return x.view.home == kCpu ? result(sizes, x.view.dim, x.view.dtype) : empty(sizes, x.view.dim, x.view.dtype, x.view.home);
}

}  // namespace effk::binding
