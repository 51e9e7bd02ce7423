// CPU binding of the wq_* ops: checks everything that a kernel relies on, allocates, and calls ops/wq_linear. What the
// arguments mean is in csrc/ops/wq_linear/wq_linear.h, how they are laid out in csrc/formats/t16.h.
#include "ops/wq_linear/wq_linear.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "torch/check.h"
#include "torch/tensor.h"

namespace effk::binding {
namespace {

constexpr int64_t kMaxSide = INT32_MAX;       // of N and K
constexpr int64_t kMaxColumns16 = 65536;      // columns that a uint16 outlier index reaches

void check_geometry(const char* op, int64_t n, int64_t k, int64_t bits, int64_t group, int index = -1) {
  const auto require = [&](bool ok, const char* name, const char* expected, int64_t got) {
    if (__builtin_expect(!ok, 0)) Arg{op, name, index}.fail(expected, std::to_string(got));
  };
  require(n >= 0 && n <= kMaxSide, "n", "0 to 2147483647", n);
  require(k >= 1 && k <= kMaxSide, "k", "1 to 2147483647", k);
  require(t16::valid_bits(int(bits)) && bits == int(bits), "bits", "2, 3, 4 or 8", bits);
  require(t16::valid_group(group), "group_size", "32, 64, 128, 256, or 0 for one group per row", group);
}

Compute parse_compute(const char* op, const std::string& compute) {
  if (compute == "int8") return Compute::int8;
  EFFK_CHECK(compute == "float", op, ": compute: expected 'float' or 'int8', got '", compute, "'");
  return Compute::fp;
}

DType float_dtype(const Arg& arg, const View& t) {
  if (t.dtype == dtypes().f32) return DType::f32;
  if (t.dtype == dtypes().bf16) return DType::bf16;
  if (t.dtype == dtypes().f16) return DType::f16;
  arg.fail("float32, bfloat16 or float16", dtype_name(t.dtype));
}

// An optional argument, where an empty tensor also means "absent": packing returns those.
template <class Use>
bool present(const OptionalTensor& t, const Use& use) {
  if (!t) return false;
  const View view(*t);
  if (view.numel() == 0) return false;
  use(view);
  return true;
}

// Outlier indices address x and the output, so their contents are checked at every call: a scan that vectorises, over
// data that the kernel reads next.
template <class Index>
bool all_below(const Index* index, int64_t count, int64_t limit) {
  using Unsigned = std::make_unsigned_t<Index>;  // a negative index becomes a large one
  Unsigned largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, Unsigned(index[i]));
  return count == 0 || int64_t(largest) < limit;
}

void add_outliers(const char* op, int index, const OptionalTensor& ptr, const OptionalTensor& col,
                  const OptionalTensor& val, WqWeight& w) {
  const int given = ptr.has_value() + col.has_value() + val.has_value();
  if (given == 0) return;
  EFFK_CHECK(given == 3, op, ": out_ptr, out_col, out_val: expected all three or none, got ", given);
  const View p(*ptr), c(*col), v(*val);
  if (p.numel() == 0 && c.numel() == 0 && v.numel() == 0) return;

  expect(Arg{op, "out_ptr", index}, p, {dtypes().i32}, {w.n + 1});
  const int64_t nnz = v.numel();
  w.col32 = w.k > kMaxColumns16;
  expect(Arg{op, "out_col", index}, c, {w.col32 ? dtypes().i32 : dtypes().u16}, {nnz});
  expect(Arg{op, "out_val", index}, v, {dtypes().f16}, {nnz});
  w.out_ptr = p.data<int32_t>();
  w.out_col = c.data();
  w.out_val = v.data<uint16_t>();

  bool ascending = true;
  for (int64_t i = 0; i < w.n; ++i) ascending &= w.out_ptr[i] <= w.out_ptr[i + 1];
  if (!ascending || w.out_ptr[0] != 0 || w.out_ptr[w.n] != nnz)
    Arg{op, "out_ptr", index}.fail("ascending offsets from 0 to " + std::to_string(nnz), "other values");
  const bool columns_ok = w.col32 ? all_below(static_cast<const int32_t*>(w.out_col), nnz, w.k)
                                  : all_below(static_cast<const uint16_t*>(w.out_col), nnz, w.k);
  if (!columns_ok) Arg{op, "out_col", index}.fail("columns below k = " + std::to_string(w.k), "a larger or negative one");
}

// The packed weight that an op was given, checked.
WqWeight make_weight(const char* op, int index, const Tensor& packed, const Tensor& scales, const OptionalTensor& zeros,
                     const OptionalTensor& codebook, int64_t n, int64_t k, int64_t bits, int64_t group) {
  check_geometry(op, n, k, bits, group, index);
  WqWeight w{};
  w.n = n;
  w.k = k;
  w.bits = int32_t(bits);
  w.group = int32_t(group);
  const Dtypes& d = dtypes();
  const int64_t tiles = t16::tiles(n), groups = t16::groups(k, group);

  const View p(packed), s(scales);
  expect(Arg{op, "packed", index}, p, {d.u8}, {tiles, t16::chunks(k, w.bits), t16::chunk_bytes(w.bits)});
  expect(Arg{op, "scales", index}, s, {d.f16, d.f32}, {tiles, groups, t16::kTileRows});
  w.packed = p.data<uint8_t>();
  w.scales = s.data();
  w.scales_f32 = s.dtype == d.f32;

  const bool has_zeros = present(zeros, [&](const View& z) {
    expect(Arg{op, "zeros", index}, z, {d.u8}, {tiles, groups, t16::kTileRows});
    w.zeros = z.data<uint8_t>();
  });
  const bool has_codebook = present(codebook, [&](const View& c) {
    const int64_t entries = int64_t(1) << bits;
    const Arg arg{op, "codebook", index};
    w.codebook_per_row = c.dim == 3;
    if (w.codebook_per_row) expect(arg, c, {d.f32}, {tiles, entries, t16::kTileRows});
    else expect(arg, c, {d.f32}, {entries});
    w.codebook = c.data<float>();
  });
  EFFK_CHECK(!(has_zeros && has_codebook), op, ": zeros: expected none with a codebook, got both");
  return w;
}

void add_bias(const char* op, int index, const OptionalTensor& bias, WqWeight& w) {
  if (!bias) return;
  const View b(*bias);
  const Arg arg{op, "bias", index};
  w.bias_dtype = float_dtype(arg, b);
  expect(arg, b, {b.dtype}, {w.n});
  w.bias = b.data();
}

// x as [m, k] with rows one after the other; `owner` keeps the copy of an x that was not contiguous.
struct Input {
  Tensor owner;
  View view;
  DType dtype;
  int64_t m;
};

Input make_input(const Arg& arg, const Tensor& x, int64_t k) {
  const View given(x);
  const DType dtype = float_dtype(arg, given);
  const bool ok = given.on_cpu && given.dim >= 1 && given.sizes[given.dim - 1] == k;
  if (__builtin_expect(!ok, 0)) arg.fail("[..., " + std::to_string(k) + "] on cpu", given.text());
  int64_t m = 1;
  for (int64_t i = 0; i + 1 < given.dim; ++i) m *= given.sizes[i];
  if (given.contiguous) return {x, given, dtype, m};
  Tensor copy = torch::stable::contiguous(x);
  const View view(copy);
  return {std::move(copy), view, dtype, m};
}

Tensor output_like(const Input& x, int64_t columns) {
  constexpr int64_t kMaxDim = 64;
  int64_t sizes[kMaxDim];
  std::copy_n(x.view.sizes, x.view.dim, sizes);
  sizes[x.view.dim - 1] = columns;
  return empty(sizes, x.view.dim, x.view.dtype);
}

void run(const Input& x, int64_t k, const WqWeight* weights, void* const* y, int count, Compute compute) {
  if (x.m == 0) return;
  WqLinearArgs args{};
  args.x = x.view.data();
  args.x_dtype = x.dtype;
  args.m = x.m;
  args.k = k;
  args.weights = weights;
  args.y = y;
  args.n_weights = count;
  args.compute = compute;
  wq_linear(args, scratch(wq_linear_workspace(args)), torch_pool());
}

Tensor linear(const Tensor& x, const Tensor& packed, const Tensor& scales, const OptionalTensor& zeros,
              const OptionalTensor& codebook, const OptionalTensor& out_ptr, const OptionalTensor& out_col,
              const OptionalTensor& out_val, const OptionalTensor& bias, int64_t n, int64_t k, int64_t bits,
              int64_t group_size, const std::string& compute) {
  constexpr const char* op = "wq_linear";
  const Compute form = parse_compute(op, compute);
  WqWeight w = make_weight(op, -1, packed, scales, zeros, codebook, n, k, bits, group_size);
  add_outliers(op, -1, out_ptr, out_col, out_val, w);
  add_bias(op, -1, bias, w);
  const Input in = make_input(Arg{op, "x"}, x, k);
  Tensor y = output_like(in, n);
  void* out = y.mutable_data_ptr();
  run(in, k, &w, &out, 1, form);
  return y;
}

using OptionalTensors = std::vector<OptionalTensor>;

std::vector<Tensor> multi_linear(const Tensor& x, std::vector<Tensor> packed, std::vector<Tensor> scales,
                                 OptionalTensors zeros, OptionalTensors codebook, OptionalTensors out_ptr,
                                 OptionalTensors out_col, OptionalTensors out_val, OptionalTensors bias,
                                 std::vector<int64_t> n, int64_t k, std::vector<int64_t> bits,
                                 std::vector<int64_t> group_size, const std::string& compute) {
  constexpr const char* op = "wq_multi_linear";
  const Compute form = parse_compute(op, compute);
  const size_t count = packed.size();
  const struct { const char* name; size_t length; } lists[] = {
      {"scales", scales.size()},   {"zeros", zeros.size()},     {"codebook", codebook.size()},
      {"out_ptr", out_ptr.size()}, {"out_col", out_col.size()}, {"out_val", out_val.size()},
      {"bias", bias.size()},       {"n", n.size()},             {"bits", bits.size()},
      {"group_size", group_size.size()}};
  for (const auto& list : lists)
    EFFK_CHECK(list.length == count, op, ": ", list.name, ": expected ", count, " entries as packed has, got ", list.length);

  std::vector<WqWeight> weights;
  weights.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const int at = int(i);
    WqWeight w = make_weight(op, at, packed[i], scales[i], zeros[i], codebook[i], n[i], k, bits[i], group_size[i]);
    add_outliers(op, at, out_ptr[i], out_col[i], out_val[i], w);
    add_bias(op, at, bias[i], w);
    weights.push_back(w);
  }
  const Input in = make_input(Arg{op, "x"}, x, k);
  std::vector<Tensor> ys;
  std::vector<void*> outs;
  ys.reserve(count);
  outs.reserve(count);
  for (const WqWeight& w : weights) {
    ys.push_back(output_like(in, w.n));
    outs.push_back(ys.back().mutable_data_ptr());
  }
  if (count) run(in, k, weights.data(), outs.data(), int(count), form);
  return ys;
}

