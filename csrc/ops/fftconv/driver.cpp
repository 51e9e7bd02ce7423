// Chooses a kernel and a plan, cuts rows and long transforms among threads. Compiled with baseline flags.
#include <algorithm>

#include "ops/fftconv/plan.h"

#ifdef EFFK_X86
#include <xmmintrin.h>
#endif

namespace effk {
namespace fft {

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

using spectrum::Header;
using spectrum::Mode;
using spectrum::Scheme;

const Kernel& kernel() {
  for (const Kernel* k : kKernels)
    if (k->tier <= isa::active()) return *k;
  return kScalar;
}

constexpr int64_t kPointsPerThread = 16384;  // about 10 us of work
constexpr int64_t kSharedPoints = 32768;     // transforms from here on can occupy several threads

constexpr size_t round_up(size_t floats) { return (floats + 15) / 16 * 16; }
const void* at(const void* p, int64_t i, DType t) { return p ? static_cast<const char*>(p) + i * (t == DType::f32 ? 4 : 2) : nullptr; }
void* at(void* p, int64_t i, DType t) { return p ? static_cast<char*>(p) + i * (t == DType::f32 ? 4 : 2) : nullptr; }

// Rows go to slots, each with its own work space; or, when there are fewer long rows than threads, all threads share a row.
struct Split {
  int64_t slots;
  bool shared;
};
Split split(int64_t items, int64_t points, int threads) {
  if (threads > 1 && items < threads && points >= kSharedPoints) return {1, true};
  return {std::max<int64_t>(1, std::min<int64_t>({int64_t(threads), items, items * points / kPointsPerThread})), false};
}

// Denormals in decaying filters cost a hundred cycles each: a thread flushes them while it works.
struct FlushDenormals {
#ifdef EFFK_X86
  const unsigned saved = _mm_getcsr();
  FlushDenormals() { _mm_setcsr(saved | 0x8040u); }
  ~FlushDenormals() { _mm_setcsr(saved); }
#else
  FlushDenormals() {}
#endif
};

const ParallelFor kAlone{nullptr, nullptr, 1};

// The three phases over one row; with several threads, each phase is cut among them.
struct Transform {
  const Kernel& k;
  const Plan& p;
  const ParallelFor& pf;

  void first(const Source& s, float* work, const Ahead& ahead = {}) const {
    columns([&](int64_t c0, int64_t c1) { k.first(p, s, work, c0, c1, ahead); });
  }
  void last(float* work, const Sink& s, const Ahead& ahead = {}) const {
    columns([&](int64_t c0, int64_t c1) { k.last(p, work, s, c0, c1, ahead); });
  }
  template <class F> void columns(const F& f) const {
    constexpr int64_t kStrip = 256;
    const int64_t strips = (p.columns() + kStrip - 1) / kStrip;
    if (p.head == 1) return f(0, p.columns());  // short: not worth a thread
    parallel_for(pf, strips, 1, [&](int64_t s0, int64_t s1) {
      const FlushDenormals flush;
      f(s0 * kStrip, std::min(s1 * kStrip, p.columns()));
    });
  }
  template <class F> void blocks(const F& f) const {
    parallel_for(pf, p.blocks, 1, [&](int64_t b0, int64_t b1) {
      const FlushDenormals flush;
      f(b0, b1);
    });
  }

