// The CUDA kernels of quik_linear against exact integers and float64, without torch: the program that runs under ASan and
// UBSan in every thread order and must fail for every planted bug of mutants.py; on a GPU, the one that compute-sanitizer
// watches.
//   driver_quik [quick]     quick: the cases of the planted bugs
#include "buffers.h"
#include "cases.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "ops/quik_linear/cuda.h"

namespace {
namespace quik = cuda::quik;
using quik::Form;

struct Case {
  int n, n_base, n_out, m, bits_w, bits_a;
  bool int4 = false;
  int shape = 0;
  DType type = DType::f16;
  bool listed = true;   // index lists; else columns as they lie
  bool sim = false, bias = true;
  int shift = 0;        // elements that x starts off alignment
};

std::string describe(const Case& c) {
  const char* const types[] = {" f32", " bf16", " f16"};
  return "N " + std::to_string(c.n) + " base " + std::to_string(c.n_base) + " out " + std::to_string(c.n_out) + " M " + std::to_string(c.m) + " W" +
         std::to_string(c.bits_w) + "A" + std::to_string(c.bits_a) + (c.int4 ? " int4" : "") + " shape " + std::to_string(c.shape) + types[int(c.type)] +
         (c.listed ? " listed" : "") + (c.sim ? " sim" : "") + (c.shift ? " shifted" : "");
}

void launched(int error) {
  if (error) throw std::runtime_error(quik::error_text(error));
}

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

// Values of the type of x, which may be fp32.
struct Values {
  DType type;
  Buffer<unsigned char> bytes;
  Values(DType type, size_t count, int shift = 0) : type(type), bytes(count * size(type), shift * size(type)) {
    std::fill_n(bytes.data(), bytes.size(), 0xff);
  }
  static size_t size(DType t) { return t == DType::f32 ? 4 : 2; }
  float operator[](size_t i) const {
    if (type == DType::f32) return reinterpret_cast<const float*>(bytes.data())[i];
    return decode(reinterpret_cast<const uint16_t*>(bytes.data())[i], type);
  }
  void put(size_t i, float v) {
    if (type == DType::f32) reinterpret_cast<float*>(bytes.data())[i] = v;
    else reinterpret_cast<uint16_t*>(bytes.data())[i] = encode(v, type);
  }
};

int code_of(const uint8_t* row, Form form, int64_t j) {
  if (form == Form::bytes) return int8_t(row[j]);
  const int64_t place = form == Form::nibbles ? j : j / 8 * 8 + j % 4 * 2 + j / 4 % 2;
  const int nibble = row[place / 2] >> 4 * (place % 2) & 15;
  return nibble - 2 * (nibble & 8);
}

template <class T>
Buffer<T> filled(size_t count, T value) {
  Buffer<T> b(count);
  std::fill_n(b.data(), count, value);
  return b;
}

double worst(const Case& c, std::mt19937& random) {
  Worst w;
  std::normal_distribution<float> normal;
  const int64_t n = c.n, m = c.m, base = c.n_base, k = base + c.n_out;

  // x, with a large column among the outliers, and a row with a NaN where there are several.
  std::vector<int32_t> order(k);
  std::iota(order.begin(), order.end(), 0);
  if (c.listed) std::shuffle(order.begin(), order.end(), random);
  Buffer<int32_t> int_idx(base), fp_idx(c.n_out);
  std::copy(order.begin(), order.begin() + base, int_idx.data());
  std::copy(order.begin() + base, order.end(), fp_idx.data());
  Values x(c.type, m * k, c.shift);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < k; ++j) x.put(i * k + order[j], (j >= base ? 20.0f : 1.0f) * normal(random) - 0.3f);
  const int64_t nan_row = m > 4 ? m / 2 : -1, constant_row = m > 5 ? m - 1 : -1;
  if (nan_row >= 0) x.put(nan_row * k + random() % k, random() % 2 ? NAN : INFINITY);
  if (constant_row >= 0)
    for (int64_t j = 0; j < base; ++j) x.put(constant_row * k + order[j], 1.5f);
  if (c.sim && m > 7)  // two ties that are both rounded up: one code too many, which is cut
    for (int64_t j = 0; j < base; ++j) x.put(order[j], 0.5f * float((1 << c.bits_a) - 1) * (j % 2 ? 1.0f : -1.0f));

