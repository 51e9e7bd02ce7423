// CPU binding of the wq_* ops: checks the arguments (torch/wq_linear_args.h), allocates, and calls ops/wq_linear.
#include "ops/wq_linear/wq_linear.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "torch/wq_linear_args.h"

namespace effk::binding {
namespace {

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
  check_form(op, -1, w, form);
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
  check_lengths(op, count, {{"scales", scales.size()},   {"zeros", zeros.size()},     {"codebook", codebook.size()},
                            {"out_ptr", out_ptr.size()}, {"out_col", out_col.size()}, {"out_val", out_val.size()},
                            {"bias", bias.size()},       {"n", n.size()},             {"bits", bits.size()},
                            {"group_size", group_size.size()}});
  std::vector<WqWeight> weights;
  weights.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const int at = int(i);
    WqWeight w = make_weight(op, at, packed[i], scales[i], zeros[i], codebook[i], n[i], k, bits[i], group_size[i]);
    check_form(op, at, w, form);
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

Tensor dequantize_checked(const WqWeight& w) {
  Tensor out = result({w.n, w.k}, dtypes().f32);
  float* rows = static_cast<float*>(out.mutable_data_ptr());
  const int64_t tile_values = t16::kTileRows * w.k;
  const int64_t grain = 1 + 65536 / tile_values;  // about 50 us of work: well above the cost of a parallel region
  parallel_for(torch_pool(), t16::tiles(w.n), grain, [&](int64_t begin, int64_t end) {
    wq_dequantize(wq_cut(w, begin, end), rows + begin * tile_values);
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
  const bool has_zeros = present(zeros, [&](const View& view) {
    expect(Arg{op, "zeros"}, view, {d.u8}, {n, groups});
    z = view.data<uint8_t>();
  });
  Tensor table = empty({0}, d.f32);
  present(codebook, [&](const View& view) {
    EFFK_CHECK(!has_zeros, op, ": zeros: expected none with a codebook, got both");
    const Arg arg{op, "codebook"};
    if (bits == 8) arg.fail("none at 8 bits, where integer codes are as good", view.text());
    if (view.dim == 2) {
      expect(arg, view, {d.f32}, {n, entries});
      table = pack_codebook(view, n, entries);
    } else {
      expect(arg, view, {d.f32}, {entries});
      table = torch::stable::clone(*codebook);
    }
  });

  Tensor packed = weights({tiles, t16::chunks(k, b), t16::chunk_bytes(b)}, d.u8);
  Tensor scales_p = empty({tiles, groups, t16::kTileRows}, s.dtype);
  Tensor zeros_p = has_zeros ? empty({tiles, groups, t16::kTileRows}, d.u8) : empty({0}, d.u8);
  wq_pack(q.data<uint8_t>(), s.data(), z, n, k, b, group_size, s.dtype == d.f32 ? 4 : 2,
          static_cast<uint8_t*>(packed.mutable_data_ptr()), scales_p.mutable_data_ptr(),
          has_zeros ? static_cast<uint8_t*>(zeros_p.mutable_data_ptr()) : nullptr);
  return {packed, scales_p, zeros_p, table};
}

std::tuple<Tensor, Tensor, Tensor> unpack(const Tensor& packed, const Tensor& scales, const OptionalTensor& zeros,
                                          int64_t n, int64_t k, int64_t bits, int64_t group_size) {
  const WqWeight w = make_weight("wq_unpack", -1, packed, scales, zeros, std::nullopt, n, k, bits, group_size);
  const Dtypes& d = dtypes();
  const int64_t groups = t16::groups(k, group_size);
  Tensor q = empty({n, t16::ceil_div(k * bits, 8)}, d.u8);
  Tensor s = empty({n, groups}, w.scales_f32 ? d.f32 : d.f16);
  const bool has_zeros = present(zeros, [](const View&) {});  // an empty tensor of the right shape has no address
  Tensor z = has_zeros ? empty({n, groups}, d.u8) : empty({0}, d.u8);
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