  void multiply(float* work, const float* coef, bool conjugate, const Ahead& ahead = {}) const {
    blocks([&](int64_t b0, int64_t b1) { k.multiply(p, work, coef + b0 * p.block * 2, conjugate, b0, b1, ahead); });
  }
};

// Circular: result t of a length-l cycle is R[t] + R[t + l] of the product, R[t] - R[2 M - l + t] of a correlation.
void fold(const Kernel& k, float* r, int64_t l, int64_t points, bool correlation, Sink s) {
  const float* other = correlation ? r + 2 * points - l : r + l;
  const float sign = correlation ? -1.0f : 1.0f;
  for (int64_t t = 0; t < s.end; ++t) r[t] += sign * other[t];
  s.shift = 0;
  k.scatter(s, 0, s.end, r);
}

// Bidirectional: the tap of lag -j lies at n - j of n taps, and at 2 M - j, negated, in the ring modulo x^2M + 1.
void place_taps(const float* taps, int64_t n, int64_t points, float* r) {
  std::fill_n(r, 2 * points, 0.0f);
  std::copy_n(taps, n / 2, r);
  for (int64_t j = 1; j <= n - n / 2; ++j) r[2 * points - j] = -taps[n - j];
}
void read_taps(const float* r, int64_t n, int64_t points, float* taps) {
  std::copy_n(r, n / 2, taps);
  for (int64_t j = 1; j <= n - n / 2; ++j) taps[n - j] = -r[2 * points - j];
}

Sink fp32_sink(float* y, int64_t end) { return {y, nullptr, nullptr, nullptr, nullptr, nullptr, 0.0f, DType::f32, 0, 0, end, false}; }

// Runs body(slot's work space, item) over all items.
template <class F> void over_items(const ParallelFor& pf, const Split& s, int64_t items, float* workspace, size_t floats, const F& body) {
  parallel_for(pf, s.slots, 1, [&](int64_t s0, int64_t s1) {
    const FlushDenormals flush;
    for (int64_t slot = s0; slot < s1; ++slot)
      for (int64_t i = items * slot / s.slots; i < items * (slot + 1) / s.slots; ++i) body(workspace + slot * floats, i);
  });
}

// The spectrum of one channel's taps: fp32 taps -> coef, through the work buffer. `room` holds 2 points floats in mode
// bidirectional.
void transform_taps(const Transform& t, Mode mode, const float* taps, int64_t count, float* work, float* room, float* coef) {
  Source source{taps, nullptr, DType::f32, count, 0};
  if (mode == Mode::bidirectional) {
    place_taps(taps, count, t.p.points, room);
    source.a = room;
    source.length = 2 * t.p.points;
  }
  t.first(source, work);
  t.blocks([&](int64_t b0, int64_t b1) {
    t.k.to_spectrum(t.p, work, coef + b0 * t.p.block * 2, 1.0f / float(t.p.points), b0, b1);
  });
}

Sink row_sink(const FftConvArgs& a, const Source& v, int64_t h, int64_t row) {
  Sink sink{at(a.y, row, a.dtype), at(a.postgate, row, a.dtype), nullptr, nullptr, nullptr, nullptr, 0.0f, a.dtype, 0, 0, a.l, false};
  if (a.skip) {
    sink.a = v.a;
    sink.b = v.b;
    sink.skip = a.skip[h];
  }
  return sink;
}
int64_t row_of(const FftConvArgs& a, int64_t item) {  // channels outermost: a spectrum is read once
  return (item % a.b * a.h + item / a.b) * a.l;
}
Source row_source(const FftConvArgs& a, int64_t row) { return {at(a.u, row, a.dtype), at(a.pregate, row, a.dtype), a.dtype, a.l, 0}; }

// What to fetch while item i (as in row_of) is computed, where the rows of a call leave the second-level cache between two uses but
// one row's stay in it. Without it memory is waited for: at 8 x 768 x 1024 for a third of the time, gated or backward for half of it.
struct Lookahead {
  const FftConvArgs& a;
  const Header& head;
  int64_t distance, items;     // short rows are fetched some rows ahead, so that memory has the time to answer
  Ahead shares{};              // thirds of a row for the three phases
  bool coefficients;