  // Quantise, in the form of the product and in that of the op.
  const Form form = c.int4 ? Form::units : Form::bytes, plain = c.bits_a == 4 ? Form::nibbles : Form::bytes;
  const int64_t ld = quik::row_bytes(base, form), plain_ld = plain == Form::nibbles ? (base + 1) / 2 : base, out_ld = (c.n_out + 7) / 8 * 8;
  Buffer<uint8_t> codes = filled<uint8_t>(m * ld, 0xff), op_codes = filled<uint8_t>(m * plain_ld, 0xff), repacked = filled<uint8_t>(m * ld, 0xff);
  Buffer<float> scale = filled(m, NAN), zero = filled(m, NAN);
  Values x_out(c.type, m * out_ld);
  const Mirror<unsigned char> x_d(x.bytes), x_out_d(x_out.bytes);
  const Mirror<int32_t> int_d(int_idx), fp_d(fp_idx);
  const Mirror<uint8_t> codes_d(codes), op_codes_d(op_codes), repacked_d(repacked);
  const Mirror<float> scale_d(scale), zero_d(zero);
  quik::Quantise q{};
  q.x = x_d.get(), q.dtype = c.type, q.m = m, q.split = {nullptr, nullptr, k, base, c.n_out};
  if (c.listed) q.split.base = int_d.get(), q.split.outlier = fp_d.get();
  q.bits = c.bits_a, q.mode = c.sim ? QuikMode::sim : QuikMode::kernel;
  q.scale = scale_d.get(), q.zero = zero_d.get(), q.x_out = x_out_d.get(), q.out_ld = out_ld;
  q.form = plain, q.codes = op_codes_d.get(), q.row_bytes = plain_ld;
  launched(quik::quantise(q, nullptr));
  q.form = form, q.codes = codes_d.get(), q.row_bytes = ld;
  launched(quik::quantise(q, nullptr));
  launched(quik::repack(op_codes_d.get(), plain, m, base, form, repacked_d.get(), nullptr));
  codes_d.fetch(), op_codes_d.fetch(), repacked_d.fetch(), scale_d.fetch(), zero_d.fetch(), x_out_d.fetch();
  w.same(std::memcmp(codes.data(), repacked.data(), codes.size()) == 0);

