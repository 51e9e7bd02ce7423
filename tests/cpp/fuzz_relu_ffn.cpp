// Random calls of relu_ffn, input_sparse and nz_compact on every tier, in guarded memory, against sums in double precision. A neuron
// whose gate lies so near its threshold that rounding decides counts as uncertain: the bound of y has room for it, and nnz too.
//   fuzz_relu_ffn [calls [first seed]]
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "fuzz.h"
#include "ops/neuron_lists/neuron_lists.h"
#include "ops/relu_ffn/relu_ffn.h"

namespace {

using namespace effk;
using namespace effk::test;
using namespace effk::relu_ffn;
using neuron::Rows;

struct Memory {
  static constexpr size_t kRoom = size_t(4) << 20;
  struct Layer { Guarded rows{kRoom}, scales{kRoom}, bias{kRoom}; } layers[3];
  Guarded plain{kRoom}, x{kRoom}, y{kRoom}, nnz{kRoom}, param{kRoom}, mask{kRoom}, workspace{size_t(16) << 20};
};

// Numbers: small integers, of which all sums are exact in fp32, or normal ones.
struct Numbers {
  Random& r;
  bool whole;
  float operator()(float size) const { return whole ? float(r.below(3) - 1) : size * r.normal(); }
};

// Rows [f, d], packed, and as the kernels see them.
struct Layer {
  NeuronRows rows{};
  std::vector<double> w, bias;
};

Layer random_layer(Random& r, Memory& m, int which, Rows type, int64_t group, int64_t f, int64_t d, int64_t bias_length, const Numbers& draw) {
  Memory::Layer& at = m.layers[which];
  const bool transposed = r.chance(50);
  const DType dtype = DType(r.below(3));
  const float size = 1 / std::sqrt(float(d));
  const Values given = values(r, m.plain, dtype, f * d, [&] { return draw(size); });
  const int64_t groups = neuron::groups(d, group), bytes = neuron::row_bytes(type, d);
  uint8_t* rows = place<uint8_t>(r, at.rows, f * bytes);
  float* scales = neuron::quantised(type) ? place<float>(r, at.scales, f * groups) : nullptr;
  pack(given.at, dtype, transposed, f, d, type, group, rows, scales, random_pool(r));
  expect_intact("packing wrote outside", {&at.rows});
  if (scales) expect_intact("packing wrote outside the scales", {&at.scales});
  float* back = place<float>(r, m.y, f * d);
  unpack(rows, scales, type, group, f, d, back, random_pool(r));
  expect_intact("unpacking wrote outside", {&m.y});
  Layer layer;
  layer.rows = {rows, scales, nullptr};
  layer.w.assign(back, back + f * d);
  for (int64_t i = 0; i < f; ++i)
    for (int64_t c = 0; c < d; ++c) {
      const double want = given.value[size_t(transposed ? c * f + i : i * d + c)], got = layer.w[size_t(i * d + c)];
      if (scales) {
        if (!(std::fabs(got - want) <= 0.50001 * double(scales[i * groups + (group ? c / group : 0)]))) fail("a code is too far off");
      } else {
        expect_within("a packed value", got, want, 0, type == Rows::f32 ? DType::f32 : type == Rows::bf16 ? DType::bf16 : DType::f16);
      }
    }
  layer.bias.assign(size_t(bias_length), 0.0);
  if (r.chance(60)) {
    const Values b = values(r, at.bias, DType::f32, bias_length, [&] { return draw(0.3f); });
    layer.bias = b.value, layer.rows.bias = b.floats();
  }
  return layer;
}

// A sum of `terms` products in fp32, whatever the order: what it is, and how far off a kernel may be.
struct Sum {
  double value = 0, size = 0;
  void add(double term) { value += term, size += std::fabs(term); }
  double off(int64_t terms, bool whole) const { return whole && size < 0x1p24 ? 0 : double(terms + 8) * 0x1p-24 * size; }
};

enum class State { off, on, uncertain };
struct Active { double a, off; State state; };

State compare(double v, double threshold, double off) {
  return std::fabs(v - threshold) <= off && off > 0 ? State::uncertain : v > threshold ? State::on : State::off;
}

// Who is among the k largest of `size`, known within `off`; ties to the lower index, where nothing is off.
std::vector<State> among_largest(const std::vector<double>& size, const std::vector<double>& off, const std::vector<bool>& allowed, int64_t k) {
  std::vector<double> upper, lower;
  for (size_t i = 0; i < size.size(); ++i)
    if (allowed[i]) upper.push_back(size[i] + off[i]), lower.push_back(size[i] - off[i]);
  std::sort(upper.begin(), upper.end()), std::sort(lower.begin(), lower.end());
  std::vector<State> states(size.size(), State::off);
  for (size_t i = 0; i < size.size(); ++i) {
    if (!allowed[i]) continue;
    const auto rivals = [&](const std::vector<double>& v, double from) { return int64_t(v.end() - std::lower_bound(v.begin(), v.end(), from)); };
    const int64_t most = rivals(upper, size[i] - off[i]), least = rivals(lower, std::nextafter(size[i] + off[i], 1e300));  // `most` counts i
    states[i] = most <= k ? State::on : least >= k ? State::off : State::uncertain;
  }
  if (std::all_of(off.begin(), off.end(), [](double o) { return o == 0; })) {
    std::vector<int64_t> order;
    for (size_t i = 0; i < size.size(); ++i)
      if (allowed[i]) order.push_back(int64_t(i));
    std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return size[size_t(i)] > size[size_t(j)]; });
    for (size_t i = 0; i < order.size(); ++i) states[size_t(order[i])] = int64_t(i) < k ? State::on : State::off;
  }
  return states;
}

