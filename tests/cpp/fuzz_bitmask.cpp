// Random calls of bitmask_linear and its packing on every tier, in guarded memory: integers against the formula in fp32, bit for bit;
// float sums against double precision.
//   fuzz_bitmask [calls [first seed]]
#include <algorithm>
#include <cmath>
#include <vector>

#include "fuzz.h"
#include "ops/bitmask_linear/bitmask_linear.h"

namespace {

using namespace effk;
using namespace effk::test;
using bitmask::Args;
using bitmask::PackArgs;
using bitmask::Weight;
namespace bm = effk::bitmask;
using Type = bitmask::Values;

struct Memory {
  static constexpr size_t kRoom = size_t(4) << 20;
  Guarded plain{kRoom}, keep{kRoom}, scale{kRoom}, masks{kRoom}, ptr{kRoom}, values{kRoom}, row_sum{kRoom}, dense{kRoom}, x{kRoom}, y{kRoom}, bias{kRoom},
      workspace{size_t(32) << 20};
};

// A packed weight and what it holds: codes or values [n, k], and which are stored.
struct Packed {
  Weight w{};
  int64_t stored = 0;
  std::vector<double> value;
  double at(int64_t row, int64_t c) const { return value[size_t(row * w.k + c)]; }
  int64_t group_of(int64_t c) const { return w.group ? c / w.group : 0; }
};

float scaled(const Packed& p, int64_t row, int64_t c) {  // as the float form sees it: one rounding
  const float v = float(p.at(row, c));
  return p.w.scale ? v * p.w.scale[row * bm::groups(p.w.k, p.w.group) + p.group_of(c)] : v;
}

// What packing should store of weight i: nothing, or a value or code.
bool wanted(const PackArgs& a, const Values& given, const float* scale, int64_t i, double* v) {
  *v = 0;
  if (a.keep && !a.keep[i]) return false;
  if (a.codes) return *v = static_cast<const int8_t*>(a.w)[i], *v != 0;
  *v = given.value[size_t(i)];
  if (a.type == Type::i8) {
    const float by = scale[i / a.k * bm::groups(a.k, a.group) + (a.group ? i % a.k / a.group : 0)];
    return *v = std::nearbyint(float(*v) / by), *v != 0;
  }
  uint8_t stored[4];
  store(stored, a.type == Type::f32 ? DType::f32 : DType::bf16, 0, float(*v));
  *v = load(stored, a.type == Type::f32 ? DType::f32 : DType::bf16, 0);
  return a.keep || *v != 0;
}

void check_packing(const PackArgs& a, const Values& given, const Packed& p) {
  const Weight& w = p.w;
  const int64_t width = bm::blocks(w.k);
  const uint8_t* at = w.values;
  for (int64_t panel = 0; panel < bm::panels(w.n); ++panel) {
    if (at != w.values + w.ptr[panel] * bm::bytes_of(w.type)) fail("where a panel begins");
    for (int64_t b = 0; b < width; ++b)
      for (int64_t row = panel * bm::kRows; row < (panel + 1) * bm::kRows; ++row) {
        const uint64_t mask = w.masks[bm::word(width, row, b)];
        for (int64_t c = b * bm::kBlock; c < (b + 1) * bm::kBlock; ++c) {
          double v;
          const bool is = row < w.n && c < w.k && wanted(a, given, w.scale, row * w.k + c, &v);
          if (is != (mask >> (c % bm::kBlock) & 1)) fail("mask");
          if (!is) continue;
          const double got = w.type == Type::i8 ? double(int8_t(*at)) : load(at, w.type == Type::f32 ? DType::f32 : DType::bf16, 0);
          if (got != v || p.at(row, c) != v) fail("stored value");
          at += bm::bytes_of(w.type);
        }
      }
  }
  if (at != w.values + p.stored * bm::bytes_of(w.type)) fail("number of values");
  const int64_t groups = bm::groups(w.k, w.group), span = w.group ? w.group : w.k;
  for (int64_t i = 0; w.scale && i < w.n * groups; ++i) {
    int64_t sum = 0;
    float most = 0;
    for (int64_t c = i % groups * span; c < std::min(w.k, (i % groups + 1) * span); ++c) {
      const int64_t j = i / groups * w.k + c;
      sum += int64_t(p.value[size_t(j)]);
      if (!a.codes && (!a.keep || a.keep[j])) most = std::max(most, std::fabs(float(given.value[size_t(j)])));
    }
    if (w.row_sum[i] != sum) fail("sum of codes");
    if (!a.codes && w.scale[i] != (most / 127.0f == 0 ? 1.0f : most / 127.0f)) fail("scale");
  }
}

Packed random_weight(Random& r, Memory& m, int64_t n, int64_t k) {
  PackArgs a{};
  a.n = n, a.k = k, a.type = Type(r.below(3)), a.dtype = DType(r.below(3));
  a.codes = a.type == Type::i8 && r.chance(40);
  const int64_t blocks = bm::blocks(k);
  if (a.type == Type::i8 && blocks > 1 && r.chance(60)) a.group = bm::kBlock * (1 + r.below(blocks - 1));
  const int sparsity = r.chance(20) ? (r.chance(50) ? 0 : 100) : int(r.below(100));
  Values given;
  if (a.codes) {
    int8_t* codes = place<int8_t>(r, m.plain, n * k);
    for (int64_t i = 0; i < n * k; ++i) codes[i] = r.chance(sparsity) ? int8_t(0) : int8_t(r.below(256) - 128);
    a.w = codes;
  } else {
    given = values(r, m.plain, a.dtype, n * k, [&] { return r.chance(sparsity) ? 0.0f : r.normal(); });
    a.w = given.at;
  }
  if (r.chance(30)) {
    uint8_t* keep = place<uint8_t>(r, m.keep, n * k);
    for (int64_t i = 0; i < n * k; ++i) keep[i] = uint8_t(r.chance(60) * (1 + r.below(255)));
    a.keep = keep;
  }
  const bool quantised = a.type == Type::i8;
  const int64_t scales = n * bm::groups(k, a.group), panels = bm::panels(n);
  float* scale = quantised ? place<float>(r, m.scale, scales) : nullptr;
  if (a.codes)
    for (int64_t i = 0; i < scales; ++i) scale[i] = 0.01f + 0.05f * float(r.below(100)) / 100;
  uint64_t* masks = place<uint64_t>(r, m.masks, panels * blocks * bm::kRows);
  int64_t* ptr = place<int64_t>(r, m.ptr, panels + 1);
  bm::count(a, scale, masks, ptr, random_pool(r));
  Packed p;
  p.stored = ptr[panels];
  uint8_t* stream = place<uint8_t>(r, m.values, p.stored * bm::bytes_of(a.type) + bm::kTailBytes);
  int32_t* row_sum = quantised ? place<int32_t>(r, m.row_sum, scales) : nullptr;
  bm::fill(a, scale, masks, ptr, stream, row_sum, random_pool(r));
  expect_intact("packing wrote outside", {&m.masks, &m.ptr, &m.values});
  if (quantised) expect_intact("packing wrote outside the scales", {&m.scale, &m.row_sum});
  p.w = {a.type, stream, masks, ptr, nullptr, row_sum, n, k, a.group};

  const size_t dense = size_t(n * k * bm::bytes_of(a.type));
  uint8_t* back = m.dense.place(dense, r.chance(70));
  bm::unpack(p.w, back, random_pool(r));
  expect_intact("unpacking wrote outside", {&m.dense});
  for (int64_t i = 0; i < n * k; ++i)
    p.value.push_back(quantised ? double(int8_t(back[i])) : load(back, a.type == Type::f32 ? DType::f32 : DType::bf16, i));
  p.w.scale = scale;
  check_packing(a, given, p);
  if (quantised) {
    float* w = place<float>(r, m.dense, n * k);
    bm::unpack(p.w, reinterpret_cast<uint8_t*>(w), random_pool(r));
    expect_intact("unpacking wrote outside", {&m.dense});
    for (int64_t i = 0; i < n * k; ++i)
      if (w[i] != scaled(p, i / k, i % k)) fail("unpacked value");
  }

  // One bit more or less, or a number of ptr that is another: noticed.
  int64_t at;
  if (bm::validate(p.w, p.stored, &at)) fail("a right weight is refused");
  if (r.chance(50)) {
    uint64_t& word = masks[r.below(panels * blocks * bm::kRows)];
    const uint64_t bit = uint64_t(1) << r.below(64);
    word ^= bit;
    if (!bm::validate(p.w, p.stored, &at) || at < 0 || at >= panels) fail("a wrong mask passes");
    word ^= bit;
    // A bit that moves to where no weight is: the counts stay as they were.
    uint64_t& last = masks[bm::word(blocks, n - 1, blocks - 1)];
    const uint64_t right = last, lowest = right & (0 - right);
    uint64_t& beyond = n % bm::kRows ? masks[bm::word(blocks, n, blocks - 1)] : last;
    if (lowest && (n % bm::kRows || k % bm::kBlock) && r.chance(50)) {
      last ^= lowest, beyond |= n % bm::kRows ? lowest : uint64_t(1) << 63;
      if (!bm::validate(p.w, p.stored, &at)) fail("a mask beyond the weight passes");
      beyond = 0, last = right;
    } else if (lowest && k % bm::kBlock) {
      last = (last ^ lowest) | uint64_t(1) << 63;
      if (!bm::validate(p.w, p.stored, &at)) fail("a column beyond the last passes");
      last = right;
    }
  } else {
    int64_t& end = ptr[r.below(panels + 1)];
    const int64_t right = end;
    end = r.chance(50) ? int64_t(r.engine()) : end + (r.chance(50) ? 1 : -1);
    if (end != right && !bm::validate(p.w, p.stored, &at)) fail("a wrong ptr passes");
    end = right;
  }
  return p;
}

// Row `row` of y for one token in the int8 form: integers exact, every other operation in fp32.
float integer_result(const Packed& p, const std::vector<float>& x, int64_t row, float bias) {
  float most = 0;
  for (float v : x) {
    if (!std::isfinite(v)) return NAN;
    most = std::max(most, std::fabs(v));
  }
  const float sx = most / 127.0f == 0 ? 1.0f : most / 127.0f;
  const int64_t groups = bm::groups(p.w.k, p.w.group);
  std::vector<int64_t> sums(size_t(groups), 0);
  for (int64_t c = 0; c < p.w.k; ++c)
    sums[size_t(p.group_of(c))] += int64_t(std::min(127.0f, std::max(-127.0f, std::nearbyint(x[size_t(c)] / sx)))) * int64_t(p.at(row, c));
  float total = 0;
  for (int64_t g = 0; g < groups; ++g) total = total + p.w.scale[row * groups + g] * float(sums[size_t(g)]);
  return total * sx + bias;
}

void check(const Args& a, const Packed& p, const std::vector<double>& x, const std::vector<double>& bias, const uint8_t* y) {
  const int64_t n = a.w.n, k = a.w.k, step = a.m > 20 ? 1 + a.m / 12 : 1;
  for (int64_t t = 0; t < a.m; t += step) {
    const std::vector<float> token(x.begin() + t * k, x.begin() + (t + 1) * k);
    for (int64_t row = 0; row < n; ++row) {
      const double got = load(y, a.dtype, t * n + row);
      if (a.int8) {
        uint8_t stored[4];
        store(stored, a.dtype, 0, integer_result(p, token, row, float(bias[size_t(row)])));
        const double want = load(stored, a.dtype, 0);
        if (!(got == want || (std::isnan(got) && std::isnan(want)))) fail("integers");
        continue;
      }
      double want = 0, size = 0;
      for (int64_t c = 0; c < k; ++c) want += double(scaled(p, row, c)) * token[size_t(c)], size += std::fabs(double(scaled(p, row, c)) * token[size_t(c)]);
      want += bias[size_t(row)], size += std::fabs(bias[size_t(row)]);
      expect_within("float sums", got, want, double(k / 16 + 10) * 0x1p-24 * size, a.dtype);
    }
  }
}

void one_call(Random& r, Memory& m) {
  random_tier(r);
  const bool wide = r.chance(2);  // several expanded pieces a row
  const int64_t n = wide ? 1 + r.below(10) : 1 + r.below(r.chance(80) ? 40 : 200), k = wide ? 1000 + r.below(8000) : 1 + r.below(r.chance(80) ? 200 : 700);
  const Packed p = random_weight(r, m, n, k);
  Args a{};
  a.w = p.w, a.dtype = DType(r.below(3)), a.bias_dtype = DType(r.below(3));
  a.int8 = p.w.type == Type::i8 && r.chance(60);
  a.m = r.chance(3) ? 0 : r.chance(30) ? 1 : 1 + r.below(r.chance(90) || wide ? 12 : 300);
  const Values x = values(r, m.x, a.dtype, a.m * k, [&] { return r.chance(10) ? 0.0f : r.normal(); });
  std::vector<double> given = x.value;
  for (int64_t t = 0; t < a.m; ++t) {
    if (r.chance(3)) std::memset(x.at + t * k * int64_t(width(a.dtype)), 0, size_t(k) * width(a.dtype));
    else if (a.int8 && r.chance(3)) store(x.at, a.dtype, t * k + r.below(k), r.chance(50) ? NAN : -INFINITY);
  }
  for (int64_t i = 0; i < a.m * k; ++i) given[size_t(i)] = load(x.at, a.dtype, i);
  a.x = x.at;
  std::vector<double> bias(size_t(n), 0.0);
  if (r.chance(50)) {
    const Values b = random_values(r, m.bias, a.bias_dtype, n);
    a.bias = b.at, bias = b.value;
  }
  const auto call = [&](const Args& some) {
    const ParallelFor pool = random_pool(r);
    bm::run(some, room(m.workspace, bm::workspace(some, pool.threads)), pool);
    expect_intact("written outside", {&m.x, &m.y, &m.workspace});
  };
  const size_t row = size_t(n) * width(a.dtype), bytes = size_t(a.m) * row;
  a.y = m.y.place(bytes, r.chance(70));
  call(a);
  const std::vector<uint8_t> first = bytes_at(a.y, bytes);
  check(a, p, given, bias, first.data());
  a.y = m.y.place(bytes, r.chance(70));
  call(a);
  expect_equal("threads change the result", a.y, first);
  if (a.m == 0) return;
  const size_t t = size_t(r.below(a.m)), in = size_t(k) * width(a.dtype);
  a.x = x.at + t * in, a.m = 1;
  a.y = m.y.place(row, r.chance(70));
  call(a);
  expect_equal("a token depends on its batch", a.y, {first.begin() + int64_t(t * row), first.begin() + int64_t((t + 1) * row)});
}

}  // namespace

int main(int argc, char** argv) {
  static Memory memory;
  return run_calls(argc, argv, [&](Random& r) { one_call(r, memory); });
}