  const int half = 1 << (c.bits_a - 1), levels = 2 * half - 1;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < out_ld; ++j) {
      const float want = j < c.n_out ? x[i * k + order[base + j]] : 0.0f, got = x_out[i * out_ld + j];
      w.same(want == got || (std::isnan(want) && std::isnan(got)));
    }
    w.same(std::isnan(scale[i]) == (i == nan_row) && std::isnan(zero[i]) == (i == nan_row));
    if (i == nan_row) continue;
    float lo = INFINITY, hi = -INFINITY, shift = 0.0f;
    for (int64_t j = 0; j < base; ++j) lo = std::fmin(lo, x[i * k + order[j]]), hi = std::fmax(hi, x[i * k + order[j]]);
    float s = std::fmax((hi - lo) / float(levels), 1e-6f), z = lo;
    if (c.sim) {
      lo = std::fmin(lo, 0.0f), hi = std::fmax(hi, 0.0f);
      s = (hi - lo) / float(levels), shift = std::rint(-lo / s), z = -s * shift;
    }
    w.same(s == scale[i] && z == zero[i]);
    const float inverse = 1.0f / s;
    for (int64_t j = 0; j < base; ++j) {
      const float v = x[i * k + order[j]], u = c.sim ? std::rint(v * inverse) + shift : std::rint((v - z) * inverse);
      w.same(code_of(codes.data() + i * ld, form, j) == int(std::fmin(std::fmax(u, 0.0f), float(levels))) - half);
    }
    for (int64_t j = base; j < (form == Form::bytes ? ld : 2 * ld); ++j) w.same(code_of(codes.data() + i * ld, form, j) == 0);
  }

  if (c.listed && m && !c.shift) {  // an index out of range: no row has a result
    Buffer<int32_t> broken(base);
    std::copy_n(int_idx.data(), base, broken.data());
    broken[base / 2] = c.sim ? -1 : int32_t(k);
    const Mirror<int32_t> broken_d(broken);
    quik::Quantise wrong = q;
    Buffer<float> no_scale = filled(m, 0.0f), no_zero = filled(m, 0.0f);
    const Mirror<float> no_scale_d(no_scale), no_zero_d(no_zero);
    wrong.split.base = broken_d.get(), wrong.codes = repacked_d.get(), wrong.scale = no_scale_d.get(), wrong.zero = no_zero_d.get();
    launched(quik::quantise(wrong, nullptr));
    no_scale_d.fetch(), no_zero_d.fetch();
    for (int64_t i = 0; i < m; ++i) w.same(std::isnan(no_scale[i]) && std::isnan(no_zero[i]));
    Values column(c.type, m * k);
    const Mirror<unsigned char> column_d(column.bytes);
    launched(quik::split_columns({x_d.get(), c.type, m, wrong.split, k, k, column_d.get()}, nullptr));
    column_d.fetch();
    for (int64_t i = 0; i < m; ++i) w.same(std::isnan(column[i * k + base / 2]));
  }

  // Weights: codes, scales, outliers; a bias and what is added.
  std::vector<int> qw(n * base);
  Buffer<uint8_t> packed = filled<uint8_t>(t16::packed_bytes(n, base, c.bits_w), 0);
  for (int64_t row = 0; row < n; ++row)
    for (int64_t j = 0; j < base; ++j) {
      const uint32_t u = random() % (1u << c.bits_w);
      const t16::Place at = t16::place(row, j, base, c.bits_w);
      packed[at.byte] |= uint8_t(u << at.shift);
      qw[row * base + j] = int(u) - (1 << (c.bits_w - 1));
    }
  Buffer<float> w_scale = filled(t16::tiles(n) * 16, 0.0f), w_reduced(n), bias(n), y_in(m * n);
  for (int64_t row = 0; row < n; ++row) {
    w_scale[row] = 0.01f * (1.0f + std::fabs(normal(random)));
    double sum = 0.0;
    for (int64_t j = 0; j < base; ++j) sum += double(w_scale[row]) * qw[row * base + j];
    w_reduced[row] = float(sum), bias[row] = normal(random);
  }
  const bool in_tile = c.type != DType::f32 && c.n_out > 0;
  Values w_out(in_tile ? c.type : DType::f32, n * out_ld);
  for (int64_t row = 0; row < n; ++row)
    for (int64_t j = 0; j < out_ld; ++j) w_out.put(row * out_ld + j, j < c.n_out ? 0.1f * normal(random) : 0.0f);
  for (int64_t i = 0; i < m * n; ++i) y_in[i] = normal(random);
  Buffer<uint32_t> header(8);
  std::iota(header.data(), header.data() + 8, 17u);

  Buffer<int32_t> sums = filled<int32_t>(m * n, 0x55555555);
  Values y(c.type, m * n), y_only(DType::f32, m * n);
  const Mirror<uint8_t> packed_d(packed);
  const Mirror<float> w_scale_d(w_scale), w_reduced_d(w_reduced), bias_d(bias), y_in_d(y_in);
  const Mirror<unsigned char> w_out_d(w_out.bytes), y_d(y.bytes), y_only_d(y_only.bytes);
  const Mirror<uint32_t> header_d(header);
  const Mirror<int32_t> sums_d(sums);
  quik::Product p{};
  p.packed = packed_d.get(), p.n = n, p.n_base = base, p.bits = c.bits_w, p.int4 = c.int4, p.codes = codes_d.get(), p.m = m, p.shape = c.shape;
  p.sums = sums_d.get();
  launched(quik::product(p, nullptr));
  sums_d.fetch();
  p.sums = nullptr;
  p.scale = scale_d.get(), p.zero = zero_d.get(), p.w_scale = w_scale_d.get(), p.w_reduced = w_reduced_d.get(), p.half = float(half);
  if (in_tile) {
    p.x_out = x_out_d.get(), p.w_out = w_out_d.get(), p.out_type = c.type, p.out_ld = out_ld, p.header = header_d.get();
    std::copy_n(header.data(), 8, p.expected);
  } else {
    p.y_in = y_in_d.get();
  }
  if (c.bias) p.bias = bias_d.get(), p.bias_type = DType::f32;
  p.y = y_d.get(), p.y_type = c.type;
  launched(quik::product(p, nullptr));
  y_d.fetch();
  quik::Dequantise d{sums_d.get(), scale_d.get(), zero_d.get(), w_scale_d.get(), w_reduced_d.get(), y_in_d.get(), DType::f32, m, n, float(half),
                     y_only_d.get(), DType::f32};
  launched(quik::dequantise(d, nullptr));
  y_only_d.fetch();

  const double last_place = c.type == DType::f32 ? 0x1p-24 : c.type == DType::f16 ? 0x1p-11 : 0x1p-8;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t row = 0; row < n; ++row) {
      int64_t sum = 0;
      for (int64_t j = 0; j < base; ++j) sum += int64_t(code_of(codes.data() + i * ld, form, j)) * qw[row * base + j];
      w.same(sums[i * n + row] == sum);
      if (i == nan_row) {
        w.same(std::isnan(y[i * n + row]) && std::isnan(y_only[i * n + row]));
        continue;
      }
      // The scaled sum is rounded five times, each by at most a last place of one of its two terms; outliers and what
      // is added are fp32 sums.
      const double first = double(scale[i]) * w_scale[row] * double(sum), second = (zero[i] + half * double(scale[i])) * w_reduced[row];
      double want = first + second, size = 5 * (std::fabs(first) + (std::fabs(zero[i]) + half * scale[i]) * std::fabs(w_reduced[row]));
      w.near(y_only[i * n + row], want + y_in[i * n + row], (size + 2 * std::fabs(y_in[i * n + row])) * 0x1p-23);
      double outliers = 0.0;
      if (in_tile)
        for (int64_t j = 0; j < c.n_out; ++j) {
          const double term = double(x_out[i * out_ld + j]) * w_out[row * out_ld + j];
          want += term, outliers += std::fabs(term);
        }
      else want += y_in[i * n + row], outliers = std::fabs(y_in[i * n + row]);
      if (c.bias) want += bias[row], outliers += std::fabs(bias[row]);
      size += (c.n_out + 8) * (outliers + std::fabs(first + second));
      w.near(y[i * n + row], want, size * 0x1p-23 + last_place * std::fabs(want) + 0x1p-24);
    }

  // Where activations are not quantised: columns in order, sums over the outliers, the whole weight.
  const int64_t split_ld = k + 3;
  Values ordered(c.type, m * split_ld), whole(c.type, n * k);
  Buffer<float> added = filled(m * n, NAN);
  const Mirror<unsigned char> ordered_d(ordered.bytes), whole_d(whole.bytes);
  const Mirror<float> added_d(added);
  launched(quik::split_columns({x_d.get(), c.type, m, q.split, k, split_ld, ordered_d.get()}, nullptr));
  launched(quik::outlier_sums({x_d.get(), c.type, m, q.split, w_out_d.get(), w_out.type, n, out_ld, nullptr, {}, added_d.get()}, nullptr));
  launched(quik::assemble({packed_d.get(), w_scale_d.get(), n, base, c.n_out, c.bits_w, w_out_d.get(), w_out.type, out_ld, nullptr, {}, c.type, whole_d.get()}, nullptr));
  ordered_d.fetch(), added_d.fetch(), whole_d.fetch();
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < split_ld; ++j) {
      const float want = j < k ? x[i * k + order[j]] : 0.0f, got = ordered[i * split_ld + j];
      w.same(want == got || (std::isnan(want) && std::isnan(got)));
    }
    for (int64_t row = 0; row < n; ++row) {
      double want = 0.0, size = 0.0;
      for (int64_t j = 0; j < c.n_out; ++j) {
        const double term = double(x[i * k + order[base + j]]) * w_out[row * out_ld + j];
        want += term, size += std::fabs(term);
      }
      if (std::isfinite(want)) w.near(added[i * n + row], want, (c.n_out + 8) * 0x1p-23 * size + 1e-30);
      else w.same(!std::isfinite(added[i * n + row]));
    }
  }
  for (int64_t row = 0; row < n; ++row)
    for (int64_t j = 0; j < k; ++j) {
      const double want = j < base ? double(w_scale[row]) * qw[row * base + j] : w_out[row * out_ld + j - base];
      w.near(whole[row * k + j], want, 2 * last_place * std::fabs(want) + 1e-30);
    }

  if (in_tile && m && n) {  // weights that are not what the call says
    header[3] ^= 1u;
    const Mirror<uint32_t> spoilt_d(header);
    p.header = spoilt_d.get();
    launched(quik::product(p, nullptr));
    y_d.fetch();
    for (int64_t i = 0; i < m * n; ++i) w.same(std::isnan(y[i]));
    quik::Outliers o{x_d.get(), c.type, m, q.split, w_out_d.get(), w_out.type, n, out_ld, spoilt_d.get(), {}, added_d.get()};
    std::copy_n(p.expected, 8, o.expected);
    launched(quik::outlier_sums(o, nullptr));
    added_d.fetch();
    for (int64_t i = 0; i < m * n; ++i) w.same(std::isnan(added[i]));
  }
  return w.ratio;
}

