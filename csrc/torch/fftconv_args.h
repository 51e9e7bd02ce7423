// The arguments of the fftconv ops, checked, as the kernels take them: for the CPU and the CUDA binding. What they mean is in
// csrc/ops/fftconv/fftconv.h.
#pragma once
#include <string>

#include "ops/fftconv/fftconv.h"
#include "torch/check.h"
#include "torch/tensor.h"

namespace effk::binding {

inline constexpr int64_t kMinFft = 32, kMaxFft = int64_t(1) << 24;

inline DType float_dtype_of(const Arg& arg, const View& t) {
  if (t.dtype == dtypes().f32) return DType::f32;
  if (t.dtype == dtypes().bf16) return DType::bf16;
  if (t.dtype == dtypes().f16) return DType::f16;
  arg.fail("float32, bfloat16 or float16", dtype_name(t.dtype));
}

inline spectrum::Mode parse_mode(const char* op, const std::string& mode) {
  if (mode == "causal") return spectrum::Mode::causal;
  if (mode == "circular") return spectrum::Mode::circular;
  EFFK_CHECK(mode == "bidirectional", op, ": mode: expected 'causal', 'circular' or 'bidirectional', got '", mode, "'");
  return spectrum::Mode::bidirectional;
}
inline const char* mode_name(spectrum::Mode mode) {
  return mode == spectrum::Mode::causal ? "causal" : mode == spectrum::Mode::circular ? "circular" : "bidirectional";
}
inline spectrum::Scheme parse_scheme(const char* op, const std::string& scheme, spectrum::Mode mode) {
  using spectrum::Scheme;
  if (scheme == "auto") return Scheme::automatic;
  if (scheme == "fft") return Scheme::fft;
  EFFK_CHECK(scheme == "overlap_save" || scheme == "direct", op,
             ": scheme: expected 'auto', 'fft', 'overlap_save' or 'direct', got '", scheme, "'");
  EFFK_CHECK(mode == spectrum::Mode::causal, op, ": scheme: expected 'auto' or 'fft' in mode '", mode_name(mode), "', got '", scheme, "'");
  return scheme == "direct" ? Scheme::direct : Scheme::overlap_save;
}
inline const char* scheme_name(spectrum::Scheme scheme) {
  using spectrum::Scheme;
  return scheme == Scheme::fft ? "fft" : scheme == Scheme::overlap_save ? "overlap_save" : scheme == Scheme::direct ? "direct" : "auto";
}

inline void check_n_fft(const char* op, int64_t n_fft) {
  int64_t odd = n_fft > 0 ? n_fft : 1;
  while (odd % 2 == 0) odd /= 2;
  const bool ok = n_fft >= kMinFft && n_fft <= kMaxFft && (odd == 1 || odd == 3 || odd == 5);
  if (__builtin_expect(!ok, 0)) Arg{op, "n_fft"}.fail("2^a, 3 * 2^a or 5 * 2^a from 32 to 16777216", std::to_string(n_fft));
}

// Whether a filter of `taps` and rows of `length` fit n_fft; `length` < 0: the filter alone.
inline void check_fits(const char* op, spectrum::Mode mode, int64_t n_fft, int64_t taps, int64_t length) {
  using spectrum::Mode;
  const Arg arg{op, "n_fft"};
  const auto text = [](const char* what, int64_t a) { return std::string(what) + std::to_string(a); };
  if (mode == Mode::bidirectional) {
    EFFK_CHECK(taps == n_fft, op, ": k: expected n_fft = ", n_fft, " taps in mode 'bidirectional', got ", taps);
    if (length >= 0 && n_fft < 2 * length) arg.fail(text("at least 2 L = ", 2 * length) + " in mode 'bidirectional'", std::to_string(n_fft));
    return;
  }
  EFFK_CHECK(taps <= n_fft, op, ": k: expected at most n_fft = ", n_fft, " taps, got ", taps);
  if (length < 0) return;
  if (mode == Mode::circular) {
    if (n_fft != length) arg.fail(text("L = ", length) + " in mode 'circular'", std::to_string(n_fft));
  } else if (length > 0 && n_fft < length + taps - 1) {
    arg.fail(text("at least L + K - 1 = ", length + taps - 1) + " in mode 'causal'", std::to_string(n_fft));
  }
}

// u, gates and skip, checked against each other.
struct Rows {
  View u;
  DType dtype;
  int64_t b, h, l;
  const void *pregate = nullptr, *postgate = nullptr;
  const float* skip = nullptr;
};

inline const void* like_u(const char* op, const char* name, const Tensor& t, const Rows& r) {
  const View view(t);
  expect(Arg{op, name}, view, {r.u.dtype}, {r.b, r.h, r.l}, r.u.home);
  return view.data();
}

inline Rows make_rows(const char* op, const Tensor& u, const OptionalTensor& pregate, const OptionalTensor& postgate,
                      const OptionalTensor& skip, const Home& home) {
  Rows r{View(u), DType::f32, 0, 0, 0};
  const Arg arg{op, "u"};
  r.dtype = float_dtype_of(arg, r.u);
  if (r.u.dim != 3 || !r.u.contiguous || !(r.u.home == home)) arg.fail("[B, H, L], contiguous, on " + home.text(), r.u.text());
  r.b = r.u.sizes[0];
  r.h = r.u.sizes[1];
  r.l = r.u.sizes[2];
  if (pregate) r.pregate = like_u(op, "pregate", *pregate, r);
  if (postgate) r.postgate = like_u(op, "postgate", *postgate, r);
  if (skip) {
    const View view(*skip);
    expect(Arg{op, "skip"}, view, {dtypes().f32}, {r.h}, home);
    r.skip = view.data<float>();
  }
  return r;
}

}  // namespace effk::binding
