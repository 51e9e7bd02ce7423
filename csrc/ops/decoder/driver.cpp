// Runs the layers one after the other; memory and threads. Compiled with baseline flags.
#include <algorithm>
#include <cstring>

#include "common/half.h"
#include "formats/t16.h"
#include "ops/decoder/kernels.h"

namespace effk::decoder {

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

namespace {

constexpr int64_t kRowGrain = 16 << 10;  // floats of the passes between products: about 3 us, above the cost of waking a thread

const Kernel& choose() {
  for (const Kernel* k : kKernels)
    if (k->tier <= isa::active()) return *k;
  return kScalar;
}
constexpr size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

gemm::LinearArgs dense_args(const DenseWeight& w, const void* x, DType dtype, int64_t rows, void* y) {
  return {w.shape, w.panels, x, dtype, false, rows, w.bias, w.bias_dtype, Activation::none, y};
}
WqLinearArgs wq_args(const Part& p, const void* x, DType dtype, int64_t rows, int64_t k, void* const* y) {
  return {x, dtype, rows, k, p.wq, y, p.count, p.compute};
}
QuikLinearArgs quik_args(const Part& p, const void* x, DType dtype, int64_t rows, void* const* y) {
  return {x, dtype, rows, p.split, p.quik, y, p.count, p.bits_a, p.mode};
}

// Room of one call, laid out once for the widest layer.
struct Room {
  size_t h, x, q, k, v, attended, up, sum, narrow_x, narrow_y, kernel, total;
};

void widen(const Model& m, const Place& p, int64_t rows, int threads, int64_t& widest_in, int64_t& widest_out, size_t& kernel) {
  widest_in = std::max(widest_in, p.k);
  widest_out = std::max(widest_out, p.total());
  for (int i = 0; i < p.n_parts; ++i) {
    const Part& part = p.parts[i];
    void* none[kMaxOutputs] = {};
    if (part.kind == Kind::wq) {
      kernel = std::max(kernel, wq_linear_workspace(wq_args(part, nullptr, m.dtype, rows, p.k, none)));
    } else if (part.kind == Kind::quik) {
      kernel = std::max(kernel, quik_linear_workspace(quik_args(part, nullptr, m.dtype, rows, none), threads));
    } else {
      for (int j = 0; j < part.count; ++j)
        kernel = std::max(kernel, gemm::linear_workspace(dense_args(part.dense[j], nullptr, m.dtype, rows, nullptr), threads));
    }
  }
}

int64_t logit_rows(const Step& s) { return s.which == Logits::none ? 0 : s.which == Logits::last ? s.n_runs : s.rows; }

relu_ffn::Args sparse_args(const Layer& l, const float* x, int64_t rows, float* y, int32_t* nnz) {
  relu_ffn::Args a = *l.sparse;
  a.x = x;
  a.dtype = DType::f32;
  a.tokens = rows;
  a.y = y;
  a.nnz = nnz;
  return a;
}

attention::Args attention_args(const Model& m, const Step& s, int64_t layer, const float* q, const float* k, const float* v, int64_t q_stride,
                               int64_t kv_stride, float* out) {
  attention::Args a{};
  a.q = q, a.k = k, a.v = v;
  a.q_stride = q_stride, a.k_stride = kv_stride, a.v_stride = kv_stride;
  a.heads = m.heads;
  a.scale = m.scale;
  a.cosine = m.cosine, a.sine = m.sine, a.rotary = m.rotary;
  a.window = m.window;
  a.cache = s.cache;
  a.cache.k = static_cast<char*>(s.cache.k) + layer * s.k_layer;
  a.cache.v = static_cast<char*>(s.cache.v) + layer * s.v_layer;
  if (s.cache.k_scale) a.cache.k_scale += layer * s.scale_layer, a.cache.v_scale += layer * s.scale_layer;
  a.runs = s.runs, a.n_runs = s.n_runs;
  a.out = out, a.out_stride = m.heads * m.head_dim;
  return a;
}

Room room_of(const Model& m, const Step& s, int threads) {
  const int64_t rows = s.rows, q_width = m.heads * m.head_dim, kv_width = m.kv_heads * m.head_dim;
  int64_t in = m.width, out = m.width, up = 0;
  size_t kernel = 0;
  for (int64_t i = 0; i < m.n_layers; ++i) {
    const Layer& l = m.layers[i];
    for (const Place* p : {&l.qkv, &l.out, &l.up, &l.down})
      if (p->n_parts) widen(m, *p, rows, threads, in, out, kernel);
    up = std::max(up, l.up.total());
    if (l.sparse) kernel = std::max(kernel, relu_ffn::workspace(sparse_args(l, nullptr, rows, nullptr, nullptr), threads) + aligned(size_t(rows) * 4));
  }
  if (m.n_layers) kernel = std::max(kernel, attention::workspace(attention_args(m, s, 0, nullptr, nullptr, nullptr, q_width, kv_width, nullptr), threads));
  int64_t head_out = 0;
  if (logit_rows(s)) widen(m, m.head, logit_rows(s), threads, in, head_out, kernel);
  Room r{};
  size_t at = 0;
  const auto take = [&](size_t bytes) { const size_t here = at; at += aligned(bytes); return here; };
  const size_t n = size_t(rows) * 4;
  r.h = take(n * size_t(m.width));
  r.x = take(n * size_t(m.width));
  r.q = take(n * size_t(q_width + 2 * kv_width));
  r.attended = take(n * size_t(q_width));
  r.up = take(n * size_t(up));
  r.sum = take(n * size_t(m.width));
  if (m.dtype != DType::f32) {
    r.narrow_x = take(size_t(rows) * size_t(in) * 2);
    r.narrow_y = take(std::max(size_t(rows) * size_t(out), size_t(logit_rows(s)) * size_t(head_out)) * 2);
  }
  r.kernel = take(kernel);
  r.total = at;
  return r;
}

struct Runner {
  const Model& m;
  const Step& s;
  const Kernel& kernel;
  const ParallelFor& pf;
  char* base;
  Room room;

