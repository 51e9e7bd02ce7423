// dyad_linear on CUDA: where the operands of its products lie, residues put in order, expansion to a dense matrix.
#include "ops/dyad_linear/cuda.h"

#include <algorithm>

#include "cuda/cu.h"
#include "cuda/gemm_problem.h"
#include "ops/dense_linear/cuda.h"

namespace effk::cuda::dyad {
namespace {

constexpr int kThreads = 256, kSpan = 1024;

// `span` elements of a row (a multiple of n) through shared memory; a block a span. Bound: bytes in and out.
// Reading residues out of shared memory, neighbouring threads are n elements apart: with n = 2 halves no conflicts, 4
// two, 8 four, 16 eight ways (fp32: twice that); 32 threads then write 64 bytes in succession.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) deinterleave_kernel(const T* in, T* out, int64_t length, int n, int span) {
  EFFK_DYN_SMEM(smem);
  T* const part = reinterpret_cast<T*>(smem);
  const int64_t spans = (length + span - 1) / span, row = blockIdx.x / spans, first = blockIdx.x % spans * span, per_row = length / n;
  const int count = int(min(int64_t(span), length - first)), per = count / n;
  const T* const from = in + row * length + first;
  if (reinterpret_cast<uintptr_t>(from) % 16 == 0 && count * sizeof(T) % 16 == 0) {
    for (int i = threadIdx.x; i < int(count * sizeof(T) / 16); i += kThreads)
      reinterpret_cast<uint4*>(part)[i] = reinterpret_cast<const uint4*>(from)[i];
  } else {
    for (int i = threadIdx.x; i < count; i += kThreads) part[i] = from[i];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int c = i / per, j = i % per;
    out[row * length + c * per_row + first / n + j] = part[j * n + c];
  }
}

__global__ void __launch_bounds__(kThreads, 6) to_dense_kernel(const Weights w, int n, int64_t d_out, int64_t d_in, Kind kind, void* dense) {
  const int64_t f_in = n * d_in, f_out = n * d_out, i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= f_in * f_out) return;
  const int64_t r = i / f_in, j = i % f_in;
  float v = 0.0f;
  if (r / d_out == j / d_in) v = load_scalar(w.wl, w.type, r * w.ld + j % d_in);
  const bool scattered = kind != Kind::it, gathered = kind != Kind::ot;
  const int64_t out_block = scattered ? r % n : r / d_out, o = scattered ? r / n : r % d_out;
  const int64_t in_block = gathered ? j % n : j / d_in, k = gathered ? j / n : j % d_in;
  if (out_block == in_block) v += load_scalar(w.wu, w.type, (out_block * d_out + o) * w.ld + k);
  store_scalar(dense, w.type, i, v);
}

// One side of the layer: n contiguous blocks of d features of every token.
struct Side {
  int64_t n, d, tokens;
  bool features;

  // As an operand whose rows are the tokens and whose k are the features of a block: contiguous, or a residue.
  // `by_class` says what numbers the block. Features first its lines run along the tokens.
  Operand tokens_operand(const void* p, bool residue, bool by_class, const void* in_order) const {
    Operand o;
    o.p = residue && in_order && !features ? in_order : p;
    int64_t distance;
    if (features) {
      distance = residue ? tokens : d * tokens;
      o.ld = residue ? n * tokens : tokens;
    } else {
      const bool strided = residue && !in_order;
      distance = strided ? 1 : d;
      o.ld = n * d;
      o.step = int(strided ? n : 1);
    }
    (by_class ? o.at.cls : o.at.block) = distance;
    return o;
  }
};

// The linear part in either direction: from the `from` side to the `to` side, weights as rows of k (`straight`) or as
// columns.
struct Linear {
  Side from, to;
  bool gathers, residue;  // n products, or n * n; whether the second half of k is a residue
  bool straight;
};

