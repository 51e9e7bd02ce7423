// CUDA binding of the fftconv ops: checks the arguments, makes outputs and workspaces, sets the device, and launches the
// kernels of ops/fftconv/cuda*.cu on the current stream. No call waits for the device.
//
// A spectrum made on CUDA has CUDA's own contents, which cannot be read here without waiting. Its size tells device, mode, scheme and
// n_fft; a size that matches by chance, and a spectrum of more taps than the call leaves room for, make the kernels write NaN.
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "ops/fftconv/cuda.h"
#include "torch/cuda/stream.h"

namespace effk::binding {
namespace {

namespace fft = cuda::fftconv;

void check_launch(const char* op, int error) {
  EFFK_CHECK(error == 0, op, ": CUDA error ", error, ": ", fft::error_text(error), cuda_build_text());
}

fft::Mode parse_mode(const char* op, const std::string& mode) {
  if (mode == "circular") return fft::Mode::circular;
  if (mode == "bidirectional") return fft::Mode::bidirectional;
  EFFK_CHECK(mode == "causal", op, ": mode: expected 'causal', 'circular' or 'bidirectional', got '", mode, "'");
  return fft::Mode::causal;
}

fft::Scheme parse_scheme(const char* op, const std::string& scheme, fft::Mode mode) {
  fft::Scheme parsed = fft::Scheme::automatic;
  if (scheme == "fft") parsed = fft::Scheme::fft;
  else if (scheme == "overlap_save") parsed = fft::Scheme::overlap_save;
  else if (scheme == "direct") parsed = fft::Scheme::direct;
  else EFFK_CHECK(scheme == "auto", op, ": scheme: expected 'auto', 'fft', 'overlap_save' or 'direct', got '", scheme, "'");
  EFFK_CHECK(mode == fft::Mode::causal || parsed <= fft::Scheme::fft, op, ": scheme: expected 'auto' or 'fft' for this mode, got '", scheme, "'");
  return parsed;
}

void check_n_fft(const char* op, int64_t n_fft) {
  if (!fft::legal_n_fft(n_fft)) Arg{op, "n_fft"}.fail("2^a, 3*2^a or 5*2^a between 32 and 16777216", std::to_string(n_fft));
}

void check_taps(const char* op, int64_t taps, int64_t n_fft, fft::Mode mode, const char* name) {
  const bool ok = mode == fft::Mode::bidirectional ? taps == n_fft : taps >= 1 && taps <= n_fft;
  const std::string n = std::to_string(n_fft);
  if (!ok) Arg{op, name}.fail(mode == fft::Mode::bidirectional ? n + " taps (n_fft)" : "1 to " + n + " taps (n_fft)", std::to_string(taps));
}

fft::Plan plan_for(const char* op, int64_t n_fft, fft::Mode mode) {
  int error;
  const int limit = fft::log_limit(error);
  check_launch(op, error);
  const fft::Plan plan = fft::make_plan(n_fft, mode, limit);
  EFFK_CHECK(plan.log_outer <= fft::kMaxOuterLog && limit >= fft::kMinLog, op, ": n_fft: expected at most ",
             (int64_t(1) << (limit + fft::kMaxOuterLog)) * (mode == fft::Mode::circular ? 1 : 2), " on this device, whose shared memory holds 2^",
             limit, " points, got ", n_fft);
  return plan;
}

DType dtype_of(const Arg& arg, const View& t) {
  if (t.dtype == dtypes().f32) return DType::f32;
  if (t.dtype == dtypes().bf16) return DType::bf16;
  if (t.dtype == dtypes().f16) return DType::f16;
  arg.fail("float32, bfloat16 or float16", dtype_name(t.dtype));
}

// The arguments that the forward and the backward op share, checked.
struct Call {
  const char* op;
  fft::Problem p{};
  int32_t dtype = 0;
  Home home;
  const void* u = nullptr;
  const void* pregate = nullptr;
  const void* postgate = nullptr;
  const float* skip = nullptr;
  cuda::fftconv::Stream stream;

