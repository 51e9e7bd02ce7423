// Random calls of quik_linear, its parts and sp24 on every tier, in guarded memory, against direct sums in 64-bit integers and
// double precision.
//   fuzz_quik [calls [first seed]]
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "fuzz.h"
#include "gemm/gemm.h"
#include "ops/quik_linear/quik_linear.h"
#include "ops/sp24/sp24.h"
#include "ops/wq_linear/wq_linear.h"

namespace {

using namespace effk;
using namespace effk::test;

struct Memory {
  static constexpr size_t kRoom = size_t(2) << 20;
  Guarded x{kRoom}, y{kRoom}, packed{kRoom}, panels{kRoom}, codes{kRoom}, meta{kRoom}, scale{kRoom}, zero{kRoom}, x_out{kRoom}, bias{kRoom}, scales{kRoom},
      reduced{kRoom}, base{kRoom}, outlier{kRoom}, workspace{size_t(64) << 20};
};
void within(const Memory& m, std::initializer_list<const Guarded*> places, const char* what) {
  expect_intact(what, places);
  expect_intact("workspace overrun", {&m.workspace});
}

int random_code(Random& r, int bits) { return int(r.below(int64_t(1) << bits)) - (1 << (bits - 1)); }

// A weight [n, k] of signed codes in t16, its scales and their sums.
struct Base {
  int64_t n, k;
  int bits;
  std::vector<int> q;
  const uint8_t* packed;
  const float *scales, *reduced;
};
Base random_base(Random& r, Memory& m, int64_t n, int64_t k, int bits) {
  Base b{n, k, bits, std::vector<int>(size_t(n * k)), nullptr, nullptr, nullptr};
  const bool extreme = r.chance(10);
  for (int& q : b.q) q = extreme ? (r.chance(50) ? -(1 << (bits - 1)) : (1 << (bits - 1)) - 1) : random_code(r, bits);
  const int64_t row_bytes = t16::ceil_div(k * bits, 8);
  std::vector<uint8_t> rows(size_t(n * row_bytes), 0);
  std::vector<float> scale(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    scale[size_t(i)] = (0.01f + 0.05f * float(r.below(100)) / 100) * (r.chance(20) ? -1.0f : 1.0f);
    for (int64_t c = 0; c < k; ++c) {
      const int code = b.q[size_t(i * k + c)] + (1 << (bits - 1));
      rows[size_t(i * row_bytes + c * bits / 8)] |= uint8_t(code << (c * bits % 8));
    }
  }
  uint8_t* packed = m.packed.place(size_t(t16::packed_bytes(n, k, bits)), r.chance(70));
  float* scales = reinterpret_cast<float*>(m.scales.place(size_t(t16::tiles(n) * 64), r.chance(70)));
  float* reduced = reinterpret_cast<float*>(m.reduced.place(size_t(n) * 4, r.chance(70)));
  wq_pack(rows.data(), scale.data(), nullptr, n, k, bits, 0, 4, packed, scales, nullptr);
  for (int64_t i = 0; i < n; ++i) {
    int64_t sum = 0;
    for (int64_t c = 0; c < k; ++c) sum += b.q[size_t(i * k + c)];
    reduced[i] = float(double(sum) * double(scale[size_t(i)]));
  }
  b.packed = packed, b.scales = scales, b.reduced = reduced;
  return b;
}

// Columns in some order, base and outliers as the kernels take them.
struct Columns {
  std::vector<int32_t> base, outlier;
  QuikSplit split;
};
Columns random_columns(Random& r, Memory& m, int64_t k, int64_t n_base) {
  Columns c;
  std::vector<int32_t> order(static_cast<size_t>(k));
  std::iota(order.begin(), order.end(), 0);
  const int kind = int(r.below(3));  // no index; runs; any order
  if (kind) std::shuffle(order.begin(), order.end(), r.engine);
  if (kind == 1) std::sort(order.begin(), order.begin() + n_base), std::sort(order.begin() + n_base, order.end());
  c.base.assign(order.begin(), order.begin() + n_base);
  c.outlier.assign(order.begin() + n_base, order.end());
  c.split = {nullptr, nullptr, k, n_base, k - n_base};
  if (!kind) return c;
  const auto put = [&](Guarded& memory, const std::vector<int32_t>& from) {
    uint8_t* at = memory.place(from.size() * 4, r.chance(70));
    if (!from.empty()) std::memcpy(at, from.data(), from.size() * 4);
    return reinterpret_cast<const int32_t*>(at);
  };
  c.split.base = put(m.base, c.base);
  c.split.outlier = put(m.outlier, c.outlier);
  return c;
}

int64_t random_rows(Random& r) { return r.chance(5) ? 0 : r.chance(60) ? 1 + r.below(20) : 1 + r.below(300); }

struct Quantised {
  DType dtype;
  int64_t m;
  int bits;
  QuikMode mode;
  const uint8_t* x;
  std::vector<int> codes;
  std::vector<float> scale, zero;
  std::vector<bool> bad;
};

// Quantises random rows and checks the codes against the bound that the formulas give.
Quantised quantise(Random& r, Memory& m, const Columns& c, int64_t rows, int bits, QuikMode mode, DType dtype, const ParallelFor& pool) {
  const QuikSplit& s = c.split;
  Quantised q{dtype, rows, bits, mode, m.x.place(size_t(rows * s.k) * width(dtype), r.chance(70)), {}, {}, {}, std::vector<bool>(size_t(rows), false)};
  uint8_t* x = const_cast<uint8_t*>(q.x);
  for (int64_t i = 0; i < rows; ++i) {
    const float size = std::ldexp(1.0f, int(r.below(12)) - 6), shift = r.normal() * size;
    const int kind = int(r.below(20));  // 0: constant; 1: one value is not finite
    for (int64_t k = 0; k < s.k; ++k) store(x, dtype, i * s.k + k, kind == 0 ? shift : size * r.normal() + shift);
    if (kind == 1) store(x, dtype, i * s.k + r.below(s.k), r.chance(50) ? NAN : INFINITY), q.bad[size_t(i)] = true;
  }
  const int64_t code_bytes = bits == 8 ? s.n_base : (s.n_base + 1) / 2;
  uint8_t* codes = m.codes.place(size_t(rows * code_bytes), r.chance(70));
  float* scale = reinterpret_cast<float*>(m.scale.place(size_t(rows) * 4, r.chance(70)));
  float* zero = reinterpret_cast<float*>(m.zero.place(size_t(rows) * 4, r.chance(70)));
  uint8_t* x_out = m.x_out.place(size_t(rows * s.n_out) * width(dtype), r.chance(70));
  const QuikQuantizeArgs a{x, dtype, rows, s, bits, mode, codes, scale, zero, x_out};
  quik_quantize(a, room(m.workspace, quik_quantize_workspace(a, pool.threads)), pool);
  within(m, {&m.codes, &m.scale, &m.zero, &m.x_out}, "quantising wrote outside");
  q.codes.resize(size_t(rows * s.n_base));
  q.scale.assign(scale, scale + rows);
  q.zero.assign(zero, zero + rows);
  const int half = 1 << (bits - 1);
  for (int64_t i = 0; i < rows; ++i) {
    if (q.bad[size_t(i)] != std::isnan(scale[i]) || q.bad[size_t(i)] != std::isnan(zero[i])) fail("rows that are not finite");
    for (int64_t o = 0; o < s.n_out; ++o)
      if (std::memcmp(x_out + (i * s.n_out + o) * int64_t(width(dtype)), x + (i * s.k + c.outlier[size_t(o)]) * int64_t(width(dtype)), width(dtype)) != 0)
        fail("outliers");
    for (int64_t k = 0; k < s.n_base; ++k) {
      int code;
      if (bits == 8) code = int8_t(codes[i * s.n_base + k]);
      else code = ((codes[i * code_bytes + k / 2] >> (4 * (k % 2)) & 15) ^ 8) - 8;
      q.codes[size_t(i * s.n_base + k)] = code;
      if (q.bad[size_t(i)]) {
        if (code != 0) fail("codes of a row that is not finite");
        continue;
      }
      const double v = load(x, dtype, i * s.k + c.base[size_t(k)]), back = double(scale[i]) * (code + half) + double(zero[i]);
      // Half a step; in mode sim the ends may lie another half away, because the zero point is rounded.
      const double step = (mode == QuikMode::sim ? 1.0 : 0.5) + 2e-3;
      if (std::fabs(back - v) > step * double(scale[i]) + 1e-6 * std::fabs(v)) fail("a code is too far off");
    }
  }
  return q;
}

void parts(Random& r, Memory& m) {
  const int bits_w = r.chance(50) ? 4 : 8, bits_a = r.chance(50) ? 4 : 8;
  const int64_t n = 1 + r.below(r.chance(80) ? 60 : 500), n_base = 1 + r.below(r.chance(80) ? 150 : 2200), rows = std::min<int64_t>(random_rows(r), 200000 / n_base);
  const ParallelFor pool = random_pool(r);
  const Columns c = random_columns(r, m, n_base + r.below(20), n_base);
  const DType dtype = DType(r.below(3));
  const Quantised q = quantise(r, m, c, rows, bits_a, r.chance(50) ? QuikMode::kernel : QuikMode::sim, dtype, pool);
  const Base b = random_base(r, m, n, n_base, bits_w);
  int32_t* acc = reinterpret_cast<int32_t*>(m.y.place(size_t(rows * n) * 4, r.chance(70)));
  std::vector<uint8_t> codes;  // as quantise left them
  const int64_t code_bytes = bits_a == 8 ? n_base : (n_base + 1) / 2;
  codes.resize(size_t(rows * code_bytes), 0);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < n_base; ++k) {
      const int code = q.codes[size_t(i * n_base + k)];
      if (bits_a == 8) codes[size_t(i * n_base + k)] = uint8_t(code);
      else codes[size_t(i * code_bytes + k / 2)] |= uint8_t((code & 15) << (4 * (k % 2)));
    }
  if (bits_a == 4 && n_base % 2)
    for (int64_t i = 0; i < rows; ++i) codes[size_t((i + 1) * code_bytes - 1)] |= 0xf0;  // means nothing
  uint8_t* given = m.codes.place(codes.size(), r.chance(70));
  if (!codes.empty()) std::memcpy(given, codes.data(), codes.size());
  const QuikIntMatmulArgs a{given, rows, n_base, bits_a, b.packed, n, bits_w, acc};
  quik_int_matmul(a, room(m.workspace, quik_int_matmul_workspace(a, pool.threads)), pool);
  within(m, {&m.y}, "product wrote outside");
  for (int64_t i = 0; i < rows; i += rows > 20 ? 5 : 1)
    for (int64_t j = 0; j < n; ++j) {
      int64_t want = 0;
      for (int64_t k = 0; k < n_base; ++k) want += int64_t(q.codes[size_t(i * n_base + k)]) * b.q[size_t(j * n_base + k)];
      if (acc[i * n + j] != want) fail("integer product");
    }