struct Problem {
  Args a{};
  Layer gate, up, down;   // gate is up where there is none
  bool whole;
  std::vector<double> x;
  std::vector<bool> bad;  // tokens with NaN
  bool inside(int64_t token, int64_t i) const {
    if (!a.mask) return true;
    const int64_t bit = i / a.mask_group;
    return a.mask[(a.mask_rows == 1 ? 0 : token) * a.mask_bytes + bit / 8] >> (bit % 8) & 1;
  }
};

// a of every neuron of a token from its gates.
std::vector<Active> activate(const Problem& p, int64_t token, const std::vector<double>& g, const std::vector<double>& off) {
  const Args& a = p.a;
  std::vector<Active> out(size_t(a.f), Active{0, 0, State::off});
  double cut = 0, cut_off = 0;
  if (a.kind == Gate::gelu_gauss) {  // the deviation moves by at most the root of the mean square of the errors
    double mean = 0, square = 0, mean_off = 0, square_off = 0;
    for (int64_t i = 0; i < a.f; ++i) mean += g[size_t(i)], mean_off += off[size_t(i)], square_off += off[size_t(i)] * off[size_t(i)];
    mean /= double(a.f), mean_off /= double(a.f);
    for (int64_t i = 0; i < a.f; ++i) square += (g[size_t(i)] - mean) * (g[size_t(i)] - mean);
    cut = mean + double(a.param[0]) * std::sqrt(square / double(a.f));
    cut_off = mean_off + std::fabs(double(a.param[0])) * std::sqrt(square_off / double(a.f)) + 0x1p-23 * std::fabs(cut) + 1e-30;
  }
  std::vector<bool> allowed(static_cast<size_t>(a.f));
  for (int64_t i = 0; i < a.f; ++i) allowed[size_t(i)] = p.inside(token, i);
  std::vector<State> largest;
  if (a.kind == Gate::top_k) {
    std::vector<double> size(static_cast<size_t>(a.f));
    for (size_t i = 0; i < size.size(); ++i) size[i] = std::fabs(g[i]);
    largest = among_largest(size, off, allowed, int64_t(a.param[0]));
  }
  for (size_t i = 0; i < out.size(); ++i) {
    if (!allowed[i]) continue;
    const double v = g[i], o = off[i], t = a.param ? a.param[a.param_each ? i : 0] : 0;
    switch (a.kind) {
      case Gate::relu:
      case Gate::drelu: out[i] = {v, o, compare(v, 0, o)}; break;
      case Gate::relu2: out[i] = {v * v, 2 * std::fabs(v) * o + o * o + (p.whole ? 0 : 0x1p-24 * v * v), compare(v, 0, o)}; break;
      case Gate::shifted_relu: out[i] = {v - t, o + (p.whole ? 0 : 0x1p-24 * std::fabs(v - t)), compare(v, t, o)}; break;
      case Gate::fatrelu: out[i] = {v, o, compare(v, t, o)}; break;
      case Gate::silu_threshold: {
        const double q = v / (1 + std::exp(-v)), q_off = 1.1 * o + 1e-6 * std::max(1.0, std::fabs(q));
        out[i] = {q, q_off, std::fabs(std::fabs(q) - t) <= q_off ? State::uncertain : std::fabs(q) < t ? State::off : State::on};
        break;
      }
      case Gate::gelu_gauss: {
        const double over = v - cut, over_off = o + cut_off + 0x1p-24 * std::fabs(over);
        const double q = 0.5 * over * (1 + std::tanh(std::sqrt(2 / 3.14159265358979323846) * (over + 0.044715 * over * over * over)));
        out[i] = {q, 1.13 * over_off + 1e-6 * std::max(1.0, std::fabs(q)), compare(over, 0, over_off)};
        break;
      }
      default: out[i] = {v, o, largest[i]};
    }
  }
  return out;
}