  Call(const char* name, const OnDevice& device, const Tensor& u_t, const Tensor& spec, const OptionalTensor& pregate_t,
       const OptionalTensor& postgate_t, const OptionalTensor& skip_t, int64_t n_fft, const std::string& mode, const std::string& scheme)
      : op(name), home(device.home), stream(device.stream()) {
    p.mode = parse_mode(op, mode);
    p.scheme = parse_scheme(op, scheme, p.mode);
    check_n_fft(op, n_fft);
    p.n_fft = n_fft;
    const View view(u_t);
    if (view.dim != 3) Arg{op, "u"}.fail("a tensor (B, H, L)", view.text());
    p.batch = view.sizes[0], p.channels = view.sizes[1], p.length = view.sizes[2];
    p.type = dtype_of(Arg{op, "u"}, view);
    dtype = view.dtype;
    u = like_u("u", u_t);
    if (pregate_t) pregate = like_u("pregate", *pregate_t);
    if (postgate_t) postgate = like_u("postgate", *postgate_t);
    if (skip_t) {
      const View s(*skip_t);
      expect(Arg{op, "skip"}, s, {dtypes().f32}, {p.channels}, home);
      skip = s.data<float>();
    }
    const int64_t limit = p.mode == fft::Mode::bidirectional ? n_fft / 2 : n_fft;
    const std::string expected = std::to_string(limit);
    if (p.mode == fft::Mode::circular ? p.length != n_fft : p.length > limit)
      Arg{op, "n_fft"}.fail(p.mode == fft::Mode::circular ? "the length of u, " + std::to_string(p.length)
                            : p.mode == fft::Mode::causal ? "at least L + K - 1 with L = " + std::to_string(p.length)
                                                          : "at least 2 L with L = " + std::to_string(p.length),
                            std::to_string(n_fft));
    EFFK_CHECK(p.batch * p.channels <= INT32_MAX && p.channels <= 65535, op, ": u: expected at most 65535 channels and 2^31 - 1 rows, got ",
               view.text());
    p.plan = plan_for(op, n_fft, p.mode);
    const View s(spec);
    if (s.dim != 1 || s.dtype != dtypes().f32 || !(s.home == home) || !s.contiguous)
      Arg{op, "spec"}.fail("what fftconv_prepare returned on " + home.text(), s.text());
    bool fits = false;
    for (int i = 0; i < 4; ++i) {
      const auto made = fft::Scheme(i);
      if (p.scheme == fft::Scheme::automatic || made == p.scheme)
        fits = fits || s.sizes[0] == fft::spec_floats(p.plan, n_fft, p.mode, made, p.channels);
    }
    if (!fits)
      Arg{op, "spec"}.fail("a spectrum prepared on this device for " + std::to_string(p.channels) + " channels, n_fft " + std::to_string(n_fft) +
                               ", mode '" + mode + "', scheme '" + scheme + "'",
                           "one of another size, " + s.text());
    if (reinterpret_cast<uintptr_t>(s.data()) % 16) Arg{op, "spec"}.fail("a spectrum as fftconv_prepare returned it", "a view off alignment");
    p.spec = s.data<float>();
  }

  const void* like_u(const char* name, const Tensor& t) const {
    const View view(t);
    expect(Arg{op, name}, view, {dtype}, {p.batch, p.channels, p.length}, home);
    return view.data();
  }
  bool empty_rows() const { return p.batch * p.channels * p.length == 0; }
  Tensor rows() const { return empty({p.batch, p.channels, p.length}, dtype, home); }
  Tensor bytes(size_t count) const { return empty({int64_t(count)}, dtypes().u8, home); }

