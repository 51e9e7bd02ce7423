// Gate, list of active neurons, up, down: three rounds of threads per group of at most eight tokens, or of up to 32 where there are more.
// Compiled with baseline flags.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "ops/relu_ffn/kernels.h"

namespace effk::relu_ffn {

extern const Kernel kScalar;
#ifdef EFFK_X86
extern const Kernel kAvx2, kAvx512;
#endif
const Kernel* const kKernels[] = {
#ifdef EFFK_X86
    &kAvx512, &kAvx2,
#endif
    &kScalar,
};
const int kKernelCount = int(sizeof(kKernels) / sizeof(kKernels[0]));

const Kernel& kernel() {
  for (const Kernel* k : kKernels)
    if (k->tier <= isa::active()) return *k;
  return kScalar;
}

namespace {

using neuron::padded;

constexpr int64_t kBlock = 256;          // neurons of one item of the first round: 43 items at f = 11008, 1 us and more each
constexpr int64_t kRowGrain = 64 << 10;  // bytes of rows that are worth a thread
constexpr double kMostPicked = 0.7;      // share of active neurons from which all are read in order: an estimate from the speeds of both ways
constexpr int64_t kSliceUnits = 8;       // narrowest slice of the rows of down: 512 bytes in a run

// Memory of a call, cut in order.
struct Room {
  char* at;
  template <class T> T* take(int64_t count) {
    T* here = reinterpret_cast<T*>(at);
    at += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return here;
  }
};
int64_t whole(int64_t n) { return (n + 15) / 16 * 16; }

// Everything between the rounds, for a group of tokens. `rows`: neurons, or inputs of input_sparse.
struct Lists {
  float *x, *y, *a, *u, *g;   // [tokens][x_row], [tokens][y_row], the others [tokens][a_row]
  int32_t *position, *counts, *active;  // of blocks: counts [blocks], active [blocks][tokens]
  uint16_t* allowed;          // [tokens][a_row / 16]
  int64_t x_row, y_row, a_row, blocks, tokens;

