// The CUDA kernels of bitmask_linear against float64 and exact integers, without torch: the program that runs under ASan and UBSan in
// every thread order and must fail for every planted bug of mutants.py; on a GPU, the one that compute-sanitizer watches.
//   driver_bitmask [quick]     quick: the cases of the planted bugs
#include "buffers.h"
#include "cases.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "ops/bitmask_linear/cuda.h"

namespace {
namespace device_bitmask = cuda::bitmask;
using bitmask::Values;

struct Case {
  int n, k, m;
  Values values = Values::f32;
  bool int8 = false;
  int group = 0;
  double sparsity = 0.6;
  DType type = DType::f32;
  bool bias = true;
};

std::string describe(const Case& c) {
  const char* const types[] = {" f32", " bf16", " f16"};
  return "N " + std::to_string(c.n) + " K " + std::to_string(c.k) + " M " + std::to_string(c.m) + " " + bitmask::kValueNames[int(c.values)] + "/" +
         std::to_string(c.group) + (c.int8 ? " int8" : "") + types[int(c.type)];
}

void launched(int error) {
  if (error) throw std::runtime_error(device_bitmask::error_text(error));
}
float read(const Buffer<unsigned char>& b, DType t, size_t i) {
  if (t == DType::f32) return reinterpret_cast<const float*>(b.data())[i];
  return decode(reinterpret_cast<const uint16_t*>(b.data())[i], t);
}
void put(const Buffer<unsigned char>& b, DType t, size_t i, float v) {
  if (t == DType::f32) reinterpret_cast<float*>(b.data())[i] = v;
  else reinterpret_cast<uint16_t*>(b.data())[i] = encode(v, t);
}

double worst(const Case& c, std::mt19937& random) {
  double ratio = 0.0;
  const auto near = [&](double got, double want, double bound) {
    const double r = got == want ? 0.0 : std::fabs(got - want) / bound;
    ratio = std::fmax(ratio, std::isnan(r) ? INFINITY : r);
  };
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<double> uniform;
  const int64_t n = c.n, k = c.k, m = c.m, panels = bitmask::panels(n), blocks = bitmask::blocks(k), groups = bitmask::groups(k, c.group);

  // The weight: numbers, then masks and values as the format has them.
  std::vector<float> w(n * k);
  for (float& v : w) {
    v = uniform(random) < c.sparsity ? 0.0f : c.values == Values::i8 ? float(int(random() % 255) - 127) : normal(random);
    if (c.values == Values::bf16) v = bf16_to_float(float_to_bf16(v));
  }
  Buffer<uint64_t> masks(panels * blocks * bitmask::kRows);
  Buffer<int64_t> ptr(panels + 1);
  std::vector<uint8_t> stream;
  std::fill_n(masks.data(), masks.size(), 0);
  int64_t stored = 0;
  for (int64_t p = 0; p < panels; ++p) {
    ptr[p] = stored;
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t row = p * bitmask::kRows; row < std::min(n, (p + 1) * bitmask::kRows); ++row)
        for (int64_t col = b * 64; col < std::min(k, (b + 1) * 64); ++col) {
          const float v = w[row * k + col];
          if (v == 0.0f) continue;
          masks[bitmask::word(blocks, row, b)] |= uint64_t(1) << col % 64;
          const uint16_t half = float_to_bf16(v);
          const int8_t byte = int8_t(v);
          const auto* from = c.values == Values::f32 ? reinterpret_cast<const uint8_t*>(&v)
                             : c.values == Values::bf16 ? reinterpret_cast<const uint8_t*>(&half) : reinterpret_cast<const uint8_t*>(&byte);
          stream.insert(stream.end(), from, from + bitmask::bytes_of(c.values));
          ++stored;
        }
  }
  ptr[panels] = stored;
  Buffer<uint8_t> values(stream.size());  // without the bytes behind them: nothing may read those here
  std::copy(stream.begin(), stream.end(), values.data());
  Buffer<float> scale(c.values == Values::i8 ? n * groups : 0), bias(n);
  for (size_t i = 0; i < scale.size(); ++i) scale[i] = 0.01f * (1.0f + std::fabs(normal(random)));
  for (int64_t i = 0; i < n; ++i) bias[i] = normal(random);
  const auto scale_at = [&](int64_t row, int64_t col) { return scale.size() ? double(scale[row * groups + (c.group ? col / c.group : 0)]) : 1.0; };