  void convolve(const fft::Signals& s, bool correlate) const {
    if (empty_rows()) return;
    const Tensor workspace = bytes(fft::convolve_workspace(p));
    check_launch(op, fft::convolve(p, s, correlate, workspace.mutable_data_ptr(), stream));
  }
};

Tensor prepare(const Tensor& k, int64_t n_fft, const std::string& mode_text, const std::string& scheme_text) {
  constexpr const char* op = "fftconv_prepare";
  const fft::Mode mode = parse_mode(op, mode_text);
  const fft::Scheme scheme = parse_scheme(op, scheme_text, mode);
  check_n_fft(op, n_fft);
  const OnDevice device(Arg{op, "k"}, k);
  const View view(k);
  if (view.dim != 2) Arg{op, "k"}.fail("a tensor (H, K)", view.text());
  const int64_t channels = view.sizes[0], taps = view.sizes[1];
  expect(Arg{op, "k"}, view, {dtypes().f32}, {channels, taps}, device.home);
  check_taps(op, taps, n_fft, mode, "k");
  EFFK_CHECK(channels <= 65535, op, ": k: expected at most 65535 channels, got ", channels);
  const fft::Plan plan = plan_for(op, n_fft, mode);
  Tensor spec = empty({fft::spec_floats(plan, n_fft, mode, scheme, channels)}, dtypes().f32, device.home);
  if (channels)
    check_launch(op, fft::prepare(view.data<float>(), channels, taps, n_fft, mode, scheme, plan, static_cast<float*>(spec.mutable_data_ptr()),
                                  device.stream()));
  return spec;
}

Tensor forward(const Tensor& u, const Tensor& spec, const OptionalTensor& pregate, const OptionalTensor& postgate, const OptionalTensor& skip,
               int64_t n_fft, const std::string& mode, const std::string& scheme) {
  constexpr const char* op = "fftconv";
  const OnDevice device(Arg{op, "u"}, u);
  const Call call(op, device, u, spec, pregate, postgate, skip, n_fft, mode, scheme);
  Tensor y = call.rows();
  fft::Signals s{};
  s.x = call.u, s.gate = call.pregate, s.out_gate[0] = call.postgate, s.y[0] = y.mutable_data_ptr(), s.skip = call.skip;
  call.convolve(s, false);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& gy_t, const Tensor& u, const Tensor& spec, const OptionalTensor& pregate,
                                                            const OptionalTensor& postgate, const OptionalTensor& skip, int64_t n_fft,
                                                            int64_t k_len, const std::string& mode, const std::string& scheme,
                                                            std::vector<bool> mask) {
  constexpr const char* op = "fftconv_backward";
  const OnDevice device(Arg{op, "u"}, u);
  const Call call(op, device, u, spec, pregate, postgate, skip, n_fft, mode, scheme);
  const void* const gy = call.like_u("gy", gy_t);
  EFFK_CHECK(mask.size() == 5, op, ": mask: expected 5 entries, got ", mask.size());
  check_taps(op, k_len, n_fft, call.p.mode, "k_len");
  const fft::Problem& p = call.p;
  const auto absent = [&](int32_t dtype) { return empty({0}, dtype, call.home); };
  Tensor gu = mask[0] ? call.rows() : absent(call.dtype), gpre = mask[2] && pregate ? call.rows() : absent(call.dtype);
  Tensor gpost = mask[3] && postgate ? call.rows() : absent(call.dtype);
  const bool want_skip = mask[4] && skip, idle = call.empty_rows();
  Tensor gk = mask[1] ? empty({p.channels, k_len}, dtypes().f32, call.home) : absent(dtypes().f32);
  Tensor gskip = want_skip ? empty({p.channels}, dtypes().f32, call.home) : absent(dtypes().f32);

  // gv = corr(g, k) + skip g with g = postgate gy; gu = pregate gv, gpre = u gv.
  if (mask[0] || (mask[2] && pregate)) {
    fft::Signals s{};
    s.x = gy, s.gate = call.postgate, s.skip = call.skip;
    if (mask[0]) s.y[0] = gu.mutable_data_ptr(), s.out_gate[0] = call.pregate;
    if (mask[2] && pregate) s.y[1] = gpre.mutable_data_ptr(), s.out_gate[1] = call.u;
    call.convolve(s, true);
  }
  if (mask[3] && postgate) {  // gy (c + skip v), c computed again
    fft::Signals s{};
    s.x = call.u, s.gate = call.pregate, s.skip = call.skip, s.out_gate[0] = gy, s.y[0] = gpost.mutable_data_ptr();
    call.convolve(s, false);
  }
  if (mask[1] && idle) gk = torch::stable::fill_(gk, 0.0);
  if (mask[1] && !idle) {
    const Tensor workspace = call.bytes(fft::filter_gradient_workspace(p));
    check_launch(op, fft::filter_gradient(p, call.u, call.pregate, gy, call.postgate, k_len, static_cast<float*>(gk.mutable_data_ptr()),
                                          workspace.mutable_data_ptr(), call.stream));
  }
  if (want_skip && idle) gskip = torch::stable::fill_(gskip, 0.0);
  if (want_skip && !idle) {
    const Tensor partial = empty({p.batch * p.channels}, dtypes().f32, call.home);
    check_launch(op, fft::skip_gradient(p, call.u, call.pregate, gy, call.postgate, static_cast<float*>(partial.mutable_data_ptr()),
                                        static_cast<float*>(gskip.mutable_data_ptr()), call.stream));
  }
  return {gu, gk, gpre, gpost, gskip};
}

Tensor decode_prepare(const Tensor& k, int64_t) {
  Arg{"fftconv_decode_prepare", "k"}.fail("a tensor on cpu: fftconv_decode_prepare is not on CUDA yet", View(k).text());
}

Tensor decode_step(const Tensor& x_t, const Tensor&, const Tensor&, const Tensor&, std::vector<Tensor>, int64_t) {
  Arg{"fftconv_decode_step", "x_t"}.fail("a tensor on cpu: fftconv_decode_step is not on CUDA yet", View(x_t).text());
}

}  // namespace
}  // namespace effk::binding

#ifdef EFFK_CUEMU
STABLE_TORCH_LIBRARY_IMPL(effk_emu, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(effk, CUDA, m) {
#endif
  using namespace effk::binding;
  m.impl("fftconv_prepare", TORCH_BOX(&prepare));
  m.impl("fftconv", TORCH_BOX(&forward));
  m.impl("fftconv_backward", TORCH_BOX(&backward));
  m.impl("fftconv_decode_prepare", TORCH_BOX(&decode_prepare));
  m.impl("fftconv_decode_step", TORCH_BOX(&decode_step));
}