// Whether neurons are off for every token.
std::vector<bool> check(const Problem& p, const uint8_t* y, const int32_t* nnz) {
  const Args& a = p.a;
  std::vector<bool> unused(static_cast<size_t>(a.f), true);
  for (int64_t token = 0; token < a.tokens; ++token) {
    if (p.bad[size_t(token)]) {
      int64_t count = 0;
      for (int64_t i = 0; i < a.f; ++i) count += p.inside(token, i);
      if (a.kind == Gate::top_k) count = std::min(count, int64_t(a.param[0]));
      if (nnz[token] != count) fail("NaN is not active");
      for (int64_t c = 0; count && c < a.d; ++c)
        if (!std::isnan(load(y, a.dtype, token * a.d + c))) fail("NaN is lost");
      std::fill(unused.begin(), unused.end(), false);
      continue;
    }
    const double* x = p.x.data() + token * a.d;
    const auto products = [&](const Layer& l, std::vector<double>& value, std::vector<double>& off) {
      for (int64_t i = 0; i < a.f; ++i) {
        Sum s;
        s.add(l.bias[size_t(i)]);
        for (int64_t c = 0; c < a.d; ++c) s.add(l.w[size_t(i * a.d + c)] * x[c]);
        value.push_back(s.value), off.push_back(s.off(a.d, p.whole));
      }
    };
    std::vector<double> g, g_off, u, u_off;
    products(p.gate, g, g_off);
    if (a.up.rows) products(p.up, u, u_off);
    const std::vector<Active> active = activate(p, token, g, g_off);
    int64_t sure = 0, perhaps = 0;
    std::vector<Sum> sums(size_t(a.d));
    std::vector<double> off(size_t(a.d), 0.0);
    for (int64_t c = 0; c < a.d; ++c) sums[size_t(c)].add(p.down.bias[size_t(c)]);
    for (int64_t i = 0; i < a.f; ++i) {
      const Active& n = active[size_t(i)];
      if (n.state == State::off) continue;
      unused[size_t(i)] = false;
      ++(n.state == State::on ? sure : perhaps);
      double h = n.a, h_off = n.off;
      if (a.up.rows) {
        const double up = a.kind == Gate::drelu ? std::max(0.0, u[size_t(i)]) : u[size_t(i)], up_off = u_off[size_t(i)];
        h = n.a * up;
        h_off = n.off * std::fabs(up) + std::fabs(n.a) * up_off + n.off * up_off + (p.whole && std::fabs(h) < 0x1p24 ? 0 : 0x1p-24 * std::fabs(h));
      }
      if (n.state == State::uncertain) h_off += std::fabs(h);
      for (int64_t c = 0; c < a.d; ++c) {
        const double w = p.down.w[size_t(i * a.d + c)];
        if (n.state == State::on) sums[size_t(c)].add(h * w);
        off[size_t(c)] += h_off * std::fabs(w);
      }
    }
    int64_t low = sure, high = sure + perhaps;
    if (a.kind == Gate::top_k) {
      int64_t count = 0;
      for (int64_t i = 0; i < a.f; ++i) count += p.inside(token, i);
      low = high = std::min(count, int64_t(a.param[0]));
    }
    if (nnz[token] < low || nnz[token] > high) fail("number of active neurons");
    for (int64_t c = 0; c < a.d; ++c) {
      const double bound = off[size_t(c)] * (1 + double(a.f + 8) * 0x1p-24) + sums[size_t(c)].off(a.f, p.whole);
      expect_within("y", load(y, a.dtype, token * a.d + c), sums[size_t(c)].value, bound, a.dtype);
    }
  }
  return unused;
}

