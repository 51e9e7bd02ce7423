// The arguments of the sp24_* ops, checked, for the CPU and the CUDA binding. What they mean is in csrc/ops/sp24/sp24.h.
#pragma once
#include <string>

#include "ops/quik_linear/quik_linear.h"
#include "ops/sp24/sp24.h"
#include "torch/check.h"
#include "torch/tensor.h"

namespace effk::binding {

inline Sp24 parse_pattern(const char* op, const std::string& pattern) {
  if (pattern == "2:4") return Sp24::elements;
  EFFK_CHECK(pattern == "pair4:8", op, ": pattern: expected '2:4' or 'pair4:8', got '", pattern, "'");
  return Sp24::pairs;
}
inline void check_width(const char* op, Sp24 pattern, int64_t k) {
  EFFK_CHECK(k >= sp24_period(pattern) && k % sp24_period(pattern) == 0 && k <= kQuikMaxBase, op, ": k: expected a multiple of ",
             sp24_period(pattern), " up to ", kQuikMaxBase, ", got ", k);
}
// An int8 matrix of at least one column.
inline View int8_matrix(const Arg& arg, const Tensor& t, const Home& home = kCpu) {
  const View v(t);
  if (v.dim != 2 || v.dtype != dtypes().i8 || v.sizes[1] < 1 || !v.contiguous || !(v.home == home))
    arg.fail("int8 [rows, columns], contiguous, on " + home.text(), v.text());
  return v;
}
// values and meta of k columns; the number of rows.
inline int64_t check_halves(const char* op, Sp24 pattern, const View& values, const View& meta, int64_t k, const Home& home = kCpu) {
  check_width(op, pattern, k);
  expect(Arg{op, "values"}, values, {dtypes().i8}, {values.dim ? values.sizes[0] : 0, k / 2}, home);
  expect(Arg{op, "meta"}, meta, {dtypes().u8}, {values.sizes[0], sp24_meta_bytes(pattern, k)}, home);
  return values.sizes[0];
}

}  // namespace effk::binding
