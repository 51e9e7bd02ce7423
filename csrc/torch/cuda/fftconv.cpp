// CUDA binding of the fftconv ops: checks the arguments, makes outputs and workspaces, sets the device, and launches the
// kernels of ops/fftconv/cuda*.cu on the current stream. No call waits for the device.
//
// A spectrum made on CUDA has CUDA's own contents, which cannot be read here without waiting. Its size tells device, mode, scheme and
// n_fft; a size that matches by chance, and a spectrum of more taps than the call leaves room for, make the kernels write NaN.
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "ops/fftconv/cuda.h"
#include "torch/cuda/stream.h"
#include "torch/fftconv_args.h"

namespace effk::binding {
namespace {

namespace fft = cuda::fftconv;

constexpr int64_t kMaxChannels = 65535;  // of a grid's second side

void check_launch(const char* op, int error) {
  EFFK_CHECK(error == 0, op, ": CUDA error ", error, ": ", fft::error_text(error), cuda_build_text());
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

// The arguments that the forward and the backward op share, checked.
struct Call {
  const char* op;
  Rows r;
  fft::Problem p{};
  fft::Stream stream;

  Call(const char* name, const OnDevice& device, const Tensor& u, const Tensor& spec, const OptionalTensor& pregate,
       const OptionalTensor& postgate, const OptionalTensor& skip, int64_t n_fft, const std::string& mode, const std::string& scheme)
      : op(name), r(make_rows(op, u, pregate, postgate, skip, device.home)), stream(device.stream()) {
    p.mode = parse_mode(op, mode);
    p.scheme = parse_scheme(op, scheme, p.mode);
    check_n_fft(op, n_fft);
    // How many taps there are the kernels know.
    check_fits(op, p.mode, n_fft, p.mode == fft::Mode::bidirectional ? n_fft : 1, r.l);
    p.n_fft = n_fft;
    p.batch = r.b, p.channels = r.h, p.length = r.l;
    p.type = r.dtype;
    EFFK_CHECK(p.batch * p.channels <= INT32_MAX && p.channels <= kMaxChannels, op, ": u: expected at most ", kMaxChannels,
               " channels and 2147483647 rows, got ", r.u.text());
    p.plan = plan_for(op, n_fft, p.mode);
    const View s(spec);
    const Arg arg{op, "spec"};
    if (s.dim != 1 || s.dtype != dtypes().f32 || !(s.home == device.home) || !s.contiguous)
      arg.fail("what fftconv_prepare returns: float32 [floats], contiguous, on " + device.home.text(), s.text());
    bool fits = false;
    for (const auto made : {fft::Scheme::fft, fft::Scheme::overlap_save, fft::Scheme::direct})
      if (p.scheme == fft::Scheme::automatic || made == p.scheme)
        fits = fits || s.sizes[0] == fft::spec_floats(p.plan, n_fft, p.mode, made, p.channels);
    EFFK_CHECK(fits, op, ": spec: expected one prepared on CUDA for H = ", p.channels, ", n_fft = ", n_fft, ", mode '", mode, "', scheme '", scheme,
               "', got another: ", s.sizes[0], " floats");
    if (reinterpret_cast<uintptr_t>(s.data()) % 16) arg.fail("what fftconv_prepare returned", "a view of it, off alignment");
    p.spec = s.data<float>();
  }

  bool empty_rows() const { return p.batch * p.channels * p.length == 0; }
  Tensor rows(bool wanted) const {
    return wanted ? empty({p.batch, p.channels, p.length}, r.u.dtype, r.u.home) : empty({0}, r.u.dtype, r.u.home);
  }
  Tensor bytes(size_t count) const { return empty({int64_t(count)}, dtypes().u8, r.u.home); }

  void convolve(const fft::Signals& s, bool correlate) const {
    if (empty_rows()) return;
    const Tensor workspace = bytes(fft::convolve_workspace(p));
    check_launch(op, fft::convolve(p, s, correlate, workspace.mutable_data_ptr(), stream));
  }
};

Tensor prepare(const Tensor& k, int64_t n_fft, const std::string& mode_text, const std::string& scheme_text) {
  constexpr const char* op = "fftconv_prepare";
  const fft::Mode mode = parse_mode(op, mode_text);
  fft::Scheme scheme = parse_scheme(op, scheme_text, mode);
  if (scheme == fft::Scheme::automatic) scheme = fft::Scheme::fft;
  const OnDevice device(Arg{op, "k"}, k);
  const View view(k);
  if (view.dim != 2 || view.dtype != dtypes().f32 || !view.contiguous || view.sizes[1] < 1)
    Arg{op, "k"}.fail("float32 [H, K] with K >= 1, contiguous, on " + device.home.text(), view.text());
  check_n_fft(op, n_fft);
  const int64_t channels = view.sizes[0], taps = view.sizes[1];
  check_fits(op, mode, n_fft, taps, -1);
  EFFK_CHECK(channels <= kMaxChannels, op, ": k: expected at most ", kMaxChannels, " channels, got ", channels);
  const fft::Plan plan = plan_for(op, n_fft, mode);
  Tensor spec = empty({fft::spec_floats(plan, n_fft, mode, scheme, channels)}, dtypes().f32, device.home);
  check_launch(op, fft::prepare(view.data<float>(), channels, taps, n_fft, mode, scheme, plan, static_cast<float*>(spec.mutable_data_ptr()),
                                device.stream()));
  return spec;
}

Tensor forward(const Tensor& u, const Tensor& spec, const OptionalTensor& pregate, const OptionalTensor& postgate, const OptionalTensor& skip,
               int64_t n_fft, const std::string& mode, const std::string& scheme) {
  constexpr const char* op = "fftconv";
  const OnDevice device(Arg{op, "u"}, u);
  const Call call(op, device, u, spec, pregate, postgate, skip, n_fft, mode, scheme);
  Tensor y = call.rows(true);
  fft::Signals s{};
  s.x = call.r.u.data(), s.gate = call.r.pregate, s.out_gate[0] = call.r.postgate, s.y[0] = y.mutable_data_ptr(), s.skip = call.r.skip;
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
  const Rows& r = call.r;
  const fft::Problem& p = call.p;
  const void* const gy = like_u(op, "gy", gy_t, r);
  EFFK_CHECK(mask.size() == 5, op, ": mask: expected 5 entries (u, k, pregate, postgate, skip), got ", mask.size());
  EFFK_CHECK(!mask[2] || pregate, op, ": mask: expected no gradient of pregate without one, got true");
  EFFK_CHECK(!mask[3] || postgate, op, ": mask: expected no gradient of postgate without one, got true");
  EFFK_CHECK(!mask[4] || skip, op, ": mask: expected no gradient of skip without one, got true");
  if (mask[1] && (k_len < 1 || k_len > n_fft)) Arg{op, "k_len"}.fail("what spec was prepared from", std::to_string(k_len));
  Tensor gu = call.rows(mask[0]), gpre = call.rows(mask[2]), gpost = call.rows(mask[3]);
  Tensor gk = mask[1] ? empty({p.channels, k_len}, dtypes().f32, r.u.home) : empty({0}, dtypes().f32, r.u.home);
  Tensor gskip = empty({mask[4] ? p.channels : 0}, dtypes().f32, r.u.home);
  if (call.empty_rows()) return {gu, torch::stable::fill_(gk, 0.0), gpre, gpost, torch::stable::fill_(gskip, 0.0)};

  // gv = corr(g, k) + skip g with g = postgate gy; gu = pregate gv, gpre = u gv.
  if (mask[0] || mask[2]) {
    fft::Signals s{};
    s.x = gy, s.gate = r.postgate, s.skip = r.skip;
    if (mask[0]) s.y[0] = gu.mutable_data_ptr(), s.out_gate[0] = r.pregate;
    if (mask[2]) s.y[1] = gpre.mutable_data_ptr(), s.out_gate[1] = r.u.data();
    call.convolve(s, true);
  }
  if (mask[3]) {  // gy (c + skip v), c computed again
    fft::Signals s{};
    s.x = r.u.data(), s.gate = r.pregate, s.skip = r.skip, s.out_gate[0] = gy, s.y[0] = gpost.mutable_data_ptr();
    call.convolve(s, false);
  }
  if (mask[1]) {
    const Tensor workspace = call.bytes(fft::filter_gradient_workspace(p));
    check_launch(op, fft::filter_gradient(p, r.u.data(), r.pregate, gy, r.postgate, k_len, static_cast<float*>(gk.mutable_data_ptr()),
                                          workspace.mutable_data_ptr(), call.stream));
  }
  if (mask[4]) {
    const Tensor partial = empty({p.batch * p.channels}, dtypes().f32, r.u.home);
    check_launch(op, fft::skip_gradient(p, r.u.data(), r.pregate, gy, r.postgate, static_cast<float*>(partial.mutable_data_ptr()),
                                        static_cast<float*>(gskip.mutable_data_ptr()), call.stream));
  }
  return {gu, gk, gpre, gpost, gskip};
}

[[noreturn]] void only_on_cpu(const Arg& arg, const Tensor& t) {
  arg.fail("a tensor on cpu, because decoding is not on CUDA yet", View(t).text());
}
Tensor decode_prepare(const Tensor& k, int64_t) { only_on_cpu(Arg{"fftconv_decode_prepare", "k"}, k); }
Tensor decode_step(const Tensor& x_t, const Tensor&, const Tensor&, const Tensor&, std::vector<Tensor>, int64_t) {
  only_on_cpu(Arg{"fftconv_decode_step", "x_t"}, x_t);
}

}  // namespace
}  // namespace effk::binding

EFFK_CUDA_LIBRARY(m) {
  using namespace effk::binding;
  m.impl("fftconv_prepare", TORCH_BOX(&prepare));
  m.impl("fftconv", TORCH_BOX(&forward));
  m.impl("fftconv_backward", TORCH_BOX(&backward));
  m.impl("fftconv_decode_prepare", TORCH_BOX(&decode_prepare));
  m.impl("fftconv_decode_step", TORCH_BOX(&decode_step));
}