  Lookahead(const FftConvArgs& args, const Header& header, const Plan& p, int64_t points)
      : a(args), head(header), distance(std::max<int64_t>(1, 1024 / std::max<int64_t>(a.l, 1))), items(a.b * a.h),
        coefficients(a.dtype == DType::f32 && a.l == points) {
    if (p.head > 1 || items * a.l <= (1 << 16)) items = 0;
    const int64_t third = ((a.l * (a.dtype == DType::f32 ? 4 : 2)) << 10) / 3;
    shares.first = {0, third / (p.columns() / 16)};
    shares.middle = {third, third / (p.points / (spectrum::kBlockPoints / 4))};
    shares.last = {2 * third, third / (p.columns() / 16)};
  }
  // The rows of `tensors`; of the next channel the spectrum too, and a row of length l of `channels`.
  Ahead during(int64_t i, std::initializer_list<const void*> tensors, const float* channels = nullptr) const {
    Ahead ahead = shares;
    const int64_t next = i + distance;
    if (next >= items) return ahead;
    for (const void* tensor : tensors) ahead.add(at(tensor, row_of(a, next), a.dtype));
    if (!coefficients || next / a.b == i / a.b) return ahead;
    const float* coef = a.spec + spectrum::kHeaderFloats + next / a.b * head.stride;
    ahead.add(coef);
    ahead.add(coef + a.l);
    if (channels) ahead.add(channels + next / a.b * a.l);
    return ahead;
  }
};

// Direct scheme: pieces of a row with the taps - 1 values before them, in a buffer of a slot.
constexpr int64_t kPiece = 2048;
size_t direct_floats(int64_t taps) { return round_up(size_t(taps) + 16) + 2 * kPiece; }
void direct(const FftConvArgs& a, const Header& head, const Kernel& kern, float* workspace, const ParallelFor& pf) {
  const int64_t pieces = (a.l + kPiece - 1) / kPiece, items = a.b * a.h * pieces, history = int64_t(round_up(size_t(head.taps - 1)));
  const Split s = split(items, std::min(a.l, kPiece), pf.threads);
  over_items(pf, s, items, workspace, direct_floats(head.taps), [&](float* x, int64_t i) {
    const int64_t item = i / pieces, begin = i % pieces * kPiece, row = row_of(a, item);
    const int64_t count = std::min(kPiece, int64_t(round_up(size_t(a.l - begin))));
    const Source v = row_source(a, row);
    float* y = x + history + kPiece;
    kern.gather(v, begin - history, history + count, x);
    kern.fir(x + history, a.spec + spectrum::kHeaderFloats + item / a.b * head.stride, head.taps, y, count);
    kern.scatter(row_sink(a, v, item / a.b, row), begin, count, y);
  });
}

// Overlap-save: blocks of 2 M values that start taps - 1 before their first result.
void overlap_save(const FftConvArgs& a, const Header& head, const Kernel& kern, const Plan& p, float* workspace, const ParallelFor& pf) {
  const int64_t step = 2 * p.points - head.taps + 1, blocks = (a.l + step - 1) / step, items = a.b * a.h * blocks;
  const Split s = split(items, p.points, pf.threads);
  const Transform t{kern, p, s.shared ? pf : kAlone};
  over_items(pf, s, items, workspace, round_up(size_t(p.work_points) * 2), [&](float* w, int64_t i) {
    const int64_t item = i / blocks, begin = i % blocks * step, row = row_of(a, item), h = item / a.b;
    Source v = row_source(a, row);
    Sink sink = row_sink(a, v, h, row);
    v.origin = sink.shift = begin - (head.taps - 1);
    sink.begin = begin;
    sink.end = std::min(begin + step, a.l);
    t.first(v, w);
    t.multiply(w, a.spec + spectrum::kHeaderFloats + h * head.stride + head.coef_at(), false);
    t.last(w, sink);
  });
}

// The header of what fftconv_prepare makes.
Header header_of(int64_t h, int64_t taps, int64_t n_fft, Mode mode, Scheme scheme) {
  const Choice c = choose(taps, n_fft, mode, scheme);
  Header head{spectrum::kMagic, spectrum::kVersion, spectrum::kPlanCpu, n_fft, mode, c.scheme, h, taps, c.points, 0};
  head.stride = head.coef_at() + 2 * c.points;
  return head;
}

}  // namespace
}  // namespace fft

using namespace fft;

size_t fftconv_spec_floats(int64_t h, int64_t taps, int64_t n_fft, Mode mode, Scheme scheme) {
  const Header head = header_of(h, taps, n_fft, mode, scheme);
  return head.scheme != Scheme::direct && !head.points ? 0 : spectrum::kHeaderFloats + size_t(h * head.stride);
}

size_t fftconv_prepare_workspace(int64_t h, int64_t taps, int64_t n_fft, Mode mode, Scheme scheme, int threads) {
  const Header head = header_of(h, taps, n_fft, mode, scheme);
  if (!head.points) return 0;
  const Plan& p = *plan_of(head.points);
  return size_t(split(h, p.points, threads).slots) * (round_up(size_t(p.work_points) * 2) + round_up(size_t(2 * p.points))) * 4;
}

