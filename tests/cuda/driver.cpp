// The CUDA kernels of wq_linear against a float64 reference, without torch. Emulated (EFFK_CUEMU), this is the program that
// runs under ASan and UBSan in every thread order and must fail for every planted bug of mutants.py; on a GPU, the one
// that compute-sanitizer watches.
//   driver [bits]     bits 2, 3, 4 or 8: only the cases of that width
#include "../cpp/entries.h"
#include "buffers.h"
#include "cases.h"

#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "ops/wq_linear/cuda.h"
#include "ops/wq_linear/wq_linear.h"

namespace {
using namespace effk;

struct Case {
  int bits, group, n, k, m;
  DType type = DType::f16;
  bool zeros = false, codebook = false, per_row = false, outliers = false, scales_f32 = false, bias = false;
  int shift_x = 0;  // elements that x starts off alignment
  int gap = -1;     // elements between rows of x; at 0 and above something is added to the sums
};

std::string describe(const Case& c) {
  return std::to_string(c.bits) + " bits G " + std::to_string(c.group) + " N " + std::to_string(c.n) + " K " +
         std::to_string(c.k) + " M " + std::to_string(c.m) + (c.type == DType::f16 ? " f16" : " bf16") +
         (c.zeros ? " zeros" : "") + (c.codebook ? c.per_row ? " codebook/row" : " codebook" : "") +
         (c.outliers ? " outliers" : "") + (c.scales_f32 ? " scales32" : "") + (c.bias ? " bias" : "") +
         (c.shift_x ? " x+" + std::to_string(c.shift_x) : "") + (c.gap >= 0 ? " gap " + std::to_string(c.gap) : "");
}

// The largest error over its bound: at most 1 is right, NaN counts as infinite.
double worst(const Case& c, std::mt19937& random) {
  std::normal_distribution<float> normal;
  const int64_t n = c.n, k = c.k, ldx = k + std::max(c.gap, 0), groups = t16::groups(k, c.group), entries = int64_t(1) << c.bits;
  std::vector<double> w(n * k), w_error(n * k);  // dequantised, and what the kernel may be off by
  std::vector<uint32_t> codes(n * k);
  Buffer<uint8_t> qweight(n * t16::ceil_div(k * c.bits, 8)), zeros(n * groups);
  Buffer<uint16_t> scales16(n * groups);
  Buffer<float> scales32(n * groups), codebook(c.per_row ? n * entries : entries), bias(n);
  std::fill_n(qweight.data(), qweight.size(), uint8_t(0));
  for (auto& q : codes) q = random() % entries;
  for (size_t i = 0; i < scales16.size(); ++i) {
    scales16[i] = float_to_f16(0.01f * normal(random));
    scales32[i] = c.scales_f32 ? 1e-3f * normal(random) : f16_to_float(scales16[i]);
    zeros[i] = uint8_t(random() % entries);
  }
  for (size_t i = 0; i < codebook.size(); ++i) codebook[i] = normal(random);
  for (int64_t i = 0; i < n; ++i) bias[i] = normal(random);

  Buffer<int32_t> out_ptr(n + 1);
  std::vector<uint16_t> columns, values;
  std::vector<double> sparse(n * k);
  out_ptr[0] = 0;
  for (int64_t row = 0; row < n; ++row) {
    for (int64_t col = 0; col < k; ++col) {
      if (!c.outliers || random() % 8) continue;
      columns.push_back(uint16_t(col));
      values.push_back(float_to_f16(normal(random)));
      sparse[row * k + col] = f16_to_float(values.back());
    }
    out_ptr[row + 1] = int32_t(columns.size());
  }
  for (int64_t row = 0; row < n; ++row)
    for (int64_t col = 0; col < k; ++col) {
      const int64_t g = row * groups + (c.group ? col / c.group : 0);
      const uint32_t q = codes[row * k + col];
      for (int b = 0; b < c.bits; ++b)
        if (q >> b & 1) qweight[row * t16::ceil_div(k * c.bits, 8) + (col * c.bits + b) / 8] |= uint8_t(1 << ((col * c.bits + b) % 8));
      const double table = codebook[c.per_row ? row * entries + q : c.codebook ? q : 0];
      const double value = c.codebook ? table : double(q) - (c.zeros ? zeros[g] : double(entries / 2));
      w[row * k + col] = scales32[g] * value + sparse[row * k + col];
      if (c.codebook)
        w_error[row * k + col] = std::fabs(scales32[g]) * (c.type == DType::f16 ? std::fabs(value) * 0x1p-21 + 0x1p-25 : std::fabs(value) * 0x1p-16);
    }

  const int64_t tiles = t16::tiles(n);
  Buffer<uint8_t> packed(t16::packed_bytes(n, k, c.bits)), zeros_p(tiles * groups * 16), scales_p(tiles * groups * 16 * (c.scales_f32 ? 4 : 2));
  const void* scales = c.scales_f32 ? static_cast<const void*>(scales32.data()) : scales16.data();
  wq_pack(qweight.data(), scales, c.zeros ? zeros.data() : nullptr, n, k, c.bits, c.group, c.scales_f32 ? 4 : 2, packed.data(),
          scales_p.data(), c.zeros ? zeros_p.data() : nullptr);
  Buffer<float> tables(c.per_row ? tiles * entries * 16 : entries);
  std::fill_n(tables.data(), tables.size(), 0.0f);
  for (int64_t i = 0; i < int64_t(codebook.size()); ++i)
    tables[c.per_row ? (i / entries / 16 * entries + i % entries) * 16 + i / entries % 16 : i] = codebook[i];
  Buffer<uint16_t> out_col(columns.size()), out_val(columns.size()), x(c.m * ldx, c.shift_x), y(c.m * n);
  Buffer<float> y_in(c.gap >= 0 ? c.m * n : 0);
  for (size_t i = 0; i < y_in.size(); ++i) y_in[i] = normal(random);
  const std::vector<int32_t> rows(out_ptr.data(), out_ptr.data() + n + 1);
  const auto in_tiles = [&](const std::vector<uint16_t>& entries, uint16_t* to) {
    const std::vector<uint16_t> moved = test::rank_by_rank(rows, entries);
    std::copy(moved.begin(), moved.end(), to);
  };
  in_tiles(columns, out_col.data());
  in_tiles(values, out_val.data());
  for (size_t i = 0; i < x.size(); ++i) x[i] = encode(normal(random), c.type);

  std::fill_n(y.data(), y.size(), uint16_t(0xffff));  // what the kernel does not write stays NaN
  const Mirror<uint8_t> packed_d(packed), zeros_d(zeros_p), scales_d(scales_p);
  const Mirror<float> tables_d(tables), bias_d(bias), y_in_d(y_in);
  const Mirror<int32_t> out_ptr_d(out_ptr);
  const Mirror<uint16_t> out_col_d(out_col), out_val_d(out_val), x_d(x), y_d(y);
  WqWeight weight{};
  weight.packed = packed_d.get();
  weight.scales = scales_d.get();
  weight.zeros = c.zeros ? zeros_d.get() : nullptr;
  weight.codebook = c.codebook ? tables_d.get() : nullptr;
  if (c.outliers) weight.out_ptr = out_ptr_d.get(), weight.out_col = out_col_d.get(), weight.out_val = out_val_d.get();
  weight.bias = c.bias ? bias_d.get() : nullptr;
  weight.n = n;
  weight.k = k;
  weight.bits = c.bits;
  weight.group = c.group;
  weight.scales_f32 = c.scales_f32;
  weight.codebook_per_row = c.per_row;
  weight.bias_dtype = DType::f32;
  const int outliers = int(columns.size());
  const auto launched = [](int error) {
    if (error) throw std::runtime_error(cuda::error_text(error));
  };
  launched(cuda::wq_linear(weight, outliers, x_d.get(), y_d.get(), c.type, c.m, nullptr, c.gap >= 0 ? ldx : 0, c.gap >= 0 ? y_in_d.get() : nullptr));
  y_d.fetch();

  const double last_place = c.type == DType::f16 ? 0x1p-11 : 0x1p-8;
  double ratio = 0.0;
  const auto check = [&](double got, double want, double bound) {
    const double r = std::fabs(got - want) / bound;
    ratio = std::fmax(ratio, std::isnan(r) ? INFINITY : r);
  };
  for (int64_t m = 0; m < c.m; ++m)
    for (int64_t row = 0; row < n; ++row) {
      double want = c.bias ? bias[row] : 0.0, magnitude = std::fabs(want), error = 0.0;
      if (c.gap >= 0) want += y_in[m * n + row], magnitude += std::fabs(y_in[m * n + row]);
      for (int64_t col = 0; col < k; ++col) {
        const double value = decode(x[m * ldx + col], c.type), at = w[row * k + col];
        want += at * value;
        magnitude += (std::fabs(at) + 2 * std::fabs(sparse[row * k + col])) * std::fabs(value);
        error += w_error[row * k + col] * std::fabs(value);
      }
      // fp32 sums of k terms, each addition off by at most one last place of the magnitude; then one rounding.
      check(decode(y[m * n + row], c.type), want, error + double(k + 64) * 0x1p-23 * magnitude + last_place * std::fabs(want) + 0x1p-24);
    }

  Buffer<float> full(n * k);
  Buffer<uint16_t> half(n * k);
  const Mirror<float> full_d(full);
  const Mirror<uint16_t> half_d(half);
  launched(cuda::wq_dequantize(weight, outliers, full_d.get(), DType::f32, nullptr));
  launched(cuda::wq_dequantize(weight, outliers, half_d.get(), c.type, nullptr));
  full_d.fetch();
  half_d.fetch();
  for (int64_t i = 0; i < n * k; ++i) {
    const double magnitude = std::fabs(w[i]) + 2 * std::fabs(sparse[i]);
    check(full[i], w[i], 0x1p-22 * magnitude + 1e-30);
    check(decode(half[i], c.type), w[i], 2 * last_place * magnitude + 0x1p-24);
  }
  return ratio;
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (int bits : {2, 3, 4, 8}) {
    const bool table = bits < 8;  // no codebooks at 8 bits
    all.push_back({bits, 64, 64, 576, 1});
    all.push_back({bits, 128, 33, 320, 3, DType::bf16, true});
    all.push_back({bits, 32, 17, 352, 8, DType::f16, true, false, false, true, true, true});
    all.push_back({bits, 0, 16, 104, 2, DType::bf16, false, table});
    all.push_back({bits, 0, 47, 232, 5, DType::f16, false, table, table, true});
    all.push_back({bits, 256, 130, 640, 11, DType::bf16, false, false, false, true});
    all.push_back({bits, 128, 5, 136, 16, DType::f16, true, false, false, false, true});
    all.push_back({bits, 32, 48, 100, 19, DType::bf16, true, false, false, true, false, true});
    all.push_back({bits, 64, 65, 256, 32, DType::f16});
    all.push_back({bits, 64, 40, 200, 33, DType::f16, false, table, false, false, true, false, 1});
    all.push_back({bits, 128, 31, 192, 64, DType::bf16});
    all.push_back({bits, 64, 32, 1536, 4, DType::f16, false, false, false, true});
    all.push_back({bits, 128, 24, 4160, 2, DType::bf16, true, false, false, true});        // two blocks share K
    all.push_back({bits, 128, 61, 4160, 12, DType::f16, false, false, false, true, false, true});  // four
    all.push_back({bits, 128, 1, 7, 1, DType::f16, false, false, false, false, false, false, 3});
    all.push_back({bits, 0, 37, 93, 6, DType::bf16, false, false, false, false, true, true, 0, 11});  // what quik_linear does
  }
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  const int only = argc > 1 ? std::atoi(argv[1]) : 0;
  std::mt19937 random(1);
  effk::test::Cases done;
  for (const Case& c : cases()) {
    if (only && c.bits != only) continue;
    done.run(describe(c), [&] { return worst(c, random); });
  }
  return done.finish();
}
