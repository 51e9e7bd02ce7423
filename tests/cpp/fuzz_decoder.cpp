// Random steps of small decoders on every tier, in guarded memory: logits and cache have the bits of the parts called one after the
// other. What lies between the products is compared with double precision; the products and attention have programs of their own.
//   fuzz_decoder [calls [first seed]]
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "fuzz.h"
#include "ops/decoder/kernels.h"
#include "wq_rows.h"

namespace {

using namespace effk;
using namespace effk::test;
using namespace effk::decoder;
using attention::Cache;
using attention::Run;

struct Memory {
  static constexpr size_t kRoom = size_t(1) << 20;
  Guarded a{kRoom}, b{kRoom}, c{kRoom}, y{kRoom}, tokens{kRoom}, logits{kRoom}, keys[2]{Guarded{kRoom}, Guarded{kRoom}}, values[2]{Guarded{kRoom}, Guarded{kRoom}},
      k_scale[2]{Guarded{kRoom}, Guarded{kRoom}}, v_scale[2]{Guarded{kRoom}, Guarded{kRoom}}, workspace{size_t(32) << 20};
};

const Kernel& kernel() {
  for (int i = 0; i + 1 < kKernelCount; ++i)
    if (kKernels[i]->tier <= isa::active()) return *kKernels[i];
  return *kKernels[kKernelCount - 1];
}

// Owns what weights point to.
struct Store {
  std::vector<std::unique_ptr<std::vector<uint8_t>>> all;
  uint8_t* bytes(size_t n) { return all.emplace_back(new std::vector<uint8_t>(n))->data(); }
  float* floats(Random& r, int64_t n, float size, float centre = 0) {
    float* at = reinterpret_cast<float*>(bytes(size_t(n) * 4));
    for (int64_t i = 0; i < n; ++i) at[i] = centre + size * r.normal();
    return at;
  }
  void biased(Random& r, int64_t n, const void*& bias, DType& dtype) {
    if (r.chance(50)) return;
    dtype = DType(r.below(3));
    uint8_t* to = bytes(size_t(n) * width(dtype));
    for (int64_t i = 0; i < n; ++i) store(to, dtype, i, 0.3f * r.normal());
    bias = to;
  }
  WqWeight wq(Random& r, int64_t n, int64_t k, int bits) {
    const int64_t groups[] = {0, 32, 64, 128};
    const WqRows rows = random_wq_rows(r, n, k, bits, groups[r.below(4)], r.chance(50), r.chance(50));
    WqWeight w = rows.pack(bytes(rows.packed_bytes()), bytes(rows.packed_groups() * size_t(rows.scale_bytes())),
                           rows.zeros.empty() ? nullptr : bytes(rows.packed_groups()));
    biased(r, n, w.bias, w.bias_dtype);
    return w;
  }
  DenseWeight dense(Random& r, int64_t n, int64_t k) {
    const DType dtype = r.chance(50) ? DType::f32 : DType::bf16;
    const float* plain = floats(r, n * k, 1 / std::sqrt(float(k)));
    DenseWeight w{panel::Shape{panel::Kind::dense, dtype, 1, n, k}, nullptr, nullptr, DType::f32};
    uint8_t* panels = bytes(size_t(w.shape.bytes() - panel::kHeaderBytes));
    gemm::pack(w.shape, plain, nullptr, DType::f32, false, panels, ParallelFor{nullptr, nullptr, 1});
    w.panels = panels;
    biased(r, n, w.bias, w.bias_dtype);
    return w;
  }
  template <class T> T* keep(std::initializer_list<T> list) {
    T* at = reinterpret_cast<T*>(bytes(list.size() * sizeof(T)));
    std::copy(list.begin(), list.end(), at);
    return at;
  }
  Norm norm(Random& r, int64_t d) { return {floats(r, d, 0.3f, 1), r.chance(50) ? floats(r, d, 0.3f) : nullptr, 1e-5f, r.chance(50)}; }
  // Products of one x with weights of one kind each, or the first dense and the others in t16.
  Place place(Random& r, int64_t k, std::initializer_list<int64_t> widths) {
    Place p{nullptr, 0, int(widths.size()), k, {}};
    std::copy(widths.begin(), widths.end(), p.width);
    const int dense_ones = r.chance(40) ? p.outputs : int(r.below(p.outputs + 1));
    std::vector<DenseWeight> panels;
    std::vector<WqWeight> packed;
    for (int i = 0; i < p.outputs; ++i)
      if (i < dense_ones) panels.push_back(dense(r, p.width[i], k));
      else packed.push_back(wq(r, p.width[i], k, 4 << r.below(2)));
    const auto copy = [&](const auto& from) {
      auto* to = reinterpret_cast<std::decay_t<decltype(from[0])>*>(bytes(from.size() * sizeof(from[0])));
      std::copy(from.begin(), from.end(), to);
      return to;
    };
    std::vector<Part> parts;
    if (!panels.empty()) parts.push_back({Kind::dense, 0, dense_ones, copy(panels), nullptr, Compute::fp, nullptr, {}, 0, {}});
    if (!packed.empty()) parts.push_back({Kind::wq, dense_ones, p.outputs - dense_ones, nullptr, copy(packed), Compute(r.below(2)), nullptr, {}, 0, {}});
    p.parts = copy(parts), p.n_parts = int(parts.size());
    return p;
  }
};

using Rows = std::vector<float>;  // [rows, width]
const ParallelFor kAlone{nullptr, nullptr, 1};

// What a step does, part by part. The products and attention are called as they are; the rest is written out.
struct Oracle {
  const Model& m;
  const Step& s;