Gemm product(const Linear& l, const void* in, DType in_type, const Weights& w, const void* in_residues, const void* wl_residues, void* out) {
  const int64_t n = l.from.n, rows = l.to.d, k = l.from.d, d_out = l.straight ? rows : k;
  Operand x[2], v[2];
  x[0] = l.from.tokens_operand(in, false, false, nullptr);
  x[1] = l.from.tokens_operand(in, l.residue, !l.gathers, in_residues);
  v[0].p = w.wl, v[1].p = w.wu;
  const int64_t block = d_out * w.ld, unit = l.straight ? w.ld : 1;  // elements from feature to feature
  for (Operand& o : v) {
    o.ld = w.ld;
    (&o == &v[1] && !l.gathers ? o.at.cls : o.at.block) = block;
  }
  if (!l.gathers) {
    v[1].at.quotient = unit;
    if (l.straight) v[0].ld = n * w.ld, v[0].at.first = unit;
    else if (wl_residues) v[0].p = wl_residues, v[0].at = {d_out * rows, rows / n, 0, 0}, v[0].ld = rows;
    else v[0].step = int(n), v[0].at.first = unit;
  }
  Gemm g;
  const bool features = l.from.features;
  g.features_on_m = features;
  for (int i = 0; i < 2; ++i) g.a[i] = features ? v[i] : x[i], g.b[i] = features ? x[i] : v[i];
  g.a_type = features ? w.type : in_type, g.b_type = features ? in_type : w.type, g.out_type = in_type;
  g.a_along_k = features ? l.straight : true;
  g.b_along_k = features ? false : l.straight;
  g.m = int(features ? rows : l.from.tokens), g.n = int(features ? l.from.tokens : rows), g.k = int(k);
  g.segments = 2;
  g.blocks = int(n), g.classes = int(l.gathers ? 1 : n);
  g.out[0] = out;
  const int64_t feature = features ? l.from.tokens : 1;
  g.out_at.block = rows * feature;
  if (!l.gathers) g.out_at.first = feature;
  g.out_ld = features ? g.classes * feature : n * rows;
  g.out_step = features ? 1 : g.classes;
  g.header = w.header;
  std::copy_n(w.expected, 8, g.expected);
  return g;
}

Side in_side(const Shape& s) { return {s.n, s.d_in, s.tokens, s.features}; }
Side out_side(const Shape& s) { return {s.n, s.d_out, s.tokens, s.features}; }
Linear forward_of(const Shape& s) {
  const bool gathers = s.kind == Kind::it || s.n == 1;
  return {in_side(s), out_side(s), gathers, s.kind != Kind::ot, true};
}
// The input gradient of `it` is the forward of `ot` with its sides exchanged, and the other way round.
Linear gradient_of(const Shape& s) {
  const bool gathers = s.kind == Kind::ot || s.n == 1;
  return {out_side(s), in_side(s), gathers, s.kind != Kind::it, false};
}

// A launch costs about what 16 MiB from L2 do (3 us at 5.5 TB/s: reasoned, to be measured). Emulated, small tests shall
// meet both ways.
#ifdef EFFK_CUEMU
constexpr int64_t kWorthBytes = 1 << 12;
#else
constexpr int64_t kWorthBytes = 1 << 24;
#endif
constexpr int64_t kTile = 256, kMaxCopiedBlocks = 1024;
bool worth(int64_t n, int64_t elements, int64_t readers) { return n > 1 && n <= kMaxCopiedBlocks && elements * ((n - 1) * readers - 2) * 2 > kWorthBytes; }
int64_t tiles(int64_t side) { return (side + kTile - 1) / kTile; }
// Each element is read by the tiles of the outputs that need its residue: of one block, or of one class of all blocks.
bool wants_input(const Linear& l) {
  if (l.from.features || !l.residue) return false;
  const int64_t readers = l.gathers ? tiles(l.to.d) : l.to.n * tiles(l.to.d / l.to.n);
  return worth(l.from.n, l.from.n * l.from.d * l.from.tokens, readers);
}

}  // namespace

bool wants_x_residues(const Shape& s) { return wants_input(forward_of(s)); }
bool wants_gy_residues(const Shape& s) { return wants_input(gradient_of(s)); }
bool wants_wl_residues(const Shape& s) {
  return !gradient_of(s).gathers && s.d_in % s.n == 0 && worth(s.n, s.n * s.d_out * s.d_in, (s.tokens + 127) / 128);
}
bool wants_residues_for_weights(const Shape& s, bool of_gy) {
  if (s.features || (of_gy ? s.kind == Kind::it : s.kind == Kind::ot)) return false;
  return worth(s.n, s.n * (of_gy ? s.d_out : s.d_in) * s.tokens, tiles(of_gy ? s.d_in : s.d_out));
}

