// Checks of an op's arguments. A message names the op, the argument, what was expected and what came, and is raised
// before any work. It reaches Python as a RuntimeError, without the file and line that STD_TORCH_CHECK would put in front.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

#include "torch/tensor.h"

namespace effk::binding {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

#define EFFK_CHECK(condition, ...)                                             \
  do {                                                                         \
    if (__builtin_expect(!(condition), 0)) ::effk::binding::fail(__VA_ARGS__); \
  } while (0)

// Where an argument stands, for the message: "wq_multi_linear: scales[2]". Text is made only when a check fails.
struct Arg {
  const char* op;
  const char* name;
  int index = -1;

  [[noreturn]] void fail(const std::string& expected, const std::string& got) const {
    const std::string at = index < 0 ? "" : "[" + std::to_string(index) + "]";
    binding::fail(op, ": ", name, at, ": expected ", expected, ", got ", got);
  }
};

inline std::string shape_text(const int64_t* sizes, int64_t dim) {
  std::string text = "[";
  for (int64_t i = 0; i < dim; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

// A dense, contiguous tensor on `home` of one of the dtypes and exactly this shape.
template <int Dims>
void expect(const Arg& arg, const View& t, std::initializer_list<int32_t> dtypes, const int64_t (&shape)[Dims],
            const Home& home = kCpu) {
  bool dtype_ok = false;
  for (int32_t d : dtypes) dtype_ok |= t.dtype == d;
  bool shape_ok = t.dim == Dims;
  for (int i = 0; i < Dims && shape_ok; ++i) shape_ok = t.sizes[i] == shape[i];
  if (__builtin_expect(dtype_ok && shape_ok && t.home == home && t.contiguous, 1)) return;

  std::string expected;
  for (int32_t d : dtypes) expected += (expected.empty() ? "" : " or ") + dtype_name(d);
  expected += " " + shape_text(shape, Dims) + ", contiguous, on " + home.text();
  arg.fail(expected, t.text());
}

}  // namespace effk::binding
