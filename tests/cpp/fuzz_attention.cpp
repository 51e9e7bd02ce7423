// Random calls of attention on every tier, in guarded memory: the cache against what was appended, results against sums in double
// precision over what the cache holds, and both bit for bit against the same tokens in other runs.
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
      keys_again{kRoom}, values_again{kRoom}, k_scale_again{kRoom}, v_scale_again{kRoom}, workspace{size_t(64) << 20};
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

// What a cache holds of the token at position p against k and v, turned and rounded to its type.
void check_stored(const attention::Args& a, int64_t slot, int64_t head, int64_t p, const float* k, const float* v) {
  const Cache& c = a.cache;
  const int64_t half = a.cosine ? a.rotary / 2 : 0;
  std::vector<double> key(k, k + c.head_dim), size(size_t(c.head_dim), 0.0);
  double most_key = 0, most_value = 0;
  for (int64_t i = 0; i < half; ++i) {
    const double cosine = a.cosine[p * half + i], sine = a.sine[p * half + i], first = k[i], second = k[i + half];
    key[size_t(i)] = first * cosine - second * sine, key[size_t(i + half)] = second * cosine + first * sine;
    size[size_t(i)] = size[size_t(i + half)] = 3 * 0x1p-24 * (std::fabs(first) + std::fabs(second));
  }
  for (int64_t i = 0; i < c.head_dim; ++i) most_key = std::max(most_key, std::fabs(key[size_t(i)])), most_value = std::max(most_value, double(std::fabs(v[i])));
  const auto expect = [&](bool is_key, int64_t i, double want, double off, double most) {
    const double step = c.type == Type::i8 ? 0.5001 * most / 127 + 2 * off : (c.type == Type::f16 ? 0x1p-11 * std::fabs(want) + 0x1p-24 : 0) + off;
    if (!(std::fabs(element(c, is_key, slot, head, p, i) - want) <= step)) fail(is_key ? "attention: stored key" : "attention: stored value");
  };
  for (int64_t i = 0; i < c.head_dim; ++i) expect(true, i, key[size_t(i)], size[size_t(i)], most_key), expect(false, i, v[i], 0, most_value);
}

void place_cache(Random& r, Cache& c, Guarded& k, Guarded& v, Guarded& k_scale, Guarded& v_scale) {
  const int64_t heads = c.slots * c.kv_heads, bytes = heads * kv::head_bytes(c.type, c.capacity, c.head_dim);
  c.k = place<uint8_t>(r, k, bytes), c.v = place<uint8_t>(r, v, bytes);
  if (c.type != Type::i8) return;
  c.k_scale = place<float>(r, k_scale, heads * kv::padded(c.capacity)), c.v_scale = place<float>(r, v_scale, heads * kv::padded(c.capacity));
}

// What a sequence was fed and what came out, one token behind the other.
struct Sequence {
  std::vector<float> q, k, v, out;
  int64_t length = 0;
};

// One step of some sequences: up to `most` of the tokens that are left of each.
std::vector<Run> random_runs(Random& r, const std::vector<int64_t>& held, const std::vector<int64_t>& ends, int64_t most, int skipped) {
  std::vector<Run> runs;
  int64_t rows = 0;
  for (size_t s = 0; s < held.size(); ++s) {
    const int64_t count = std::min(ends[s] - held[s], r.chance(50) ? 1 : 1 + r.below(r.chance(20) ? most : 20));
    if (count < 1 || r.chance(skipped)) continue;
    runs.push_back({rows, count, int64_t(s), held[s]});
    rows += count;
  }
  if (r.chance(50)) std::reverse(runs.begin(), runs.end());
  return runs;
}

void call(Random& r, Memory& m, attention::Args& a, const std::vector<Run>& runs) {
  a.runs = runs.data(), a.n_runs = int64_t(runs.size());
  const ParallelFor pool = random_pool(r, 7);
  attention::run(a, room(m.workspace, attention::workspace(a, pool.threads)), pool);
  expect_intact("attention: written beyond a buffer", {&m.q, &m.k, &m.v, &m.out, &m.workspace});
}

