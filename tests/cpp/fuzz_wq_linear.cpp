// Random calls of wq_linear on every tier, in guarded memory, against a double reference.
//   fuzz_wq_linear [calls [first seed]]
// Each call is a function of its seed: a failure prints it, and `fuzz_wq_linear 1 <seed>` repeats it.
#include <algorithm>
#include <cmath>
#include <vector>

#include "entries.h"
#include "fuzz.h"
#include "ops/wq_linear/wq_linear.h"

namespace {

using namespace effk;
using namespace effk::test;

constexpr int64_t kLong = 2000;  // a few problems are so long that a row has more outliers than a kernel takes at once

// The memory of one weight, and the weight as plain numbers.
struct Weight {
  static constexpr size_t kRoom = size_t(1) << 20;
  Guarded packed{kRoom}, scales{kRoom}, zeros{kRoom}, codebook{kRoom}, ptr{kRoom}, col{kRoom}, val{kRoom}, bias{kRoom};
  Guarded y{kRoom}, unpacked{kRoom}, unpacked_scales{kRoom}, unpacked_zeros{kRoom}, dense{kRoom};
  WqWeight w;
  std::vector<float> code_value, scale, center;  // [n, k]: value without scale, scale; |terms| of the float form's zeros
  std::vector<double> sparse;                    // [n, k]
  std::vector<float> bias_value;
};

void fill(Random& r, Weight& o, int64_t k, Compute compute) {
  const int bit_choices[] = {2, 3, 4, 8}, group_choices[] = {32, 64, 128, 256, 0};
  WqWeight& w = o.w;
  w = WqWeight{};
  w.n = r.chance(2) ? 0 : 1 + r.below(k >= kLong ? 20 : r.chance(20) ? 120 : 40);
  w.k = k;
  w.bits = bit_choices[r.below(4)];
  w.group = group_choices[r.below(5)];
  w.scales_f32 = r.chance(30);
  const int64_t n = w.n, groups = t16::groups(k, w.group), tiles = t16::tiles(n), codes = int64_t(1) << w.bits;
  const int64_t row_bytes = t16::ceil_div(k * w.bits, 8), span = w.group ? w.group : k;
  const size_t scale_bytes = w.scales_f32 ? 4 : 2;
  const auto upper = [&] { return r.chance(70); };

  enum { symmetric, asymmetric, table, row_tables };
  int kind = int(r.below(w.bits == 8 ? 2 : compute == Compute::int8 ? 3 : 4));
  std::vector<uint8_t> q(size_t(n * row_bytes)), z(size_t(n * groups)), code(size_t(n * k));
  std::vector<uint8_t> s(size_t(n * groups) * scale_bytes);
  const int extreme = r.chance(20) ? int(r.below(2)) + 1 : 0;  // all codes zero, or all at the top
  for (int64_t i = 0; i < n * k; ++i) {
    const int c = extreme == 1 ? 0 : extreme == 2 ? int(codes) - 1 : int(r.below(codes));
    code[size_t(i)] = uint8_t(c);
    const int64_t bit = i % k * w.bits, byte = i / k * row_bytes + bit / 8;
    q[size_t(byte)] = uint8_t(q[size_t(byte)] | c << bit % 8);
    if (bit % 8 + w.bits > 8) q[size_t(byte) + 1] = uint8_t(q[size_t(byte) + 1] | c >> (8 - bit % 8));
  }
  for (int64_t i = 0; i < n * groups; ++i) {
    store(s.data(), w.scales_f32 ? DType::f32 : DType::f16, i, (r.chance(20) ? -1.0f : 1.0f) * (0.5f + float(r.below(64)) / 64) / 256);
    z[size_t(i)] = uint8_t(r.below(codes));
  }

  uint8_t* packed = o.packed.place(size_t(t16::packed_bytes(n, k, w.bits)), upper());
  uint8_t* scales = o.scales.place(size_t(tiles * groups * 16) * scale_bytes, upper());
  uint8_t* zeros = kind == asymmetric ? o.zeros.place(size_t(tiles * groups * 16), upper()) : nullptr;
  wq_pack(q.data(), s.data(), zeros ? z.data() : nullptr, n, k, w.bits, w.group, int(scale_bytes), packed, scales, zeros);
  w.packed = packed;
  w.scales = scales;
  w.zeros = zeros;

  uint8_t* q2 = o.unpacked.place(q.size(), upper());
  uint8_t* s2 = o.unpacked_scales.place(s.size(), upper());
  uint8_t* z2 = zeros ? o.unpacked_zeros.place(z.size(), upper()) : nullptr;
  wq_unpack(packed, scales, zeros, n, k, w.bits, w.group, int(scale_bytes), q2, s2, z2);
  if (std::memcmp(q2, q.data(), q.size()) || std::memcmp(s2, s.data(), s.size()) || (z2 && std::memcmp(z2, z.data(), z.size())))
    fail("unpacking does not invert packing");

  for (int64_t row = n; row < tiles * 16; ++row)
    for (int64_t g = 0; g < groups; ++g)
      if (load(scales, w.scales_f32 ? DType::f32 : DType::f16, (row / 16 * groups + g) * 16 + row % 16) != 0.0f)
        fail("the scale of a padding row is not zero");

  const float* tables = nullptr;
  if (kind == table || kind == row_tables) {
    w.codebook_per_row = kind == row_tables;
    const int64_t entries = w.codebook_per_row ? tiles * codes * 16 : codes;
    float* t = reinterpret_cast<float*>(o.codebook.place(size_t(entries) * 4, upper()));
    for (int64_t i = 0; i < entries; ++i) t[i] = r.normal();
    tables = w.codebook = t;
  }

  o.sparse.assign(size_t(n * k), 0.0);
  if (r.chance(40)) {
    std::vector<int32_t> ptr{0};
    std::vector<uint16_t> col, val;
    const int percent = r.chance(k >= kLong ? 50 : 10) ? 60 : 2;
    for (int64_t row = 0; row < n; ++row) {
      for (int64_t c = 0; c < k; ++c) {
        if (!r.chance(percent)) continue;
        col.push_back(uint16_t(c));
        val.push_back(float_to_f16(r.normal()));
        o.sparse[size_t(row * k + c)] = f16_to_float(val.back());
      }
      ptr.push_back(int32_t(col.size()));
    }
    const auto copy = [&](Guarded& to, const auto& from) {
      uint8_t* p = to.place(from.size() * sizeof(from[0]), upper());
      if (!from.empty()) std::memcpy(p, from.data(), from.size() * sizeof(from[0]));
      return p;
    };
    w.out_ptr = reinterpret_cast<const int32_t*>(copy(o.ptr, ptr));
    w.out_col = copy(o.col, rank_by_rank(ptr, col));
    w.out_val = reinterpret_cast<const uint16_t*>(copy(o.val, rank_by_rank(ptr, val)));
  }

  o.bias_value.assign(size_t(n), 0.0f);
  if (r.chance(40)) {
    w.bias_dtype = DType(r.below(3));
    uint8_t* b = o.bias.place(size_t(n) * width(w.bias_dtype), upper());
    for (int64_t i = 0; i < n; ++i) {
      store(b, w.bias_dtype, i, r.normal());
      o.bias_value[size_t(i)] = load(b, w.bias_dtype, i);
    }
    w.bias = b;
  }

  o.code_value.resize(size_t(n * k));
  o.scale.resize(size_t(n * k));
  o.center.assign(size_t(n * k), 0.0f);
  const float half = float(codes / 2);
  float top = 0;
  for (int64_t i = 0; tables && kind == table && i < codes; ++i) top = std::max(top, std::fabs(tables[i]));
  for (int64_t i = 0; i < n * k; ++i) {
    const int64_t row = i / k, g = row * groups + i % k / span;
    const int c = code[size_t(i)];
    float v = float(c) - (zeros ? float(z[size_t(g)]) : half);
    if (kind == table) v = compute == Compute::int8 ? std::nearbyintf(tables[c] * (127.0f / top)) * (top / 127.0f) : tables[c];
    if (kind == row_tables) v = tables[(row / 16 * codes + c) * 16 + row % 16];
    o.code_value[size_t(i)] = v;
    o.scale[size_t(i)] = load(s.data(), w.scales_f32 ? DType::f32 : DType::f16, g);
    if (zeros) o.center[size_t(i)] = std::fabs(float(z[size_t(g)]) - half) + std::fabs(float(c) - half);
  }

  float* dense = reinterpret_cast<float*>(o.dense.place(size_t(n * k) * 4, upper()));
  wq_dequantize(w, dense);
  for (int64_t i = 0; i < n * k; ++i) {
    if (kind == table && compute == Compute::int8) break;  // code_value is the rounded table there
    const double expected = double(o.scale[size_t(i)]) * o.code_value[size_t(i)] + o.sparse[size_t(i)];
    if (std::fabs(dense[i] - expected) > 3e-7 * (std::fabs(expected) + std::fabs(o.sparse[size_t(i)]))) fail("dequantized value");
  }
}

// x as the products see it: itself, or its int8 codes times their scale (csrc/ops/wq_linear/wq_linear.h).
std::vector<double> seen(const std::vector<float>& x, int64_t m, int64_t k, int group, Compute compute) {
  std::vector<double> out(x.begin(), x.end());
  if (compute == Compute::fp) return out;
  const int64_t span = t16::act_group(group);
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t k0 = 0; k0 < k; k0 += span) {
      const int64_t end = std::min(k, k0 + span);
      float top = 0;
      for (int64_t i = k0; i < end; ++i) top = std::max(top, std::fabs(x[size_t(row * k + i)]));
      const bool usable = top >= 0x1p-119f;
      const float inverse = usable ? 127.0f / top : 0.0f, scale = usable ? top / 127.0f : 0.0f;
      for (int64_t i = k0; i < end; ++i)
        out[size_t(row * k + i)] = double(std::nearbyintf(x[size_t(row * k + i)] * inverse)) * scale;
    }
  }
  return out;
}

