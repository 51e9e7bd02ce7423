// The CUDA kernels of relu_ffn against float64, without torch: the program that runs under ASan and UBSan in every thread order and
// must fail for every planted bug of mutants.py; on a GPU, the one that compute-sanitizer watches.
//   driver_relu [quick]     quick: the cases of the planted bugs
#include "buffers.h"
#include "cases.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "ops/relu_ffn/cuda.h"

namespace {
namespace ffn = cuda::relu_ffn;
using neuron::Rows;

struct Case {
  int d, f, tokens;
  Rows rows = Rows::bf16;
  int group = 0;
  Gate gate = Gate::relu;
  DType type = DType::f32;
  bool gated = true, bias = true, each = false, dense = false;
  int mask_rows = 0, mask_group = 1;
  int shift = 0;       // elements that x starts off alignment
  bool ties = false;   // gates of seven sizes
  int d_out = 0;       // not 0: input_sparse_linear from d inputs, f unused
};

std::string describe(const Case& c) {
  const char* const types[] = {" f32", " bf16", " f16"};
  return (c.d_out ? "inputs, d " : "d ") + std::to_string(c.d) + " f " + std::to_string(c.d_out ? c.d_out : c.f) + " M " + std::to_string(c.tokens) +
         " rows " + neuron::kRowNames[int(c.rows)] + "/" + std::to_string(c.group) + " " + (c.d_out ? "" : kGateNames[int(c.gate)]) + types[int(c.type)] +
         (c.gated ? " gated" : "") + (c.dense ? " dense" : "") + (c.mask_rows ? " masked" : "") + (c.shift ? " shifted" : "");
}

void launched(int error) {
  if (error) throw std::runtime_error(ffn::error_text(error));
}

// Random rows in their packed form, and what they mean.
struct Packed {
  Buffer<uint8_t> bytes;
  Buffer<float> scales;
  std::vector<double> w;  // [f, d]