  std::vector<Rows> products(const Place& p, const Rows& x, int64_t rows) const {
    std::vector<uint8_t> in(x.size() * width(m.dtype));
    for (size_t i = 0; i < x.size(); ++i) store(in.data(), m.dtype, int64_t(i), x[i]);
    std::vector<std::vector<uint8_t>> out(size_t(p.outputs));
    std::vector<uint8_t> room;
    const auto work = [&](size_t bytes) {
      room.resize(bytes + 64);
      return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(room.data()) + 63) / 64 * 64);
    };
    for (int i = 0; i < p.n_parts; ++i)
      for (int j = 0; j < p.parts[i].count; ++j) {
        const Part& part = p.parts[i];
        auto& y = out[size_t(part.first + j)];
        y.resize(size_t(rows * p.width[part.first + j]) * width(m.dtype));
        if (part.kind == Kind::dense) {
          const DenseWeight& w = part.dense[j];
          const gemm::LinearArgs a{w.shape, w.panels, in.data(), m.dtype, false, rows, w.bias, w.bias_dtype, Activation::none, y.data()};
          gemm::linear(a, work(gemm::linear_workspace(a, 1)), kAlone);
        } else {
          void* to = y.data();
          const WqLinearArgs a{in.data(), m.dtype, rows, p.k, &part.wq[j], &to, 1, part.compute};
          wq_linear(a, work(wq_linear_workspace(a)), kAlone);
        }
      }
    std::vector<Rows> wide;
    for (const auto& y : out) {
      Rows values(y.size() / width(m.dtype));
      for (size_t i = 0; i < values.size(); ++i) values[i] = load(y.data(), m.dtype, int64_t(i));
      wide.push_back(values);
    }
    return wide;
  }
  Rows normalised(const Norm& n, const Rows& h) const {
    Rows x(h.size());
    for (size_t i = 0; i < h.size(); i += size_t(m.width)) kernel().norm(n, h.data() + i, m.width, x.data() + i);
    return x;
  }
  static void add(const Rows& y, Rows& h) {
    for (size_t i = 0; i < h.size(); ++i) h[i] += y[i];
  }
  Rows attended(const Rows& q, const Rows& k, const Rows& v, int64_t layer) const {
    attention::Args a{};
    const int64_t q_width = m.heads * m.head_dim, kv_width = m.kv_heads * m.head_dim;
    a.q = q.data(), a.k = k.data(), a.v = v.data(), a.q_stride = q_width, a.k_stride = a.v_stride = kv_width;
    a.heads = m.heads, a.scale = m.scale, a.cosine = m.cosine, a.sine = m.sine, a.rotary = m.rotary, a.window = m.window, a.cache = s.cache;
    a.cache.k = static_cast<char*>(s.cache.k) + layer * s.k_layer, a.cache.v = static_cast<char*>(s.cache.v) + layer * s.v_layer;
    if (s.cache.k_scale) a.cache.k_scale += layer * s.scale_layer, a.cache.v_scale += layer * s.scale_layer;
    Rows out(size_t(s.rows * q_width));
    a.runs = s.runs, a.n_runs = s.n_runs, a.out = out.data(), a.out_stride = q_width;
    std::vector<uint8_t> room(attention::workspace(a, 1) + 64);
    attention::run(a, reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(room.data()) + 63) / 64 * 64), kAlone);
    return out;
  }
  Rows embedded() const {
    Rows h;
    std::vector<float> table(size_t(m.vocab * m.width));
    if (m.embedding.codes) wq_dequantize(*m.embedding.codes, table.data());
    for (int64_t i = 0; i < s.rows; ++i)
      for (int64_t c = 0; c < m.width; ++c) {
        const int64_t at = s.tokens[i] * m.width + c;
        h.push_back(m.embedding.codes ? table[size_t(at)] : load(static_cast<const uint8_t*>(m.embedding.table), m.embedding.dtype, at));
      }
    for (int64_t i = 0; m.embedding.positions && i < s.n_runs; ++i)
      for (int64_t j = 0; j < s.runs[i].count * m.width; ++j)
        h[size_t(s.runs[i].row * m.width + j)] += m.embedding.positions[s.runs[i].start * m.width + j];
    return h;
  }
  void layer(int64_t index, Rows& h) const {
    const Layer& l = m.layers[index];
    std::vector<Rows> qkv = products(l.qkv, normalised(l.attention_norm, h), s.rows);
    if (l.qkv.outputs == 1) {
      const int64_t q = m.heads * m.head_dim, kv = m.kv_heads * m.head_dim, all = q + 2 * kv;
      const auto cut = [&](int64_t from, int64_t count) {
        Rows part;
        for (int64_t i = 0; i < s.rows; ++i) part.insert(part.end(), qkv[0].begin() + i * all + from, qkv[0].begin() + i * all + from + count);
        return part;
      };
      qkv = {cut(0, q), cut(q, kv), cut(q + kv, kv)};
    }
    add(products(l.out, attended(qkv[0], qkv[1], qkv[2], index), s.rows)[0], h);
    const Rows x = normalised(l.ffn_norm, h);
    if (l.sparse) {
      relu_ffn::Args a = *l.sparse;
      Rows y(h.size());
      std::vector<int32_t> nnz(size_t(s.rows));
      a.x = x.data(), a.dtype = DType::f32, a.tokens = s.rows, a.y = y.data(), a.nnz = nnz.data();
      std::vector<uint8_t> room(relu_ffn::workspace(a, 1) + 64);
      relu_ffn::run(a, reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(room.data()) + 63) / 64 * 64), kAlone);
      return add(y, h);
    }
    std::vector<Rows> up = products(l.up, x, s.rows);
    kernel().gate(m.act, up[0].data(), m.gated ? up[1].data() : nullptr, int64_t(up[0].size()), up[0].data());
    add(products(l.down, up[0], s.rows)[0], h);
  }
  Rows logits() const {
    Rows h = embedded();
    for (int64_t i = 0; i < m.n_layers; ++i) layer(i, h);
    Rows wanted;
    if (s.which == Logits::all) wanted = h;
    for (int64_t i = 0; s.which == Logits::last && i < s.n_runs; ++i) {
      const auto last = h.begin() + (s.runs[i].row + s.runs[i].count - 1) * m.width;
      wanted.insert(wanted.end(), last, last + m.width);
    }
    return wanted.empty() ? wanted : products(m.head, normalised(m.final_norm, wanted), int64_t(wanted.size()) / m.width)[0];
  }
};

