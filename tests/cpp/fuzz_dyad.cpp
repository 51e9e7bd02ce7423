// Random calls of the matrix products behind dense_linear and dyad_linear, their gradients, the fused pair, dyad_to_dense and
// dyad_wq_linear on every tier, in guarded memory, against direct sums in double precision over the table of supports.
//   fuzz_dyad [calls [first seed]]
#include <algorithm>
#include <cmath>
#include <vector>

#include "fuzz.h"
#include "gemm/gemm.h"
#include "ops/dense_linear/dense_linear.h"
#include "ops/dyad_linear/dyad_linear.h"
#include "wq_rows.h"

namespace {

using namespace effk;
using namespace effk::test;
using panel::Kind;

struct Memory {
  static constexpr size_t kRoom = size_t(2) << 20;
  Guarded x{kRoom}, y{kRoom}, gy{kRoom}, wl{kRoom}, wu{kRoom}, gwl{kRoom}, gwu{kRoom}, bias{kRoom}, packed{kRoom}, packed2{kRoom}, small{kRoom},
      workspace{size_t(64) << 20};
};

double rounded(double v, DType t) {
  uint8_t room[4];
  store(room, t, 0, float(v));
  return load(room, t, 0);
}

// fp32 accumulation of k products whose magnitudes add to `size`, then one rounding to storage.
void expect_near(const char* what, double got, double want, double size, int64_t k, DType t, double extra = 0) {
  const double storage = t == DType::f32 ? 6e-8 : t == DType::bf16 ? 4e-3 : 5e-4;
  if (!(std::fabs(got - want) <= double(2 * k + 8) * 6e-8 * size + storage * std::fabs(want) + 1e-7 + extra)) fail(what);
}

// W and its magnitudes, from the table of supports; wu is null when dense.
struct Matrix {
  int64_t rows, columns;
  std::vector<double> w, size;
  Matrix(Kind kind, int64_t n, int64_t d_out, int64_t d_in, const double* wl, const double* wu)
      : rows(n * d_out), columns(n * d_in), w(size_t(rows * columns), 0.0), size(w) {
    for (int64_t d = 0; d < n; ++d)
      for (int64_t o = 0; o < d_out; ++o)
        for (int64_t i = 0; i < d_in; ++i) {
          const int64_t at = (d * d_out + o) * d_in + i;
          add((d * d_out + o) * columns + d * d_in + i, wl[at]);
          if (kind == Kind::dense) continue;
          const int64_t row = kind == Kind::it ? d * d_out + o : o * n + d, column = kind == Kind::ot ? d * d_in + i : i * n + d;
          add(row * columns + column, wu[at]);
        }
  }
  void add(int64_t at, double v) { w[size_t(at)] += v, size[size_t(at)] += std::fabs(v); }
};

struct Problem {
  Kind kind;
  int64_t n, d_out, d_in, tokens;
  DType x, w, panels;
  bool features;
  int64_t f_in() const { return n * d_in; }
  int64_t f_out() const { return n * d_out; }
  int64_t at(int64_t t, int64_t j, int64_t columns) const { return features ? j * tokens + t : t * columns + j; }
};

uint8_t* packed_weights(Random& r, Guarded& memory, const panel::Shape& s, const void* wl, const void* wu, DType dtype, bool transposed,
                        const ParallelFor& pool) {
  uint8_t* to = memory.place(size_t(s.bytes() - panel::kHeaderBytes), r.chance(70));
  gemm::pack(s, wl, wu, dtype, transposed, to, pool);
  if (!memory.margin_intact()) fail("packing wrote outside");
  return to;
}

// y and what it should be, one element after the other.
void check_rows(const char* what, const Problem& p, const Matrix& w, const std::vector<double>& x, const std::vector<double>& bias, Activation act,
                const uint8_t* y) {
  const int64_t step = p.tokens > 20 ? 7 : 1;
  for (int64_t t = 0; t < p.tokens; t += step)
    for (int64_t o = 0; o < w.rows; ++o) {
      double want = bias.empty() ? 0 : bias[size_t(o)], size = std::fabs(want);
      for (int64_t i = 0; i < w.columns; ++i) {
        const double v = x[size_t(p.at(t, i, w.columns))];
        want += w.w[size_t(o * w.columns + i)] * v;
        size += w.size[size_t(o * w.columns + i)] * std::fabs(v);
      }
      expect_near(what, load(y, p.x, p.at(t, o, w.rows)), activated(want, act), 1.2 * size, 2 * p.d_in, p.x,
                  act == Activation::none ? 0 : 1e-6 * std::max(1.0, std::fabs(want)));
    }
}

Problem random_problem(Random& r, bool with_dense) {
  Problem p{};
  const Kind kinds[] = {Kind::it, Kind::ot, Kind::dt, Kind::dense};
  p.kind = kinds[r.below(with_dense ? 4 : 3)];
  const bool large = r.chance(8);  // several pieces of columns, of k and of tokens
  p.n = p.kind == Kind::dense ? 1 : 1 + r.below(r.chance(70) ? 4 : 9);
  const auto side = [&] { return r.chance(30) ? 16 * (1 + r.below(3)) : 1 + r.below(r.chance(80) ? 20 : 70); };
  p.d_out = side(), p.d_in = side();
  if (large) (r.chance(50) ? p.d_out : p.d_in) = 300 + r.below(400), p.n = std::min<int64_t>(p.n, 2);
  p.tokens = r.chance(5) ? 0 : r.chance(60) ? 1 + r.below(20) : 1 + r.below(large ? 70 : 200);
  p.x = DType(r.below(3)), p.w = DType(r.below(3)), p.panels = DType(r.below(3));
  p.features = p.kind != Kind::dense && r.chance(40);
  return p;
}

void forward(Random& r, Memory& m) {
  const Problem p = random_problem(r, true);
  const ParallelFor pool{scattered, &r, 1 + int(r.below(6))}, other{scattered, &r, 1 + int(r.below(3))};
  const bool dense = p.kind == Kind::dense, biased = r.chance(50);
  const Activation act = Activation(r.below(5));
  const int64_t count = p.n * p.d_out * p.d_in;
  const Values x = random_values(r, m.x, p.x, p.tokens * p.f_in()), wl = random_values(r, m.wl, p.w, count);
  const Values wu = random_values(r, m.wu, p.w, dense ? 0 : count), bias = random_values(r, m.bias, DType(r.below(3)), 0);
  const DType bias_dtype = DType(r.below(3));
  const Values b = biased ? random_values(r, m.bias, bias_dtype, p.f_out()) : bias;
  const panel::Shape s{p.kind, p.panels, p.n, p.d_out, p.d_in};
  const uint8_t* panels = packed_weights(r, m.packed, s, wl.at, dense ? nullptr : wu.at, p.w, false, pool);
  const size_t bytes = size_t(p.tokens * p.f_out()) * width(p.x);
  gemm::LinearArgs a{s, panels, x.at, p.x, p.features, p.tokens, biased ? b.at : nullptr, bias_dtype, act, m.y.place(bytes, r.chance(70))};
  gemm::linear(a, room(m.workspace, gemm::linear_workspace(a, pool.threads)), pool);
  if (!m.y.margin_intact() || !m.workspace.margin_intact()) fail("product wrote outside");
  std::vector<double> l(static_cast<size_t>(count)), u(wu.value.size());
  for (size_t i = 0; i < l.size(); ++i) l[i] = rounded(wl.value[i], p.panels);
  for (size_t i = 0; i < u.size(); ++i) u[i] = rounded(wu.value[i], p.panels);
  check_rows("product", p, Matrix(p.kind, p.n, p.d_out, p.d_in, l.data(), u.data()), x.value, b.value, act, static_cast<uint8_t*>(a.y));

  if (dense) {
    std::vector<float> back(static_cast<size_t>(count));
    dense_unpack(s, panels, back.data());
    for (size_t i = 0; i < back.size(); ++i)
      if (double(back[i]) != l[i]) fail("unpacked weight");
  }
  // The same bits for another number of threads, and for one row alone.
  const std::vector<uint8_t> first = bytes_at(a.y, bytes);
  gemm::linear(a, room(m.workspace, gemm::linear_workspace(a, other.threads)), other);
  if (bytes_at(a.y, bytes) != first) fail("threads change the result");
  if (p.tokens == 0 || p.features) return;
  const int64_t t = r.below(p.tokens), row = p.f_out() * int64_t(width(p.x));
  a.x = x.at + t * p.f_in() * int64_t(width(p.x));
  a.tokens = 1;
  a.y = m.y.place(size_t(row), true);
  gemm::linear(a, room(m.workspace, gemm::linear_workspace(a, pool.threads)), pool);
  if (std::memcmp(a.y, first.data() + t * row, size_t(row)) != 0) fail("a row depends on its batch");
}

void pair(Random& r, Memory& m) {
  Problem p = random_problem(r, false);
  p.features = false;
  const ParallelFor pool = random_pool(r, 3);
  const int64_t count = p.n * p.d_out * p.d_in;
  const Values x = random_values(r, m.x, p.x, p.tokens * p.f_in());
  const Values wl = random_values(r, m.wl, p.w, count), wu = random_values(r, m.wu, p.w, count);
  const Values b1 = random_values(r, m.bias, DType::f32, p.f_out()), b2 = random_values(r, m.small, DType::f32, p.f_in());
  const panel::Shape s1{p.kind, p.panels, p.n, p.d_out, p.d_in}, s2{p.kind, DType(r.below(3)), p.n, p.d_in, p.d_out};
  const uint8_t* panels1 = packed_weights(r, m.packed, s1, wl.at, wu.at, p.w, false, pool);
  const uint8_t* panels2 = packed_weights(r, m.packed2, s2, wl.at, wu.at, p.w, true, pool);
  const size_t hidden = size_t(p.tokens * p.f_out()) * width(p.x), bytes = size_t(p.tokens * p.f_in()) * width(p.x);
  gemm::LinearArgs one{s1, panels1, x.at, p.x, false, p.tokens, b1.at, DType::f32, Activation(r.below(5)), m.gy.place(hidden, r.chance(70))};
  gemm::LinearArgs two{s2, panels2, one.y, p.x, false, p.tokens, b2.at, DType::f32, Activation::none, m.y.place(bytes, r.chance(70))};
  gemm::linear(one, room(m.workspace, gemm::linear_workspace(one, pool.threads)), pool);
  gemm::linear(two, room(m.workspace, gemm::linear_workspace(two, pool.threads)), pool);
  const std::vector<uint8_t> want = bytes_at(two.y, bytes);
  one.y = nullptr;
  two.x = nullptr;
  two.y = m.y.place(bytes, r.chance(70));
  gemm::linear_pair(one, two, room(m.workspace, gemm::linear_pair_workspace(one, two, pool.threads)), pool);
  if (!m.y.margin_intact() || !m.workspace.margin_intact()) fail("pair wrote outside");
  if (bytes_at(two.y, bytes) != want) fail("pair differs from its two products");
}

void gradients(Random& r, Memory& m) {
  Problem p = random_problem(r, false);
  if (r.chance(3)) p.tokens = 500 + r.below(600), p.n = 1 + r.below(2), p.d_out = 1 + r.below(20), p.d_in = 1 + r.below(20);
  const ParallelFor pool = random_pool(r);
  const int64_t count = p.n * p.d_out * p.d_in;
  const Values x = random_values(r, m.x, p.x, p.tokens * p.f_in()), gy = random_values(r, m.gy, p.x, p.tokens * p.f_out());
  const Values wl = random_values(r, m.wl, p.w, count), wu = random_values(r, m.wu, p.w, count);

  // of x: the product with the sides exchanged, against the transposed matrix
  const Kind dual = p.kind == Kind::it ? Kind::ot : p.kind == Kind::ot ? Kind::it : p.kind;
  const panel::Shape s{dual, p.w, p.n, p.d_in, p.d_out};
  const uint8_t* panels = packed_weights(r, m.packed, s, wl.at, wu.at, p.w, true, pool);
  const gemm::LinearArgs a{s, panels, gy.at, p.x, p.features, p.tokens, nullptr, DType::f32, Activation::none,
                           m.y.place(size_t(p.tokens * p.f_in()) * width(p.x), r.chance(70))};
  gemm::linear(a, room(m.workspace, gemm::linear_workspace(a, pool.threads)), pool);
  const Matrix w(p.kind, p.n, p.d_out, p.d_in, wl.value.data(), wu.value.data());
  Matrix t = w;
  std::swap(t.rows, t.columns);
  for (int64_t i = 0; i < t.rows; ++i)
    for (int64_t j = 0; j < t.columns; ++j) {
      t.w[size_t(i * t.columns + j)] = w.w[size_t(j * w.columns + i)];
      t.size[size_t(i * t.columns + j)] = w.size[size_t(j * w.columns + i)];
    }
  Problem turned = p;
  std::swap(turned.d_in, turned.d_out);
  check_rows("gradient of x", turned, t, gy.value, {}, Activation::none, static_cast<uint8_t*>(a.y));

  // of the weights and the bias
  gemm::GradientArgs g{p.kind, p.n, p.d_out, p.d_in, x.at, gy.at, p.x, p.features, p.tokens, nullptr, nullptr, p.w};
  if (r.chance(80)) g.gwl = m.gwl.place(size_t(count) * width(p.w), r.chance(70));
  if (r.chance(80)) g.gwu = m.gwu.place(size_t(count) * width(p.w), r.chance(70));
  gemm::gradient(g, room(m.workspace, gemm::gradient_workspace(g, pool.threads)), pool);
  if ((g.gwl && !m.gwl.margin_intact()) || (g.gwu && !m.gwu.margin_intact()) || !m.workspace.margin_intact()) fail("gradient wrote outside");
  for (int component = 0; component < 2; ++component) {
    const uint8_t* got = static_cast<uint8_t*>(component ? g.gwu : g.gwl);
    if (!got) continue;
    for (int64_t at = r.below(3); at < count; at += 1 + r.below(3)) {
      const int64_t d = at / (p.d_out * p.d_in), o = at / p.d_in % p.d_out, i = at % p.d_in;
      const int64_t row = component && p.kind != Kind::it ? o * p.n + d : d * p.d_out + o;
      const int64_t column = component && p.kind != Kind::ot ? i * p.n + d : d * p.d_in + i;
      double want = 0, size = 0;
      for (int64_t k = 0; k < p.tokens; ++k) {
        const double term = gy.value[size_t(p.at(k, row, p.f_out()))] * x.value[size_t(p.at(k, column, p.f_in()))];
        want += term;
        size += std::fabs(term);
      }
      expect_near("gradient of a weight", load(got, p.w, at), want, size, p.tokens, p.w);
    }
  }
  float* sum = reinterpret_cast<float*>(m.small.place(size_t(p.f_out()) * 4, r.chance(70)));
  gemm::column_sums(gy.at, p.x, p.features, p.tokens, p.f_out(), sum, pool);
  if (!m.small.margin_intact()) fail("sums wrote outside");
  for (int64_t o = 0; o < p.f_out(); ++o) {
    double want = 0, size = 0;
    for (int64_t k = 0; k < p.tokens; ++k) want += gy.value[size_t(p.at(k, o, p.f_out()))], size += std::fabs(gy.value[size_t(p.at(k, o, p.f_out()))]);
    expect_near("gradient of the bias", sum[o], want, size, 64, DType::f32);
  }
}

void expanded(Random& r, Memory& m) {
  const Problem p = random_problem(r, false);
  const ParallelFor pool = random_pool(r, 3);
  const int64_t count = p.n * p.d_out * p.d_in;
  const Values wl = random_values(r, m.wl, p.w, count), wu = random_values(r, m.wu, p.w, count);
  std::vector<uint8_t> w(size_t(p.f_out() * p.f_in()) * width(p.w), 0xff);
  dyad_to_dense(p.kind, p.n, p.d_out, p.d_in, wl.at, wu.at, p.w, w.data(), pool);
  const Matrix want(p.kind, p.n, p.d_out, p.d_in, wl.value.data(), wu.value.data());
  for (size_t i = 0; i < want.w.size(); ++i)
    if (double(load(w.data(), p.w, int64_t(i))) != rounded(want.w[i], p.w)) fail("expanded weight");
}

void quantised(Random& r, Memory& m) {
  Problem p = random_problem(r, false);
  p.n = 1 + r.below(4);
  p.d_out = 16 * (1 + r.below(3)), p.d_in = 1 + r.below(80), p.tokens = r.below(20), p.features = false;
  const ParallelFor pool = random_pool(r, 3);
  const bool joined = p.kind == Kind::it;
  const int64_t rows = (joined ? 1 : 2) * p.f_out(), k = (joined ? 2 : 1) * p.d_in, groups_of[] = {0, 32, 64, 128, 256};
  const int bits = r.chance(50) ? 4 : 8;
  const WqRows plain = random_wq_rows(r, rows, k, bits, groups_of[r.below(5)], true, false);
  std::vector<uint8_t> packed(plain.packed_bytes());
  std::vector<float> scales(plain.packed_groups());
  const Values x = random_values(r, m.x, p.x, p.tokens * p.f_in()), bias = random_values(r, m.bias, DType::f32, p.f_out());
  WqWeight w = plain.pack(packed.data(), scales.data(), nullptr);
  std::vector<float> dense(static_cast<size_t>(rows * k));
  wq_dequantize(w, dense.data());
  w.bias = bias.at, w.bias_dtype = DType::f32;
  const Compute form = r.chance(50) ? Compute::int8 : Compute::fp;
  DyadWqArgs a{p.kind, p.n, p.d_out, p.d_in, x.at, p.x, p.tokens, w, form, m.y.place(size_t(p.tokens * p.f_out()) * width(p.x), r.chance(70))};
  dyad_wq_linear(a, room(m.workspace, dyad_wq_workspace(a)), pool);
  if (!m.y.margin_intact() || !m.workspace.margin_intact()) fail("quantised product wrote outside");
  std::vector<double> wl(static_cast<size_t>(p.f_out() * p.d_in)), wu(wl);
  for (int64_t o = 0; o < p.f_out(); ++o)
    for (int64_t i = 0; i < p.d_in; ++i) {
      wl[size_t(o * p.d_in + i)] = dense[size_t(o * k + i)];
      wu[size_t(o * p.d_in + i)] = joined ? dense[size_t(o * k + p.d_in + i)] : dense[size_t((p.f_out() + o) * k + i)];
    }
  const Matrix want(p.kind, p.n, p.d_out, p.d_in, wl.data(), wu.data());
  for (int64_t t = 0; t < p.tokens; ++t)
    for (int64_t o = 0; o < p.f_out(); ++o) {
      double v = bias.value[size_t(o)], size = std::fabs(v), step = 0, largest = 0;
      for (int64_t i = 0; i < p.f_in(); ++i) largest = std::max(largest, std::fabs(x.value[size_t(t * p.f_in() + i)]));
      for (int64_t i = 0; i < p.f_in(); ++i) {
        const double xi = x.value[size_t(t * p.f_in() + i)];
        v += want.w[size_t(o * p.f_in() + i)] * xi;
        size += want.size[size_t(o * p.f_in() + i)] * std::fabs(xi);
        step += want.size[size_t(o * p.f_in() + i)] * largest / 254;  // half a step of x in the int8 form
      }
      expect_near("quantised product", load(static_cast<uint8_t*>(a.y), p.x, t * p.f_out() + o), v, 4 * size, 2 * p.d_in, p.x,
                  form == Compute::int8 ? 1.01 * step : 0);
    }
}

void one_call(Random& r, Memory& m) {
  random_tier(r);
  const int64_t which = r.below(100);
  if (which < 45) forward(r, m);
  else if (which < 60) pair(r, m);
  else if (which < 85) gradients(r, m);
  else if (which < 92) expanded(r, m);
  else quantised(r, m);
}

}  // namespace

int main(int argc, char** argv) {
  static Memory memory;
  return run_calls(argc, argv, [&](Random& r) { one_call(r, memory); });
}