std::vector<Case> cases(bool quick) {
  std::vector<Case> all;
  for (int way = 0; way < 5; ++way) {  // W8A8, W4A8, W4A4 as int8 and as int4, W8A4
    const int bits_w = way == 0 || way == 4 ? 8 : 4, bits_a = way < 2 ? 8 : 4;
    const bool int4 = way == 3;
    all.push_back({70, 200, 31, 66, bits_w, bits_a, int4, 2, DType::f16});
    if (way != 4) all.push_back({250, 330, 40, 131, bits_w, bits_a, int4, 1, DType::bf16});
    all.push_back({37, 577, 1, 9, bits_w, bits_a, int4, 2, DType::bf16, true, true});
    all.push_back({64, 128, 0, 64, bits_w, bits_a, int4, 2, DType::f16, false, false, false});
    all.push_back({33, 61, 7, 5, bits_w, bits_a, int4, 2, DType::f32, true, false, true, 1});
    if (way == 1) all.push_back({20, 64, 8, 520, 4, 8, false, 2, DType::f16});  // two groups of tiles of tokens
    if (quick) continue;
    all.push_back({260, 330, 40, 131, bits_w, bits_a, int4, 1, DType::bf16, false});
    all.push_back({300, 900, 256, 150, bits_w, bits_a, int4, 1, DType::f16, false});
    all.push_back({16, 2, 3, 1, bits_w, bits_a, int4, 1, DType::f16, true, true, true, 3});
    all.push_back({20, 700, 20, 33, bits_w, bits_a, int4, 0, DType::f32, true, true});
  }
  // Rows beyond shared memory, for the quantiser.
  all.push_back({3, 26000, 4, 2, 4, 8, false, 2, DType::f32});
  return all;
}