void steps(Random& r, Memory& memory) {
  Store store_;
  Model m{};
  m.width = 1 + r.below(100), m.vocab = 1 + r.below(60), m.n_layers = 1 + r.below(2);
  m.kv_heads = 1 + r.below(2), m.heads = m.kv_heads * (1 + r.below(3)), m.head_dim = 16 * (1 + r.below(3));
  m.scale = float(1 / std::sqrt(double(m.head_dim))), m.dtype = r.chance(50) ? DType::f32 : DType::bf16;
  m.act = Activation(1 + r.below(4)), m.gated = r.chance(60);
  const int64_t q = m.heads * m.head_dim, kv = m.kv_heads * m.head_dim, capacity = 1 + r.below(80), slots = 1 + r.below(4);
  m.window = r.chance(30) ? 1 + r.below(capacity) : 0;
  if (r.chance(60)) {
    m.rotary = 2 * (1 + r.below(m.head_dim / 2));
    m.cosine = store_.floats(r, capacity * m.rotary / 2, 0.5f), m.sine = store_.floats(r, capacity * m.rotary / 2, 0.5f);
  }
  std::vector<Layer> layers;
  std::vector<std::unique_ptr<relu_ffn::Args>> sparse;
  for (int64_t i = 0; i < m.n_layers; ++i) {
    Layer l{store_.norm(r, m.width), store_.norm(r, m.width), {}, {}, {}, {}, nullptr};
    l.qkv = r.chance(50) ? store_.place(r, m.width, {q, kv, kv}) : store_.place(r, m.width, {q + 2 * kv});
    l.out = store_.place(r, q, {m.width});
    const int64_t f = 1 + r.below(150);
    if (r.chance(30)) {
      auto& a = *sparse.emplace_back(new relu_ffn::Args{});
      a.type = neuron::Rows::bf16, a.kind = Gate::relu, a.d = m.width, a.f = f, a.fall_back = true;
      for (relu_ffn::NeuronRows* rows : {&a.gate, &a.up, &a.down}) {
        uint8_t* at = store_.bytes(size_t(f * neuron::row_bytes(a.type, m.width)));
        relu_ffn::pack(store_.floats(r, f * m.width, 0.3f), DType::f32, false, f, m.width, a.type, 0, at, nullptr, kAlone);
        rows->rows = at;
      }
      l.sparse = &a;
    } else {
      l.up = m.gated ? store_.place(r, m.width, {f, f}) : store_.place(r, m.width, {f});
      l.down = store_.place(r, f, {m.width});
    }
    layers.push_back(l);
  }
  m.layers = layers.data();
  m.final_norm = store_.norm(r, m.width);
  m.head = store_.place(r, m.width, {m.vocab});
  if (r.chance(40)) {
    WqWeight* codes = store_.keep({store_.wq(r, m.vocab, m.width, 8)});
    codes->bias = nullptr, codes->zeros = nullptr;  // rows of a table are symmetric
    m.embedding.codes = codes;
  } else {
    m.embedding.dtype = DType(r.below(3));
    uint8_t* table = store_.bytes(size_t(m.vocab * m.width) * width(m.embedding.dtype));
    for (int64_t i = 0; i < m.vocab * m.width; ++i) store(table, m.embedding.dtype, i, r.normal());
    m.embedding.table = table;
  }
  if (r.chance(40)) m.embedding.positions = store_.floats(r, capacity * m.width, 0.5f);

  // Two caches, of the decoder and of the oracle.
  Step s{}, other{};
  const kv::Type type = kv::Type(r.below(3));
  const int64_t heads = slots * m.kv_heads, bytes = heads * kv::head_bytes(type, capacity, m.head_dim), scales = heads * kv::padded(capacity);
  const auto cache_of = [&](Step& step, int which) {
    const auto floats = [&](Guarded& at) { return place<float>(r, at, scales * m.n_layers); };
    step.cache = {place<uint8_t>(r, memory.keys[which], bytes * m.n_layers), place<uint8_t>(r, memory.values[which], bytes * m.n_layers),
                  type == kv::Type::i8 ? floats(memory.k_scale[which]) : nullptr, type == kv::Type::i8 ? floats(memory.v_scale[which]) : nullptr,
                  type, slots, capacity, m.kv_heads, m.head_dim};
    step.k_layer = step.v_layer = bytes, step.scale_layer = scales;
  };
  cache_of(s, 0), cache_of(other, 1);
  std::vector<int64_t> held(size_t(slots), 0);
  for (int n = 0; n < 3; ++n) {
    std::vector<Run> runs;
    int64_t rows = 0;
    for (int64_t slot = 0; slot < slots; ++slot) {
      const int64_t count = std::min(capacity - held[size_t(slot)], r.chance(50) ? 1 : 1 + r.below(12));
      if (count < 1 || r.chance(20)) continue;
      runs.push_back({rows, count, slot, held[size_t(slot)]});
      rows += count, held[size_t(slot)] += count;
    }
    int64_t* tokens = place<int64_t>(r, memory.tokens, rows);
    for (int64_t i = 0; i < rows; ++i) tokens[i] = r.below(m.vocab);
    s.tokens = other.tokens = tokens, s.rows = other.rows = rows, s.runs = other.runs = runs.data(), s.n_runs = other.n_runs = int64_t(runs.size());
    s.which = other.which = Logits(r.below(3));
    const int64_t wanted = s.which == Logits::none ? 0 : s.which == Logits::last ? s.n_runs : rows;
    s.logits = place<float>(r, memory.logits, wanted * m.vocab);
    const ParallelFor pool = random_pool(r);
    decoder::step(m, s, room(memory.workspace, decoder::workspace(m, s, pool.threads)), pool);
    expect_intact("written outside", {&memory.tokens, &memory.logits, &memory.workspace, &memory.keys[0], &memory.values[0]});
    const Rows want = Oracle{m, other}.logits();
    if (int64_t(want.size()) != wanted * m.vocab) fail("number of logits");
    expect_equal("logits", s.logits, bytes_at(want.data(), want.size() * 4));
    expect_equal("keys", s.cache.k, bytes_at(other.cache.k, size_t(bytes * m.n_layers)));
    expect_equal("values", s.cache.v, bytes_at(other.cache.v, size_t(bytes * m.n_layers)));
  }
}