// The bound is that of tests/wq_cases.py: chains of fp32 roundings over the sum of the magnitudes, then one to y's type.
void check(const Weight& o, const std::vector<float>& x, int64_t m, DType type, Compute compute, const uint8_t* y) {
  const int64_t n = o.w.n, k = o.w.k;
  const std::vector<double> rows = seen(x, m, k, o.w.group, compute);
  const double step = type == DType::f32 ? 0x1p-24 : type == DType::bf16 ? 0x1p-8 : 0x1p-11;
  for (int64_t a = 0; a < m; ++a) {
    for (int64_t b = 0; b < n; ++b) {
      double sum = o.bias_value[size_t(b)], magnitude = std::fabs(sum);
      for (int64_t i = 0; i < k; ++i) {
        const size_t at = size_t(b * k + i);
        const double scaled = rows[size_t(a * k + i)] * o.scale[at], sparse = o.sparse[at] * x[size_t(a * k + i)];
        sum += scaled * o.code_value[at] + sparse;
        magnitude += std::fabs(scaled) * std::max(std::fabs(o.code_value[at]), o.center[at]) + std::fabs(sparse);
      }
      const double bound = magnitude * double(2 * k + 2 * t16::groups(k, o.w.group) + 16) * 0x1p-24 + 0x1p-100;
      const double got = load(y, type, a * n + b);
      if (!(std::fabs(got - sum) <= bound + step * (std::fabs(sum) + bound) + (type == DType::f16 ? 0x1p-24 : 0x1p-126))) {
        std::fprintf(stderr, "row %lld column %lld: %.9g, expected %.9g within %.3g; m %lld n %lld k %lld bits %d group %d %s\n",
                     (long long)a, (long long)b, got, sum, bound, (long long)m, (long long)n, (long long)k, o.w.bits,
                     o.w.group, compute == Compute::int8 ? "int8" : "float");
        fail("wrong result");
      }
    }
  }
}