  Packed(const Case& c, int64_t f, int64_t d, std::mt19937& random)
      : bytes(f * neuron::row_bytes(c.rows, d)), scales(neuron::quantised(c.rows) ? f * neuron::groups(d, c.group) : 0), w(f * d) {
    std::normal_distribution<float> normal;
    std::fill_n(bytes.data(), bytes.size(), 0);
    const float size = 1.0f / std::sqrt(float(d));
    const int64_t groups = neuron::groups(d, c.group), ld = neuron::row_bytes(c.rows, d);
    for (size_t i = 0; i < scales.size(); ++i) scales[i] = size * (c.rows == Rows::i8 ? 0.01f : 0.2f) * (1.0f + std::fabs(normal(random)));
    for (int64_t i = 0; i < f; ++i)
      for (int64_t j = 0; j < d; ++j) {
        uint8_t* const row = bytes.data() + i * ld;
        double& v = w[i * d + j];
        const float scale = scales.size() ? scales[i * groups + (c.group ? j / c.group : 0)] : 0.0f;
        if (c.rows == Rows::f32) {
          const float x = size * normal(random);
          std::memcpy(row + 4 * j, &x, 4), v = x;
        } else if (c.rows == Rows::i8) {
          const int8_t code = int8_t(int(random() % 255) - 127);
          row[j] = uint8_t(code), v = double(scale) * code;
        } else if (c.rows == Rows::i4) {
          const int code = int(random() % 16);
          const int64_t unit = j / 128, word = j % 16, nibble = j % 128 / 16;
          row[unit * 64 + word * 4 + nibble / 2] |= uint8_t(code << 4 * (nibble % 2)), v = double(scale) * (code - 8);
        } else {
          const DType t = c.rows == Rows::bf16 ? DType::bf16 : DType::f16;
          const uint16_t bits = encode(size * normal(random), t);
          std::memcpy(row + 2 * j, &bits, 2), v = decode(bits, t);
        }
      }
  }
};

// What the kernels see of it.
struct Device {
  Mirror<uint8_t> bytes;
  Mirror<float> scales, bias;
  Device(const Packed& p, const Buffer<float>& bias) : bytes(p.bytes), scales(p.scales), bias(bias) {}
  relu_ffn::NeuronRows rows(const Packed& p, bool biased) const { return {bytes.get(), p.scales.size() ? scales.get() : nullptr, biased ? bias.get() : nullptr}; }
};

struct Values {  // [rows, columns] of the type of x
  DType type;
  Buffer<unsigned char> bytes;
  Values(DType type, size_t count, int shift = 0) : type(type), bytes(count * size(type), shift * size(type)) {
    std::fill_n(bytes.data(), bytes.size(), 0xff);
  }
  static size_t size(DType t) { return t == DType::f32 ? 4 : 2; }
  float operator[](size_t i) const {
    if (type != DType::f32) return decode(reinterpret_cast<const uint16_t*>(bytes.data())[i], type);
    return reinterpret_cast<const float*>(bytes.data())[i];
  }
  void put(size_t i, float v) {
    if (type == DType::f32) reinterpret_cast<float*>(bytes.data())[i] = v;
    else reinterpret_cast<uint16_t*>(bytes.data())[i] = encode(v, type);
  }
};

// The largest error over its bound, where 1 is right; wrong integers count as infinite.
struct Worst {
  double ratio = 0.0;
  void near(double got, double want, double bound) {
    const double r = std::fabs(got - want) / bound;
    ratio = std::fmax(ratio, std::isnan(r) ? INFINITY : r);
  }
  void same(bool ok) {
    if (!ok) ratio = INFINITY;
  }
};

double last_place(DType t) { return t == DType::f32 ? 0x1p-24 : t == DType::f16 ? 0x1p-11 : 0x1p-8; }

// a of a gate, its derivative's bound, and whether it is open; false in `clear` where fp32 may decide otherwise.
struct Opened {
  double a;
  bool on, clear;
};
Opened open(Gate kind, double g, double p, double margin) {
  const auto near_to = [&](double x, double y) { return std::fabs(x - y) > margin; };
  switch (kind) {
    case Gate::relu2: return {g * g, g > 0, near_to(g, 0)};
    case Gate::shifted_relu: return {g - p, g > p, near_to(g, p)};
    case Gate::fatrelu: return {g, g > p, near_to(g, p)};
    case Gate::silu_threshold: {
      const double q = g / (1.0 + std::exp(-g));
      return {q, std::fabs(q) >= p, near_to(std::fabs(q), p)};
    }
    case Gate::gelu_gauss: {
      const double v = g - p;
      return {0.5 * v * (1.0 + std::tanh(0.7978845608 * (v + 0.044715 * v * v * v))), v > 0, near_to(v, 0)};
    }
    default: return {g, g > 0, near_to(g, 0)};
  }
}

double feed_forward(const Case& c, std::mt19937& random) {
  Worst worst;
  std::normal_distribution<float> normal;
  const int64_t d = c.d, f = c.f, m = c.tokens;
  Packed gate(c, f, d, random);
  const Packed up(c, f, d, random), down(c, f, d, random);
  for (int64_t i = 7; c.ties && i < f; ++i) {
    std::copy_n(gate.bytes.data() + i % 7 * neuron::row_bytes(c.rows, d), neuron::row_bytes(c.rows, d), gate.bytes.data() + i * neuron::row_bytes(c.rows, d));
    std::copy_n(gate.w.begin() + i % 7 * d, d, gate.w.begin() + i * d);
  }
  Buffer<float> bg(f), bu(f), bd(d);
  for (int64_t i = 0; i < f; ++i) bg[i] = c.ties ? 0.0f : 0.1f * normal(random), bu[i] = 0.1f * normal(random);
  for (int64_t i = 0; i < d; ++i) bd[i] = 0.1f * normal(random);
  Values x(c.type, m * d, c.shift), y(c.type, m * d);
  for (int64_t i = 0; i < m * d; ++i) x.put(i, normal(random));
  Buffer<float> param(c.each ? f : 1);
  for (size_t i = 0; i < param.size(); ++i) param[i] = c.gate == Gate::top_k ? float(std::min<int64_t>(f, 5)) : 0.3f + 0.1f * float(i % 5);
  const int64_t bits = (f + c.mask_group - 1) / c.mask_group, mask_bytes = (bits + 7) / 8;
  Buffer<uint8_t> mask(c.mask_rows * mask_bytes);
  for (size_t i = 0; i < mask.size(); ++i) mask[i] = uint8_t(random() & 0xff);
  for (int64_t r = 0; r < c.mask_rows && bits % 8; ++r) mask[r * mask_bytes + mask_bytes - 1] &= uint8_t((1 << bits % 8) - 1);
  const auto allowed = [&](int64_t t, int64_t i) {
    if (!c.mask_rows) return true;
    const int64_t bit = i / c.mask_group;
    return bool(mask[(c.mask_rows == 1 ? 0 : t) * mask_bytes + bit / 8] >> bit % 8 & 1);
  };

  Buffer<int32_t> nnz(m);
  std::fill_n(nnz.data(), m, -7);
  const Device gate_d(gate, bg), up_d(up, bu), down_d(down, bd);
  const Mirror<unsigned char> x_d(x.bytes), y_d(y.bytes);
  const Mirror<float> param_d(param);
  const Mirror<uint8_t> mask_d(mask);
  const Mirror<int32_t> nnz_d(nnz);
  relu_ffn::Args a{};
  if (c.gated) a.gate = gate_d.rows(gate, c.bias), a.up = up_d.rows(up, c.bias);
  else a.gate = up_d.rows(up, c.bias);
  a.down = down_d.rows(down, c.bias);
  a.type = c.rows, a.group = c.group, a.kind = c.gate;
  const bool takes = c.gate == Gate::shifted_relu || c.gate == Gate::fatrelu || c.gate == Gate::silu_threshold || c.gate == Gate::gelu_gauss ||
                     c.gate == Gate::top_k;
  if (takes) a.param = param_d.get(), a.param_each = c.each;
  if (c.mask_rows) a.mask = mask_d.get(), a.mask_rows = c.mask_rows, a.mask_bytes = mask_bytes, a.mask_group = c.mask_group;
  a.x = x_d.get(), a.dtype = c.type, a.tokens = m, a.d = d, a.f = f, a.dense = c.dense, a.y = y_d.get(), a.nnz = nnz_d.get();
  Buffer<uint8_t> memory(ffn::workspace(a));
  std::fill_n(memory.data(), memory.size(), 0xff);
  const Mirror<uint8_t> memory_d(memory);
  launched(ffn::run(a, memory_d.get(), nullptr));
  y_d.fetch(), nnz_d.fetch();

  // A product passes at most this many additions: eight a chunk of its lane, the tree, four parts and the bias; in down those of
  // four lists, eight warps, the slices and the bias. Each is off by a last place of the magnitude; and weights are rounded.
  const double eps = 0x1p-24, steps = 8.0 * double((d + 255) / 256) + 12, down_steps = 64.0 + 8 + double((f + 511) / 512) + 4;
  const Packed& first = c.gated ? gate : up;
  const Buffer<float>& first_bias = c.gated ? bg : bu;
  int64_t compared = 0;
  for (int64_t t = 0; t < m; ++t) {
    std::vector<double> g(f), g_size(f), h(f), h_error(f);
    for (int64_t i = 0; i < f; ++i) {
      g[i] = g_size[i] = 0.0;
      if (c.bias) g[i] = first_bias[i], g_size[i] = std::fabs(g[i]);
      for (int64_t j = 0; j < d; ++j) {
        const double term = first.w[i * d + j] * x[t * d + j];
        g[i] += term, g_size[i] += std::fabs(term);
      }
    }
    double cut = 0.0;
    std::vector<bool> kept(f, true);
    bool clear = true;
    if (c.gate == Gate::gelu_gauss) {
      double mean = 0.0, squares = 0.0;
      for (double v : g) mean += v / double(f);
      for (double v : g) squares += (v - mean) * (v - mean) / double(f);
      cut = mean + double(param[0]) * std::sqrt(squares);
    }
    if (c.gate == Gate::top_k) {
      std::vector<double> sizes;
      for (int64_t i = 0; i < f; ++i)
        if (allowed(t, i)) sizes.push_back(std::fabs(g[i]));
      std::sort(sizes.begin(), sizes.end(), std::greater<>());
      const size_t keep = std::min(sizes.size(), size_t(param[0]));
      const double cut_size = keep ? sizes[keep - 1] : INFINITY;
      auto ties = int64_t(keep) - std::count_if(sizes.begin(), sizes.end(), [&](double v) { return v > cut_size; });
      for (int64_t i = 0; i < f; ++i) {
        const double v = std::fabs(g[i]);
        kept[i] = v > cut_size || (v == cut_size && allowed(t, i) && ties-- > 0);
      }
      for (double v : sizes) clear = clear && (v == cut_size || std::fabs(v - cut_size) > 1e-5);
    }
    int active = 0;
    for (int64_t i = 0; i < f; ++i) {
      const double p = c.gate == Gate::gelu_gauss ? cut : takes ? param[c.each ? i : 0] : 0.0;
      const double g_error = steps * eps * g_size[i] + (c.gate == Gate::gelu_gauss ? 1e-5 : 0.0);
      Opened o = c.gate == Gate::top_k ? Opened{g[i], kept[i], true} : open(c.gate, g[i], p, 2 * g_error);
      if (!allowed(t, i)) o.on = false, o.clear = true;
      clear = clear && o.clear;
      active += o.on;
      double u = 1.0, u_error = 0.0;
      if (c.gated) {
        double size = c.bias ? std::fabs(bu[i]) : 0.0;
        u = c.bias ? bu[i] : 0.0;
        for (int64_t j = 0; j < d; ++j) {
          const double term = up.w[i * d + j] * x[t * d + j];
          u += term, size += std::fabs(term);
        }
        u_error = steps * eps * size;
        if (c.gate == Gate::drelu) u = std::fmax(u, 0.0);
      }
      h[i] = o.on ? o.a * u : 0.0;
      const double slope = c.gate == Gate::relu2 ? 2 * std::fabs(g[i]) : 1.2;
      h_error[i] = o.on ? (slope * g_error + 8 * eps * std::fabs(o.a)) * std::fabs(u) + std::fabs(o.a) * u_error : 0.0;
    }
    if (!clear) continue;
    ++compared;
    worst.same(nnz[t] == active);
    for (int64_t j = 0; j < d; ++j) {
      double want = c.bias ? bd[j] : 0.0, size = std::fabs(want), error = 0.0;
      for (int64_t i = 0; i < f; ++i) {
        const double w = down.w[i * d + j];
        want += h[i] * w, size += std::fabs(h[i] * w), error += h_error[i] * std::fabs(w);
      }
      error += down_steps * eps * size;
      worst.near(y[t * d + j], want, error + last_place(c.type) * (std::fabs(want) + error) + 1e-30);
    }
  }
  worst.same(2 * compared >= m);  // where fp32 may decide otherwise than float64 there is nothing to compare with
  return worst.ratio;
}

double inputs(const Case& c, std::mt19937& random) {
  Worst worst;
  std::normal_distribution<float> normal;
  const int64_t n = c.d, out = c.d_out, m = c.tokens;
  const Packed w(c, n, out, random);
  Buffer<float> bias(out), threshold(c.each ? n : 1);
  for (int64_t j = 0; j < out; ++j) bias[j] = normal(random);
  for (size_t i = 0; i < threshold.size(); ++i) threshold[i] = 0.2f + 0.1f * float(i % 7);
  Values x(c.type, m * n, c.shift), y(c.type, m * out);
  for (int64_t i = 0; i < m * n; ++i) x.put(i, random() % 3 ? normal(random) : 0.0f);
  Buffer<int32_t> nnz(m);
  const Device w_d(w, bias);
  const Mirror<unsigned char> x_d(x.bytes), y_d(y.bytes);
  const Mirror<float> threshold_d(threshold);
  const Mirror<int32_t> nnz_d(nnz);
  relu_ffn::InputSparseArgs a{};
  a.w = w_d.rows(w, c.bias), a.type = c.rows, a.group = c.group;
  a.threshold = threshold_d.get(), a.threshold_each = c.each;
  a.x = x_d.get(), a.dtype = c.type, a.tokens = m, a.d_in = n, a.d_out = out, a.y = y_d.get(), a.nnz = nnz_d.get();
  Buffer<uint8_t> memory(ffn::input_sparse_workspace(a));
  std::fill_n(memory.data(), memory.size(), 0xff);
  const Mirror<uint8_t> memory_d(memory);
  launched(ffn::input_sparse(a, memory_d.get(), nullptr));
  y_d.fetch(), nnz_d.fetch();
  for (int64_t t = 0; t < m; ++t) {
    int active = 0;
    const auto on = [&](int64_t i) { return std::fabs(x[t * n + i]) > threshold[c.each ? i : 0]; };
    for (int64_t i = 0; i < n; ++i) active += on(i);
    worst.same(nnz[t] == active);
    for (int64_t j = 0; j < out; ++j) {
      double want = c.bias ? bias[j] : 0.0, size = std::fabs(want);
      for (int64_t i = 0; i < n; ++i)
        if (on(i)) want += w.w[i * out + j] * x[t * n + i], size += std::fabs(w.w[i * out + j] * x[t * n + i]);
      const double error = (64.0 + 8 + double((n + 511) / 512) + 4) * 0x1p-24 * size;  // as of down above
      worst.near(y[t * out + j], want, error + last_place(c.type) * (std::fabs(want) + error) + 1e-30);
    }
  }
  return worst.ratio;
}

std::vector<Case> cases(bool quick) {
  std::vector<Case> all;
  const auto add = [&](Case c, auto change) { change(c), all.push_back(c); };
  const Rows kinds[] = {Rows::f32, Rows::bf16, Rows::f16, Rows::i8, Rows::i4};
  for (int r = 0; r < 5; ++r) {
    const Rows rows = kinds[r];
    const int group = neuron::quantised(rows) ? 32 : 0;
    // A set of one token, of four and of eight; several slices and chunks; the last ones not whole.
    add({300, 570, 1, rows, group}, [&](Case& c) { c.type = DType::bf16; });
    add({130, 90, 3, rows, group}, [&](Case& c) { c.gate = Gate::drelu; });
    add({520, 37, 9, rows, group ? 64 : 0}, [&](Case& c) { c.type = DType::f16, c.gate = Gate::relu2, c.gated = false; });
    add({77, 0, 9, rows, group}, [&](Case& c) { c.d_out = 300, c.each = true; });
  }
  // Gates that look at all of them, masks, thresholds, x off alignment, several panels, the dense way.
  all.push_back({64, 100, 2, Rows::bf16, 0, Gate::gelu_gauss});
  all.push_back({24, 1100, 1, Rows::f32, 0, Gate::gelu_gauss});
  all.push_back({32, 1100, 2, Rows::f32, 0, Gate::top_k});
  add({32, 60, 2, Rows::f32, 0, Gate::top_k}, [](Case& c) { c.ties = true; });
  add({32, 1100, 1, Rows::f32, 0, Gate::top_k}, [](Case& c) { c.ties = true, c.mask_rows = 1; });
  add({64, 100, 3, Rows::f32, 0, Gate::top_k}, [](Case& c) { c.mask_rows = 3, c.mask_group = 2; });
  add({64, 100, 3, Rows::f32, 0, Gate::gelu_gauss}, [](Case& c) { c.mask_rows = 1, c.mask_group = 3; });
  add({64, 100, 10, Rows::bf16, 0, Gate::fatrelu}, [](Case& c) { c.mask_rows = 10, c.each = true; });
  add({64, 100, 2, Rows::i8, 128, Gate::shifted_relu}, [](Case& c) { c.each = true, c.shift = 1; });
  add({66, 50, 2, Rows::bf16, 0, Gate::silu_threshold}, [](Case& c) { c.type = DType::f16, c.shift = 3; });
  all.push_back({1100, 40, 8, Rows::bf16});
  add({2100, 20, 6, Rows::i8, 0, Gate::relu}, [](Case& c) { c.type = DType::bf16; });
  add({64, 100, 2, Rows::bf16}, [](Case& c) { c.dense = true; });
  add({4, 7, 1, Rows::i4, 32}, [](Case& c) { c.bias = false; });
  if (quick) return all;
  for (const Rows rows : kinds)
    for (int gate = 0; gate < kGates; ++gate)
      for (int tokens : {1, 2, 5, 17}) {
        Case c{tokens * 50 + 37, 530 / tokens, tokens, rows, neuron::quantised(rows) ? (gate % 2 ? 0 : 128) : 0, Gate(gate), DType(gate % 3)};
        c.gated = gate == int(Gate::drelu) || tokens % 2;
        c.dense = tokens == 5;
        all.push_back(c);
      }
  all.push_back({64, 48, 130, Rows::bf16});  // three rounds of launches
  all.push_back({8500, 20, 1, Rows::bf16});
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && !std::strcmp(argv[1], "quick");
  std::mt19937 random(1);
  effk::test::Cases done;
  for (const Case& c : cases(quick)) {
    done.run(describe(c), [&] { return c.d_out ? inputs(c, random) : feed_forward(c, random); });
  }
  return done.finish();
}