struct Result { std::vector<uint8_t> y; std::vector<int32_t> nnz; };
template <class A> Result call(Random& r, Memory& m, A& a, int64_t out, size_t (*size)(const A&, int), void (*run)(const A&, void*, const ParallelFor&)) {
  const size_t bytes = size_t(a.tokens * out) * width(a.dtype);
  a.y = m.y.place(bytes, r.chance(70));
  a.nnz = place<int32_t>(r, m.nnz, a.tokens);
  const ParallelFor pool = random_pool(r);
  run(a, room(m.workspace, size(a, pool.threads)), pool);
  expect_intact("written outside", {&m.x, &m.y, &m.nnz, &m.workspace});
  return {bytes_at(a.y, bytes), {a.nnz, a.nnz + a.tokens}};
}
template <class A> void expect_same(const char* what, Random& r, Memory& m, A a, int64_t out, size_t (*size)(const A&, int),
                                    void (*run)(const A&, void*, const ParallelFor&), const Result& first) {
  const Result again = call(r, m, a, out, size, run);
  if (again.y != first.y || again.nnz != first.nnz) fail(what);
}
// One token, alone, as among the others.
template <class A> void expect_alone(Random& r, Memory& m, A a, int64_t in, int64_t out, size_t (*size)(const A&, int),
                                     void (*run)(const A&, void*, const ParallelFor&), const Result& first) {
  if (a.tokens == 0) return;
  const int64_t t = r.below(a.tokens), row = out * int64_t(width(a.dtype));
  a.x = static_cast<const uint8_t*>(a.x) + t * in * int64_t(width(a.dtype));
  if constexpr (std::is_same_v<A, Args>)
    if (a.mask && a.mask_rows > 1) a.mask += t * a.mask_bytes, a.mask_rows = 1;
  a.tokens = 1;
  const Result alone = call(r, m, a, out, size, run);
  expect_equal("a token depends on its batch", alone.y.data(), {first.y.begin() + t * row, first.y.begin() + (t + 1) * row});
  if (alone.nnz[0] != first.nnz[size_t(t)]) fail("nnz depends on the batch");
}

// NaN in rows of neurons, or in their scales: whoever reads them shows it.
void poison(const NeuronRows& rows, Rows type, int64_t group, int64_t i, int64_t d) {
  if (rows.scales) std::memset(const_cast<float*>(rows.scales) + i * neuron::groups(d, group), 0xff, size_t(neuron::groups(d, group)) * 4);
  else std::memset(const_cast<uint8_t*>(rows.rows) + i * neuron::row_bytes(type, d), 0xff, size_t(neuron::row_bytes(type, d)));
}

int64_t side(Random& r, bool large) { return large ? 1 + r.below(700) : 1 + r.below(r.chance(70) ? 40 : 150); }
int64_t random_group(Random& r, Rows type) {
  const int64_t groups[] = {0, 32, 64, 128};
  return neuron::quantised(type) ? groups[r.below(4)] : 0;
}
std::vector<double> random_tokens(Random& r, Memory& m, const Numbers& draw, DType dtype, int64_t tokens, int64_t d, const void** at, std::vector<bool>& bad) {
  const Values x = values(r, m.x, dtype, tokens * d, [&] { return r.chance(10) ? 0.0f : draw(1); });
  bad.assign(size_t(tokens), false);
  for (int64_t t = 0; t < tokens; ++t)
    if (r.chance(2)) store(x.at, dtype, t * d + r.below(d), NAN), bad[size_t(t)] = true;
  *at = x.at;
  return x.value;
}

