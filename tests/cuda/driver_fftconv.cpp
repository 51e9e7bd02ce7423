// The CUDA kernels of fftconv against direct sums in float64, without torch: the program that runs under ASan and UBSan in every
// thread order and must fail for every planted bug of mutants.py; on a GPU, the one that compute-sanitizer watches.
//   driver_fftconv [quick]     quick: no transforms above 4096 points
#include "buffers.h"
#include "cases.h"

#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "ops/fftconv/cuda.h"

namespace {
namespace fft = cuda::fftconv;
using fft::Mode;

struct Case {
  int batch, channels, length, taps, n_fft;
  Mode mode = Mode::causal;
  DType type = DType::f16;
  bool pregate = false, postgate = false, skip = false;
  int shift = 0;           // elements that every row tensor starts off alignment
  float spread = 1.0f;     // row r is scaled by spread^r
  bool gradients = true;
  int log_limit = 0;       // of one kernel; 0: what the device has
  float ramp = 0.0f;       // sample t is scaled by 2^(ramp t / length)
};

std::string describe(const Case& c) {
  const char* const modes[] = {"causal", "circular", "bidirectional"};
  return std::to_string(c.batch) + "x" + std::to_string(c.channels) + "x" + std::to_string(c.length) + " K " + std::to_string(c.taps) +
         " n_fft " + std::to_string(c.n_fft) + " " + modes[int(c.mode)] + (c.type == DType::f16 ? " f16" : c.type == DType::bf16 ? " bf16" : " f32") +
         (c.pregate ? " pre" : "") + (c.postgate ? " post" : "") + (c.skip ? " skip" : "") + (c.shift ? " shifted" : "") +
         (c.spread != 1.0f ? " spread" : "") + (c.log_limit ? " limit 2^" + std::to_string(c.log_limit) : "") + (c.ramp != 0.0f ? " ramp" : "");
}

float get(uint16_t bits, DType type) { return decode(bits, type); }
float get(float value, DType) { return value; }
void put(uint16_t& to, float value, DType type) { to = encode(value, type); }
void put(float& to, float value, DType) { to = value; }

void launched(int error) {
  if (error) throw std::runtime_error(fft::error_text(error));
}

// The tap that joins output t and input s, or -1.
int tap_of(const Case& c, int t, int s) {
  int lag = t - s;
  if (c.mode == Mode::circular && lag < 0) lag += c.length;
  if (c.mode == Mode::bidirectional && lag < 0 && lag >= -c.n_fft / 2) lag += c.n_fft;
  else if (c.mode == Mode::bidirectional && lag >= c.n_fft / 2) return -1;
  return lag >= 0 && lag < c.taps ? lag : -1;
}

// The largest error over its bound, row by row; NaN counts as infinite.
template <class T>
double worst(const Case& c, std::mt19937& random) {
  std::normal_distribution<float> normal;
  const int rows = c.batch * c.channels, length = c.length;
  const size_t count = size_t(rows) * length;
  // Rounding to the type of the result, and in a transform that of fp16 (fp32: of fp32): a factor of three above what is seen.
  const double bound = c.type == DType::f32 ? 1e-6 : c.type == DType::f16 ? 2e-3 : 6e-3;
  const auto fill = [&](Buffer<T>& b, bool spread) {
    for (size_t i = 0; i < count; ++i) put(b[i], normal(random) * (spread ? std::pow(c.spread, float(i / length)) * std::exp2(c.ramp * float(i % length) / float(length)) : 1.0f), c.type);
  };
  Buffer<T> u(count, c.shift), pre(count, c.shift), post(count, c.shift), gy(count, c.shift), y(count, c.shift), gu(count, c.shift),
      gpre(count, c.shift), gpost(count, c.shift);
  fill(u, true), fill(pre, false), fill(post, false), fill(gy, false);
  Buffer<float> k(size_t(c.channels) * c.taps), skip(c.channels), gk(k.size()), gskip(c.channels), partial(rows);
  for (size_t i = 0; i < k.size(); ++i) k[i] = normal(random);
  for (size_t i = 0; i < skip.size(); ++i) skip[i] = normal(random);

  int error;
  const int limit = fft::log_limit(error);
  launched(error);
  fft::Problem p{c.n_fft, c.mode, fft::Scheme::fft, c.batch, c.channels, length, c.type, nullptr,
                 fft::make_plan(c.n_fft, c.mode, c.log_limit ? c.log_limit : limit)};
  Buffer<float> spec(size_t(fft::spec_floats(p.plan, c.n_fft, c.mode, p.scheme, c.channels)));
  for (Buffer<T>* b : {&y, &gu, &gpre, &gpost}) std::fill_n(reinterpret_cast<unsigned char*>(b->data()), count * sizeof(T), 0xff);
  for (Buffer<float>* b : {&gk, &gskip, &partial, &spec}) std::fill_n(b->data(), b->size(), NAN);
  const Mirror<float> k_d(k), spec_d(spec);
  launched(fft::prepare(k_d.get(), c.channels, c.taps, c.n_fft, c.mode, p.scheme, p.plan, spec_d.get(), nullptr));
  p.spec = spec_d.get();
  Buffer<unsigned char> workspace(std::max(fft::convolve_workspace(p), fft::filter_gradient_workspace(p)));
  std::fill_n(workspace.data(), workspace.size(), 0xff);
  const Mirror<T> u_d(u), pre_d(pre), post_d(post), gy_d(gy), y_d(y), gu_d(gu), gpre_d(gpre), gpost_d(gpost);
  const Mirror<float> skip_d(skip), gk_d(gk), gskip_d(gskip), partial_d(partial);
  const Mirror<unsigned char> workspace_d(workspace);
  const auto maybe = [](bool there, const void* q) { return there ? q : nullptr; };
  const void *const pregate = maybe(c.pregate, pre_d.get()), *const postgate = maybe(c.postgate, post_d.get());
  const float* const through = c.skip ? skip_d.get() : nullptr;

  launched(fft::convolve(p, {u_d.get(), pregate, {postgate, nullptr}, {y_d.get(), nullptr}, through}, false, workspace_d.get(), nullptr));
  if (c.gradients) {
    launched(fft::convolve(p, {gy_d.get(), postgate, {pregate, u_d.get()}, {gu_d.get(), gpre_d.get()}, through}, true, workspace_d.get(), nullptr));
    launched(fft::convolve(p, {u_d.get(), pregate, {gy_d.get(), nullptr}, {gpost_d.get(), nullptr}, through}, false, workspace_d.get(), nullptr));
    launched(fft::filter_gradient(p, u_d.get(), pregate, gy_d.get(), postgate, c.taps, gk_d.get(), workspace_d.get(), nullptr));
    launched(fft::skip_gradient(p, u_d.get(), pregate, gy_d.get(), postgate, partial_d.get(), gskip_d.get(), nullptr));
    gu_d.fetch(), gpre_d.fetch(), gpost_d.fetch(), gk_d.fetch(), gskip_d.fetch();
  }
  y_d.fetch();

  double ratio = 0.0;
  const auto row_error = [&](const std::vector<double>& want, const auto& got, double allowed) {
    double errors = 0.0, size = 1e-300;
    for (size_t i = 0; i < want.size(); ++i) errors += std::pow(got(i) - want[i], 2), size += want[i] * want[i];
    const double r = std::sqrt(errors / size) / allowed;
    ratio = std::fmax(ratio, std::isnan(r) ? INFINITY : r);
  };
  for (int h = 0; h < c.channels; ++h) {
    std::vector<double> dk(c.taps);
    double dskip = 0.0, dskip_size = 1e-300;
    for (int b = 0; b < c.batch; ++b) {
      const size_t row = (size_t(b) * c.channels + h) * length;
      std::vector<double> v(length), g(length), conv(length), corr(length), want(length);
      for (int t = 0; t < length; ++t) {
        v[t] = double(get(u[row + t], c.type)) * (c.pregate ? get(pre[row + t], c.type) : 1.0);
        g[t] = double(get(gy[row + t], c.type)) * (c.postgate ? get(post[row + t], c.type) : 1.0);
        dskip += g[t] * v[t], dskip_size += std::fabs(g[t] * v[t]);
      }
      for (int t = 0; t < length; ++t)
        for (int s = c.mode == Mode::causal ? std::max(0, t - c.taps + 1) : 0; s < (c.mode == Mode::causal ? t + 1 : length); ++s) {
          const int j = tap_of(c, t, s);
          if (j < 0) continue;
          const double tap = k[size_t(h) * c.taps + j];
          conv[t] += tap * v[s], corr[s] += tap * g[t], dk[j] += g[t] * v[s];
        }
      const double d = c.skip ? skip[h] : 0.0;
      const auto compare = [&](const Buffer<T>& got, const auto& value) {
        for (int t = 0; t < length; ++t) want[t] = value(t);
        row_error(want, [&](size_t i) { return double(get(got[row + i], c.type)); }, bound);
      };
      const auto gate = [&](bool there, const Buffer<T>& of, int t) { return there ? double(get(of[row + t], c.type)) : 1.0; };
      compare(y, [&](int t) { return (conv[t] + d * v[t]) * gate(c.postgate, post, t); });
      if (!c.gradients) continue;
      compare(gu, [&](int t) { return (corr[t] + d * g[t]) * gate(c.pregate, pre, t); });
      compare(gpre, [&](int t) { return (corr[t] + d * g[t]) * get(u[row + t], c.type); });
      compare(gpost, [&](int t) { return (conv[t] + d * v[t]) * get(gy[row + t], c.type); });
    }
    if (!c.gradients) continue;
    row_error(dk, [&](size_t i) { return double(gk[size_t(h) * c.taps + i]); }, c.type == DType::f32 ? 1e-6 : 2e-3);
    const double r = std::fabs(gskip[h] - dskip) / (1e-6 * dskip_size);
    ratio = std::fmax(ratio, std::isnan(r) ? INFINITY : r);
  }
  return ratio;
}

std::vector<Case> cases(bool quick) {
  const DType f16 = DType::f16, bf16 = DType::bf16, f32 = DType::f32;
  const Mode causal = Mode::causal, circular = Mode::circular, both = Mode::bidirectional;
  std::vector<Case> all = {
      {3, 2, 100, 60, 256, causal, f16, true, true, true},
      {33, 1, 40, 9, 64, causal, bf16, true},                       // more rows than a block has, the last block ragged
      {2, 2, 256, 200, 256, circular, bf16, false, true},
      {2, 1, 160, 320, 320, both, f16},
      {1, 2, 500, 12, 512, causal, f16, false, false, true},        // both halves of the ring
      {17, 1, 512, 300, 1024, causal, f16, true, false, false, 1},  // off alignment
      {3, 3, 777, 700, 2048, causal, bf16, true, true},
      {5, 1, 1000, 25, 1024, causal, f16},
      {3, 2, 1500, 40, 4096, causal, f16, true},
      {1, 2, 2047, 2, 2048, causal, bf16},
      {3, 1, 4096, 30, 8192, causal, f16, true, true},
      {2, 1, 192, 192, 192, circular, f32, true, true, true},
      {2, 1, 1000, 2048, 2048, both, f32, true},
      {1, 2, 700, 300, 1024, causal, f32, false, true, false, 1},
      {4, 1, 300, 20, 1024, causal, f16, false, false, false, 0, 0.25f, false},
      {4, 1, 300, 20, 1024, causal, bf16, false, false, false, 0, 1e-9f},
      // The three kernels, with 256 points in one: outer factors of 16, 64 (two of the fp32 way) and 256.
      {2, 1, 4000, 50, 8192, causal, f16, true, true, true, 0, 1.0f, true, 8},
      {1, 1, 5001, 20, 8192, causal, bf16, true, false, false, 1, 1.0f, true, 8},
      {3, 1, 3000, 17, 8192, causal, f32, true, true, true, 0, 1.0f, true, 8},
      {1, 1, 4000, 20, 8192, causal, bf16, false, false, false, 0, 1.0f, false, 8, 30.0f},
      {2, 1, 16000, 12, 32768, causal, f16, true, false, true, 0, 1.0f, true, 8},
  };
  if (quick) return all;
  const std::vector<Case> large = {
      {1, 1, 8190, 100, 16384, causal, f16, true, true, false, 0, 1.0f, false},
      {1, 1, 16384, 40, 16384, circular, bf16, false, false, true, 0, 1.0f, false},
      {1, 1, 30000, 20, 65536, causal, f16, true, true, false, 0, 1.0f, false},
      {1, 1, 9000, 12, 131072, causal, f16, true, false, true, 0, 1.0f, true, 8},
  };
  all.insert(all.end(), large.begin(), large.end());
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && std::string(argv[1]) == "quick";
  std::mt19937 random(1);
  effk::test::Cases done;
  for (const Case& c : cases(quick)) {
    done.run(describe(c), [&] { return c.type == DType::f32 ? worst<float>(c, random) : worst<uint16_t>(c, random); });
  }
  return done.finish();
}