// Every product at the end of its range: -128 times -128 and -8 times -8.
bool extremes() {
  bool right = true;
  for (int bits : {4, 8})
    for (bool int4 : {false, true}) {
      if (int4 && bits == 8) continue;
      const int64_t n = 17, m = 9, base = 130, ld = quik::row_bytes(base, int4 ? Form::units : Form::bytes);
      Buffer<uint8_t> packed = filled<uint8_t>(t16::packed_bytes(n, base, bits), 0), plain = filled<uint8_t>(m * (int4 ? base / 2 : base), int4 ? 0x88 : 0x80);
      Buffer<uint8_t> codes = filled<uint8_t>(m * ld, 0xff);
      Buffer<int32_t> sums = filled<int32_t>(m * n, 1);
      const Mirror<uint8_t> packed_d(packed), plain_d(plain), codes_d(codes);
      const Mirror<int32_t> sums_d(sums);
      launched(quik::repack(plain_d.get(), int4 ? Form::nibbles : Form::bytes, m, base, int4 ? Form::units : Form::bytes, codes_d.get(), nullptr));
      quik::Product p{};
      p.packed = packed_d.get(), p.n = n, p.n_base = base, p.bits = bits, p.int4 = int4, p.codes = codes_d.get(), p.m = m, p.sums = sums_d.get();
      launched(quik::product(p, nullptr));
      sums_d.fetch();
      for (size_t i = 0; i < sums.size(); ++i) right = right && sums[i] == base * (1 << (bits - 1)) * (int4 ? 8 : 128);
    }
  return right;
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && !std::strcmp(argv[1], "quick");
  std::mt19937 random(1);
  effk::test::Cases done;
  bool int4 = false;
  launched(quik::has_int4(int4));
  for (const Case& c : cases(quick)) {
    if (c.int4 && !int4) continue;
    done.run(describe(c), [&] { return worst(c, random); });
  }
  if (int4) done.run("the largest products", [] { return extremes() ? 0.0 : INFINITY; });
  return done.finish();
}
