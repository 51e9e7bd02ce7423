// The CUDA kernels of dense_linear and dyad_linear against sums in float64 over the table of the specification, without
// torch: the program that runs under ASan and UBSan in every thread order and must fail for every planted bug of
// mutants.py; on a GPU, the one that compute-sanitizer watches.
//   driver_dyad [quick | large]     quick: the cases of the planted bugs; large: also the largest tile with several of
//                                   each side
#include "buffers.h"
#include "cases.h"

#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "ops/dense_linear/cuda.h"
#include "ops/dyad_linear/cuda.h"

namespace {
namespace dyad = cuda::dyad;
using panel::Kind;

// Numbers of any type: host memory of exact size, and what the kernels see of it.
struct Array {
  DType type;
  size_t count;
  Buffer<unsigned char> bytes;
  std::unique_ptr<Mirror<unsigned char>> mirror;

  Array(DType type, size_t count, int shift = 0) : type(type), count(count), bytes(count * size(), shift * size()) {
    std::fill_n(bytes.data(), bytes.size(), 0xff);
  }
  size_t size() const { return type == DType::f32 ? 4 : 2; }
  double operator[](size_t i) const {
    if (type == DType::f32) return reinterpret_cast<const float*>(bytes.data())[i];
    return decode(reinterpret_cast<const uint16_t*>(bytes.data())[i], type);
  }
  void put(size_t i, float v) {
    if (type == DType::f32) reinterpret_cast<float*>(bytes.data())[i] = v;
    else reinterpret_cast<uint16_t*>(bytes.data())[i] = encode(v, type);
  }
  void fill(std::mt19937& random) {
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < count; ++i) put(i, normal(random));
  }
  unsigned char* device() {
    if (!mirror) mirror = std::make_unique<Mirror<unsigned char>>(bytes);
    return mirror->get();
  }
  void fetch() { mirror->fetch(); }
};

struct Case {
  int n, d_out, d_in, tokens;
  Kind kind = Kind::it;
  DType x = DType::f16, w = DType::f16;
  bool features = false, bias = true;
  Activation act = Activation::none;
  bool in_order = false;  // residues in copies
  int shape = 0, shift = 0;
  DType packed = DType::f32;  // fp32: as w
  int next = 0;               // blocks of the next layer, whose residues the epilogue writes too
};

std::string describe(const Case& c) {
  const char *const kinds[] = {"dense", "it", "ot", "dt"}, *const types[] = {" f32", " bf16", " f16"};
  return std::string(kinds[int(c.kind)]) + " n " + std::to_string(c.n) + " d_out " + std::to_string(c.d_out) + " d_in " +
         std::to_string(c.d_in) + " T " + std::to_string(c.tokens) + types[int(c.x)] + types[int(c.w)] + (c.features ? " features" : "") +
         (c.in_order ? " in order" : "") + (c.shape ? " shape " + std::to_string(c.shape) : "") + (c.shift ? " shifted" : "") +
         (c.next ? " next " + std::to_string(c.next) : "");
}

void launched(int error) {
  if (error) throw std::runtime_error(cuda::gemm_error_text(error));
}

double activation(double v, Activation act) {
  switch (act) {
    case Activation::relu: return std::fmax(v, 0.0);
    case Activation::gelu: return 0.5 * v * (1.0 + std::erf(v / std::sqrt(2.0)));
    case Activation::gelu_tanh: return 0.5 * v * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (v + 0.044715 * v * v * v)));
    case Activation::silu: return v / (1.0 + std::exp(-v));
    default: return v;
  }
}

// The largest error over its bound. Sums of `terms` products in fp32 in any order, one rounding to the type of the
// result, one ulp of fp32 more for each step of an activation, whose slope stays below 1.13.
struct Worst {
  double ratio = 0.0;
  void add(double got, double want, double magnitude, double terms, DType type) {
    const double epsilon = type == DType::f32 ? 0x1p-24 : type == DType::f16 ? 0x1p-11 : 0x1p-8;
    const double bound = 1.13 * (terms + 8) * 0x1p-23 * magnitude + epsilon * std::fabs(want) + (type == DType::f16 ? 0x1p-24 : 1e-30);
    const double r = std::fabs(got - want) / bound;
    ratio = std::fmax(ratio, std::isnan(r) ? INFINITY : r);
  }
};

// Feature numbers of both components: output o of block d, input i of block d.
int out_feature(const Case& c, int part, int d, int o) { return part && c.kind != Kind::it ? o * c.n + d : d * c.d_out + o; }
int in_feature(const Case& c, int part, int d, int i) { return part && c.kind != Kind::ot ? i * c.n + d : d * c.d_in + i; }