void one_call(Random& r, Guarded& x_memory, Guarded& workspace, Weight* weights, int most_weights) {
  const isa::Tier tier = isa::Tier(r.below(int(isa::detected()) + 1));
  isa::force(tier, r.chance(70));
  const int64_t k = r.chance(1) ? kLong + r.below(3000) : 1 + r.below(r.chance(20) ? 600 : r.chance(50) ? 200 : 40);
  // Rows of x: around the borders of the kernels; the portable tier is slow and has fewer of them.
  const int64_t m = r.chance(2) ? 0 : r.chance(40) ? 1 : 1 + r.below(k < kLong && r.chance(tier == isa::Tier::scalar ? 2 : 10) ? 160 : 16);
  const DType type = DType(r.below(3));
  const Compute compute = Compute(r.below(2));
  const int count = 1 + int(r.chance(20) ? r.below(most_weights) : 0);

  std::vector<float> x(size_t(m * k));
  uint8_t* rows = x_memory.place(size_t(m * k) * width(type), r.chance(70));
  for (int64_t i = 0; i < m * k; ++i) {
    store(rows, type, i, r.normal() * (r.chance(2) ? 30.0f : 1.0f));
    x[size_t(i)] = load(rows, type, i);
  }

  std::vector<WqWeight> w;
  std::vector<void*> y;
  for (int i = 0; i < count; ++i) {
    fill(r, weights[i], k, compute);
    w.push_back(weights[i].w);
    y.push_back(weights[i].y.place(size_t(m * weights[i].w.n) * width(type), r.chance(70)));
  }
  WqLinearArgs args{};
  args.x = rows;
  args.x_dtype = type;
  args.m = m;
  args.k = k;
  args.weights = w.data();
  args.y = y.data();
  args.n_weights = count;
  args.compute = compute;
  wq_linear(args, room(workspace, wq_linear_workspace(args)), random_pool(r, 4));

  if (!workspace.margin_intact() || !x_memory.margin_intact()) fail("written outside the workspace or into x");
  for (int i = 0; i < count; ++i) {
    if (!weights[i].y.margin_intact()) fail("written outside y");
    check(weights[i], x, m, type, compute, static_cast<const uint8_t*>(y[size_t(i)]));
  }
}

}  // namespace

int main(int argc, char** argv) {
  constexpr int kMostWeights = 3;
  Guarded x(size_t(1) << 20), workspace(size_t(8) << 20);
  static Weight weights[kMostWeights];
  return test::run_calls(argc, argv, [&](Random& r) { one_call(r, x, workspace, weights, kMostWeights); });
}