  const DType y_dtype = DType(r.below(3)), in_dtype = DType(r.below(3));
  const bool add = r.chance(60);
  uint8_t* y_in = m.x.place(size_t(rows * n) * width(in_dtype), r.chance(70));
  for (int64_t i = 0; i < rows * n; ++i) store(y_in, in_dtype, i, r.normal());
  uint8_t* y = m.panels.place(size_t(rows * n) * width(y_dtype), r.chance(70));
  const float* scale = reinterpret_cast<const float*>(m.scale.place(size_t(rows) * 4, r.chance(70)));
  const float* zero = reinterpret_cast<const float*>(m.zero.place(size_t(rows) * 4, r.chance(70)));
  for (int64_t i = 0; i < rows; ++i) const_cast<float*>(scale)[i] = q.scale[size_t(i)], const_cast<float*>(zero)[i] = q.zero[size_t(i)];
  const QuikDequantizeArgs d{acc, scale, zero, b.scales, b.reduced, add ? y_in : nullptr, in_dtype, rows, n, bits_a, y, y_dtype};
  quik_dequantize(d, pool);
  within(m, {&m.panels}, "dequantising wrote outside");
  for (int64_t i = 0; i < rows * n; ++i) {
    const double s = scale[i / n], z = zero[i / n], one = s * b.scales[i % n] * acc[i], two = (z + (1 << (bits_a - 1)) * s) * b.reduced[i % n];
    const double in = add ? load(y_in, in_dtype, i) : 0, want = one + two + in, got = load(y, y_dtype, i);
    if (std::isnan(s)) {
      if (!std::isnan(got)) fail("a row that is not finite");
      continue;
    }
    const double storage = y_dtype == DType::f32 ? 6e-8 : y_dtype == DType::bf16 ? 4e-3 : 5e-4;
    const double most = y_dtype == DType::f16 ? 65504 : 1e38;
    const double off = 6e-7 * (std::fabs(one) + std::fabs(two) + std::fabs(in)) + 2 * std::fabs(6e-7 * z * b.reduced[i % n]) + storage * std::fabs(want) + 1e-7;
    if (std::fabs(want) < most && !(std::fabs(got - want) <= off)) fail("dequantised");
  }
}