  const size_t size = c.type == DType::f32 ? 4 : 2;
  Buffer<unsigned char> x(m * k * size), y(m * n * size), dense(n * k * 4);
  for (int64_t i = 0; i < m * k; ++i) put(x, c.type, i, normal(random));
  const int64_t zero_row = m > 2 ? 1 : -1, nan_row = m > 3 ? 2 : -1;
  for (int64_t j = 0; zero_row >= 0 && j < k; ++j) put(x, c.type, zero_row * k + j, 0.0f);
  if (nan_row >= 0 && c.int8) put(x, c.type, nan_row * k + k / 2, NAN);

  const Mirror<uint64_t> masks_d(masks);
  const Mirror<int64_t> ptr_d(ptr);
  const Mirror<uint8_t> values_d(values);
  const Mirror<float> scale_d(scale), bias_d(bias);
  const Mirror<unsigned char> x_d(x), y_d(y), dense_d(dense);
  bitmask::Args a{};
  a.w = {c.values, values_d.get(), masks_d.get(), ptr_d.get(), scale.size() ? scale_d.get() : nullptr, nullptr, n, k, c.group};
  a.int8 = c.int8, a.x = x_d.get(), a.dtype = c.type, a.m = m, a.y = y_d.get();
  if (c.bias) a.bias = bias_d.get(), a.bias_dtype = DType::f32;
  Buffer<uint8_t> memory(device_bitmask::workspace(a));
  std::fill_n(memory.data(), memory.size(), 0xff);
  const Mirror<uint8_t> memory_d(memory);
  launched(device_bitmask::linear(a, stored, memory_d.get(), nullptr));
  launched(device_bitmask::expand(a.w, stored, false, DType::f32, dense_d.get(), nullptr));
  y_d.fetch(), dense_d.fetch();

  for (int64_t i = 0; i < n * k; ++i) near(read(dense, DType::f32, i), float(float(scale_at(i / k, i % k)) * w[i]), 0x1p-149);
  const double last_place = c.type == DType::f32 ? 0x1p-24 : c.type == DType::f16 ? 0x1p-11 : 0x1p-8;
  for (int64_t t = 0; t < m; ++t) {
    float most = 0.0f;
    bool finite = true;
    for (int64_t j = 0; j < k; ++j) most = std::fmax(most, std::fabs(read(x, c.type, t * k + j))), finite = finite && std::isfinite(read(x, c.type, t * k + j));
    const float sx = most > 0.0f ? most / 127.0f : 1.0f;
    for (int64_t row = 0; row < n; ++row) {
      double want = 0.0, magnitude = 0.0;
      for (int64_t j = 0; j < k; ++j) {
        const double v = c.int8 ? double(std::rint(read(x, c.type, t * k + j) / sx)) * sx : read(x, c.type, t * k + j);
        want += v * w[row * k + j] * scale_at(row, j), magnitude += std::fabs(v * w[row * k + j]) * scale_at(row, j);
      }
      if (c.bias) want += bias[row], magnitude += std::fabs(bias[row]);
      const double got = read(y, c.type, t * n + row);
      if (c.int8 && !finite) {
        if (!std::isnan(got)) ratio = INFINITY;
        continue;
      }
      // Integers are exact; each group is rounded twice. Floats: two additions a block of a warp's share, the tree, eight warps.
      const double steps = c.int8 ? 2.0 * double(groups) + 4 : 2.0 * double((blocks + 7) / 8 + c.group / 64) + 16;
      near(got, want, steps * 0x1p-24 * magnitude + last_place * (std::fabs(want) + 1e-4 * magnitude) + 0x1p-24);
    }
  }
  return ratio;
}

std::vector<Case> cases(bool quick) {
  std::vector<Case> all;
  for (const auto& [values, int8] : {std::pair{Values::f32, false}, {Values::bf16, false}, {Values::i8, false}, {Values::i8, true}}) {
    const int group = values == Values::i8 ? 64 : 0;
    all.push_back({20, 700, 1, values, int8, 0});
    all.push_back({9, 1300, 5, values, int8, group, 0.6, DType::bf16});
    all.push_back({8, 65, 4, values, int8, group, 0.3, DType::f16, false});
    all.push_back({3, 2900, 2, values, int8, 3 * group, 0.7});
    if (quick) continue;
    all.push_back({1, 1, 1, values, int8, 0, 0.0});
    all.push_back({33, 3000, 9, values, int8, 4 * group, 0.8, DType::f16});
    all.push_back({17, 500, 2, values, int8, 2 * group, 1.0});
    all.push_back({64, 2048, 3, values, int8, group, 0.0, DType::bf16});
  }
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && !std::strcmp(argv[1], "quick");
  std::mt19937 random(1);
  effk::test::Cases done;
  for (const Case& c : cases(quick)) {
    done.run(describe(c), [&] { return worst(c, random); });
  }
  return done.finish();
}