// Rows [16 * begin, 16 * end) of a weight: the outer index of every packed array is the tile.
WqWeight cut_tiles(WqWeight w, int64_t begin, int64_t end) {
  const int64_t first = begin * t16::kTileRows;
  const int64_t group_rows = t16::groups(w.k, w.group) * t16::kTileRows;
  w.packed += begin * t16::chunks(w.k, w.bits) * t16::chunk_bytes(w.bits);
  w.scales = static_cast<const uint8_t*>(w.scales) + begin * group_rows * (w.scales_f32 ? 4 : 2);
  if (w.zeros) w.zeros += begin * group_rows;
  if (w.codebook_per_row) w.codebook += begin * (int64_t(1) << w.bits) * t16::kTileRows;
  if (w.out_ptr) w.out_ptr += first;  // its entries stay offsets into the whole list
  w.n = std::min(w.n, end * t16::kTileRows) - first;
  return w;
}

Tensor dequantize_checked(const WqWeight& w) {
  Tensor out = empty({w.n, w.k}, dtypes().f32);
  float* rows = static_cast<float*>(out.mutable_data_ptr());
  const int64_t tile_values = t16::kTileRows * w.k;
  const int64_t grain = 1 + 65536 / tile_values;  // about 50 us of work: well above the cost of a parallel region
  parallel_for(torch_pool(), t16::tiles(w.n), grain, [&](int64_t begin, int64_t end) {
    wq_dequantize(cut_tiles(w, begin, end), rows + begin * tile_values);
  });
  return out;
}