// y for several weights, each against sums in double precision, as one call and as calls of their own, for other threads and rows.
void layer(Random& r, Memory& m) {
  const int64_t n_base = 1 + r.below(r.chance(80) ? 150 : 700), n_out = r.chance(30) ? 0 : 1 + r.below(r.chance(80) ? 20 : 70), n = 1 + r.below(r.chance(80) ? 60 : 450);
  const int64_t rows = random_rows(r);
  const int bits_w = r.chance(50) ? 4 : 8, bits_a = r.chance(15) ? 16 : r.chance(50) ? 4 : 8;
  const QuikMode mode = r.chance(40) ? QuikMode::kernel : QuikMode::sim;
  const DType dtype = DType(r.below(3)), out_dtype = DType(r.below(3)), bias_dtype = DType(r.below(3));
  const ParallelFor pool{scattered, &r, 1 + int(r.below(6))}, other{scattered, &r, 1 + int(r.below(3))};
  const Columns c = random_columns(r, m, n_base + n_out, n_base);
  const Quantised q = quantise(r, m, c, rows, bits_a == 16 ? 8 : bits_a, mode, dtype, pool);
  const Base b = random_base(r, m, n, n_base, bits_w);
  const panel::Shape shape{panel::Kind::dense, out_dtype, 1, n, std::max<int64_t>(n_out, 1)};
  std::vector<uint8_t> dense(size_t(n * n_out) * width(out_dtype));
  for (int64_t i = 0; i < n * n_out; ++i) store(dense.data(), out_dtype, i, 0.1f * r.normal());
  uint8_t* panels = m.panels.place(n_out ? size_t(shape.bytes() - panel::kHeaderBytes) : 0, r.chance(70));
  if (n_out) gemm::pack(shape, dense.data(), nullptr, out_dtype, false, panels, pool);
  const bool biased = r.chance(50);
  uint8_t* bias = m.bias.place(size_t(n) * width(bias_dtype), r.chance(70));
  for (int64_t j = 0; j < n; ++j) store(bias, bias_dtype, j, r.normal());

  const QuikWeight whole{b.packed, b.scales, b.reduced, n_out ? panels : nullptr, out_dtype, biased ? bias : nullptr, bias_dtype, n, bits_w};
  const size_t bytes = size_t(rows * n) * width(dtype);
  void* y = m.y.place(bytes, r.chance(70));
  QuikLinearArgs a{q.x, dtype, rows, c.split, &whole, &y, 1, bits_a, mode};
  quik_linear(a, room(m.workspace, quik_linear_workspace(a, pool.threads)), pool);
  within(m, {&m.y}, "layer wrote outside");
  const uint8_t* got = static_cast<const uint8_t*>(y);
  const std::vector<uint8_t> first(got, got + bytes);
  const bool only = quik_weight_only(a);
  const int half = bits_a == 16 ? 0 : 1 << (bits_a - 1);
  for (int64_t i = 0; i < rows; i += rows > 20 ? 7 : 1)
    for (int64_t j = 0; j < n; ++j) {
      const float result = load(first.data(), dtype, i * n + j);
      if (q.bad[size_t(i)]) {
        if (std::isfinite(result)) fail("a row that is not finite gives finite results");
        continue;
      }
      double want = biased ? load(bias, bias_dtype, j) : 0, size = std::fabs(want);
      for (int64_t o = 0; o < n_out; ++o) {
        const double t = double(load(q.x, dtype, i * (n_base + n_out) + c.outlier[size_t(o)])) * load(dense.data(), out_dtype, j * n_out + o);
        want += t, size += std::fabs(t);
      }
      if (only) {
        for (int64_t k = 0; k < n_base; ++k) {
          const double t = double(load(q.x, dtype, i * (n_base + n_out) + c.base[size_t(k)])) * b.q[size_t(j * n_base + k)] * b.scales[j];
          want += t, size += std::fabs(t);
        }
      } else {
        int64_t acc = 0;
        for (int64_t k = 0; k < n_base; ++k) acc += int64_t(q.codes[size_t(i * n_base + k)]) * b.q[size_t(j * n_base + k)];
        const double s = q.scale[size_t(i)], one = s * b.scales[j] * double(acc), two = (q.zero[size_t(i)] + half * s) * b.reduced[j];
        want += one + two, size += std::fabs(one) + std::fabs(two) + 2 * std::fabs(double(q.zero[size_t(i)]) * b.reduced[j]);
      }
      const double storage = dtype == DType::f32 ? 6e-8 : dtype == DType::bf16 ? 4e-3 : 5e-4;
      if (dtype == DType::f16 && std::fabs(want) > 60000) continue;
      if (!(std::fabs(result - want) <= double(2 * (n_out + (only ? n_base : 0)) + 16) * 6e-8 * size + storage * std::fabs(want) + 1e-6)) fail("layer");
    }

  // The same bits for other threads, for a row alone where it takes the same path, and for two weights in one call.
  y = m.y.place(bytes, r.chance(70));
  quik_linear(a, room(m.workspace, quik_linear_workspace(a, other.threads)), other);
  if (bytes && std::memcmp(y, first.data(), bytes) != 0) fail("threads change the result");
  if (rows == 0) return;
  const QuikWeight both[] = {whole, whole};
  void* ys[] = {m.y.place(bytes, r.chance(70)), m.x_out.place(bytes, r.chance(70))};
  a.weights = both, a.y = ys, a.n_weights = 2;
  quik_linear(a, room(m.workspace, quik_linear_workspace(a, pool.threads)), pool);
  if (std::memcmp(ys[0], first.data(), bytes) != 0 || std::memcmp(ys[1], first.data(), bytes) != 0) fail("weights in one call");
  if (only && mode == QuikMode::kernel && bits_a != 16) return;
  if (only) return;  // float sums of one row and of many may take different kernels
  const int64_t t = r.below(rows), row = n * int64_t(width(dtype));
  void* one = m.y.place(size_t(row), true);
  a.weights = &whole, a.y = &one, a.n_weights = 1, a.m = 1, a.mode = mode;
  if (quik_weight_only(a)) return;
  a.x = q.x + t * (n_base + n_out) * int64_t(width(dtype));
  quik_linear(a, room(m.workspace, quik_linear_workspace(a, pool.threads)), pool);
  if (std::memcmp(one, first.data() + t * row, size_t(row)) != 0) fail("a row depends on its batch");
}