void layer(Random& r, Memory& m) {
  Problem p;
  Args& a = p.a;
  a.type = Rows(r.below(5)), a.dtype = DType(r.below(3)), a.group = random_group(r, a.type);
  const bool wide = r.chance(1), large = !wide && r.chance(5);  // wide: more groups than add_rows makes factors of at a time
  a.d = wide ? 8000 + r.below(1000) : side(r, large), a.f = wide ? 1 + r.below(12) : r.chance(15) ? 1 + r.below(600) : side(r, large);
  a.tokens = r.chance(3) ? 0 : r.chance(40) ? 1 : 1 + r.below(wide ? 3 : large ? 5 : r.chance(80) ? 8 : 20);
  p.whole = !neuron::quantised(a.type) && r.chance(30);
  const Numbers draw{r, p.whole};
  const bool gated = r.chance(70);
  do a.kind = Gate(r.below(kGates));
  while (a.kind == Gate::drelu && !gated);
  p.gate = random_layer(r, m, 0, a.type, a.group, a.f, a.d, a.f, draw);
  if (gated) p.up = random_layer(r, m, 1, a.type, a.group, a.f, a.d, a.f, draw);
  p.down = random_layer(r, m, 2, a.type, a.group, a.f, a.d, a.d, draw);
  a.gate = p.gate.rows, a.down = p.down.rows;
  if (gated) a.up = p.up.rows;
  if (a.kind != Gate::relu && a.kind != Gate::relu2 && a.kind != Gate::drelu) {
    const bool rank = a.kind == Gate::top_k, sign = a.kind == Gate::shifted_relu || a.kind == Gate::gelu_gauss;
    a.param_each = !rank && a.kind != Gate::gelu_gauss && a.f > 1 && r.chance(40);
    const float centre = rank ? float(r.below(a.f + 1)) : draw(1);
    a.param = values(r, m.param, DType::f32, a.param_each ? a.f : 1, [&] {
                const float v = rank ? centre : a.param_each ? draw(1) : centre;
                return sign ? v : std::fabs(v);
              }).floats();
  }
  if (r.chance(30)) {
    a.mask_group = 1 + r.below(r.chance(50) ? 4 : 2 * a.f), a.mask_rows = r.chance(50) ? 1 : std::max<int64_t>(1, a.tokens);
    const int64_t bits = (a.f + a.mask_group - 1) / a.mask_group;
    a.mask_bytes = (bits + 7) / 8;
    uint8_t* mask = place<uint8_t>(r, m.mask, a.mask_rows * a.mask_bytes);
    std::memset(mask, 0, size_t(a.mask_rows * a.mask_bytes));
    const int density = int(r.below(101));
    for (int64_t i = 0; i < a.mask_rows * bits; ++i)
      if (r.chance(density)) mask[i / bits * a.mask_bytes + i % bits / 8] |= uint8_t(1 << i % bits % 8);
    a.mask = mask;
  }
  p.x = random_tokens(r, m, draw, a.dtype, a.tokens, a.d, &a.x, p.bad);
  a.dense = r.chance(30), a.fall_back = r.chance(50);

  const Result first = call(r, m, a, a.d, &workspace, &run);
  const std::vector<bool> unused = check(p, first.y.data(), first.nnz.data());
  expect_alone(r, m, a, a.d, a.d, &workspace, &run, first);
  a.dense = !a.dense;
  expect_same("skipping changes the result", r, m, a, a.d, &workspace, &run, first);
  a.dense = a.fall_back = false;
  for (int64_t i = 0; i < a.f; ++i) {
    if (!unused[size_t(i)]) continue;
    poison(a.down, a.type, a.group, i, a.d);
    if (gated) poison(a.up, a.type, a.group, i, a.d);
  }
  expect_same("inactive rows are read", r, m, a, a.d, &workspace, &run, first);
}