double worst(const Case& c, std::mt19937& random) {
  const int f_in = c.n * c.d_in, f_out = c.n * c.d_out, tokens = c.tokens;
  const size_t weights = size_t(f_out) * c.d_in;
  const auto x_at = [&](int t, int f) { return c.features ? size_t(f) * tokens + t : size_t(t) * f_in + f; };
  const auto y_at = [&](int t, int f) { return c.features ? size_t(f) * tokens + t : size_t(t) * f_out + f; };
  Array x(c.x, size_t(tokens) * f_in, c.shift), gy(c.x, size_t(tokens) * f_out, c.shift), w[2] = {{c.w, weights, c.shift}, {c.w, weights, c.shift}},
      bias(DType::f32, f_out), y(c.x, size_t(tokens) * f_out, c.shift), gx(c.x, size_t(tokens) * f_in, c.shift),
      gw[2] = {{c.w, weights}, {c.w, weights}}, gb(DType::f32, f_out), dense(c.w, size_t(f_out) * f_in), copy(c.x, c.next ? y.count : 0);
  x.fill(random), gy.fill(random), w[0].fill(random), w[1].fill(random), bias.fill(random);

  // float64: y, and the size of what was added up; the same for every gradient.
  std::vector<double> want_y(y.count), size_y(y.count), want_x(x.count), size_x(x.count), want_w[2], size_w[2], want_dense(dense.count);
  for (int part = 0; part < 2; ++part) {
    want_w[part].resize(weights), size_w[part].resize(weights);
    for (int d = 0; d < c.n; ++d)
      for (int o = 0; o < c.d_out; ++o)
        for (int i = 0; i < c.d_in; ++i) {
          const size_t at = (size_t(d) * c.d_out + o) * c.d_in + i;
          const double v = w[part][at];
          const int r = out_feature(c, part, d, o), j = in_feature(c, part, d, i);
          want_dense[size_t(r) * f_in + j] += v;
          for (int t = 0; t < tokens; ++t) {
            const double a = x[x_at(t, j)], g = gy[y_at(t, r)];
            want_y[y_at(t, r)] += v * a, size_y[y_at(t, r)] += std::fabs(v * a);
            want_x[x_at(t, j)] += v * g, size_x[x_at(t, j)] += std::fabs(v * g);
            want_w[part][at] += g * a, size_w[part][at] += std::fabs(g * a);
          }
        }
  }

  dyad::Shape s{c.n, c.d_out, c.d_in, tokens, c.kind, c.features};
  dyad::Weights plain{w[0].device(), w[1].device(), c.w, c.d_in};
  dyad::Epilogue e{c.bias ? bias.device() : nullptr, DType::f32, c.act, c.next ? copy.device() : nullptr, c.next ? c.next : 1};
  Array x_order(c.x, c.in_order ? x.count : 0), gy_order(c.x, c.in_order ? gy.count : 0), wl_order(c.w, c.in_order ? weights : 0);
  dyad::Residues residues;
  if (c.in_order) {
    launched(dyad::deinterleave(x.device(), c.x, tokens, f_in, c.n, x_order.device(), nullptr));
    launched(dyad::deinterleave(gy.device(), c.x, tokens, f_out, c.n, gy_order.device(), nullptr));
    residues.x = x_order.device(), residues.gy = gy_order.device();
    if (c.d_in % c.n == 0) {
      launched(dyad::deinterleave(w[0].device(), c.w, f_out, c.d_in, c.n, wl_order.device(), nullptr));
      residues.wl = wl_order.device();
    }
  }
  Worst worst;
  const auto compare_y = [&] {
    y.fetch();
    for (int t = 0; t < tokens; ++t)
      for (int r = 0; r < f_out; ++r) {
        const double add = c.bias ? bias[r] : 0.0, size = size_y[y_at(t, r)] + std::fabs(add);
        const double want = activation(want_y[y_at(t, r)] + add, c.act);
        worst.add(y[y_at(t, r)], want, size, 2 * c.d_in + 1, c.x);
        if (c.next) {
          copy.fetch();
          worst.add(copy[size_t(t) * f_out + r % c.next * (f_out / c.next) + r / c.next], want, size, 2 * c.d_in + 1, c.x);
        }
      }
  };
  launched(dyad::forward(s, x.device(), c.x, plain, e, residues, y.device(), nullptr, c.shape));
  compare_y();

  // Packed, and packed with a header that does not match.
  {
    cuda::Packed what{c.kind, c.w, c.n, c.d_out, c.d_in}, found;
    Array buffer(DType::f16, size_t(what.bytes() + 1) / 2);
    launched(cuda::pack(what, w[0].device(), w[1].device(), c.w, buffer.device(), nullptr));
    if (!cuda::packed_of_size(what.bytes(), false, f_out, f_in, found) || found.n != c.n || found.dtype != c.w ||
        found.kind != c.kind)
      return INFINITY;
    unsigned char* const rows = buffer.device() + cuda::kPackHeader;
    dyad::Weights packed{rows, rows + what.rows() / 2 * what.ld() * what.element(), c.w, what.ld(), reinterpret_cast<const uint32_t*>(buffer.device())};
    found.words(packed.expected);
    std::fill_n(y.bytes.data(), y.bytes.size(), 0xff);
    y.mirror.reset();
    launched(dyad::forward(s, x.device(), c.x, packed, e, residues, y.device(), nullptr, c.shape));
    compare_y();
    packed.expected[2] ^= 8;  // another variant: NaN everywhere
    launched(dyad::forward(s, x.device(), c.x, packed, e, residues, y.device(), nullptr, c.shape));
    y.fetch();
    for (size_t i = 0; i < y.count; ++i)
      if (!std::isnan(y[i])) return INFINITY;
  }

  launched(dyad::input_gradient(s, gy.device(), c.x, plain, residues, gx.device(), nullptr, c.shape));
  launched(dyad::weight_gradient(s, gy.device(), x.device(), c.x, residues, gw[0].device(), gw[1].device(), c.w, nullptr, c.shape));
  launched(dyad::bias_gradient(s, gy.device(), c.x, reinterpret_cast<float*>(gb.device()), nullptr));
  launched(dyad::to_dense(s, plain, dense.device(), nullptr));
  gx.fetch(), gw[0].fetch(), gw[1].fetch(), gb.fetch(), dense.fetch();
  for (size_t i = 0; i < gx.count; ++i) worst.add(gx[i], want_x[i], size_x[i], 2 * c.d_out, c.x);
  for (int part = 0; part < 2; ++part)
    for (size_t i = 0; i < weights; ++i) worst.add(gw[part][i], want_w[part][i], size_w[part][i], tokens, c.w);
  for (int r = 0; r < f_out; ++r) {
    double sum = 0.0, size = 0.0;
    for (int t = 0; t < tokens; ++t) sum += gy[y_at(t, r)], size += std::fabs(gy[y_at(t, r)]);
    worst.add(gb[r], sum, size, tokens, DType::f32);
  }
  for (size_t i = 0; i < dense.count; ++i) worst.add(dense[i], want_dense[i], std::fabs(want_dense[i]), 1, c.w);

  // The component wu alone, as a mask asks for it.
  std::fill_n(gw[1].bytes.data(), gw[1].bytes.size(), 0xff);
  gw[1].mirror.reset();
  launched(dyad::weight_gradient(s, gy.device(), x.device(), c.x, residues, nullptr, gw[1].device(), c.w, nullptr, c.shape));
  gw[1].fetch();
  for (size_t i = 0; i < weights; ++i) worst.add(gw[1][i], want_w[1][i], size_w[1][i], tokens, c.w);
  return worst.ratio;
}