void fftconv_prepare(const float* k, int64_t h, int64_t taps, int64_t n_fft, Mode mode, Scheme scheme, float* spec, void* workspace,
                     const ParallelFor& pf) {
  const Header head = header_of(h, taps, n_fft, mode, scheme);
  const Kernel& kern = kernel();
  spectrum::write_header(head, spec);
  float* channels = spec + spectrum::kHeaderFloats;
  if (head.coef_at())
    for (int64_t i = 0; i < h; ++i) {
      std::copy_n(k + i * taps, taps, channels + i * head.stride);
      std::fill(channels + i * head.stride + taps, channels + i * head.stride + head.coef_at(), 0.0f);
    }
  if (!head.points) return;
  const Plan& p = *plan_of(head.points);
  const Split s = split(h, p.points, pf.threads);
  const size_t work = round_up(size_t(p.work_points) * 2);
  const Transform t{kern, p, s.shared ? pf : kAlone};
  over_items(pf, s, h, static_cast<float*>(workspace), work + round_up(size_t(2 * p.points)), [&](float* w, int64_t i) {
    transform_taps(t, mode, k + i * taps, taps, w, w + work, channels + i * head.stride + head.coef_at());
  });
}

size_t fftconv_workspace(const FftConvArgs& a, int threads) {
  const Header head = spectrum::read_header(a.spec);
  if (head.scheme == Scheme::direct) return size_t(threads) * direct_floats(head.taps) * 4;
  const Plan& p = *plan_of(head.points);
  const size_t floats = round_up(size_t(p.work_points) * 2) + (head.mode == Mode::circular ? round_up(size_t(2 * p.points)) : 0);
  if (head.scheme == Scheme::overlap_save) return size_t(threads) * floats * 4;
  return size_t(split(a.b * a.h, p.points, threads).slots) * floats * 4;
}

void fftconv(const FftConvArgs& a, void* workspace, const ParallelFor& pf) {
  if (a.b * a.h * a.l == 0) return;
  const Header head = spectrum::read_header(a.spec);
  const Kernel& kern = kernel();
  float* space = static_cast<float*>(workspace);
  if (head.scheme == Scheme::direct) return direct(a, head, kern, space, pf);
  const Plan& p = *plan_of(head.points);
  if (head.scheme == Scheme::overlap_save) return overlap_save(a, head, kern, p, space, pf);
  const bool circular = head.mode == Mode::circular;
  const size_t work = round_up(size_t(p.work_points) * 2), floats = work + (circular ? round_up(size_t(2 * p.points)) : 0);
  const Split s = split(a.b * a.h, p.points, pf.threads);
  const Transform t{kern, p, s.shared ? pf : kAlone};
  const Lookahead lookahead(a, head, p, p.points);
  over_items(pf, s, a.b * a.h, space, floats, [&](float* w, int64_t i) {
    const int64_t h = i / a.b, row = row_of(a, i);
    const Source v = row_source(a, row);
    const Sink sink = row_sink(a, v, h, row);
    const Ahead ahead = lookahead.during(i, {a.u, a.pregate, a.postgate, a.y});
    t.first(v, w, ahead);
    t.multiply(w, a.spec + spectrum::kHeaderFloats + h * head.stride, false, ahead);
    if (!circular) return t.last(w, sink, ahead);
    t.last(w, fp32_sink(w + work, 2 * p.points));
    fold(kern, w + work, a.l, p.points, false, sink);
  });
}