  float* at(size_t offset) const { return reinterpret_cast<float*>(base + offset); }

  template <class F> void rows(int64_t count, int64_t width, const F& f) const {
    parallel_for(pf, count, 1 + kRowGrain / width, [&](int64_t b, int64_t e) { for (int64_t i = b; i < e; ++i) f(i); });
  }
  // Passes over long runs of floats, a few rows or many.
  template <class F> void spans(int64_t count, const F& f) const {
    const int64_t pieces = (count + kRowGrain - 1) / kRowGrain;
    parallel_for(pf, pieces, 1, [&](int64_t b, int64_t e) { f(b * kRowGrain, std::min(count, e * kRowGrain)); });
  }

  // y[i] = x W_i^T + b_i, all of a place.
  void products(const Place& p, const float* x, int64_t count, float* const* y) const {
    const bool narrow = m.dtype != DType::f32;
    const void* in = x;
    void* out[kMaxOutputs];
    if (narrow) {
      uint16_t *const narrow_x = reinterpret_cast<uint16_t*>(at(room.narrow_x)), *narrow_y = reinterpret_cast<uint16_t*>(at(room.narrow_y));
      spans(count * p.k, [&](int64_t b, int64_t e) { kernel.write(narrow_x + b, m.dtype, e - b, x + b); });
      in = narrow_x;
      for (int i = 0; i < p.outputs; ++i) {
        out[i] = narrow_y;
        narrow_y += count * p.width[i];
      }
    } else {
      for (int i = 0; i < p.outputs; ++i) out[i] = y[i];
    }
    for (int i = 0; i < p.n_parts; ++i) {
      const Part& part = p.parts[i];
      void* const* to = out + part.first;
      if (part.kind == Kind::wq) {
        wq_linear(wq_args(part, in, m.dtype, count, p.k, to), at(room.kernel), pf);
      } else if (part.kind == Kind::quik) {
        quik_linear(quik_args(part, in, m.dtype, count, to), at(room.kernel), pf);
      } else {
        for (int j = 0; j < part.count; ++j) gemm::linear(dense_args(part.dense[j], in, m.dtype, count, to[j]), at(room.kernel), pf);
      }
    }
    if (!narrow) return;
    for (int i = 0; i < p.outputs; ++i)
      spans(count * p.width[i], [&](int64_t b, int64_t e) {
        const int64_t whole = (e - b) / 16 * 16;  // reading writes whole vectors
        kernel.read(out[i], m.dtype, e, b, whole, y[i] + b);
        const uint16_t* from = static_cast<const uint16_t*>(out[i]);
        for (int64_t j = b + whole; j < e; ++j) y[i][j] = m.dtype == DType::bf16 ? bf16_to_float(from[j]) : f16_to_float(from[j]);
      });
  }

  void normalise(const Norm& n, const float* h, int64_t count, float* x) const {
    rows(count, m.width, [&](int64_t i) { kernel.norm(n, h + i * m.width, m.width, x + i * m.width); });
  }
  void add(const float* y, float* h) const {
    spans(s.rows * m.width, [&](int64_t b, int64_t e) { kernel.add(y + b, e - b, h + b); });
  }