// A dense weight packed and multiplied; n of the case is 1.
double worst_dense(const Case& c, std::mt19937& random) {
  Array x(c.x, size_t(c.tokens) * c.d_in, c.shift), w(c.w, size_t(c.d_out) * c.d_in), bias(c.x, c.d_out), y(c.x, size_t(c.tokens) * c.d_out),
      back(DType::f32, w.count);
  x.fill(random), w.fill(random), bias.fill(random);
  const DType type = c.packed == DType::f32 ? c.w : c.packed;
  const cuda::Packed what{Kind::dense, type, 1, c.d_out, c.d_in};
  Array buffer(DType::f16, size_t(what.bytes() + 1) / 2), rounded(type, w.count);
  for (size_t i = 0; i < w.count; ++i) rounded.put(i, float(w[i]));
  launched(cuda::pack(what, w.device(), nullptr, c.w, buffer.device(), nullptr));
  launched(cuda::dense_linear(what, buffer.device(), x.device(), c.x, c.tokens, c.bias ? bias.device() : nullptr, c.x, c.act, y.device(), nullptr, c.shape));
  launched(cuda::dense_unpack(what, buffer.device(), reinterpret_cast<float*>(back.device()), nullptr));
  y.fetch(), back.fetch();
  Worst worst;
  for (size_t i = 0; i < w.count; ++i)
    if (back[i] != rounded[i]) return INFINITY;
  for (int t = 0; t < c.tokens; ++t)
    for (int r = 0; r < c.d_out; ++r) {
      double sum = c.bias ? bias[r] : 0.0, size = std::fabs(sum);
      for (int i = 0; i < c.d_in; ++i) {
        const double v = x[size_t(t) * c.d_in + i] * rounded[size_t(r) * c.d_in + i];
        sum += v, size += std::fabs(v);
      }
      worst.add(y[size_t(t) * c.d_out + r], activation(sum, c.act), size, c.d_in + 1, c.x);
    }
  return worst.ratio;
}