// The same tokens in other runs, by other threads, in another cache: the same bits.
void repeat(Random& r, Memory& m, attention::Args a, const std::vector<Sequence>& all) {
  Cache& c = a.cache;
  const Cache first = c;
  place_cache(r, c, m.keys_again, m.values_again, m.k_scale_again, m.v_scale_again);
  std::vector<int64_t> held(all.size(), 0), ends;
  for (const Sequence& s : all) ends.push_back(s.length);
  const int64_t q_row = a.heads * c.head_dim, kv_row = c.kv_heads * c.head_dim;
  while (held != ends) {
    const std::vector<Run> runs = random_runs(r, held, ends, 600, 10);
    if (runs.empty()) continue;
    int64_t rows = 0;
    for (const Run& run : runs) rows += run.count;
    float *q = place<float>(r, m.q, rows * q_row), *k = place<float>(r, m.k, rows * kv_row), *v = place<float>(r, m.v, rows * kv_row);
    for (const Run& run : runs) {
      const Sequence& s = all[size_t(run.slot)];
      std::copy_n(s.q.begin() + run.start * q_row, run.count * q_row, q + run.row * q_row);
      std::copy_n(s.k.begin() + run.start * kv_row, run.count * kv_row, k + run.row * kv_row);
      std::copy_n(s.v.begin() + run.start * kv_row, run.count * kv_row, v + run.row * kv_row);
      held[size_t(run.slot)] += run.count;
    }
    a.q = q, a.k = k, a.v = v, a.out = place<float>(r, m.out, rows * q_row);
    call(r, m, a, runs);
    for (const Run& run : runs)
      if (std::memcmp(a.out + run.row * q_row, all[size_t(run.slot)].out.data() + run.start * q_row, size_t(run.count * q_row) * 4))
        fail("attention: a token depends on its run");
  }
  const size_t bytes = size_t(c.slots * c.kv_heads * kv::head_bytes(c.type, c.capacity, c.head_dim));
  if (std::memcmp(c.k, first.k, bytes) || std::memcmp(c.v, first.v, bytes)) fail("attention: the cache depends on the runs");
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
  place_cache(r, c, m.keys, m.values, m.k_scale, m.v_scale);
  if (r.chance(70)) {
    a.rotary = 2 * (1 + r.below(d / 2));
    float* cosine = floats(m.cosine, r, c.capacity * a.rotary / 2, 0);
    float* sine = floats(m.sine, r, c.capacity * a.rotary / 2, 0);
    for (int64_t i = 0; i < c.capacity * a.rotary / 2; ++i) cosine[i] = float(std::cos(double(i))), sine[i] = float(std::sin(double(i)));
    a.cosine = cosine, a.sine = sine;
  }
  a.q_stride = a.out_stride = a.heads * d, a.k_stride = a.v_stride = c.kv_heads * d;
  std::vector<Sequence> all(static_cast<size_t>(c.slots));
  std::vector<int64_t> held(all.size(), 0);
  const std::vector<int64_t> ends(all.size(), c.capacity);
  for (int step = 0; step < 3; ++step) {
    const std::vector<Run> runs = random_runs(r, held, ends, 600, 20);
    int64_t rows = 0;
    for (const Run& run : runs) rows += run.count;
    a.q = floats(m.q, r, rows * a.q_stride, 2), a.k = floats(m.k, r, rows * a.k_stride, 1), a.v = floats(m.v, r, rows * a.v_stride, 1);
    a.out = place<float>(r, m.out, rows * a.out_stride);
    call(r, m, a, runs);
    expect_intact("attention: written beyond the cache", {&m.keys, &m.values});
    for (const Run& run : runs) {
      for (int n = 0; n < 3; ++n) {
        const int64_t t = n ? r.below(run.count) : run.count - 1, head = r.below(c.kv_heads);
        check(a, run, t, r.below(a.heads));
        check_stored(a, run.slot, head, run.start + t, a.k + (run.row + t) * a.k_stride + head * d, a.v + (run.row + t) * a.v_stride + head * d);
      }
      Sequence& s = all[size_t(run.slot)];
      const auto append = [&](std::vector<float>& to, const float* from, int64_t stride) {
        to.insert(to.end(), from + run.row * stride, from + (run.row + run.count) * stride);
      };
      append(s.q, a.q, a.q_stride), append(s.k, a.k, a.k_stride), append(s.v, a.v, a.v_stride), append(s.out, a.out, a.out_stride);
      held[size_t(run.slot)] = s.length += run.count;
    }
  }
  if (r.chance(50)) repeat(r, m, a, all);
}

}  // namespace

int main(int argc, char** argv) {
  static Memory memory;
  return run_calls(argc, argv, [&](Random& r) { one_call(r, memory); });
}