Tensor dequantize(const Tensor& packed, const Tensor& scales, const OptionalTensor& zeros,
                  const OptionalTensor& codebook, const OptionalTensor& out_ptr, const OptionalTensor& out_col,
                  const OptionalTensor& out_val, int64_t n, int64_t k, int64_t bits, int64_t group_size) {
  constexpr const char* op = "wq_dequantize";
  WqWeight w = make_weight(op, -1, packed, scales, zeros, codebook, n, k, bits, group_size);
  add_outliers(op, -1, out_ptr, out_col, out_val, w);
  return dequantize_checked(w);
}

// grad @ W, as one dequantisation and torch's own fp32 product, which is what a training step can afford: 4 N K bytes of
// memory for its duration, and none of the arithmetic is rounded below fp32.
Tensor linear_backward(const Tensor& grad, const Tensor& packed, const Tensor& scales, const OptionalTensor& zeros,
                       const OptionalTensor& codebook, const OptionalTensor& out_ptr, const OptionalTensor& out_col,
                       const OptionalTensor& out_val, int64_t n, int64_t k, int64_t bits, int64_t group_size) {
  constexpr const char* op = "wq_linear_backward";
  WqWeight w = make_weight(op, -1, packed, scales, zeros, codebook, n, k, bits, group_size);
  add_outliers(op, -1, out_ptr, out_col, out_val, w);
  const Input in = make_input(Arg{op, "grad"}, grad, n);
  const Tensor product = torch::stable::matmul(
      torch::stable::to(in.owner, torch::headeronly::ScalarType::Float), dequantize_checked(w));
  return torch::stable::to(product, grad.scalar_type());
}

