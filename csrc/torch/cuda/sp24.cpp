// CUDA binding of the sp24_* ops: checks the arguments, allocates, and launches ops/sp24/cuda.cu and the integer product of
// ops/quik_linear on the current stream. Only sp24_compress waits for the device: it runs once, when a weight is made.
#include <tuple>

#include "ops/quik_linear/cuda.h"
#include "ops/sp24/cuda.h"
#include "torch/cuda/other_ops.h"
#include "torch/cuda/stream.h"
#include "torch/sp24_args.h"

namespace effk::binding {
namespace {

void check_launch(const char* op, int error) {
  EFFK_CHECK(error == 0, op, ": CUDA error ", error, ": ", cuda::quik::error_text(error), cuda_build_text());
}

Tensor decompress(const Tensor& values, const Tensor& meta, int64_t k, const std::string& pattern) {
  constexpr const char* op = "sp24_decompress";
  const Sp24 p = parse_pattern(op, pattern);
  const OnDevice device(Arg{op, "values"}, values);
  const View v(values), m(meta);
  const int64_t n = check_halves(op, p, v, m, k, device.home);
  Tensor w = empty({n, k}, dtypes().i8, device.home);
  check_launch(op, cuda::sp24::expand(v.data<int8_t>(), m.data<uint8_t>(), n, k, p, false, w.mutable_data_ptr(), device.stream()));
  return w;
}

Tensor matmul(const Tensor& qx, const Tensor& values, const Tensor& meta, const std::string& pattern) {
  constexpr const char* op = "sp24_matmul";
  const Sp24 p = parse_pattern(op, pattern);
  const OnDevice device(Arg{op, "qx"}, qx);
  const View x = int8_matrix(Arg{op, "qx"}, qx, device.home), v(values), m(meta);
  const int64_t rows = x.sizes[0], k = x.sizes[1], n = check_halves(op, p, v, m, k, device.home), row_bytes = cuda::quik::row_bytes(k, cuda::quik::Form::bytes);
  Tensor acc = empty({rows, n}, dtypes().i32, device.home);
  Tensor codes = empty({rows, row_bytes}, dtypes().u8, device.home), packed = empty({t16::packed_bytes(n, k, 8)}, dtypes().u8, device.home);
  auto* const codes_at = static_cast<uint8_t*>(codes.mutable_data_ptr());
  check_launch(op, cuda::quik::repack(x.data<uint8_t>(), cuda::quik::Form::bytes, rows, k, cuda::quik::Form::bytes, codes_at, device.stream()));
  check_launch(op, cuda::sp24::expand(v.data<int8_t>(), m.data<uint8_t>(), n, k, p, true, packed.mutable_data_ptr(), device.stream()));
  cuda::quik::Product product{};
  product.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
  product.n = n, product.n_base = k, product.bits = 8;
  product.codes = codes_at, product.m = rows;
  product.sums = static_cast<int32_t*>(acc.mutable_data_ptr());
  check_launch(op, cuda::quik::product(product, device.stream()));
  return acc;
}

#ifndef EFFK_CUEMU
std::tuple<Tensor, Tensor> compress(const Tensor& w, const std::string& pattern) {
  const auto r = call_on_cpu<2, 2>("effk::sp24_compress", {cpu_argument(w), torch::stable::detail::from(pattern)}, View(w).home);
  return {r[0], r[1]};
}
#endif

}  // namespace
}  // namespace effk::binding

EFFK_CUDA_LIBRARY(m) {
#ifndef EFFK_CUEMU
  m.impl("sp24_compress", TORCH_BOX(&effk::binding::compress));
#endif
  using namespace effk::binding;
  m.impl("sp24_decompress", TORCH_BOX(&decompress));
  m.impl("sp24_matmul", TORCH_BOX(&matmul));
}
