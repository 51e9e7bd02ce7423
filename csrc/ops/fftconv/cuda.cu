// fftconv on CUDA: choice of plan, workspaces, and the sequence of kernels of each op.
#include "ops/fftconv/cuda.h"

#include <algorithm>

#include "ops/fftconv/cuda_fft32.h"
#include "ops/fftconv/cuda_outer.h"

namespace effk::cuda::fftconv {
namespace {

#ifdef EFFK_CUEMU
constexpr int64_t kInL2 = 40 << 10;  // small tests then need several launches
#else
constexpr int64_t kInL2 = int64_t(24) << 20;  // bytes of intermediates worked on at a time: half of an H100's L2
#endif
constexpr int64_t kMaxGridRows = 65535;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t rounded(int64_t bytes) { return ceil_div(bytes, 256) * 256; }

// Rows that a launch takes when each needs `bytes` of workspace.
int64_t rows_at_once(const Problem& p, int64_t bytes) {
  return std::clamp<int64_t>(kInL2 / bytes, 1, std::min(p.batch * p.channels, kMaxGridRows));
}
int64_t work_rows(const Problem& p) { return rows_at_once(p, p.plan.m() * (p.type == DType::f32 ? 8 : 4)); }

Launch grid(int64_t count, int threads, int64_t rows, cudaStream_t stream) {
  Launch at;
  at.grid = dim3(unsigned(ceil_div(count, threads)), unsigned(rows));
  at.block = dim3(threads);
  at.stream = stream;
  return at;
}

// Launches in order until one fails.
struct Sequence {
  cudaStream_t stream;
  cudaError_t error = cudaSuccess;

