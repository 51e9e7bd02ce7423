// Random calls of fftconv, its gradient, its decoding steps and depthwise_conv1d on every tier, in guarded memory, against
// direct sums in double precision.
//   fuzz_fftconv [calls [first seed]]
#include <algorithm>
#include <cmath>
#include <vector>

#include "fuzz.h"
#include "ops/depthwise_conv1d/depthwise_conv1d.h"
#include "ops/fftconv/fftconv.h"

namespace {

using namespace effk;
using namespace effk::test;
using spectrum::Mode;
using spectrum::Scheme;

struct Memory {
  static constexpr size_t kRoom = size_t(4) << 20;
  Guarded u{kRoom}, pre{kRoom}, post{kRoom}, gy{kRoom}, y{kRoom}, gu{kRoom}, gpre{kRoom}, gpost{kRoom}, k{kRoom}, spec{kRoom}, gk{kRoom},
      small{kRoom}, workspace{size_t(32) << 20};
};

// fp32 arithmetic over sums whose magnitude Cauchy and Schwarz bound by `size`, then one rounding to storage.
void expect_near(const char* what, double got, double want, double size, DType t) {
  const double storage = t == DType::f32 ? 6e-8 : t == DType::bf16 ? 4e-3 : 5e-4;
  if (!(std::fabs(got - want) <= 4e-6 * size + storage * std::fabs(want) + 1e-7)) fail(what);
}

double norm(const double* p, int64_t n) {
  double s = 0;
  for (int64_t i = 0; i < n; ++i) s += p[i] * p[i];
  return std::sqrt(s);
}

void convolution(Random& r, Memory& m, isa::Tier tier) {
  const bool is_long = r.chance(tier == isa::Tier::scalar ? 1 : 4);
  const Mode mode = is_long ? Mode::causal : Mode(r.below(3));
  const int64_t b = 1 + r.below(3), h = 1 + r.below(is_long ? 1 : 3);
  int64_t l = is_long ? 1 + r.below(9000) : 1 + r.below(r.chance(50) ? 40 : 400), taps = 1 + r.below(is_long ? 1200 : r.chance(50) ? 20 : 400);
  const bool exact = !is_long && mode == Mode::causal && r.chance(25);  // a row fills its transform, and is read in place
  if (exact) { l = int64_t(256) << r.below(3); taps = 1 + r.below(l); }
  const int64_t odd = exact || r.chance(60) ? 1 : r.chance(50) ? 3 : 5;
  int64_t n_fft = odd * 32;
  const auto grow = [&](int64_t least) { while (n_fft < least) n_fft *= 2; };
  if (mode == Mode::causal) grow(l + taps - 1);
  else grow(mode == Mode::circular ? std::max(l, taps) : 2 * l);
  if (mode == Mode::circular) l = n_fft, taps = std::min(taps, l);
  if (mode == Mode::bidirectional) taps = n_fft;
  const Scheme schemes[] = {Scheme::automatic, Scheme::fft, Scheme::overlap_save, Scheme::direct};
  const Scheme scheme = schemes[mode == Mode::causal ? r.below(4) : r.below(2)];
  const DType type = DType(r.below(3));
  const bool gated_in = r.chance(40), gated_out = r.chance(40), skipped = r.chance(40);
  const int64_t count = b * h * l;
  const ParallelFor pool = random_pool(r, 4);

  const Values u = random_values(r, m.u, type, count), k = random_values(r, m.k, DType::f32, h * taps);
  const Values pre = random_values(r, m.pre, type, gated_in ? count : 0), post = random_values(r, m.post, type, gated_out ? count : 0);
  const Values gy = random_values(r, m.gy, type, count), skip = random_values(r, m.small, DType::f32, skipped ? h : 0);

  const size_t floats = fftconv_spec_floats(h, taps, n_fft, mode, scheme);
  float* spec = reinterpret_cast<float*>(m.spec.place(floats * 4, true));
  fftconv_prepare(reinterpret_cast<const float*>(k.at), h, taps, n_fft, mode, scheme, spec,
                  room(m.workspace, fftconv_prepare_workspace(h, taps, n_fft, mode, scheme, pool.threads)), pool);
  FftConvArgs a{spec, u.at, gated_in ? pre.at : nullptr, gated_out ? post.at : nullptr,
                skipped ? reinterpret_cast<const float*>(skip.at) : nullptr, type, b, h, l, m.y.place(size_t(count) * width(type), r.chance(70))};
  fftconv(a, room(m.workspace, fftconv_workspace(a, pool.threads)), pool);
  if (!m.workspace.margin_intact() || !m.y.margin_intact() || !m.u.margin_intact() || !m.spec.margin_intact()) fail("written outside");

  FftConvBackwardArgs back{a, gy.at, taps, nullptr, nullptr, nullptr, nullptr, nullptr};
  const size_t bytes = size_t(count) * width(type);
  if (r.chance(80)) back.gu = m.gu.place(bytes, r.chance(70));
  if (gated_in && r.chance(80)) back.gpre = m.gpre.place(bytes, r.chance(70));
  if (gated_out && r.chance(80)) back.gpost = m.gpost.place(bytes, r.chance(70));
  if (r.chance(80)) back.gk = reinterpret_cast<float*>(m.gk.place(size_t(h * taps) * 4, r.chance(70)));
  std::vector<float> gskip(size_t(h), NAN);
  if (skipped) back.gskip = gskip.data();
  fftconv_backward(back, room(m.workspace, fftconv_backward_workspace(back, pool.threads)), pool);
  if (!m.workspace.margin_intact() || (back.gu && !m.gu.margin_intact()) || (back.gk && !m.gk.margin_intact())) fail("written outside");

  // lag of tap j, and the value of a row that it meets at t
  const auto lag = [&](int64_t j) { return mode == Mode::bidirectional && j >= (n_fft + 1) / 2 ? j - n_fft : j; };
  std::vector<double> v(static_cast<size_t>(l)), g(static_cast<size_t>(l));
  const auto value = [&](const std::vector<double>& row, int64_t n) {
    if (mode == Mode::circular) n = ((n % l) + l) % l;
    return n >= 0 && n < l ? row[size_t(n)] : 0.0;
  };
  const int64_t step = is_long ? 97 : l > 200 ? 7 : 1;  // long rows are checked at some places
  for (int64_t c = 0; c < h; ++c) {
    const double* w = &k.value[size_t(c * taps)];
    const double size_k = norm(w, taps), s = skipped ? skip.value[size_t(c)] : 0.0;
    std::vector<double> taps_sum(static_cast<size_t>(taps), 0.0);
    double skip_sum = 0, taps_size = 0, skip_size = 0;
    for (int64_t i = 0; i < b; ++i) {
      const int64_t row = (i * h + c) * l;
      for (int64_t t = 0; t < l; ++t) {
        v[size_t(t)] = u.value[size_t(row + t)] * (gated_in ? pre.value[size_t(row + t)] : 1.0);
        g[size_t(t)] = gy.value[size_t(row + t)] * (gated_out ? post.value[size_t(row + t)] : 1.0);
        skip_sum += v[size_t(t)] * g[size_t(t)];
      }
      const double size_v = norm(v.data(), l), size_g = norm(g.data(), l);
      skip_size += size_v * size_g;
      taps_size += size_v * size_g;
      for (int64_t t = r.below(step); t < l; t += step) {
        double conv = s * v[size_t(t)], corr = s * g[size_t(t)];
        for (int64_t j = 0; j < taps; ++j) {
          conv += w[j] * value(v, t - lag(j));
          corr += w[j] * value(g, t + lag(j));
        }
        const double in = gated_in ? pre.value[size_t(row + t)] : 1.0, out = gated_out ? post.value[size_t(row + t)] : 1.0;
        const double size_c = size_k * size_v + std::fabs(s * v[size_t(t)]), size_r = size_k * size_g + std::fabs(s * g[size_t(t)]);
        expect_near("y", load(static_cast<const uint8_t*>(a.y), type, row + t), conv * out, size_c * std::fabs(out), type);
        if (back.gu) expect_near("gu", load(static_cast<uint8_t*>(back.gu), type, row + t), corr * in, size_r * std::fabs(in), type);
        const double at_u = u.value[size_t(row + t)], at_g = gy.value[size_t(row + t)];
        if (back.gpre) expect_near("gpre", load(static_cast<uint8_t*>(back.gpre), type, row + t), corr * at_u, size_r * std::fabs(at_u), type);
        if (back.gpost) expect_near("gpost", load(static_cast<uint8_t*>(back.gpost), type, row + t), conv * at_g, size_c * std::fabs(at_g), type);
      }
      if (back.gk)
        for (int64_t j = 0; j < taps; j += step)
          for (int64_t t = 0; t < l; ++t) taps_sum[size_t(j)] += g[size_t(t)] * value(v, t - lag(j));
    }
    for (int64_t j = 0; back.gk && j < taps; j += step) expect_near("gk", back.gk[c * taps + j], taps_sum[size_t(j)], taps_size, DType::f32);
    if (skipped) expect_near("gskip", gskip[size_t(c)], skip_sum, skip_size, DType::f32);
  }
}

void decoding(Random& r, Memory& m) {
  const int64_t b = 1 + r.below(2), h = 1 + r.below(3), capacity = 1 + r.below(r.chance(20) ? 700 : 150), taps = 1 + r.below(capacity + 20);
  const int64_t rows = b * h;
  const ParallelFor pool = random_pool(r, 3);
  const Values k = random_values(r, m.k, DType::f32, h * taps), in = random_values(r, m.u, DType::f32, rows * capacity);
  std::vector<std::vector<float>> specs;
  std::vector<const float*> pointers;
  for (int64_t tile = kDecodeTile; tile < capacity; tile *= 2) {
    const int64_t used = std::min(taps, 2 * tile), n_fft = 2 * decode_points(tile);
    std::vector<float> cut(size_t(h * used));
    for (int64_t c = 0; c < h; ++c) std::copy_n(reinterpret_cast<const float*>(k.at) + c * taps, used, &cut[size_t(c * used)]);
    specs.emplace_back(fftconv_spec_floats(h, used, n_fft, Mode::causal, Scheme::fft));
    fftconv_prepare(cut.data(), h, used, n_fft, Mode::causal, Scheme::fft, specs.back().data(),
                    room(m.workspace, fftconv_prepare_workspace(h, used, n_fft, Mode::causal, Scheme::fft, pool.threads)), pool);
  }
  for (const auto& spec : specs) pointers.push_back(spec.data());
  float* x = reinterpret_cast<float*>(m.gu.place(size_t(rows * capacity) * 4, r.chance(70)));
  float* y = reinterpret_cast<float*>(m.y.place(size_t(rows * capacity) * 4, r.chance(70)));
  std::fill_n(y, rows * capacity, 0.0f);
  for (int64_t t = 0; t < capacity; ++t) {
    std::vector<float> now(static_cast<size_t>(rows)), got(static_cast<size_t>(rows), NAN);
    for (int64_t i = 0; i < rows; ++i) now[size_t(i)] = float(in.value[size_t(i * capacity + t)]);
    const DecodeArgs a{now.data(), got.data(), x, y, reinterpret_cast<const float*>(k.at), pointers.data(), b, h, capacity, taps, t};
    fftconv_decode_step(a, room(m.workspace, fftconv_decode_workspace(a, pool.threads)), pool);
    if (capacity > 200 && t % 13) continue;
    for (int64_t i = 0; i < rows; ++i) {
      const double* w = &k.value[size_t(i % h * taps)];
      double want = 0, size = 0;
      for (int64_t j = 0; j < std::min(taps, t + 1); ++j) {
        want += w[j] * in.value[size_t(i * capacity + t - j)];
        size += std::fabs(w[j] * in.value[size_t(i * capacity + t - j)]);
      }
      expect_near("decoded", got[size_t(i)], want, size + norm(w, taps) * norm(&in.value[size_t(i * capacity)], capacity), DType::f32);
    }
  }
  if (!m.gu.margin_intact() || !m.y.margin_intact() || !m.workspace.margin_intact()) fail("written outside");
}

void depthwise(Random& r, Memory& m) {
  const int64_t b = 1 + r.below(3), h = 1 + r.below(40), l = 1 + r.below(r.chance(10) ? 3000 : 80);
  const int64_t left = r.below(9), right = r.below(9), taps = 1 + r.below(std::min<int64_t>(l + left + right, 12)), out = l + left + right - taps + 1;
  const bool last = r.chance(50), biased = r.chance(50), silu = r.chance(30);
  const DType type = DType(r.below(3));
  const ParallelFor pool = random_pool(r, 3);
  const Values x = random_values(r, m.u, type, b * h * l), w = random_values(r, m.k, DType::f32, h * taps);
  const Values bias = random_values(r, m.small, DType::f32, biased ? h : 0);
  const DepthwiseArgs a{x.at, m.y.place(size_t(b * h * out) * width(type), r.chance(70)), type, type, reinterpret_cast<const float*>(w.at),
                        biased ? reinterpret_cast<const float*>(bias.at) : nullptr, b, h, taps, l, out, taps - 1 - left, last,
                        silu ? Activation::silu : Activation::none};
  depthwise_conv1d(a, room(m.workspace, depthwise_conv1d_workspace(h, taps, pool.threads)), pool);
  if (!m.y.margin_intact() || !m.workspace.margin_intact()) fail("written outside");
  const auto index = [&](int64_t i, int64_t c, int64_t t, int64_t length) { return size_t(last ? (i * length + t) * h + c : (i * h + c) * length + t); };
  for (int64_t i = 0; i < b; ++i)
    for (int64_t c = 0; c < h; ++c)
      for (int64_t t = 0; t < out; ++t) {
        double want = biased ? bias.value[size_t(c)] : 0.0, size = std::fabs(want);
        for (int64_t j = 0; j < taps; ++j) {
          const int64_t n = t + a.offset - j;
          if (n < 0 || n >= l) continue;
          const double term = w.value[size_t(c * taps + j)] * x.value[index(i, c, n, l)];
          want += term;
          size += std::fabs(term);
        }
        if (silu) want /= 1 + std::exp(-want);
        expect_near("short filter", load(static_cast<const uint8_t*>(a.y), type, int64_t(index(i, c, t, out))), want, size, type);
      }
}

void one_call(Random& r, Memory& m) {
  const isa::Tier tier = isa::Tier(r.below(int64_t(isa::detected()) + 1));
  isa::force(tier);
  if (r.chance(70)) convolution(r, m, tier);
  else if (r.chance(50)) depthwise(r, m);
  else decoding(r, m);
}

}  // namespace

int main(int argc, char** argv) {
  static Memory memory;
  return run_calls(argc, argv, [&](Random& r) { one_call(r, memory); });
}
