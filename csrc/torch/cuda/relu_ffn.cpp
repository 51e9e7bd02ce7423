// CUDA binding of relu_ffn and input_sparse_linear: checks the arguments (torch/relu_ffn_args.h), allocates, and launches
// ops/relu_ffn/cuda*.cu on the current stream. Only packing waits for the device.
#include "ops/relu_ffn/cuda.h"

#include <tuple>
#include <utility>
#include <vector>

#include "torch/cuda/other_ops.h"
#include "torch/cuda/stream.h"
#include "torch/relu_ffn_args.h"

namespace effk::binding {
namespace {

namespace device_ffn = cuda::relu_ffn;

void check_launch(const char* op, int error) {
  EFFK_CHECK(error == 0, op, ": CUDA error ", error, ": ", device_ffn::error_text(error), cuda_build_text());
}
void check_side(const char* op, const char* name, int64_t side) {
  if (side > device_ffn::kMaxSide) Arg{op, name}.fail("at most " + std::to_string(device_ffn::kMaxSide) + " on CUDA", std::to_string(side));
}

// Copies of rows that do not start at a multiple of 16 bytes.
void align_rows(relu_ffn::NeuronRows& rows, const Tensor& owner, std::vector<Tensor>& copies) { align(rows.rows, owner, copies); }

// y and nnz, and memory for what lies between.
struct Results {
  Tensor y, nnz, memory;

  Results(const Tokens& t, int64_t width, size_t bytes, const Home& home) {
    std::vector<int64_t> shape(t.x.sizes, t.x.sizes + t.x.dim);
    shape.back() = width;
    y = empty(shape.data(), t.x.dim, t.x.dtype, home);
    nnz = empty({t.count}, dtypes().i32, home);
    memory = empty({int64_t(bytes)}, dtypes().u8, home);
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& wg, const Tensor& wu, const Tensor& wd, const OptionalTensor& sg,
                                   const OptionalTensor& su, const OptionalTensor& sd, const OptionalTensor& bg, const OptionalTensor& bu,
                                   const OptionalTensor& bd, const std::string& rows, const std::string& gate, const OptionalTensor& param,
                                   const OptionalTensor& mask, int64_t mask_group, const std::string& mode) {
  constexpr const char* op = "relu_ffn";
  const OnDevice device(Arg{op, "x"}, x);
  ReluFfnCall call = make_relu_ffn(op, x, wg, wu, wd, sg, su, sd, bg, bu, bd, rows, gate, param, mask, mask_group, mode, device.home);
  relu_ffn::Args& a = call.a;
  check_side(op, "x", a.d), check_side(op, "x", a.tokens), check_side(op, "wu", a.f);
  std::vector<Tensor> copies;
  align_rows(a.gate, wg ? *wg : wu, copies);
  align_rows(a.up, wu, copies);
  align_rows(a.down, wd, copies);
  const Results r(call.t, a.d, device_ffn::workspace(a), device.home);
  a.y = r.y.mutable_data_ptr();
  a.nnz = static_cast<int32_t*>(r.nnz.mutable_data_ptr());
  check_launch(op, device_ffn::run(a, r.memory.mutable_data_ptr(), device.stream()));
  return {r.y, r.nnz};
}

std::tuple<Tensor, Tensor> input_sparse(const Tensor& x, const Tensor& w, const OptionalTensor& scales, const OptionalTensor& bias,
                                        const OptionalTensor& threshold, const std::string& rows, int64_t f_out) {
  constexpr const char* op = "input_sparse_linear";
  const OnDevice device(Arg{op, "x"}, x);
  InputSparseCall call = make_input_sparse(op, x, w, scales, bias, threshold, rows, f_out, device.home);
  relu_ffn::InputSparseArgs& a = call.a;
  check_side(op, "x", a.d_in), check_side(op, "x", a.tokens), check_side(op, "f_out", f_out);
  std::vector<Tensor> copies;
  align_rows(a.w, w, copies);
  const Results r(call.t, f_out, device_ffn::input_sparse_workspace(a), device.home);
  a.y = r.y.mutable_data_ptr();
  a.nnz = static_cast<int32_t*>(r.nnz.mutable_data_ptr());
  check_launch(op, device_ffn::input_sparse(a, r.memory.mutable_data_ptr(), device.stream()));
  return {r.y, r.nnz};
}

#ifndef EFFK_CUEMU
std::tuple<Tensor, Tensor> pack(const Tensor& w, bool transpose, const std::string& rows, int64_t group) {
  using torch::stable::detail::from;
  const OnDevice device(Arg{"relu_ffn_pack", "w"}, w);
  auto r = call_on_cpu<2, 4>("effk::relu_ffn_pack", {cpu_argument(w), from(transpose), from(rows), from(group)}, device.home);
  return {r[0], r[1]};
}

Tensor unpack(const Tensor& packed, const OptionalTensor& scales, const std::string& kind, int64_t d) {
  using torch::stable::detail::from;
  const OnDevice device(Arg{"relu_ffn_unpack", "rows"}, packed);
  return call_on_cpu<1, 4>("effk::relu_ffn_unpack", {cpu_argument(packed), cpu_argument(scales), from(kind), from(d)}, device.home)[0];
}
#endif

}  // namespace
}  // namespace effk::binding

EFFK_CUDA_LIBRARY(m) {
  using namespace effk::binding;
#ifndef EFFK_CUEMU
  m.impl("relu_ffn_pack", TORCH_BOX(&pack));
  m.impl("relu_ffn_unpack", TORCH_BOX(&unpack));
#endif
  m.impl("relu_ffn", TORCH_BOX(&forward));
  m.impl("input_sparse_linear", TORCH_BOX(&input_sparse));
}