// [N, E] tables <-> [tiles, E, 16], rows beyond N zero.
Tensor pack_codebook(const View& rows, int64_t n, int64_t entries) {
  const int64_t tiles = t16::tiles(n);
  Tensor out = empty({tiles, entries, t16::kTileRows}, dtypes().f32);
  float* to = static_cast<float*>(out.mutable_data_ptr());
  const float* from = rows.data<float>();
  std::fill_n(to, tiles * entries * t16::kTileRows, 0.0f);
  for (int64_t row = 0; row < n; ++row)
    for (int64_t e = 0; e < entries; ++e)
      to[(row / t16::kTileRows * entries + e) * t16::kTileRows + row % t16::kTileRows] = from[row * entries + e];
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pack(const Tensor& qweight, const Tensor& scales, const OptionalTensor& zeros,
                                                const OptionalTensor& codebook, int64_t n, int64_t k, int64_t bits,
                                                int64_t group_size) {
  constexpr const char* op = "wq_pack";
  check_geometry(op, n, k, bits, group_size);
  const Dtypes& d = dtypes();
  const int64_t tiles = t16::tiles(n), groups = t16::groups(k, group_size), entries = int64_t(1) << bits;
  const int b = int(bits);

  const View q(qweight), s(scales);
  expect(Arg{op, "qweight"}, q, {d.u8}, {n, t16::ceil_div(k * bits, 8)});
  expect(Arg{op, "scales"}, s, {d.f16, d.f32}, {n, groups});
  const uint8_t* z = nullptr;
  present(zeros, [&](const View& view) {
    expect(Arg{op, "zeros"}, view, {d.u8}, {n, groups});
    z = view.data<uint8_t>();
  });
  Tensor table = empty({0}, d.f32);
  present(codebook, [&](const View& view) {
    EFFK_CHECK(!z, op, ": zeros: expected none with a codebook, got both");
    const Arg arg{op, "codebook"};
    if (view.dim == 2) {
      expect(arg, view, {d.f32}, {n, entries});
      table = pack_codebook(view, n, entries);
    } else {
      expect(arg, view, {d.f32}, {entries});
      table = torch::stable::clone(*codebook);
    }
  });

  Tensor packed = empty({tiles, t16::chunks(k, b), t16::chunk_bytes(b)}, d.u8);
  Tensor scales_p = empty({tiles, groups, t16::kTileRows}, s.dtype);
  Tensor zeros_p = z ? empty({tiles, groups, t16::kTileRows}, d.u8) : empty({0}, d.u8);
  wq_pack(q.data<uint8_t>(), s.data(), z, n, k, b, group_size, s.dtype == d.f32 ? 4 : 2,
          static_cast<uint8_t*>(packed.mutable_data_ptr()), scales_p.mutable_data_ptr(),
          z ? static_cast<uint8_t*>(zeros_p.mutable_data_ptr()) : nullptr);
  return {packed, scales_p, zeros_p, table};
}

std::tuple<Tensor, Tensor, Tensor> unpack(const Tensor& packed, const Tensor& scales, const OptionalTensor& zeros,
                                          int64_t n, int64_t k, int64_t bits, int64_t group_size) {
  const WqWeight w = make_weight("wq_unpack", -1, packed, scales, zeros, std::nullopt, n, k, bits, group_size);
  const Dtypes& d = dtypes();
  const int64_t groups = t16::groups(k, group_size);
  Tensor q = empty({n, t16::ceil_div(k * bits, 8)}, d.u8);
  Tensor s = empty({n, groups}, w.scales_f32 ? d.f32 : d.f16);
  Tensor z = w.zeros ? empty({n, groups}, d.u8) : empty({0}, d.u8);
  wq_unpack(w.packed, w.scales, w.zeros, n, k, w.bits, group_size, w.scales_f32 ? 4 : 2,
            static_cast<uint8_t*>(q.mutable_data_ptr()), s.mutable_data_ptr(),
            w.zeros ? static_cast<uint8_t*>(z.mutable_data_ptr()) : nullptr);
  return {q, s, z};
}

}  // namespace
}  // namespace effk::binding

STABLE_TORCH_LIBRARY_IMPL(effk, CPU, m) {
  using namespace effk::binding;
  m.impl("wq_pack", TORCH_BOX(&pack));
  m.impl("wq_unpack", TORCH_BOX(&unpack));
  m.impl("wq_dequantize", TORCH_BOX(&dequantize));
  m.impl("wq_linear", TORCH_BOX(&linear));
  m.impl("wq_multi_linear", TORCH_BOX(&multi_linear));
  m.impl("wq_linear_backward", TORCH_BOX(&linear_backward));
}