int deinterleave(const void* in, DType type, int64_t rows, int64_t length, int64_t n, void* out, Stream stream) {
  if (rows == 0) return 0;
  const int64_t span = n * std::max<int64_t>(1, kSpan / n), blocks = rows * ((length + span - 1) / span);
  if (blocks > INT32_MAX) return int(cudaErrorInvalidConfiguration);
  Launch at;
  at.grid = dim3(unsigned(blocks));
  at.block = dim3(kThreads);
  at.smem = size_t(span) * (type == DType::f32 ? 4 : 2);
  at.stream = static_cast<cudaStream_t>(stream);
  if (type == DType::f32)
    return int(launch(deinterleave_kernel<float>, at, static_cast<const float*>(in), static_cast<float*>(out), length, int(n), int(span)));
  return int(launch(deinterleave_kernel<uint16_t>, at, static_cast<const uint16_t*>(in), static_cast<uint16_t*>(out), length, int(n), int(span)));
}

int forward(const Shape& s, const void* x, DType x_type, const Weights& w, const Epilogue& e, const Residues& r, void* y, Stream stream, int shape) {
  Gemm g = product(forward_of(s), x, x_type, w, r.x, nullptr, y);
  g.bias = e.bias, g.bias_type = e.bias_type, g.act = e.act;
  g.residues = e.residues, g.residue_count = e.residue_count, g.residue_ld = s.f_out();
  g.shape = shape;
  return gemm(g, stream);
}

int input_gradient(const Shape& s, const void* gy, DType gy_type, const Weights& w, const Residues& r, void* gx, Stream stream, int shape) {
  Gemm g = product(gradient_of(s), gy, gy_type, w, r.gy, r.wl, gx);
  g.shape = shape;
  return gemm(g, stream);
}

int weight_gradient(const Shape& s, const void* gy, const void* x, DType type, const Residues& r, void* gwl, void* gwu, DType w_type, Stream stream,
                    int shape) {
  if (!gwl && !gwu) return 0;
  const Side in = in_side(s), out = out_side(s);
  Gemm g;
  for (int i = 0; i < 2; ++i) {
    g.a[i] = out.tokens_operand(gy, i == 1 && s.kind != Kind::it, false, r.gy);
    g.b[i] = in.tokens_operand(x, i == 1 && s.kind != Kind::ot, false, r.x);
  }
  // The tokens are k here: lines run along them where they ran along the features, and the other way round.
  g.a_along_k = g.b_along_k = s.features;
  g.a_type = g.b_type = type, g.out_type = w_type;
  g.m = int(s.d_out), g.n = int(s.d_in), g.k = int(s.tokens);
  g.blocks = int(s.n);
  g.first_out = gwl ? 0 : 1, g.outs = (gwl != nullptr) + (gwu != nullptr);
  g.out[0] = gwl, g.out[1] = gwu;
  g.out_at.block = s.d_out * s.d_in, g.out_ld = s.d_in;
  g.shape = shape;
  return gemm(g, stream);
}

int bias_gradient(const Shape& s, const void* gy, DType type, float* gb, Stream stream) {
  return s.features ? column_sums(gy, type, s.tokens, s.f_out(), 1, s.tokens, gb, stream) : column_sums(gy, type, s.tokens, s.f_out(), s.f_out(), 1, gb, stream);
}

int to_dense(const Shape& s, const Weights& w, void* dense, Stream stream) {
  if (s.f_in() * s.f_out() == 0) return 0;
  Launch at;
  at.grid = dim3(unsigned((s.f_in() * s.f_out() + kThreads - 1) / kThreads));
  at.block = dim3(kThreads);
  at.stream = static_cast<cudaStream_t>(stream);
  return int(launch(to_dense_kernel, at, w, int(s.n), s.d_out, s.d_in, s.kind, dense));
}

}  // namespace effk::cuda::dyad