const DType f16 = DType::f16, bf16 = DType::bf16, f32 = DType::f32;
const Kind it = Kind::it, ot = Kind::ot, dt = Kind::dt;

std::vector<Case> cases(const std::string& which) {
  std::vector<Case> all = {
      {4, 40, 24, 66, it, f16, f16, false, true, Activation::gelu},
      {4, 24, 40, 37, it, bf16, bf16, true, true, Activation::silu},
      {2, 72, 40, 70, it, bf16, bf16, false, true, Activation::relu, true, 2, 0, f32, 4},
      {4, 32, 64, 9, ot, f16, f16, false, true, Activation::gelu_tanh, false, 0, 0, f32, 2},
      {3, 16, 40, 20, dt, bf16, bf16, false, true, Activation::none, true},
      {3, 17, 11, 33, dt, f16, f16, true, true},
      {5, 24, 8, 19, ot, f16, f16, false, true, Activation::none, true, 0, 1},
      {4, 20, 28, 50, it, f32, f32, false, true, Activation::gelu, false, 0, 0, f32, 2},
      {3, 10, 7, 18, ot, f32, f32, true, true, Activation::none, false, 0, 1},
      {2, 36, 36, 70, dt, f32, bf16, false, false, Activation::silu, true},
      {4, 8, 16, 5, it, bf16, f32, false, true},
      {1, 70, 33, 6, dt, f16, f16, false, true},
      {2, 1, 3, 4, dt, f16, f16, false, true},
      {2, 72, 40, 20, it, f16, f16, false, true, Activation::none, false, 1},
  };
  if (which == "quick") return all;
  for (const int n : {1, 2, 3, 4, 8})
    for (const Kind v : {it, ot, dt})
      for (const bool features : {false, true}) {
        const DType type = (n + int(v)) % 3 == 0 ? f16 : (n + int(v)) % 3 == 1 ? bf16 : f32;
        all.push_back({n, 8 * (9 - n), 24, 21, v, type, type, features, n % 2 == 0, Activation(n % 5), v == dt});
        all.push_back({n, 3, 8, 1, v, f16, f16, features});
      }
  if (which == "large") {
    const std::vector<Case> large = {
        {2, 272, 64, 150, it, f16, f16, false, true, Activation::gelu, true, 1},
        {2, 64, 272, 270, dt, bf16, bf16, true, true, Activation::none, false, 1},
        {2, 544, 40, 140, ot, f16, f16, false, true, Activation::none, true, 1},
        {2, 140, 130, 100, it, f32, f32, false, true, Activation::none, false, 1},
    };
    all.insert(all.end(), large.begin(), large.end());
  }
  return all;
}

std::vector<Case> dense_cases() {
  return {
      {1, 100, 72, 3, it, f16, f16, false, true, Activation::gelu},
      {1, 65, 300, 16, it, bf16, bf16, false, true, Activation::none, false, 0, 3},
      {1, 200, 40, 90, it, bf16, f32, false, true, Activation::relu, false, 0, 0, bf16},
      {1, 33, 19, 17, it, f32, f32, false, false, Activation::silu, false, 0, 0, f16},
      {1, 258, 72, 130, it, f16, f16, false, true, Activation::none, false, 1},
  };
}

}  // namespace

int main(int argc, char** argv) {
  const std::string which = argc > 1 ? argv[1] : "";
  std::mt19937 random(1);
  effk::test::Cases done;
  for (const Case& c : cases(which)) done.run("dyad " + describe(c), [&] { return worst(c, random); });
  for (const Case& c : dense_cases()) done.run("dense " + describe(c), [&] { return worst_dense(c, random); });
  return done.finish();
}