void fftconv_decode_step(const DecodeArgs& a, void* workspace, const ParallelFor& pf) {
  const Kernel& kern = kernel();
  const int64_t s = a.t + 1, rows = a.b * a.h, tile = s & -s, next = std::min(tile, a.capacity - s);
  const bool transformed = next > 0 && tile >= kDecodeTile;
  const Plan* p = transformed ? plan_of(decode_points(tile)) : nullptr;
  const float* spec = transformed ? a.specs[log2_of(tile / kDecodeTile)] : nullptr;
  const size_t floats = transformed ? round_up(size_t(p->work_points) * 2) : 0;
  constexpr int64_t kFewTaps = 2;
  const int64_t work = transformed ? p->points : std::max<int64_t>(tile * tile / 16, 8);
  const Split split_rows = split(rows, work, pf.threads);
  over_items(pf, split_rows, rows, static_cast<float*>(workspace), floats, [&](float* w, int64_t row) {
    const int64_t h = row % a.h, at = row * a.capacity;
    const float* k = a.k + h * a.taps;
    a.x[at + a.t] = a.x_t[row];
    a.y_t[row] = a.y[at + a.t] + k[0] * a.x_t[row];
    a.y[at + a.t] = a.y_t[row];
    if (next <= 0) return;
    if (tile <= kFewTaps) {  // most steps: nothing to gain from vectors
      for (int64_t i = 0; i < next; ++i) {
        float sum = a.y[at + s + i];
        for (int64_t j = 0; j < tile; ++j)
          if (tile + i - j < a.taps) sum += k[tile + i - j] * a.x[at + s - tile + j];
        a.y[at + s + i] = sum;
      }
      return;
    }
    if (!transformed) {
      float taps[2 * kDecodeTile], sums[kDecodeTile];
      const int64_t known = std::min(2 * tile, a.taps);
      std::copy_n(k, known, taps);
      std::fill(taps + known, taps + 2 * tile, 0.0f);
      std::copy_n(a.y + at + s, next, sums);
      std::fill(sums + next, sums + tile, 0.0f);
      kern.fir_tile(a.x + at + s - tile, taps, tile, sums);
      std::copy_n(sums, next, a.y + at + s);
      return;
    }
    const Transform t{kern, *p, kAlone};
    Sink sink = fp32_sink(a.y + at, s + next);
    sink.shift = s - tile;
    sink.begin = s;
    sink.add = true;
    t.first({a.x + at + s - tile, nullptr, DType::f32, tile, 0}, w);
    t.multiply(w, spec + spectrum::kHeaderFloats + h * 2 * p->points, false);
    t.last(w, sink);
  });
}

size_t fftconv_decode_workspace(const DecodeArgs& a, int threads) {
  const int64_t s = a.t + 1, tile = s & -s;
  if (s >= a.capacity || tile < kDecodeTile) return 0;
  const Plan& p = *plan_of(decode_points(tile));
  return size_t(split(a.b * a.h, p.points, threads).slots) * round_up(size_t(p.work_points) * 2) * 4;
}

namespace fft {
namespace {

// Work space of one slot of the backward pass, in floats from its start.
struct BackwardSpace {
  size_t g, v, sum, result, coef, total;
  BackwardSpace(const Plan& p, const FftConvBackwardArgs& a, Mode mode, bool own_spectrum) {
    const size_t work = round_up(size_t(p.work_points) * 2), all = round_up(size_t(2 * p.points));
    const bool taps = a.gk != nullptr;
    g = 0;
    v = g + work;
    sum = v + (taps ? work : 0);
    result = sum + (taps && a.forward.b > 1 ? all : 0);
    coef = result + (mode == Mode::circular || (mode == Mode::bidirectional && taps) ? all : 0);
    total = coef + (own_spectrum ? all : 0);
  }
};

// sum_t v w in double precision: the gradient of skip.
double dot(const Kernel& k, const Source& v, const Source& w) {
  constexpr int64_t kPiece = 256;
  float a[kPiece], b[kPiece];
  double sum = 0;
  for (int64_t t = 0; t < v.length; t += kPiece) {
    k.gather(v, t, kPiece, a);
    k.gather(w, t, kPiece, b);
    for (int64_t i = 0; i < kPiece; ++i) sum += double(a[i]) * double(b[i]);
  }
  return sum;
}

}  // namespace
}  // namespace fft

// The gradient always takes one transform a row. A spectrum prepared for short filters is replaced, channel by channel, by one
// of that size.
int64_t backward_points(const Header& head, int64_t l) {
  return head.scheme == Scheme::fft ? head.points : spectrum::smallest_points((l + head.taps) / 2);
}

size_t fftconv_backward_workspace(const FftConvBackwardArgs& a, int threads) {
  const Header head = spectrum::read_header(a.forward.spec);
  const Plan& p = *plan_of(backward_points(head, a.forward.l));
  const Split s = split(a.forward.h, p.points, threads);
  return size_t(s.slots) * BackwardSpace(p, a, head.mode, head.scheme != Scheme::fft).total * 4;
}