void sparse_inputs(Random& r, Memory& m) {
  InputSparseArgs a{};
  a.type = Rows(r.below(5)), a.dtype = DType(r.below(3)), a.group = random_group(r, a.type);
  const bool wide = r.chance(1), large = !wide && r.chance(5);
  a.d_in = wide ? 1 + r.below(12) : side(r, large), a.d_out = wide ? 8000 + r.below(1000) : side(r, large);
  a.tokens = r.chance(3) ? 0 : r.chance(40) ? 1 : 1 + r.below(wide ? 3 : 20);
  const bool whole = !neuron::quantised(a.type) && r.chance(30);
  const Numbers draw{r, whole};
  const Layer w = random_layer(r, m, 0, a.type, a.group, a.d_in, a.d_out, a.d_out, draw);
  a.w = w.rows;
  if (r.chance(70)) {
    a.threshold_each = a.d_in > 1 && r.chance(50);
    a.threshold = values(r, m.param, DType::f32, a.threshold_each ? a.d_in : 1, [&] { return std::fabs(draw(1)); }).floats();
  }
  std::vector<bool> bad;
  const std::vector<double> x = random_tokens(r, m, draw, a.dtype, a.tokens, a.d_in, &a.x, bad);
  const Result first = call(r, m, a, a.d_out, &input_sparse_workspace, &input_sparse);
  std::vector<bool> unused(size_t(a.d_in), true);
  for (int64_t t = 0; t < a.tokens; ++t) {
    std::vector<Sum> sums(size_t(a.d_out));
    for (int64_t c = 0; c < a.d_out; ++c) sums[size_t(c)].add(w.bias[size_t(c)]);
    int64_t count = 0;
    for (int64_t j = 0; j < a.d_in; ++j) {
      const double v = load(static_cast<const uint8_t*>(a.x), a.dtype, t * a.d_in + j);  // NaN is kept
      if (std::fabs(v) <= (a.threshold ? a.threshold[a.threshold_each ? j : 0] : 0)) continue;
      ++count, unused[size_t(j)] = false;
      for (int64_t c = 0; c < a.d_out; ++c) sums[size_t(c)].add(v * w.w[size_t(j * a.d_out + c)]);
    }
    if (first.nnz[size_t(t)] != count) fail("number of inputs");
    for (int64_t c = 0; c < a.d_out; ++c) {
      const double got = load(first.y.data(), a.dtype, t * a.d_out + c);
      if (!bad[size_t(t)]) expect_within("sparse inputs", got, sums[size_t(c)].value, sums[size_t(c)].off(a.d_in, whole), a.dtype);
      else if (!std::isnan(got)) fail("NaN is lost");
    }
  }
  expect_alone(r, m, a, a.d_in, a.d_out, &input_sparse_workspace, &input_sparse, first);
  for (int64_t j = 0; j < a.d_in; ++j)
    if (unused[size_t(j)]) poison(a.w, a.type, a.group, j, a.d_out);
  expect_same("rows of inputs that are off are read", r, m, a, a.d_out, &input_sparse_workspace, &input_sparse, first);
}

// The list of what is left of x: nothing is written behind a list as long as x, whatever is kept.
void compacted(Random& r, Memory& m) {
  neuron_lists::CompactArgs a{};
  a.dtype = DType(r.below(3)), a.tokens = 1 + r.below(3), a.n = 1 + r.below(r.chance(90) ? 130 : 2000);
  const int zeros = r.chance(30) ? 0 : int(r.below(101));
  const Values x = values(r, m.x, a.dtype, a.tokens * a.n, [&] { return r.chance(zeros) ? 0.0f : r.normal(); });
  a.x = x.at;
  if (r.chance(50)) {
    a.threshold_each = a.n > 1 && r.chance(50);
    a.threshold = values(r, m.param, DType::f32, a.threshold_each ? a.n : 1, [&] { return std::fabs(r.normal()); }).floats();
  }
  a.index = place<int32_t>(r, m.mask, a.tokens * a.n), a.value = place<float>(r, m.y, a.tokens * a.n), a.count = place<int32_t>(r, m.nnz, a.tokens);
  neuron_lists::compact(a, room(m.workspace, neuron_lists::compact_workspace(a)), random_pool(r));
  expect_intact("a list is written outside", {&m.x, &m.mask, &m.y, &m.nnz, &m.workspace});
  for (int64_t t = 0; t < a.tokens; ++t) {
    int64_t at = t * a.n;
    for (int64_t j = 0; j < a.n; ++j) {
      const double v = x.value[size_t(t * a.n + j)];
      if (std::fabs(v) <= (a.threshold ? a.threshold[a.threshold_each ? j : 0] : 0)) continue;
      if (a.index[at] != j || a.value[at] != float(v)) fail("a list");
      ++at;
    }
    if (a.count[t] != at - t * a.n) fail("length of a list");
    for (; at < (t + 1) * a.n; ++at)
      if (a.index[at] != -1 || a.value[at] != 0) fail("behind a list");
  }
}

void one_call(Random& r, Memory& m) {
  random_tier(r);
  if (r.chance(5)) return compacted(r, m);
  r.chance(75) ? layer(r, m) : sparse_inputs(r, m);
}

}  // namespace

int main(int argc, char** argv) {
  static Memory memory;
  return run_calls(argc, argv, [&](Random& r) { one_call(r, memory); });
}