// Norms, gates and sums against double precision.
void passes(Random& r, Memory& memory) {
  const int64_t d = 1 + r.below(r.chance(70) ? 100 : 1500);
  const float shift = r.chance(50) ? 0 : 3 * r.normal();
  const Values x = values(r, memory.a, DType::f32, d, [&] { return r.normal() + shift; });
  const Values w = random_values(r, memory.b, DType::f32, d), b = random_values(r, memory.c, DType::f32, d);
  const bool biased = r.chance(50);
  const Norm n{w.floats(), biased ? b.floats() : nullptr, 1e-5f, r.chance(50)};
  float* y = place<float>(r, memory.y, d);
  kernel().norm(n, x.floats(), d, y);
  expect_intact("norm wrote outside", {&memory.a, &memory.y});
  double mean = 0, size = 0, squares = 0, squares_off = 0;
  for (double v : x.value) mean += v / double(d), size += std::fabs(v) / double(d);
  if (!n.centred) mean = size = 0;
  const double chain = double(d) / 64 + 12, mean_off = chain * 0x1p-24 * size;
  const auto off_of = [&](double v) { return mean_off + 0x1p-24 * std::fabs(v - mean); };
  for (double v : x.value) {
    squares += (v - mean) * (v - mean) / double(d);
    squares_off += (2 * std::fabs(v - mean) + off_of(v)) * off_of(v) / double(d);
  }
  squares_off += chain * 0x1p-24 * squares;
  const double by = 1 / std::sqrt(squares + 1e-5), relative = squares_off / (squares + 1e-5) + 4 * 0x1p-24;
  for (int64_t i = 0; relative < 0.1 && i < d; ++i) {
    const double v = x.value[size_t(i)], scaled = (v - mean) * by * w.value[size_t(i)], add = biased ? b.value[size_t(i)] : 0;
    const double off = off_of(v) * by * std::fabs(w.value[size_t(i)]) * (1 + relative) + (relative + 3 * 0x1p-24) * std::fabs(scaled);
    expect_within("norm", y[i], scaled + add, off, DType::f32);
  }

  const Activation act = Activation(r.below(5));
  const bool gated = r.chance(50);
  kernel().gate(act, x.floats(), gated ? w.floats() : nullptr, d, y);
  expect_intact("gate wrote outside", {&memory.y});
  for (int64_t i = 0; i < d; ++i) {
    const double v = x.value[size_t(i)], u = gated ? w.value[size_t(i)] : 1;
    expect_within("gate", y[i], activated(v, act) * u, (act == Activation::none || act == Activation::relu ? 0 : 1e-6 * std::max(1.0, std::fabs(v))) * std::fabs(u), DType::f32);
  }
  float* to = const_cast<float*>(b.floats());
  kernel().add(x.floats(), d, to);
  expect_intact("add wrote outside", {&memory.c});
  for (int64_t i = 0; i < d; ++i)
    if (to[i] != float(b.value[size_t(i)]) + float(x.value[size_t(i)])) fail("add");
}

}  // namespace

int main(int argc, char** argv) {
  static Memory memory;
  return run_calls(argc, argv, [&](Random& r) {
    random_tier(r);
    r.chance(60) ? steps(r, memory) : passes(r, memory);
  });
}