  template <class... P, class... A>
  void operator()(void (*kernel)(P...), const Launch& at, A&&... args) {
    if (error == cudaSuccess) error = launch(kernel, at, std::forward<A>(args)...);
  }
  template <class... P, class... A>
  void over(void (*kernel)(P...), int64_t count, int threads, int64_t rows, A&&... args) {
    (*this)(kernel, grid(count, threads, rows, stream), std::forward<A>(args)...);
  }
};

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

RowArgs row_args(const Problem& p, const Signals& s) {
  RowArgs a{};
  a.s = s;
  a.type = p.type;
  a.aligned = p.length * (p.type == DType::f32 ? 4 : 2) % 16 == 0;
  for (const void* q : {s.x, s.gate, s.out_gate[0], s.out_gate[1], static_cast<const void*>(s.y[0]), static_cast<const void*>(s.y[1])})
    a.aligned = a.aligned && aligned(q);
  a.batch = int(p.batch);
  a.channels = int(p.channels);
  a.length = int(p.length);
  a.rows = int(p.batch * p.channels);
  a.header = p.spec;
  const float words[7] = {float(spectrum::kMagic), float(spectrum::kVersion), float(spectrum::kPlanCuda), float(p.n_fft), float(int(p.mode)),
                          float(int(p.scheme)), float(p.channels)};
  std::copy(words, words + 7, a.expected);
  a.room = int(p.mode == Mode::causal ? p.n_fft - p.length + 1 : p.n_fft);
  return a;
}

FusedArgs fused_args(const Problem& p, const Signals& s, bool correlate) {
  FusedArgs f{};
  f.r = row_args(p, s);
  f.tables = p.spec;
  f.at = make_layout(p.plan, p.channels);
  f.log_outer = p.plan.log_outer;
  f.target = target_exponent(p.plan);
  f.parts = p.plan.log_outer || p.length > p.plan.m() ? 2 : 1;
  f.direction = correlate ? -1.0f : 1.0f;
  f.gain = 1.0f / float(1 << odd_stages(p.plan));
  return f;
}

void launch_fused(Sequence& run, const FusedArgs& f, const Plan& plan) {
  if (run.error != cudaSuccess) return;
  const int log = plan.log_inner();
  run.error = log <= 11 ? launch_fused_small(f, log, run.stream) : launch_fused_large(f, log, run.stream);
}

// Forward or inverse passes over the factors of a plan, rows of z.
template <bool kInverse>
void transform(Sequence& run, const Plan& plan, float2* z, int64_t rows) {
  int radix[6], count = 0;
  const auto add = [&](int r) {
    if (r > 1) radix[count++] = r;
  };
  const int low = plan.outer_low();
  const Factors f = plan.factors();
  if (plan.log_outer) add(plan.outer() / low), add(low);
  add(f.n1), add(f.n2), add(f.n3);
  for (int64_t first = 0; first < rows; first += kMaxGridRows) {
    const int64_t some = std::min(rows - first, kMaxGridRows);
    for (int i = 0; i < count; ++i) {
      const int at = kInverse ? count - 1 - i : i;
      PassArgs p{z + first * plan.m(), plan.m(), plan.m(), at == 0};
      for (int j = 0; j < at; ++j) p.n /= radix[j];
      const int64_t butterflies = plan.m() / radix[at];
      switch (radix[at]) {
        case 4: run.over(pass_kernel<4, kInverse>, butterflies, 128, some, p); break;
        case 8: run.over(pass_kernel<8, kInverse>, butterflies, 128, some, p); break;
        case 16: run.over(pass_kernel<16, kInverse>, butterflies, 128, some, p); break;
        case 32: run.over(pass_kernel<32, kInverse>, butterflies, 128, some, p); break;
        default: run.over(pass_kernel<2, kInverse>, butterflies, 128, some, p);
      }
    }
  }
}

PointArgs point_args(const Problem& p, const Signals& s, void* z, bool correlate) {
  const Layout at = make_layout(p.plan, p.channels);
  return {row_args(p, s), static_cast<float2*>(z), p.plan.m(), reinterpret_cast<const float2*>(p.spec + at.spectrum),
          p.spec + at.scale, correlate ? -1.0f : 1.0f, 1.0f / float(p.plan.m())};
}

OuterArgs outer_args(const Problem& p, const FusedArgs& f, float* largest) {
  OuterArgs o{};
  o.f = f;
  o.outer = p.plan.outer();
  o.inner = p.plan.inner();
  o.columns = o.outer > 128 ? 32 : 64;
  o.parts = p.length > p.plan.m() ? 2 : 1;
  o.largest = largest;
  return o;
}

// Scales and outer stage of rows first .. first + rows: planes in f.work.
void outer_forward(Sequence& run, const OuterArgs& o) {
  Launch at = grid(kPartials * 256, 256, o.f.r.rows, run.stream);
  run(largest_kernel, at, o.f.r, o.largest);
  at = grid(o.inner / o.columns, 1, o.f.r.rows, run.stream);
  at.block = dim3(kOuterThreads);
  at.smem = size_t(o.parts) * o.outer * o.columns * 2;
  run(outer_kernel, at, o);
}
void outer_backward(Sequence& run, const OuterArgs& o) {
  Launch at = grid(o.inner / o.columns, 1, o.f.r.rows, run.stream);
  at.block = dim3(kOuterThreads);
  at.smem = size_t(2 + o.parts) * o.outer * o.columns * 2;
  run(outer_inverse_kernel, at, o);
}

// Offsets into a workspace of `rows` rows: planes or points, spectra, scales, partial maxima.
struct Workspace {
  int64_t rows, planes, scale, largest, bytes;
  explicit Workspace(const Problem& p) : rows(work_rows(p)) {
    planes = 0;
    scale = rounded(rows * p.plan.m() * (p.type == DType::f32 ? 8 : 4));
    largest = scale + rounded(rows * 4);
    bytes = largest + rounded(rows * kPartials * 4);
  }
};

template <class Use>
void in_chunks(const Problem& p, int64_t rows, const Use& use) {
  const int64_t all = p.batch * p.channels;
  for (int64_t first = 0; first < all; first += rows) use(first, int(std::min(rows, all - first)));
}

// Forward transforms of rows of v: into pairs of fp16 and scales, or into fp32 points.
void spectra(Sequence& run, const Problem& p, const Signals& s, int64_t first, int rows, char* to, const Workspace& at) {
  if (p.type == DType::f32) {
    PointArgs a = point_args(p, s, to, false);
    a.r.first_row = int(first);
    run.over(load_kernel, p.plan.m() / 8, 128, rows, a);
    transform<false>(run, p.plan, a.z, rows);
    return;
  }
  FusedArgs f = fused_args(p, s, false);
  f.r.first_row = int(first);
  f.r.rows = rows;
  f.spectra = reinterpret_cast<uint32_t*>(to);
  f.spectrum_scale = reinterpret_cast<float*>(to + at.scale);
  f.work = reinterpret_cast<uint16_t*>(to);  // planes become spectra in place
  if (p.plan.log_outer) outer_forward(run, outer_args(p, f, reinterpret_cast<float*>(to + at.largest)));
  launch_fused(run, f, p.plan);
}

#ifdef EFFK_CUEMU
constexpr int kEmulatedSharedMemory = 227 * 1024;
#endif

}  // namespace

int log_limit(int& error) {
  int smem = 0;
  error = 0;
#ifdef EFFK_CUEMU
  smem = kEmulatedSharedMemory;
#else
  int device;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&smem, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  error = int(e);
  if (e != cudaSuccess) return -1;
#endif
  int log = kMaxInnerLog;
  while (smem_of(log) > smem) --log;
  return log;
}

int64_t spec_floats(const Plan& plan, int64_t n_fft, Mode mode, Scheme scheme, int64_t channels) {
  return make_layout(plan, channels).total + code_of(n_fft, mode, scheme);
}

int prepare(const float* k, int64_t channels, int64_t taps, int64_t n_fft, Mode mode, Scheme scheme, const Plan& plan, float* spec,
            Stream stream) {
  Sequence run{static_cast<cudaStream_t>(stream)};
  const Layout at = make_layout(plan, channels);
  const Factors f = plan.factors();
  const bool inside = plan.log_outer == 0;  // the shift belongs to the first stage of all
  HeaderArgs header{spec, {float(spectrum::kMagic), float(spectrum::kVersion), float(spectrum::kPlanCuda), float(n_fft), float(int(mode)),
                           float(int(scheme)), float(channels), float(taps), float(plan.m()), float(2 * plan.m())},
                    spec + at.total, code_of(n_fft, mode, scheme)};
  run(header_kernel, grid(1, 64, 1, run.stream), header);
  const auto matrix = [&](int64_t offset, int n, int low, bool shifted, bool inverse, bool right) {
    const int side = std::max(n, 16);
    run.over(matrix_kernel, int64_t(side) * side, 256, 1,
             MatrixArgs{reinterpret_cast<uint16_t*>(spec + offset), n, low, shifted, inverse, right});
  };
  const auto twiddle = [&](int64_t offset, int rows, int low, int columns, int step, int64_t n, bool shifted) {
    run.over(twiddle_kernel, int64_t(rows) * columns, 256, 1,
             TwiddleArgs{reinterpret_cast<float2*>(spec + offset), rows, low, columns, step, n, shifted});
  };
  if (plan.log_outer) {
    const int low = plan.outer_low();
    matrix(at.outer, plan.outer(), low, true, false, false);
    matrix(at.outer_inverse, plan.outer(), low, true, true, false);
    twiddle(at.outer_u, plan.outer(), low, plan.inner() / 32, 32, plan.m(), true);
    twiddle(at.outer_v, plan.outer(), low, 32, 1, plan.m(), true);
  }
  if (f.n1 > 1) {
    matrix(at.first, f.n1, 1, inside, false, false);
    matrix(at.first_inverse, f.n1, 1, inside, true, false);
    twiddle(at.u, f.n1, 1, f.n2, f.n3, plan.inner(), inside);
    twiddle(at.v, f.n1, 1, f.n3, 1, plan.inner(), inside);
  }
  const bool second = inside && f.n1 == 1;
  matrix(at.second, f.n2, 1, second, false, false);
  matrix(at.second_inverse, f.n2, 1, second, true, false);
  matrix(at.third, f.n3, 1, false, false, true);
  twiddle(at.w, f.n2, 1, f.n3, 1, f.n2 * f.n3, second);

  float2* const z = reinterpret_cast<float2*>(spec + at.spectrum);
  RingArgs ring{k, nullptr, z, n_fft, taps, plan.m(), mode, 1.0f, nullptr};
  run.over(ring_kernel, plan.m(), 256, channels, ring);
  transform<false>(run, plan, z, channels);
  Launch each = grid(1, 256, 1, run.stream);
  each.grid = dim3(unsigned(channels));
  run(normalize_kernel, each, z, spec + at.scale, plan.m());
  return int(run.error);
}

size_t convolve_workspace(const Problem& p) { return p.type != DType::f32 && !p.plan.log_outer ? 0 : size_t(Workspace(p).bytes); }

int convolve(const Problem& p, const Signals& s, bool correlate, void* workspace, Stream stream) {
  Sequence run{static_cast<cudaStream_t>(stream)};
  if (p.type != DType::f32 && !p.plan.log_outer) {
    launch_fused(run, fused_args(p, s, correlate), p.plan);
    return int(run.error);
  }
  const Workspace at(p);
  char* const base = static_cast<char*>(workspace);
  in_chunks(p, at.rows, [&](int64_t first, int rows) {
    if (p.type == DType::f32) {
      PointArgs a = point_args(p, s, base, correlate);
      a.r.first_row = int(first);
      run.over(load_kernel, p.plan.m() / 8, 128, rows, a);
      transform<false>(run, p.plan, a.z, rows);
      run.over(product_kernel, p.plan.m(), 256, rows, a);
      transform<true>(run, p.plan, a.z, rows);
      run.over(store_kernel, p.plan.m() / 8, 128, rows, a);
      return;
    }
    FusedArgs f = fused_args(p, s, correlate);
    f.r.first_row = int(first);
    f.r.rows = rows;
    f.work = reinterpret_cast<uint16_t*>(base);
    f.spectrum_scale = reinterpret_cast<float*>(base + at.scale);
    const OuterArgs o = outer_args(p, f, reinterpret_cast<float*>(base + at.largest));
    outer_forward(run, o);
    launch_fused(run, f, p.plan);
    outer_backward(run, o);
  });
  return int(run.error);
}

size_t filter_gradient_workspace(const Problem& p) {
  return 2 * size_t(Workspace(p).bytes) + size_t(rounded(p.channels * p.plan.m() * 8));
}

int filter_gradient(const Problem& p, const void* x, const void* gate, const void* gy, const void* post, int64_t taps, float* gk,
                    void* workspace, Stream stream) {
  Sequence run{static_cast<cudaStream_t>(stream)};
  const Workspace at(p);
  char* const v = static_cast<char*>(workspace);
  char* const g = v + at.bytes;
  float2* const sum = reinterpret_cast<float2*>(g + at.bytes);
  const bool half = p.type != DType::f32;
  Signals sv{}, sg{};
  sv.x = x, sv.gate = gate, sg.x = gy, sg.gate = post;
  in_chunks(p, at.rows, [&](int64_t first, int rows) {
    spectra(run, p, sv, first, rows, v, at);
    spectra(run, p, sg, first, rows, g, at);
    AccumulateArgs a{v, g, half ? reinterpret_cast<float*>(v + at.scale) : nullptr, half ? reinterpret_cast<float*>(g + at.scale) : nullptr,
                     sum, p.plan.m(), first, rows, int(p.batch)};
    run.over(accumulate_kernel, p.plan.m(), 256, (first + rows - 1) / p.batch - first / p.batch + 1, a);
  });
  transform<true>(run, p.plan, sum, p.channels);
  // Spectra of half rows carry sqrt(2^odd / M) each, those of fp32 rows and the inverse nothing.
  const float scale = half ? 1.0f / float(1 << odd_stages(p.plan)) : 1.0f / float(p.plan.m());
  const RingArgs ring{nullptr, gk, sum, p.n_fft, taps, p.plan.m(), p.mode, scale, p.spec};
  run.over(ring_gradient_kernel, taps, 256, p.channels, ring);
  return int(run.error);
}

int skip_gradient(const Problem& p, const void* x, const void* gate, const void* gy, const void* post, float* partial, float* gskip,
                  Stream stream) {
  Sequence run{static_cast<cudaStream_t>(stream)};
  Signals sv{}, sg{};
  sv.x = x, sv.gate = gate, sg.x = gy, sg.gate = post;
  Launch at = grid(1, 256, 1, run.stream);
  at.grid = dim3(unsigned(p.batch * p.channels));
  run(dot_kernel, at, row_args(p, sv), row_args(p, sg), partial);
  at = grid(1, 32, 1, run.stream);
  at.grid = dim3(unsigned(p.channels));
  run(sum_rows_kernel, at, static_cast<const float*>(partial), gskip, int(p.batch));
  return int(run.error);
}

const char* error_text(int error) {
#ifdef EFFK_CUEMU
  (void)error;
  return "the emulation has no CUDA errors";
#else
  return cudaGetErrorString(static_cast<cudaError_t>(error));
#endif
}

}  // namespace effk::cuda::fftconv