  Lists(Room& room, int64_t in, int64_t out, int64_t rows, int64_t most) : tokens(most) {
    x_row = padded(in), y_row = padded(out), a_row = whole(rows), blocks = (rows + kBlock - 1) / kBlock;
    x = room.take<float>(tokens * x_row);
    y = room.take<float>(tokens * y_row);
    a = room.take<float>(tokens * a_row);
    u = room.take<float>(tokens * a_row);
    g = room.take<float>(tokens * a_row);
    position = room.take<int32_t>(a_row);
    counts = room.take<int32_t>(blocks);
    active = room.take<int32_t>(blocks * tokens);
    allowed = room.take<uint16_t>(tokens * a_row / 16);
  }
  static size_t bytes(int64_t in, int64_t out, int64_t rows, int64_t most) {
    Room room{nullptr};
    Lists(room, in, out, rows, most);
    return size_t(reinterpret_cast<intptr_t>(room.at)) + 64;
  }
};

// How many tokens share a list: a decoding step as it comes; a prompt in groups of about the same size, each as large as the caches allow.
int64_t group_size(int64_t tokens) {
  if (tokens <= kMaxTokens) return tokens;
  const int64_t groups = (tokens + kMostTokens - 1) / kMostTokens;
  return (tokens + groups - 1) / groups;
}

List list_of(const NeuronRows& w, neuron::Rows type, int64_t group, int64_t columns) {
  return {w.rows, neuron::row_bytes(type, columns), neuron::units(type, columns), w.scales, neuron::groups(columns, group),
          group, nullptr, 0, 0};
}

// x in fp32, zeros beyond.
void read(const Kernel& k, const void* x, DType t, int64_t first, int tokens, int64_t width, const Lists& l) {
  const int64_t size = t == DType::f32 ? 4 : 2;
  for (int b = 0; b < tokens; ++b) {
    float* to = l.x + b * l.x_row;
    std::fill(to + width, to + l.x_row, 0.0f);
    k.read(static_cast<const char*>(x) + (first + b) * width * size, t, width, 0, width / 16 * 16, to);
    if (width % 16) {
      float last[16];
      k.read(static_cast<const char*>(x) + (first + b) * width * size, t, width, width / 16 * 16, 16, last);
      std::copy_n(last, width % 16, to + width / 16 * 16);
    }
  }
}

// The lists of all blocks as one, in order; how long it is.
int64_t merge(const Lists& l, int tokens, int32_t* nnz) {
  int64_t n = 0;
  std::fill_n(nnz, tokens, 0);
  for (int64_t i = 0; i < l.blocks; ++i) {
    const int64_t from = i * kBlock, count = l.counts[i];
    if (from != n) {
      std::memmove(l.position + n, l.position + from, size_t(count) * 4);
      for (int b = 0; b < tokens; ++b) std::memmove(l.a + b * l.a_row + n, l.a + b * l.a_row + from, size_t(count) * 4);
    }
    n += count;
    for (int b = 0; b < tokens; ++b) nnz[b] += l.active[i * l.tokens + b];
  }
  return n;
}

// y = rows of the list times h, and bias; a thread has some columns and walks the whole list, so that no sums of threads meet.
void add_up(const Kernel& k, const List& rows, neuron::Rows type, const float* bias, int64_t width, int tokens, const Lists& l, const ParallelFor& pf) {
  const int64_t columns = neuron::unit_columns(type);
  const int64_t grain = std::max(kSliceUnits, kRowGrain / std::max<int64_t>(1, rows.count * neuron::kUnitBytes));
  parallel_for(pf, rows.units, grain, [&](int64_t u0, int64_t u1) {
    const int64_t c0 = u0 * columns, c1 = u1 * columns, filled = std::min(c1, width);
    for (int b = 0; b < tokens; ++b) {
      float* y = l.y + b * l.y_row;
      std::fill(y + c0, y + c1, 0.0f);
      if (bias && filled > c0) std::copy(bias + c0, bias + filled, y + c0);
    }
    k.add_rows[int(type)](rows, l.a, l.a_row, tokens, u0, u1, l.y, l.y_row);
  });
}

void write(const Kernel& k, void* y, DType t, int64_t first, int tokens, int64_t width, const Lists& l) {
  const int64_t size = t == DType::f32 ? 4 : 2;
  for (int b = 0; b < tokens; ++b) k.write(static_cast<char*>(y) + (first + b) * width * size, t, width, l.y + b * l.y_row);
}

bool inside_mask(const Args& a, int64_t token, int64_t i) {
  const uint8_t* row = a.mask + (a.mask_rows == 1 ? 0 : token) * a.mask_bytes;
  const int64_t bit = i / a.mask_group;
  return row[bit / 8] >> (bit % 8) & 1;
}

// Gate rows [n0, n0 + count), or those on a list, with bias.
void gates(const Kernel& k, const Args& a, List rows, const int32_t* index, int64_t n0, int64_t count, int tokens, const Lists& l, float* g, int64_t g_row) {
  rows.index = index, rows.first = n0, rows.count = count;
  k.dot[int(a.type)](rows, l.x, l.x_row, tokens, g, g_row);
  const float* bias = a.gate.bias;
  for (int b = 0; bias && b < tokens; ++b)
    for (int64_t i = 0; i < count; ++i) g[b * g_row + i] += bias[index ? index[i] : n0 + i];
}

// What a gate needs of all neurons: the cut of gelu_gauss, or who is among the top k.
void look_at_all(const Args& a, int64_t first, int tokens, const Lists& l, float* cut) {
  for (int b = 0; b < tokens; ++b) {
    const float* g = l.g + b * l.a_row;
    if (a.kind == Gate::gelu_gauss) {
      double sum = 0, squares = 0;
      for (int64_t i = 0; i < a.f; ++i) sum += g[i];
      const double mean = sum / double(a.f);
      for (int64_t i = 0; i < a.f; ++i) squares += (g[i] - mean) * (g[i] - mean);
      cut[b] = float(mean + double(a.param[0]) * std::sqrt(squares / double(a.f)));
      continue;
    }
    // top_k: positions and values of the lists are free until then.
    int32_t* order = l.position;
    float* size = l.a;
    int64_t n = 0;
    for (int64_t i = 0; i < a.f; ++i) {
      if (a.mask && !inside_mask(a, first + b, i)) continue;
      order[n++] = int32_t(i);
      size[i] = std::isnan(g[i]) ? INFINITY : std::fabs(g[i]);
    }
    const int64_t keep = std::min(n, int64_t(a.param[0]));
    const auto before = [&](int32_t i, int32_t j) { return size[i] != size[j] ? size[i] > size[j] : i < j; };
    if (keep < n) std::nth_element(order, order + keep, order + n, before);
    uint16_t* allowed = l.allowed + b * (l.a_row / 16);
    std::fill_n(allowed, l.a_row / 16, uint16_t(0));
    for (int64_t i = 0; i < keep; ++i) allowed[order[i] / 16] |= uint16_t(1 << order[i] % 16);
  }
}

// The active neurons of one block, behind l.position + n0 and l.a + n0.
void block(const Kernel& k, const Args& a, const List& rows, int64_t i, int64_t first, int tokens, const Lists& l, const float* cut) {
  const int64_t n0 = i * kBlock, count = std::min(kBlock, a.f - n0);
  int32_t* active = l.active + i * l.tokens;
  std::fill_n(active, l.tokens, 0);
  const bool seen = a.kind == Gate::gelu_gauss || a.kind == Gate::top_k;  // all gates are known
  float* g = l.g + n0;
  if (!a.mask || a.kind == Gate::top_k) {
    if (!seen) gates(k, a, rows, nullptr, n0, count, tokens, l, g, l.a_row);
    l.counts[i] = int32_t(k.compact(a.kind, g, l.a_row, count, a.param ? a.param + (a.param_each ? n0 : 0) : nullptr, a.param_each, cut, tokens,
                                    seen && a.kind == Gate::top_k ? l.allowed + n0 / 16 : nullptr, l.a_row / 16, int32_t(n0), l.position + n0,
                                    l.a + n0, l.a_row, active));
    return;
  }
  // Inside a mask only those rows are read that it allows for any token.
  int32_t index[kBlock];
  float param[kBlock], part[kMostTokens * kBlock];
  uint16_t allowed[kMostTokens * kBlock / 16] = {};
  int64_t n = 0;
  for (int64_t j = n0; j < n0 + count; ++j) {
    bool any = false;
    for (int b = 0; b < (a.mask_rows == 1 ? 1 : tokens); ++b) any |= inside_mask(a, first + b, j);
    if (!any) continue;
    for (int b = 0; b < tokens; ++b)
      if (inside_mask(a, first + b, j)) allowed[b * (kBlock / 16) + n / 16] |= uint16_t(1 << n % 16);
    if (a.param) param[n] = a.param[a.param_each ? j : 0];
    if (seen)
      for (int b = 0; b < tokens; ++b) part[b * kBlock + n] = g[b * l.a_row + j - n0];
    index[n++] = int32_t(j);
  }
  if (!seen) gates(k, a, rows, index, 0, n, tokens, l, part, kBlock);
  const int64_t found = k.compact(a.kind, part, kBlock, n, a.param ? param : nullptr, true, cut, tokens, allowed, kBlock / 16, 0, l.position + n0,
                                  l.a + n0, l.a_row, active);
  for (int64_t j = 0; j < found; ++j) l.position[n0 + j] = index[l.position[n0 + j]];
  l.counts[i] = int32_t(found);
}

void group_of_tokens(const Kernel& k, const Args& a, int64_t first, int tokens, const Lists& l, const ParallelFor& pf) {
  read(k, a.x, a.dtype, first, tokens, a.d, l);
  const List gate = list_of(a.gate, a.type, a.group, a.d);
  const int64_t row_grain = std::max<int64_t>(1, kRowGrain / gate.row_bytes);
  float cut[kMostTokens] = {};
  if (a.kind == Gate::gelu_gauss || a.kind == Gate::top_k) {
    parallel_for(pf, a.f, row_grain, [&](int64_t n0, int64_t n1) { gates(k, a, gate, nullptr, n0, n1 - n0, tokens, l, l.g + n0, l.a_row); });
    look_at_all(a, first, tokens, l, cut);
  }
  parallel_for(pf, l.blocks, std::max<int64_t>(1, row_grain / kBlock), [&](int64_t i0, int64_t i1) {
    for (int64_t i = i0; i < i1; ++i) block(k, a, gate, i, first, tokens, l, cut);
  });
  List list = list_of(a.up.rows ? a.up : a.down, a.type, a.group, a.d);
  list.index = l.position;
  list.count = merge(l, tokens, a.nnz + first);
  if (a.dense || (a.fall_back && double(list.count) > kMostPicked * double(a.f))) {  // the same terms with the zeros: h of every neuron in its place
    for (int b = 0; b < tokens; ++b) {
      float *h = l.a + b * l.a_row, *from = l.g + b * l.a_row;
      std::copy_n(h, list.count, from);
      std::fill_n(h, a.f, 0.0f);
      for (int64_t i = 0; i < list.count; ++i) h[l.position[i]] = from[i];
    }
    list.index = nullptr;
    list.count = a.f;
  }
  if (a.up.rows)
    parallel_for(pf, list.count, row_grain, [&](int64_t i0, int64_t i1) {
      List part = list;
      part.count = i1 - i0;
      if (part.index) part.index += i0; else part.first = i0;
      k.dot[int(a.type)](part, l.x, l.x_row, tokens, l.u + i0, l.a_row);
      for (int b = 0; b < tokens; ++b) {
        float *h = l.a + b * l.a_row, *u = l.u + b * l.a_row;
        for (int64_t i = i0; i < i1; ++i) {
          float up = u[i];
          if (a.up.bias) up += a.up.bias[list.index ? list.index[i] : i];
          if (a.kind == Gate::drelu && up <= 0.0f) up = 0.0f;
          h[i] = h[i] == 0.0f ? 0.0f : h[i] * up;  // a token for which the neuron is inactive takes nothing from it
        }
      }
    });
  List down = list_of(a.down, a.type, a.group, a.d);
  down.index = list.index, down.count = list.count;
  add_up(k, down, a.type, a.down.bias, a.d, tokens, l, pf);
  write(k, a.y, a.dtype, first, tokens, a.d, l);
}

}  // namespace

size_t workspace(const Args& a, int) { return a.tokens ? Lists::bytes(a.d, a.d, a.f, group_size(a.tokens)) : 0; }

void run(const Args& a, void* memory, const ParallelFor& pf) {
  if (a.tokens == 0) return;
  Room room{static_cast<char*>(memory)};
  const int64_t most = group_size(a.tokens);
  const Lists l(room, a.d, a.d, a.f, most);
  for (int64_t t = 0; t < a.tokens; t += most) group_of_tokens(kernel(), a, t, int(std::min(most, a.tokens - t)), l, pf);
}

size_t input_sparse_workspace(const InputSparseArgs& a, int) { return a.tokens ? Lists::bytes(a.d_in, a.d_out, a.d_in, group_size(a.tokens)) : 0; }

void input_sparse(const InputSparseArgs& a, void* memory, const ParallelFor& pf) {
  if (a.tokens == 0) return;
  const Kernel& k = kernel();
  Room room{static_cast<char*>(memory)};
  const int64_t most = group_size(a.tokens);
  const Lists l(room, a.d_in, a.d_out, a.d_in, most);
  const float zero = 0.0f, *threshold = a.threshold ? a.threshold : &zero;
  for (int64_t t = 0; t < a.tokens; t += most) {
    const int tokens = int(std::min(most, a.tokens - t));
    read(k, a.x, a.dtype, t, tokens, a.d_in, l);
    std::fill_n(a.nnz + t, tokens, 0);
    List list = list_of(a.w, a.type, a.group, a.d_out);
    list.index = l.position;
    list.count = k.compact(Gate::magnitude, l.x, l.x_row, a.d_in, threshold, a.threshold_each, nullptr, tokens, nullptr, 0, 0, l.position, l.a,
                           l.a_row, a.nnz + t);
    add_up(k, list, a.type, a.w.bias, a.d_out, tokens, l, pf);
    write(k, a.y, a.dtype, t, tokens, a.d_out, l);
  }
}

const char* kernel_name() { return kernel().name; }

}  // namespace effk::relu_ffn
