// CPU binding of the sp24_* ops: checks the arguments, allocates, and calls ops/sp24.
#include "torch/sp24_args.h"

#include <tuple>

namespace effk::binding {
namespace {

std::tuple<Tensor, Tensor> compress(const Tensor& w, const std::string& pattern) {
  constexpr const char* op = "sp24_compress";
  const Sp24 p = parse_pattern(op, pattern);
  const View view = int8_matrix(Arg{op, "w"}, w);
  const int64_t n = view.sizes[0], k = view.sizes[1];
  check_width(op, p, k);
  Tensor values = result({n, k / 2}, dtypes().i8), meta = result({n, sp24_meta_bytes(p, k)}, dtypes().u8);
  int64_t row = 0;
  if (!sp24_compress(view.data<int8_t>(), n, k, p, static_cast<int8_t*>(values.mutable_data_ptr()), static_cast<uint8_t*>(meta.mutable_data_ptr()), &row))
    Arg{op, "w"}.fail("rows of the pattern " + pattern, "more columns that are not zero in row " + std::to_string(row));
  return {values, meta};
}

Tensor decompress(const Tensor& values, const Tensor& meta, int64_t k, const std::string& pattern) {
  constexpr const char* op = "sp24_decompress";
  const Sp24 p = parse_pattern(op, pattern);
  const View v(values), m(meta);
  const int64_t n = check_halves(op, p, v, m, k);
  Tensor w = result({n, k}, dtypes().i8);
  sp24_decompress(v.data<int8_t>(), m.data<uint8_t>(), n, k, p, static_cast<int8_t*>(w.mutable_data_ptr()), torch_pool());
  return w;
}

Tensor matmul(const Tensor& qx, const Tensor& values, const Tensor& meta, const std::string& pattern) {
  constexpr const char* op = "sp24_matmul";
  const Sp24 p = parse_pattern(op, pattern);
  const View x = int8_matrix(Arg{op, "qx"}, qx), v(values), m(meta);
  const int64_t n = check_halves(op, p, v, m, x.sizes[1]);
  Tensor acc = result({x.sizes[0], n}, dtypes().i32);
  const Sp24MatmulArgs args{x.data<int8_t>(), x.sizes[0], x.sizes[1], v.data<int8_t>(), m.data<uint8_t>(), p, n, static_cast<int32_t*>(acc.mutable_data_ptr())};
  const ParallelFor pool = torch_pool();
  sp24_matmul(args, scratch(sp24_matmul_workspace(args, pool.threads)), pool);
  return acc;
}

}  // namespace
}  // namespace effk::binding

STABLE_TORCH_LIBRARY_IMPL(effk, CPU, m) {
  using namespace effk::binding;
  m.impl("sp24_compress", TORCH_BOX(&compress));
  m.impl("sp24_decompress", TORCH_BOX(&decompress));
  m.impl("sp24_matmul", TORCH_BOX(&matmul));
}