void fftconv_backward(const FftConvBackwardArgs& a, void* workspace, const ParallelFor& pf) {
  const FftConvArgs& f = a.forward;
  if (f.h == 0) return;
  const Header head = spectrum::read_header(f.spec);
  const Plan& p = *plan_of(backward_points(head, f.l));
  const Kernel& kern = kernel();
  const Mode mode = head.mode;
  const bool own_spectrum = head.scheme != Scheme::fft;
  const Split s = split(f.h, p.points, pf.threads);
  const BackwardSpace space(p, a, mode, own_spectrum);
  const Transform t{kern, p, s.shared ? pf : kAlone};
  const float scale = 1.0f / float(p.points);
  const Lookahead lookahead(f, head, p, own_spectrum ? 0 : p.points);
  over_items(pf, s, f.h, static_cast<float*>(workspace), space.total, [&](float* w, int64_t h) {
    float *work_g = w + space.g, *work_v = w + space.v, *sum = w + space.sum, *result = w + space.result;
    const float* coef = f.spec + spectrum::kHeaderFloats + h * head.stride;
    if (own_spectrum) {
      transform_taps(t, mode, coef, head.taps, work_g, nullptr, w + space.coef);
      coef = w + space.coef;
    }
    const float skip = f.skip ? f.skip[h] : 0.0f;
    const auto finish = [&](float* work, Sink sink, bool correlation, const Ahead& ahead = {}) {
      if (mode != Mode::circular) return t.last(work, sink, ahead);
      t.last(work, fp32_sink(result, 2 * p.points));
      fold(kern, result, f.l, p.points, correlation, sink);
    };
    double skip_sum = 0;
    if (a.gk && f.b > 1) std::fill_n(sum, 2 * p.points, 0.0f);
    for (int64_t b = 0; b < f.b; ++b) {  // in order: the sum over the batch is the same for any number of threads
      const int64_t row = (b * f.h + h) * f.l;
      const Source v{at(f.u, row, f.dtype), at(f.pregate, row, f.dtype), f.dtype, f.l, 0};
      const Source g{at(a.gy, row, f.dtype), at(f.postgate, row, f.dtype), f.dtype, f.l, 0};
      const Ahead ahead = lookahead.during(h * f.b + b, {f.u, a.gy, f.pregate, f.postgate, a.gu, a.gpre}, a.k_len == f.l ? a.gk : nullptr);
      if (a.gskip) skip_sum += dot(kern, g, v);
      if (a.gpost) {
        t.first(v, work_g);
        t.multiply(work_g, coef, false);
        finish(work_g, {at(a.gpost, row, f.dtype), g.a, nullptr, nullptr, f.skip ? v.a : nullptr, v.b, skip, f.dtype, 0, 0, f.l, false}, false);
      }
      if (!a.gu && !a.gpre && !a.gk) continue;
      t.first(g, work_g, ahead);
      if (a.gk) {
        Ahead second = ahead;
        second.first.at = ahead.middle.at;  // the middle phase of a pair fetches nothing
        t.first(v, work_v, second);
        t.blocks([&](int64_t b0, int64_t b1) {
          const int64_t from = b0 * p.block * 2;
          kern.multiply_pair(p, work_g, work_v, a.gu || a.gpre ? coef + from : nullptr, f.b > 1 ? sum + from : nullptr, scale, b0, b1);
        });
      } else {
        t.multiply(work_g, coef, true, ahead);
      }
      if (a.gu || a.gpre) {
        Sink sink{at(a.gu, row, f.dtype), v.b, nullptr, nullptr, f.skip ? g.a : nullptr, g.b, skip, f.dtype, 0, 0, f.l, false};
        if (a.gpre) {
          (a.gu ? sink.y2 : sink.y) = at(a.gpre, row, f.dtype);
          (a.gu ? sink.gate2 : sink.gate) = v.a;
        }
        finish(work_g, sink, true, ahead);
      }
    }
    if (a.gskip) a.gskip[h] = float(skip_sum);
    if (!a.gk) return;
    float* taps = a.gk + h * a.k_len;
    if (f.b == 0 || f.l == 0) { std::fill_n(taps, a.k_len, 0.0f); return; }
    if (f.b > 1)
      t.blocks([&](int64_t b0, int64_t b1) { kern.from_spectrum(p, work_v, sum + b0 * p.block * 2, b0, b1); });
    if (mode == Mode::bidirectional) {
      t.last(work_v, fp32_sink(result, 2 * p.points));
      read_taps(result, a.k_len, p.points, taps);
    } else {
      finish(work_v, fp32_sink(taps, a.k_len), true);
    }
  });
}

}  // namespace effk
