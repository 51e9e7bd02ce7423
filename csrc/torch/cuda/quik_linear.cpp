// CUDA binding of the quik_* ops: checks the arguments (torch/quik_linear_args.h), allocates, and launches
// ops/quik_linear/cuda*.cu on the current stream; where activations are not quantised, the kernels of wq_linear on the
// same bytes. No call waits for the device.
#include "torch/quik_linear_args.h"

#include <tuple>
#include <vector>

#include "ops/quik_linear/cuda.h"
#include "ops/wq_linear/cuda.h"
#include "torch/cuda/device_pack.h"
#include "torch/cuda/other_ops.h"

namespace effk::binding {
namespace {

namespace quik = cuda::quik;
using quik::Form;

void check_launch(const char* op, int error) {
  EFFK_CHECK(error == 0, op, ": CUDA error ", error, ": ", quik::error_text(error), cuda_build_text());
}
int32_t dtype_number(DType t) { return t == DType::f32 ? dtypes().f32 : t == DType::f16 ? dtypes().f16 : dtypes().bf16; }
template <class T>
T* out(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize(const Tensor& x, const OptionalTensor& int_idx, const OptionalTensor& fp_idx, int64_t n_base,
                                                    int64_t bits, const std::string& mode) {
  constexpr const char* op = "quik_quantize";
  quik::Quantise q{};
  q.mode = parse_quik_mode(op, mode);
  q.bits = check_bits(op, "bits", bits);
  const OnDevice device(Arg{op, "x"}, x);
  const Input in = make_input(Arg{op, "x"}, x, last_side(op, x), device.home);
  check_side(Arg{op, "x"}, in.m);
  q.x = in.view.data(), q.dtype = in.dtype, q.m = in.m;
  q.split = make_split(op, int_idx, fp_idx, in.view.sizes[in.view.dim - 1], n_base, device.home);
  q.form = q.bits == 8 ? Form::bytes : Form::nibbles;
  q.row_bytes = q.bits == 8 ? n_base : t16::ceil_div(n_base, 2);
  q.out_ld = q.split.n_out;
  const Tensor qx = empty({q.m, q.row_bytes}, q.bits == 8 ? dtypes().i8 : dtypes().u8, device.home);
  const Tensor scale = empty({q.m}, dtypes().f32, device.home), zero = empty({q.m}, dtypes().f32, device.home);
  const Tensor x_out = empty({q.m, q.out_ld}, in.view.dtype, device.home);
  q.codes = out<uint8_t>(qx), q.scale = out<float>(scale), q.zero = out<float>(zero), q.x_out = out<void>(x_out);
  check_launch(op, quik::quantise(q, device.stream()));
  return {qx, scale, zero, x_out};
}

Tensor int_matmul(const Tensor& qx, const Tensor& packed, int64_t f_out, int64_t n_base, int64_t bits_w, int64_t bits_a) {
  constexpr const char* op = "quik_int_matmul";
  check_base(op, n_base);
  quik::Product p{};
  p.bits = check_bits(op, "bits_w", bits_w);
  const int32_t bits = check_bits(op, "bits_a", bits_a);
  EFFK_CHECK(f_out >= 1 && f_out <= kMaxSide, op, ": f_out: expected 1 to ", kMaxSide, ", got ", f_out);
  const OnDevice device(Arg{op, "qx"}, qx);
  const View given(qx), weight(packed);
  p.m = check_codes(Arg{op, "qx"}, given, n_base, bits, device.home);
  expect(Arg{op, "packed"}, weight, {dtypes().u8}, {t16::tiles(f_out), t16::chunks(n_base, p.bits), t16::chunk_bytes(p.bits)}, device.home);
  check_side(Arg{op, "qx"}, p.m);
  check_side(Arg{op, "f_out"}, f_out);
  if (p.bits == 4 && bits == 4) check_launch(op, quik::has_int4(p.int4));
  const Form form = p.int4 ? Form::units : Form::bytes;
  const Tensor codes = empty({p.m, quik::row_bytes(n_base, form)}, dtypes().u8, device.home), acc = empty({p.m, f_out}, dtypes().i32, device.home);
  std::vector<Tensor> copies;
  p.packed = weight.data<uint8_t>(), p.n = f_out, p.n_base = n_base, p.codes = out<uint8_t>(codes), p.sums = out<int32_t>(acc);
  align(p.packed, packed, copies);
  check_launch(op, quik::repack(given.data<uint8_t>(), bits == 8 ? Form::bytes : Form::nibbles, p.m, n_base, form, out<uint8_t>(codes), device.stream()));
  check_launch(op, quik::product(p, device.stream()));
  return acc;
}

Tensor dequantize(const Tensor& acc, const Tensor& scale, const Tensor& zero, const Tensor& w_scale, const Tensor& w_reduced,
                  const OptionalTensor& y_in, int64_t bits_a, const std::string& dtype) {
  constexpr const char* op = "quik_dequantize";
  const OnDevice device(Arg{op, "acc"}, acc);
  const QuikDequantizeArgs a = make_dequantize(op, acc, scale, zero, w_scale, w_reduced, y_in, bits_a, dtype, device.home);
  const Tensor y = empty({a.m, a.n}, dtype_number(a.y_dtype), device.home);
  check_launch(op, quik::dequantise({a.acc, a.scale, a.zero, a.w_scale, a.w_reduced, a.y_in, a.y_in_dtype, a.m, a.n, float(1 << (a.bits_a - 1)),
                                     out<void>(y), a.y_dtype},
                                    device.stream()));
  return y;
}

// A weight on the device, checked.
struct Layer {
  QuikWeight w{};
  cuda::Packed outliers{};         // of w_out, where there are some
  const uint32_t* header = nullptr;
  OptionalTensor bias;
  std::vector<Tensor> copies;

  const void* rows() const { return reinterpret_cast<const char*>(header) + cuda::kPackHeader; }
};

Layer make_layer(const char* op, int index, const Tensor& packed, const Tensor& w_scale, const Tensor& w_reduced, const OptionalTensor& w_out,
                 const OptionalTensor& bias, int64_t f_out, int64_t n_base, int64_t n_out, int64_t bits_w, const Home& home) {
  Layer layer;
  layer.w = make_quik_weight(op, index, packed, w_scale, w_reduced, f_out, n_base, bits_w, home);
  check_side(Arg{op, "f_out", index}, f_out);
  align(layer.w.packed, packed, layer.copies);
  align(layer.w.scales, w_scale, layer.copies);
  add_quik_bias(op, index, bias, layer.w, home);
  layer.bias = bias;
  const Arg arg{op, "w_out", index};
  if (n_out) {
    if (!w_out) arg.fail("a packed [" + std::to_string(f_out) + ", " + std::to_string(n_out) + "] weight", "None");
    layer.outliers = device_pack(arg, *w_out, panel::Kind::dense, f_out, n_out, home);
    layer.header = View(*w_out).data<uint32_t>();
  } else if (w_out) {
    arg.fail("None, since all columns of x are base columns", "a tensor");
  }
  return layer;
}

struct Call {
  const char* op;
  const Input& in;
  const QuikSplit& split;
  const std::vector<Layer>& layers;
  const OnDevice& device;
};

// Fills what a kernel compares with the words at the start of packed outliers.
template <class A>
void expect_header(A& a, const Layer& layer) {
  a.header = layer.header;
  if (layer.header) layer.outliers.words(a.expected);
}

// Few rows of 16 bits: the kernel of wq_linear, which adds sums over the outliers that are made first. Its rows of x lie
// as they are, or, with index lists, in a copy.
std::vector<Tensor> few_rows(const Call& c) {
  const int64_t n_base = c.split.n_base;
  const void* x = c.in.view.data();
  int64_t ldx = c.split.k;
  Tensor base;
  if (c.split.base) {
    ldx = t16::ceil_div(n_base, 8) * 8;
    base = empty({c.in.m, ldx}, c.in.view.dtype, c.device.home);
    x = out<void>(base);
    check_launch(c.op, quik::split_columns({c.in.view.data(), c.in.dtype, c.in.m, c.split, n_base, ldx, out<void>(base)}, c.device.stream()));
  }
  std::vector<Tensor> ys;
  for (const Layer& layer : c.layers) {
    Tensor sums;
    float* y_in = nullptr;
    if (c.split.n_out) {
      sums = empty({c.in.m, layer.w.n}, dtypes().f32, c.device.home);
      y_in = out<float>(sums);
      quik::Outliers o{c.in.view.data(), c.in.dtype, c.in.m, c.split, layer.rows(), layer.outliers.dtype, layer.w.n, layer.outliers.ld(), nullptr, {}, y_in};
      expect_header(o, layer);
      check_launch(c.op, quik::outlier_sums(o, c.device.stream()));
    }
    WqWeight w{};
    w.packed = layer.w.packed, w.scales = layer.w.scales, w.scales_f32 = true;
    w.n = layer.w.n, w.k = n_base, w.bits = layer.w.bits;
    w.bias = layer.w.bias, w.bias_dtype = layer.w.bias_dtype;
    ys.push_back(output_like(c.in, w.n));
    if (c.in.m) check_launch(c.op, cuda::wq_linear(w, 0, x, out<void>(ys.back()), c.in.dtype, int(c.in.m), c.device.stream(), ldx, y_in));
  }
  return ys;
}

// fp32, or many rows: the weight is written out in the type of x, and torch multiplies.
std::vector<Tensor> written_out(const Call& c) {
  Tensor x = c.in.owner;
  if (c.split.base) {
    x = output_like(c.in, c.split.k);
    check_launch(c.op, quik::split_columns({c.in.view.data(), c.in.dtype, c.in.m, c.split, c.split.k, c.split.k, out<void>(x)}, c.device.stream()));
  }
  std::vector<Tensor> ys;
  for (const Layer& layer : c.layers) {
    const Tensor w = empty({layer.w.n, c.split.k}, c.in.view.dtype, c.device.home);
    quik::Assemble a{layer.w.packed, layer.w.scales, layer.w.n, c.split.n_base, c.split.n_out, layer.w.bits, nullptr, DType::f32, 0, nullptr, {}, c.in.dtype,
                     out<void>(w)};
    if (c.split.n_out) a.w_out = layer.rows(), a.out_type = layer.outliers.dtype, a.ld = layer.outliers.ld();
    expect_header(a, layer);
    check_launch(c.op, quik::assemble(a, c.device.stream()));
    OptionalTensor bias = layer.bias;
    if (bias) bias = torch::stable::to(*bias, scalar_type(c.in.dtype));
    ys.push_back(library_linear(x, w, bias));
  }
  return ys;
}

// One quantised x for all weights. Outliers of the 16-bit type of x are multiplied in the tile of the product, others
// before it, in fp32.
std::vector<Tensor> quantised(const Call& c, int32_t bits, QuikMode mode) {
  bool int4 = bits == 4;
  for (const Layer& layer : c.layers) int4 = int4 && layer.w.bits == 4;
  if (int4) check_launch(c.op, quik::has_int4(int4));
  quik::Quantise q{};
  q.x = c.in.view.data(), q.dtype = c.in.dtype, q.m = c.in.m, q.split = c.split, q.bits = bits, q.mode = mode;
  q.form = int4 ? Form::units : Form::bytes;
  q.row_bytes = quik::row_bytes(c.split.n_base, q.form);
  q.out_ld = t16::ceil_div(c.split.n_out, 8) * 8;
  const Tensor codes = empty({q.m, q.row_bytes}, dtypes().u8, c.device.home), x_out = empty({q.m, q.out_ld}, c.in.view.dtype, c.device.home);
  const Tensor meta = empty({2, q.m}, dtypes().f32, c.device.home);
  q.codes = out<uint8_t>(codes), q.scale = out<float>(meta), q.zero = q.scale + q.m, q.x_out = out<void>(x_out);
  if (!c.layers.empty()) check_launch(c.op, quik::quantise(q, c.device.stream()));

  std::vector<Tensor> ys;
  for (const Layer& layer : c.layers) {
    ys.push_back(output_like(c.in, layer.w.n));
    if (!q.m) continue;
    quik::Product p{};
    p.packed = layer.w.packed, p.n = layer.w.n, p.n_base = c.split.n_base, p.bits = layer.w.bits, p.int4 = int4;
    p.codes = q.codes, p.m = q.m, p.scale = q.scale, p.zero = q.zero, p.w_scale = layer.w.scales, p.w_reduced = layer.w.reduced;
    p.half = float(1 << (bits - 1)), p.bias = layer.w.bias, p.bias_type = layer.w.bias_dtype;
    p.y = out<void>(ys.back()), p.y_type = c.in.dtype;
    Tensor before;
    if (c.split.n_out && layer.outliers.dtype == c.in.dtype && c.in.dtype != DType::f32) {
      p.x_out = q.x_out, p.w_out = layer.rows(), p.out_type = c.in.dtype, p.out_ld = q.out_ld;
      expect_header(p, layer);
    } else if (c.split.n_out) {
      before = empty({q.m, layer.w.n}, dtypes().f32, c.device.home);
      cuda::Gemm g;
      g.a[0].p = q.x_out, g.a[0].ld = q.out_ld, g.a_type = c.in.dtype;
      g.b[0].p = layer.rows(), g.b[0].ld = layer.outliers.ld(), g.b_type = layer.outliers.dtype;
      g.m = int(q.m), g.n = int(layer.w.n), g.k = int(c.split.n_out);
      g.out[0] = out<void>(before), g.out_ld = layer.w.n, g.out_type = DType::f32;
      expect_header(g, layer);
      check_gemm_launch(c.op, cuda::gemm(g, c.device.stream()));
      p.y_in = out<float>(before);
    }
    check_launch(c.op, quik::product(p, c.device.stream()));
  }
  return ys;
}

std::vector<Tensor> run(const Call& c, int32_t bits, QuikMode mode) {
  check_side(Arg{c.op, "x"}, c.in.m);
  const bool weight_only = bits == 16 || (mode == QuikMode::kernel && c.in.m <= kQuikFewRows);
  if (!weight_only) return quantised(c, bits, mode);
  return c.in.dtype == DType::f32 || c.in.m > cuda::kMaxRows ? written_out(c) : few_rows(c);
}

Tensor linear(const Tensor& x, const Tensor& packed, const Tensor& w_scale, const Tensor& w_reduced, const OptionalTensor& w_out,
              const OptionalTensor& bias, const OptionalTensor& int_idx, const OptionalTensor& fp_idx, int64_t f_out, int64_t n_base, int64_t bits_w,
              int64_t bits_a, const std::string& mode) {
  constexpr const char* op = "quik_linear";
  const QuikMode how = parse_quik_mode(op, mode);
  const int32_t bits = check_bits(op, "bits_a", bits_a, true);
  const OnDevice device(Arg{op, "x"}, x);
  const Input in = make_input(Arg{op, "x"}, x, last_side(op, x), device.home);
  const QuikSplit split = make_split(op, int_idx, fp_idx, in.view.sizes[in.view.dim - 1], n_base, device.home);
  const std::vector<Layer> layers{make_layer(op, -1, packed, w_scale, w_reduced, w_out, bias, f_out, n_base, split.n_out, bits_w, device.home)};
  return run({op, in, split, layers, device}, bits, how)[0];
}

using OptionalTensors = std::vector<OptionalTensor>;

std::vector<Tensor> multi_linear(const Tensor& x, std::vector<Tensor> packed, std::vector<Tensor> w_scale, std::vector<Tensor> w_reduced,
                                 OptionalTensors w_out, OptionalTensors bias, const OptionalTensor& int_idx, const OptionalTensor& fp_idx,
                                 std::vector<int64_t> f_out, int64_t n_base, std::vector<int64_t> bits_w, int64_t bits_a, const std::string& mode) {
  constexpr const char* op = "quik_multi_linear";
  const QuikMode how = parse_quik_mode(op, mode);
  const int32_t bits = check_bits(op, "bits_a", bits_a, true);
  const size_t count = packed.size();
  check_lengths(op, count, {{"w_scale", w_scale.size()}, {"w_reduced", w_reduced.size()}, {"w_out", w_out.size()},
                            {"bias", bias.size()},       {"f_out", f_out.size()},         {"bits_w", bits_w.size()}});
  const OnDevice device(Arg{op, "x"}, x);
  const Input in = make_input(Arg{op, "x"}, x, last_side(op, x), device.home);
  const QuikSplit split = make_split(op, int_idx, fp_idx, in.view.sizes[in.view.dim - 1], n_base, device.home);
  std::vector<Layer> layers;
  for (size_t i = 0; i < count; ++i)
    layers.push_back(make_layer(op, int(i), packed[i], w_scale[i], w_reduced[i], w_out[i], bias[i], f_out[i], n_base, split.n_out, bits_w[i], device.home));
  return run({op, in, split, layers, device}, bits, how);
}

}  // namespace
}  // namespace effk::binding

EFFK_CUDA_LIBRARY(m) {
  using namespace effk::binding;
  m.impl("quik_quantize", TORCH_BOX(&quantize));
  m.impl("quik_int_matmul", TORCH_BOX(&int_matmul));
  m.impl("quik_dequantize", TORCH_BOX(&dequantize));
  m.impl("quik_linear", TORCH_BOX(&linear));
  m.impl("quik_multi_linear", TORCH_BOX(&multi_linear));
}