void pruned(Random& r, Memory& m) {
  const Sp24 pattern = r.chance(50) ? Sp24::pairs : Sp24::elements;
  const int width_of = pattern == Sp24::pairs ? 2 : 1;
  const int64_t k = sp24_period(pattern) * (1 + r.below(r.chance(80) ? 20 : 200)), n = r.below(r.chance(80) ? 60 : 450), rows = std::min<int64_t>(random_rows(r), 150000 / k);
  const ParallelFor pool = random_pool(r);
  int8_t* w = reinterpret_cast<int8_t*>(m.packed.place(size_t(n * k), r.chance(70)));
  for (int64_t g = 0; g < n * k; g += 4 * width_of) {
    const int64_t a = r.below(4), b = r.below(4);
    for (int64_t p = 0; p < 4; ++p)
      for (int j = 0; j < width_of; ++j) w[g + p * width_of + j] = p == a || p == b ? int8_t(random_code(r, 8)) : int8_t(0);
  }
  int8_t* values = reinterpret_cast<int8_t*>(m.codes.place(size_t(n * k / 2), r.chance(70)));
  uint8_t* meta = m.meta.place(size_t(n * sp24_meta_bytes(pattern, k)), r.chance(70));
  int64_t row = 0;
  if (!sp24_compress(w, n, k, pattern, values, meta, &row)) fail("a right pattern is refused");
  int8_t* back = reinterpret_cast<int8_t*>(m.panels.place(size_t(n * k), r.chance(70)));
  sp24_decompress(values, meta, n, k, pattern, back, pool);
  within(m, {&m.codes, &m.meta, &m.panels}, "sp24 wrote outside");
  if (n && std::memcmp(back, w, size_t(n * k)) != 0) fail("round trip");
  int8_t* x = reinterpret_cast<int8_t*>(m.x.place(size_t(rows * k), r.chance(70)));
  for (int64_t i = 0; i < rows * k; ++i) x[i] = int8_t(random_code(r, 8));
  int32_t* acc = reinterpret_cast<int32_t*>(m.y.place(size_t(rows * n) * 4, r.chance(70)));
  const Sp24MatmulArgs a{x, rows, k, values, meta, pattern, n, acc};
  sp24_matmul(a, room(m.workspace, sp24_matmul_workspace(a, pool.threads)), pool);
  within(m, {&m.y}, "sp24 product wrote outside");
  for (int64_t i = 0; i < rows; i += rows > 20 ? 7 : 1)
    for (int64_t j = 0; j < n; ++j) {
      int64_t want = 0;
      for (int64_t c = 0; c < k; ++c) want += int64_t(x[i * k + c]) * w[j * k + c];
      if (acc[i * n + j] != want) fail("sp24 product");
    }
}

void one_call(Random& r, Memory& m) {
  random_tier(r);
  const int64_t which = r.below(100);
  if (which < 40) parts(r, m);
  else if (which < 85) layer(r, m);
  else pruned(r, m);
}

}  // namespace

int main(int argc, char** argv) {
  static Memory memory;
  return run_calls(argc, argv, [&](Random& r) { one_call(r, memory); });
}
