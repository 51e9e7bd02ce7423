// CPU binding of the bitmask_* ops: checks the arguments, allocates, and calls ops/bitmask_linear.
#include "ops/bitmask_linear/bitmask_linear.h"

#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#include "common/half.h"
#include "torch/bitmask_linear_args.h"

namespace effk::binding {
namespace {

using bitmask::Values;

// The last element of ptr says how far a kernel reads; what lies between is bitmask_validate's.
void check_end(const char* op, const bitmask::Weight& w, int64_t stored) {
  const int64_t end = w.ptr[bitmask::panels(w.n)];
  EFFK_CHECK(end == stored, op, ": values: expected the ", end, " that ptr ends with, and 64 bytes behind them, got ", stored);
}
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bitmask_pack(const Tensor& w, const OptionalTensor& keep, const OptionalTensor& scale,
                                                                const std::string& values, int64_t group) {
  constexpr const char* op = "bitmask_pack";
  const View view(w);
  const Arg arg{op, "w"};
  bitmask::PackArgs a{};
  a.codes = view.dtype == dtypes().i8;
  a.dtype = a.codes ? DType::f32 : float_dtype_of(arg, view);
  if (view.dim != 2 || view.sizes[0] < 1 || view.sizes[1] < 1 || !view.contiguous || !(view.home == kCpu)) arg.fail("[n, k], contiguous, on cpu", view.text());
  int type = 0;
  while (type < 3 && values != bitmask::kValueNames[type]) ++type;
  EFFK_CHECK(type < 3, op, ": values: expected 'fp32', 'bf16' or 'int8', got '", values, "'");
  a.type = Values(type), a.n = view.sizes[0], a.k = view.sizes[1], a.w = view.data();
  check_sides(op, a.n, a.k, a.type);
  EFFK_CHECK(!a.codes || a.type == Values::i8, op, ": values: expected 'int8' for codes in int8, got '", values, "'");
  EFFK_CHECK(a.codes == bool(scale), op, ": scale: expected ", a.codes ? "one for codes in int8, got none" : "none for a float weight, got one");
  if (group == a.k) group = 0;
  EFFK_CHECK(group == 0 || (a.type == Values::i8 && group > 0 && group % bitmask::kBlock == 0), op,
             ": group: expected 0, or a multiple of 64 for int8 values, got ", group);
  a.group = group >= a.k ? 0 : group;
  if (keep) {
    const View kept(*keep);
    expect(Arg{op, "keep"}, kept, {dtypes().u8, aoti_torch_dtype_bool()}, {a.n, a.k});
    a.keep = kept.data<uint8_t>();
  }
  for (int64_t i = 0; !a.codes && i < a.n * a.k; ++i) {
    const float v = a.dtype == DType::f32 ? view.data<float>()[i] : a.dtype == DType::bf16 ? bf16_to_float(view.data<uint16_t>()[i]) : f16_to_float(view.data<uint16_t>()[i]);
    EFFK_CHECK(std::isfinite(v), op, ": w: expected finite values, got ", v, " at ", i);
  }
  const bool quantised = a.type == Values::i8;
  const int64_t panels = bitmask::panels(a.n), groups = bitmask::groups(a.k, a.group);
  Tensor scales = quantised ? empty({a.n, groups}, dtypes().f32) : empty({0}, dtypes().f32);
  Tensor sums = quantised ? empty({a.n, groups}, dtypes().i32) : empty({0}, dtypes().i32);
  float* s = static_cast<float*>(scales.mutable_data_ptr());
  if (scale) {
    const View given(*scale);
    expect(Arg{op, "scale"}, given, {dtypes().f32}, {a.n, groups});
    std::memcpy(s, given.data(), size_t(a.n * groups) * 4);
  }
  Tensor masks = weights({panels, bitmask::blocks(a.k), bitmask::kRows}, dtypes().i64), ptr = empty({panels + 1}, dtypes().i64);
  auto* bits = static_cast<uint64_t*>(masks.mutable_data_ptr());
  auto* begins = static_cast<int64_t*>(ptr.mutable_data_ptr());
  const ParallelFor pool = torch_pool();
  bitmask::count(a, s, bits, begins, pool);
  const int32_t stored_as = quantised ? dtypes().i8 : a.type == Values::bf16 ? dtypes().bf16 : dtypes().f32;
  Tensor stream = weights({begins[panels] + bitmask::tail(a.type)}, stored_as);
  bitmask::fill(a, s, bits, begins, static_cast<uint8_t*>(stream.mutable_data_ptr()), quantised ? static_cast<int32_t*>(sums.mutable_data_ptr()) : nullptr, pool);
  return {stream, masks, ptr, scales, sums};
}

Tensor bitmask_unpack(const Tensor& values, const Tensor& masks, const Tensor& ptr, const OptionalTensor& scale, int64_t n, int64_t k) {
  constexpr const char* op = "bitmask_unpack";
  int64_t stored;
  bitmask::Weight w = make_bitmask(op, values, masks, ptr, n, k, &stored, kCpu);
  check_end(op, w, stored);
  if (scale) set_scale(op, w, scale, kCpu);
  Tensor out = result({n, k}, scale ? dtypes().f32 : View(values).dtype);
  bitmask::unpack(w, static_cast<uint8_t*>(out.mutable_data_ptr()), torch_pool());
  return out;
}

Tensor bitmask_validate(const Tensor& values, const Tensor& masks, const Tensor& ptr, int64_t n, int64_t k) {
  constexpr const char* op = "bitmask_validate";
  int64_t stored, at;
  const bitmask::Weight w = make_bitmask(op, values, masks, ptr, n, k, &stored, kCpu);
  const char* wrong = bitmask::validate(w, stored, &at);
  EFFK_CHECK(!wrong, op, ": ", wrong, ", got others in panel ", at);
  Tensor out = empty({1}, dtypes().i64);
  *static_cast<int64_t*>(out.mutable_data_ptr()) = stored;
  return out;
}

Tensor bitmask_linear(const Tensor& x, const Tensor& values, const Tensor& masks, const Tensor& ptr, const OptionalTensor& scale,
                      const OptionalTensor& row_sum, const OptionalTensor& bias, int64_t n, int64_t k, const std::string& compute) {
  constexpr const char* op = "bitmask_linear";
  int64_t stored;
  bitmask::Args a = make_bitmask_linear(op, x, values, masks, ptr, scale, row_sum, bias, n, k, compute, &stored, kCpu);
  check_end(op, a.w, stored);
  const View in(x);
  std::vector<int64_t> shape(in.sizes, in.sizes + in.dim);
  shape.back() = n;
  Tensor y = result(shape.data(), in.dim, in.dtype);
  a.y = y.mutable_data_ptr();
  const ParallelFor pool = torch_pool();
  bitmask::run(a, scratch(bitmask::workspace(a, pool.threads)), pool);
  return y;
}

}  // namespace
}  // namespace effk::binding

STABLE_TORCH_LIBRARY_IMPL(effk, CPU, m) {
  using namespace effk::binding;
  m.impl("bitmask_pack", TORCH_BOX(&bitmask_pack));
  m.impl("bitmask_unpack", TORCH_BOX(&bitmask_unpack));
  m.impl("bitmask_linear", TORCH_BOX(&bitmask_linear));
  m.impl("bitmask_validate", TORCH_BOX(&bitmask_validate));
}
