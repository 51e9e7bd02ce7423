// Random calls of attention on every tier, in guarded memory, against sums in double precision over what the cache holds (what is
// written to it is compared in tests/ops/test_attention.py).
//   fuzz_attention [calls [first seed]]
#include <algorithm>
#include <cmath>
#include <vector>

#include "fuzz.h"
#include "ops/attention/attention.h"

namespace {

using namespace effk;
using namespace effk::test;
using attention::Cache;
using attention::Run;
using kv::Type;

struct Memory {
  static constexpr size_t kRoom = size_t(48) << 20;
  Guarded q{kRoom}, k{kRoom}, v{kRoom}, out{kRoom}, keys{kRoom}, values{kRoom}, k_scale{kRoom}, v_scale{kRoom}, cosine{kRoom}, sine{kRoom},
      workspace{size_t(64) << 20};
};

float* floats(Guarded& memory, Random& r, int64_t count, float size) {
  auto* at = reinterpret_cast<float*>(memory.place(size_t(count) * 4, r.chance(70)));
  for (int64_t i = 0; i < count; ++i) at[i] = r.normal() * size;
  return at;
}

double element(const Cache& c, bool key, int64_t slot, int64_t head, int64_t p, int64_t channel) {
  const int64_t at = slot * c.kv_heads + head, bytes = kv::head_bytes(c.type, c.capacity, c.head_dim);
  const auto* memory = static_cast<const uint8_t*>(key ? c.k : c.v) + at * bytes +
                       (key ? kv::key_byte(c.type, c.head_dim, p, channel) : kv::value_byte(c.type, c.head_dim, p, channel));
  if (c.type == Type::f32) return load(memory, DType::f32, 0);
  if (c.type == Type::f16) return load(memory, DType::f16, 0);
  const float scale = (key ? c.k_scale : c.v_scale)[at * kv::padded(c.capacity) + p];
  return double(scale) * (key ? int(*memory) - 128 : int(int8_t(*memory)));
}

// Row t of a run and head h against the oracle; see tests/ops/test_attention.py for the bound.
void check(const attention::Args& a, const Run& run, int64_t t, int64_t h) {
  const Cache& c = a.cache;
  const int64_t d = c.head_dim, group = a.heads / c.kv_heads, p = run.start + t, half = a.cosine ? a.rotary / 2 : 0;
  const float* x = a.q + (run.row + t) * a.q_stride + h * d;
  std::vector<double> q(size_t(d), 0.0), size(q), scores, weights;
  double most = 0;
  for (int64_t i = 0; i < d; ++i) {
    q[size_t(i)] = x[i], size[size_t(i)] = std::fabs(x[i]);
    if (i >= 2 * half) continue;
    const int64_t j = i % half;
    const double cosine = a.cosine[p * half + j], sine = a.sine[p * half + j], first = x[j], second = x[j + half];
    q[size_t(i)] = i < half ? first * cosine - second * sine : second * cosine + first * sine;
    size[size_t(i)] = (std::fabs(first) + std::fabs(second)) * std::max(std::fabs(cosine), std::fabs(sine));
  }
  for (int64_t i = 0; i < d; ++i) most = std::max(most, size[size_t(i)]);
  const int64_t low = a.window ? std::max<int64_t>(0, p - a.window + 1) : 0;
  double top = -1e300, off = 0;
  for (int64_t j = low; j <= p; ++j) {
    double score = 0, magnitude = 0, sum = 0;
    for (int64_t i = 0; i < d; ++i) {
      const double key = element(c, true, run.slot, h / group, j, i);
      score += q[size_t(i)] * key, magnitude += size[size_t(i)] * std::fabs(key), sum += std::fabs(key);
    }
    scores.push_back(score * a.scale);
    top = std::max(top, scores.back());
    off = std::max(off, a.scale * (double(d + 16) * 6e-8 * magnitude + (c.type == Type::i8 ? most * sum / (127 * 128 * 2) : 0)));
  }
  double norm = 0;
  for (double s : scores) weights.push_back(std::exp(s - top)), norm += weights.back();
  const double rate = std::expm1(2.2 * off) + 2 * double(std::min<int64_t>(p + 1, 256) + 4 * (p / 256 + 1) + 16) * 6e-8 + 4e-7;
  for (int64_t i = 0; i < d; ++i) {
    double want = 0, bound = 0;
    for (size_t j = 0; j < weights.size(); ++j) {
      const double value = element(c, false, run.slot, h / group, low + int64_t(j), i);
      want += weights[j] / norm * value, bound += weights[j] / norm * std::fabs(value);
    }
    const double got = a.out[(run.row + t) * a.out_stride + h * d + i];
    if (!(std::fabs(got - want) <= rate * bound + 1e-30)) fail("attention: out");
  }
}

void one_call(Random& r, Memory& m) {
  random_tier(r);
  attention::Args a{};
  Cache& c = a.cache;
  c.type = Type(r.below(3));
  c.slots = 1 + r.below(3), c.kv_heads = 1 + r.below(3), c.head_dim = 16 * (1 + r.below(r.chance(10) ? 16 : 8));
  c.capacity = 1 + r.below(r.chance(20) ? 600 : 90);
  a.heads = c.kv_heads * (1 + r.below(8));
  a.scale = float(1 / std::sqrt(double(c.head_dim)));
  a.window = r.chance(30) ? 1 + r.below(c.capacity) : 0;
  const int64_t d = c.head_dim;
  const size_t bytes = size_t(c.slots * c.kv_heads * kv::head_bytes(c.type, c.capacity, d));
  c.k = m.keys.place(bytes, r.chance(70)), c.v = m.values.place(bytes, r.chance(70));
  if (c.type == Type::i8) {
    const size_t scales = size_t(c.slots * c.kv_heads * kv::padded(c.capacity)) * 4;
    c.k_scale = reinterpret_cast<float*>(m.k_scale.place(scales, r.chance(70)));
    c.v_scale = reinterpret_cast<float*>(m.v_scale.place(scales, r.chance(70)));
  }
  if (r.chance(70)) {
    a.rotary = 2 * (1 + r.below(d / 2));
    float* cosine = floats(m.cosine, r, c.capacity * a.rotary / 2, 0);
    float* sine = floats(m.sine, r, c.capacity * a.rotary / 2, 0);
    for (int64_t i = 0; i < c.capacity * a.rotary / 2; ++i) cosine[i] = float(std::cos(double(i))), sine[i] = float(std::sin(double(i)));
    a.cosine = cosine, a.sine = sine;
  }
  std::vector<int64_t> held(size_t(c.slots), 0);
  for (int step = 0; step < 3; ++step) {
    std::vector<Run> runs;
    int64_t rows = 0;
    for (int64_t s = 0; s < c.slots; ++s) {
      const int64_t left = c.capacity - held[size_t(s)], count = std::min(left, r.chance(50) ? 1 : 1 + r.below(r.chance(20) ? 600 : 20));
      if (count < 1 || r.chance(20)) continue;
      runs.push_back({rows, count, s, held[size_t(s)]});
      rows += count, held[size_t(s)] += count;
    }
    if (r.chance(50)) std::reverse(runs.begin(), runs.end());
    a.q_stride = a.out_stride = a.heads * d, a.k_stride = a.v_stride = c.kv_heads * d;
    a.q = floats(m.q, r, rows * a.q_stride, 2), a.k = floats(m.k, r, rows * a.k_stride, 1), a.v = floats(m.v, r, rows * a.v_stride, 1);
    a.out = reinterpret_cast<float*>(m.out.place(size_t(rows * a.out_stride) * 4, r.chance(70)));
    a.runs = runs.data(), a.n_runs = int64_t(runs.size());
    const ParallelFor pool = random_pool(r, 7);
    attention::run(a, room(m.workspace, attention::workspace(a, pool.threads)), pool);
    expect_intact("attention: written beyond a buffer", {&m.q, &m.k, &m.v, &m.out, &m.workspace});
    expect_intact("attention: written beyond the cache", {&m.keys, &m.values});
    for (const Run& run : runs)
      for (int n = 0; n < 3; ++n) check(a, run, n ? r.below(run.count) : run.count - 1, r.below(a.heads));
  }
}

}  // namespace

int main(int argc, char** argv) {
  static Memory memory;
  return run_calls(argc, argv, [&](Random& r) { one_call(r, memory); });
}