  // One row of 8-bit codes: unit u of the row's tile holds 4 of its columns (formats/t16.h).
  void expand(const WqWeight& w, int64_t token, float* to) const {
    const int64_t tile = token / t16::kTileRows, row = token % t16::kTileRows, groups = t16::groups(w.k, w.group);
    const int64_t width = w.group ? w.group : w.k;
    const uint8_t* codes = w.packed + tile * t16::chunks(w.k, 8) * t16::chunk_bytes(8) + row * 4;
    for (int64_t k = 0; k < w.k; ++k) {
      const int64_t scale = (tile * groups + k / width) * t16::kTileRows + row;
      const float factor = w.scales_f32 ? static_cast<const float*>(w.scales)[scale] : f16_to_float(static_cast<const uint16_t*>(w.scales)[scale]);
      to[k] = float(int(codes[k / 4 * 64 + k % 4]) - 128) * factor;
    }
  }
  void embed(float* h) const {
    const Embedding& e = m.embedding;
    rows(s.rows, m.width, [&](int64_t i) {
      float* to = h + i * m.width;
      const int64_t token = s.tokens[i];
      if (e.codes) {
        expand(*e.codes, token, to);
      } else if (e.dtype == DType::f32) {
        std::memcpy(to, static_cast<const float*>(e.table) + token * m.width, size_t(m.width) * 4);
      } else {
        const uint16_t* from = static_cast<const uint16_t*>(e.table) + token * m.width;
        for (int64_t k = 0; k < m.width; ++k) to[k] = e.dtype == DType::bf16 ? bf16_to_float(from[k]) : f16_to_float(from[k]);
      }
    });
    if (!e.positions) return;
    for (int64_t r = 0; r < s.n_runs; ++r)
      kernel.add(e.positions + s.runs[r].start * m.width, s.runs[r].count * m.width, h + s.runs[r].row * m.width);
  }

  void feed_forward(const Layer& l, const float* x, float* sum) const {
    if (l.sparse) {
      int32_t* nnz = reinterpret_cast<int32_t*>(at(room.kernel));
      relu_ffn::run(sparse_args(l, x, s.rows, sum, nnz), base + room.kernel + aligned(size_t(s.rows) * 4), pf);
      return;
    }
    float* up = at(room.up);
    const int64_t f = l.up.width[0];
    float* outputs[kMaxOutputs] = {up, up + s.rows * f, nullptr};
    products(l.up, x, s.rows, outputs);
    spans(s.rows * f, [&](int64_t b, int64_t e) { kernel.gate(m.act, up + b, m.gated ? up + s.rows * f + b : nullptr, e - b, up + b); });
    float* down[kMaxOutputs] = {sum};
    products(l.down, up, s.rows, down);
  }

  void layer(int64_t index, float* h) const {
    const Layer& l = m.layers[index];
    const int64_t q_width = m.heads * m.head_dim, kv_width = m.kv_heads * m.head_dim;
    float *x = at(room.x), *q = at(room.q), *attended = at(room.attended), *sum = at(room.sum);
    normalise(l.attention_norm, h, s.rows, x);
    const bool joined = l.qkv.outputs == 1;
    float *k = joined ? q + q_width : q + s.rows * q_width, *v = joined ? k + kv_width : k + s.rows * kv_width;
    float* outputs[kMaxOutputs] = {q, k, v};
    products(l.qkv, x, s.rows, outputs);
    const int64_t all = q_width + 2 * kv_width;
    attention::run(attention_args(m, s, index, q, k, v, joined ? all : q_width, joined ? all : kv_width, attended), at(room.kernel), pf);
    float* to[kMaxOutputs] = {sum};
    products(l.out, attended, s.rows, to);
    add(sum, h);
    normalise(l.ffn_norm, h, s.rows, x);
    feed_forward(l, x, sum);
    add(sum, h);
  }
};

}  // namespace

size_t workspace(const Model& m, const Step& s, int threads) { return room_of(m, s, threads).total; }

void step(const Model& m, const Step& s, void* workspace, const ParallelFor& pf) {
  if (s.rows == 0) return;
  const Runner run{m, s, choose(), pf, static_cast<char*>(workspace), room_of(m, s, pf.threads)};
  float *h = run.at(run.room.h), *x = run.at(run.room.x);
  run.embed(h);
  for (int64_t i = 0; i < m.n_layers; ++i) run.layer(i, h);
  if (s.which == Logits::none) return;
  int64_t count = s.rows;
  if (s.which == Logits::last) {  // rows that are wanted, to the front: a run's last row never lies before the rows already moved
    count = s.n_runs;
    for (int64_t r = 0; r < count; ++r) std::memmove(h + r * m.width, h + (s.runs[r].row + s.runs[r].count - 1) * m.width, size_t(m.width) * 4);
  }
  run.normalise(m.final_norm, h, count, x);
  float* logits[kMaxOutputs] = {s.logits};
  run.products(m.head, x, count, logits);
}

}  // namespace effk::decoder
