// Lists, products with listed rows and masks, on the kernels of relu_ffn. Compiled with baseline flags: what is not a product with
// rows is small beside one, except signs, whose bits are counted 64 at a time (3 GB/s of them; relu_ffn reads rows at 38).
#include "ops/neuron_lists/neuron_lists.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "ops/relu_ffn/kernels.h"

namespace effk::neuron_lists {
namespace {

using relu_ffn::Kernel;
using relu_ffn::kMaxTokens;
using relu_ffn::List;

constexpr int64_t kRowGrain = 64 << 10;  // bytes of rows that are worth a thread
constexpr int64_t kSliceUnits = 8;       // narrowest slice of rows that are added up

List list_of(const relu_ffn::NeuronRows& w, neuron::Rows type, int64_t group, int64_t d) {
  return {w.rows, neuron::row_bytes(type, d), neuron::units(type, d), w.scales, neuron::groups(d, group), group, nullptr, 0, 0};
}
int64_t row_grain(const List& l) { return std::max<int64_t>(1, kRowGrain / l.row_bytes); }
const char* token(const void* x, DType t, int64_t b, int64_t width) { return static_cast<const char*>(x) + b * width * (t == DType::f32 ? 4 : 2); }

// Tokens in fp32, `row` floats apart, zeros beyond.
void read(const Kernel& k, const void* x, DType t, int64_t first, int tokens, int64_t width, float* to, int64_t row) {
  for (int b = 0; b < tokens; ++b, to += row) {
    std::fill(to + width, to + row, 0.0f);
    const void* from = token(x, t, first + b, width);
    k.read(from, t, width, 0, width / 16 * 16, to);
    if (width % 16) {
      float last[16];
      k.read(from, t, width, width / 16 * 16, 16, last);
      std::copy_n(last, width % 16, to + width / 16 * 16);
    }
  }
}

// Products of the rows of a list with up to 8 tokens, cut among threads.
void products(const Kernel& k, const List& rows, neuron::Rows type, const float* x, int64_t x_row, int tokens, float* out, int64_t out_row,
              const ParallelFor& pf) {
  parallel_for(pf, rows.count, row_grain(rows), [&](int64_t i0, int64_t i1) {
    List part = rows;
    part.count = i1 - i0;
    if (part.index) part.index += i0; else part.first = i0;
    k.dot[int(type)](part, x, x_row, tokens, out + i0, out_row);
  });
}

// f(first, tokens) for groups of tokens that share a visit of the rows.
template <class F> void groups_of_tokens(int64_t tokens, const F& f) {
  for (int64_t t = 0; t < tokens; t += kMaxTokens) f(t, int(std::min<int64_t>(kMaxTokens, tokens - t)));
}

}  // namespace

size_t compact_workspace(const CompactArgs& a) { return size_t(neuron::padded(a.n)) * 4; }
void compact(const CompactArgs& a, void* memory, const ParallelFor&) {
  const Kernel& k = relu_ffn::kernel();
  const float zero = 0.0f, *threshold = a.threshold ? a.threshold : &zero;
  float* x = static_cast<float*>(memory);
  for (int64_t t = 0; t < a.tokens; ++t) {
    read(k, a.x, a.dtype, t, 1, a.n, x, neuron::padded(a.n));
    int32_t* index = a.index + t * a.n;
    float* value = a.value + t * a.n;
    int32_t found = 0;
    const int64_t n = k.compact(Gate::magnitude, x, 0, a.n, threshold, a.threshold_each, nullptr, 1, nullptr, 0, 0, index, value, a.n, &found);
    std::fill(index + n, index + a.n, -1);
    std::fill(value + n, value + a.n, 0.0f);
    a.count[t] = found;
  }
}

size_t dot_workspace(const RowsArgs& a) { return size_t(kMaxTokens * neuron::padded(a.d)) * 4; }
void dot(const RowsArgs& a, const void* x, DType t, float* out, void* memory, const ParallelFor& pf) {
  const Kernel& k = relu_ffn::kernel();
  float* xs = static_cast<float*>(memory);
  const int64_t x_row = neuron::padded(a.d);
  List rows = list_of(a.w, a.type, a.group, a.d);
  rows.index = a.index, rows.count = a.count;
  groups_of_tokens(a.tokens, [&](int64_t first, int tokens) {
    read(k, x, t, first, tokens, a.d, xs, x_row);
    float* to = out + first * a.capacity;
    products(k, rows, a.type, xs, x_row, tokens, to, a.capacity, pf);
    for (int b = 0; b < tokens; ++b, to += a.capacity) {
      for (int64_t i = 0; a.w.bias && i < a.count; ++i) to[i] += a.w.bias[a.index[i]];
      std::fill(to + a.count, to + a.capacity, 0.0f);
    }
  });
}

size_t axpy_workspace(const RowsArgs& a) { return dot_workspace(a); }
void axpy(const RowsArgs& a, const float* value, void* y, DType t, void* memory, const ParallelFor& pf) {
  const Kernel& k = relu_ffn::kernel();
  float* sums = static_cast<float*>(memory);
  const int64_t y_row = neuron::padded(a.d), columns = neuron::unit_columns(a.type);
  List rows = list_of(a.w, a.type, a.group, a.d);
  rows.index = a.index, rows.count = a.count;
  const int64_t grain = std::max(kSliceUnits, kRowGrain / std::max<int64_t>(1, a.count * neuron::kUnitBytes));
  groups_of_tokens(a.tokens, [&](int64_t first, int tokens) {
    parallel_for(pf, rows.units, grain, [&](int64_t u0, int64_t u1) {
      const int64_t c0 = u0 * columns, c1 = u1 * columns, filled = std::min(c1, a.d);
      for (int b = 0; b < tokens; ++b) {
        std::fill(sums + b * y_row + c0, sums + b * y_row + c1, 0.0f);
        if (a.w.bias && filled > c0) std::copy(a.w.bias + c0, a.w.bias + filled, sums + b * y_row + c0);
      }
      k.add_rows[int(a.type)](rows, value + first * a.capacity, a.capacity, tokens, u0, u1, sums, y_row);
    });
    for (int b = 0; b < tokens; ++b) k.write(const_cast<char*>(token(y, t, first + b, a.d)), t, a.d, sums + b * y_row);
  });
}

size_t low_rank_workspace(const LowRankArgs& a) {
  return size_t(kMaxTokens * (neuron::padded(a.d) + neuron::padded(a.r) + neuron::padded(a.f))) * 4;
}
void low_rank(const LowRankArgs& a, void* memory, const ParallelFor& pf) {
  const Kernel& k = relu_ffn::kernel();
  const int64_t x_row = neuron::padded(a.d), r_row = neuron::padded(a.r), f_row = neuron::padded(a.f);
  float *x = static_cast<float*>(memory), *hidden = x + kMaxTokens * x_row, *logits = hidden + kMaxTokens * r_row;
  List first = list_of(a.first, a.type, a.group_first, a.d), second = list_of(a.second, a.type, a.group_second, a.r);
  first.count = a.r, second.count = a.f;
  groups_of_tokens(a.tokens, [&](int64_t from, int tokens) {
    read(k, a.x, a.dtype, from, tokens, a.d, x, x_row);
    std::fill_n(hidden, tokens * r_row, 0.0f);
    products(k, first, a.type, x, x_row, tokens, hidden, r_row, pf);
    for (int64_t i = 0; a.relu && i < tokens * r_row; ++i) hidden[i] = hidden[i] < 0.0f ? 0.0f : hidden[i];
    products(k, second, a.type, hidden, r_row, tokens, logits, f_row, pf);
    for (int b = 0; b < tokens; ++b) {
      uint8_t* mask = a.mask + (from + b) * mask_bytes(a.f);
      std::memset(mask, 0, size_t(mask_bytes(a.f)));
      for (int64_t i = 0; i < a.f; ++i)
        mask[i / 8] |= uint8_t(int(logits[b * f_row + i] >= a.threshold[a.threshold_each ? i : 0]) << i % 8);
    }
  });
}

size_t sign_workspace(const SignArgs& a) { return size_t(neuron::padded(a.d)) * 4 + size_t(mask_bytes(a.d)); }
void sign(const SignArgs& a, void* memory, const ParallelFor& pf) {
  const Kernel& k = relu_ffn::kernel();
  const int64_t bytes = mask_bytes(a.d);
  float* x = static_cast<float*>(memory);
  uint8_t* own = reinterpret_cast<uint8_t*>(x + neuron::padded(a.d));
  for (int64_t t = 0; t < a.tokens; ++t) {
    read(k, a.x, a.dtype, t, 1, a.d, x, neuron::padded(a.d));
    std::memset(own, 0, size_t(bytes));
    for (int64_t j = 0; j < a.d; ++j) own[j / 8] |= uint8_t(int(x[j] < 0.0f) << j % 8);
    uint8_t* mask = a.mask + t * mask_bytes(a.f);
    parallel_for(pf, mask_bytes(a.f), std::max<int64_t>(1, kRowGrain / (8 * bytes)), [&](int64_t m0, int64_t m1) {
      for (int64_t m = m0; m < m1; ++m) {
        mask[m] = 0;
        for (int64_t i = m * 8; i < std::min(a.f, m * 8 + 8); ++i) {
          const uint8_t* row = a.signs + i * bytes;
          int64_t differ = 0, at = 0;
          for (; at + 8 <= bytes; at += 8) {
            uint64_t u, v;
            std::memcpy(&u, own + at, 8), std::memcpy(&v, row + at, 8);
            differ += __builtin_popcountll(u ^ v);
          }
          for (; at < bytes; ++at) differ += __builtin_popcount(unsigned(own[at] ^ row[at]));
          const float limit = a.alpha[a.alpha_each ? i : 0] * float(a.d - differ);
          mask[m] |= uint8_t(int(!(float(differ) > limit)) << i % 8);
        }
      }
    });
  }
}

void dynamic_k(const float* r, int64_t tokens, int64_t experts, float tau, bool largest, int32_t* order, uint8_t* mask, int32_t* count) {
  for (int64_t t = 0; t < tokens; ++t, r += experts, mask += mask_bytes(experts)) {
    std::memset(mask, 0, size_t(mask_bytes(experts)));
    int32_t n = 0;
    const auto take = [&](int64_t i) { mask[i / 8] |= uint8_t(1 << i % 8), ++n; };
    if (largest) {
      const float least = (1.0f - tau) * *std::max_element(r, r + experts);
      for (int64_t i = 0; i < experts; ++i)
        if (r[i] >= least) take(i);
    } else {
      float sum = 0.0f, reached = 0.0f;
      for (int64_t i = 0; i < experts; ++i) sum += r[i], order[i] = int32_t(i);
      std::stable_sort(order, order + experts, [&](int32_t i, int32_t j) { return r[i] > r[j]; });
      for (int64_t i = 0; i < experts; ++i) {
        take(order[i]);
        if (sum == 0.0f) break;
        reached += r[order[i]] / sum;
        if (reached >= tau) break;
      }
    }
    count[t] = n;
  }
}

void top_k(const float* score, int64_t tokens, int64_t n, int64_t k, int64_t group, float* largest, int32_t* order, uint8_t* mask) {
  const int64_t groups = (n + group - 1) / group;
  for (int64_t t = 0; t < tokens; ++t, score += n, mask += mask_bytes(groups)) {
    std::memset(mask, 0, size_t(mask_bytes(groups)));
    for (int64_t g = 0; g < groups; ++g) {
      float most = -INFINITY;
      for (int64_t i = g * group; i < std::min(n, (g + 1) * group); ++i) most = std::isnan(score[i]) ? INFINITY : std::max(most, score[i]);
      largest[g] = most, order[g] = int32_t(g);
    }
    const auto before = [&](int32_t i, int32_t j) { return largest[i] != largest[j] ? largest[i] > largest[j] : i < j; };
    const int64_t keep = std::min(k, groups);
    if (keep < groups) std::nth_element(order, order + keep, order + groups, before);
    for (int64_t i = 0; i < keep; ++i) mask[order[i] / 8] |= uint8_t(1 << order[i] % 8);
  }
}

void any_of(const uint8_t* mask, int64_t rows, int64_t bytes, uint8_t* any, int32_t* bits) {
  std::memset(any, 0, size_t(bytes));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < bytes; ++i) any[i] |= mask[r * bytes + i];
  *bits = 0;
  for (int64_t i = 0; i < bytes; ++i) *bits += __builtin_popcount(any[i]);
}

}  // namespace effk::neuron_lists
