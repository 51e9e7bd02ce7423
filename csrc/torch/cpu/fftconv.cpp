// CPU binding of the fftconv ops: checks the arguments (torch/fftconv_args.h), allocates, and calls ops/fftconv.
#include "ops/fftconv/fftconv.h"

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "torch/fftconv_args.h"

namespace effk::binding {
namespace {

using spectrum::Header;

// The header of a buffer, all zero unless every number in it is a small integer.
Header plain_header(const float* at) {
  bool integers = true;
  for (int i = 0; i < spectrum::kHeaderFloats; ++i) integers &= at[i] >= 0 && at[i] <= 16777216.0f && at[i] == std::floor(at[i]);
  return integers ? spectrum::read_header(at) : Header{};
}

// The prepared filter, proved to be one: for this device, these sizes, and as long as its header says.
Header check_spec(const char* op, const View& spec, const Rows& r, int64_t n_fft, spectrum::Mode mode, spectrum::Scheme scheme) {
  const Arg arg{op, "spec"};
  if (spec.dim != 1 || spec.dtype != dtypes().f32 || !spec.contiguous || !(spec.home == kCpu) || spec.sizes[0] < spectrum::kHeaderFloats)
    arg.fail("what fftconv_prepare returns: float32 [floats], contiguous, on cpu", spec.text());
  const Header h = plain_header(spec.data<float>());
  if (h.magic != spectrum::kMagic) arg.fail("what fftconv_prepare returns", "another tensor");
  EFFK_CHECK(h.version == spectrum::kVersion && h.plan == spectrum::kPlanCpu, op, ": spec: expected version ", spectrum::kVersion,
             " prepared on cpu, got version ", h.version, h.plan == spectrum::kPlanCpu ? "" : " prepared for another device");
  EFFK_CHECK(h.mode == mode, op, ": spec: expected one prepared in mode '", mode_name(mode), "', got '", mode_name(h.mode), "'");
  EFFK_CHECK(h.n_fft == n_fft, op, ": spec: expected one prepared for n_fft = ", n_fft, ", got ", h.n_fft);
  EFFK_CHECK(scheme == spectrum::Scheme::automatic || h.scheme == scheme, op, ": spec: expected one prepared with scheme '",
             scheme_name(scheme), "', got '", scheme_name(h.scheme), "'");
  EFFK_CHECK(h.channels == r.h, op, ": spec: expected one of H = ", r.h, " channels as u has, got ", h.channels);
  const size_t floats = fftconv_spec_floats(h.channels, h.taps, h.n_fft, h.mode, h.scheme);
  EFFK_CHECK(h.scheme != spectrum::Scheme::automatic && h.taps >= 1 && floats != 0 && size_t(spec.sizes[0]) == floats && spectrum::kHeaderFloats + h.channels * h.stride == spec.sizes[0],
             op, ": spec: expected ", floats, " floats, got ", spec.sizes[0]);
  check_fits(op, mode, n_fft, h.taps, r.l);
  return h;
}

Tensor prepare(const Tensor& k, int64_t n_fft, const std::string& mode_text, const std::string& scheme_text) {
  constexpr const char* op = "fftconv_prepare";
  const spectrum::Mode mode = parse_mode(op, mode_text);
  const spectrum::Scheme scheme = parse_scheme(op, scheme_text, mode);
  const View view(k);
  const Arg arg{op, "k"};
  if (view.dim != 2 || view.dtype != dtypes().f32 || !view.contiguous || !(view.home == kCpu) || view.sizes[1] < 1)
    arg.fail("float32 [H, K] with K >= 1, contiguous, on cpu", view.text());
  check_n_fft(op, n_fft);
  const int64_t h = view.sizes[0], taps = view.sizes[1];
  check_fits(op, mode, n_fft, taps, -1);
  Tensor spec = result({int64_t(fftconv_spec_floats(h, taps, n_fft, mode, scheme))}, dtypes().f32);
  const ParallelFor pool = torch_pool();
  fftconv_prepare(view.data<float>(), h, taps, n_fft, mode, scheme, static_cast<float*>(spec.mutable_data_ptr()),
                  scratch(fftconv_prepare_workspace(h, taps, n_fft, mode, scheme, pool.threads)), pool);
  return spec;
}

FftConvArgs make_args(const char* op, const Rows& r, const Tensor& spec, int64_t n_fft, const std::string& mode_text,
                      const std::string& scheme_text) {
  const spectrum::Mode mode = parse_mode(op, mode_text);
  check_n_fft(op, n_fft);
  const View view(spec);
  check_spec(op, view, r, n_fft, mode, parse_scheme(op, scheme_text, mode));
  return {view.data<float>(), r.u.data(), r.pregate, r.postgate, r.skip, r.dtype, r.b, r.h, r.l, nullptr};
}

Tensor convolve(const Tensor& u, const Tensor& spec, const OptionalTensor& pregate, const OptionalTensor& postgate,
                const OptionalTensor& skip, int64_t n_fft, const std::string& mode, const std::string& scheme) {
  constexpr const char* op = "fftconv";
  const Rows r = make_rows(op, u, pregate, postgate, skip, kCpu);
  FftConvArgs args = make_args(op, r, spec, n_fft, mode, scheme);
  Tensor y = result({r.b, r.h, r.l}, r.u.dtype);
  args.y = y.mutable_data_ptr();
  const ParallelFor pool = torch_pool();
  fftconv(args, scratch(fftconv_workspace(args, pool.threads)), pool);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& gy, const Tensor& u, const Tensor& spec,
                                                            const OptionalTensor& pregate, const OptionalTensor& postgate,
                                                            const OptionalTensor& skip, int64_t n_fft, int64_t k_len,
                                                            const std::string& mode, const std::string& scheme,
                                                            std::vector<bool> mask) {
  constexpr const char* op = "fftconv_backward";
  const Rows r = make_rows(op, u, pregate, postgate, skip, kCpu);
  FftConvBackwardArgs args{};
  args.forward = make_args(op, r, spec, n_fft, mode, scheme);
  args.gy = like_u(op, "gy", gy, r);
  EFFK_CHECK(mask.size() == 5, op, ": mask: expected 5 entries (u, k, pregate, postgate, skip), got ", mask.size());
  EFFK_CHECK(!mask[2] || pregate, op, ": mask: expected no gradient of pregate without one, got true");
  EFFK_CHECK(!mask[3] || postgate, op, ": mask: expected no gradient of postgate without one, got true");
  EFFK_CHECK(!mask[4] || skip, op, ": mask: expected no gradient of skip without one, got true");
  const int64_t taps = spectrum::read_header(args.forward.spec).taps;
  EFFK_CHECK(!mask[1] || k_len == taps, op, ": k_len: expected ", taps, " as spec was prepared from, got ", k_len);
  args.k_len = k_len;
  const auto like = [&](bool wanted, void*& data) {
    Tensor t = wanted ? result({r.b, r.h, r.l}, r.u.dtype) : empty({0}, r.u.dtype);
    if (wanted) data = t.mutable_data_ptr();
    return t;
  };
  Tensor gu = like(mask[0], args.gu), gpre = like(mask[2], args.gpre), gpost = like(mask[3], args.gpost);
  Tensor gk = mask[1] ? result({r.h, k_len}, dtypes().f32) : empty({0}, dtypes().f32);
  Tensor gskip = mask[4] ? empty({r.h}, dtypes().f32) : empty({0}, dtypes().f32);
  if (mask[1]) args.gk = static_cast<float*>(gk.mutable_data_ptr());
  if (mask[4]) args.gskip = static_cast<float*>(gskip.mutable_data_ptr());
  const ParallelFor pool = torch_pool();
  fftconv_backward(args, scratch(fftconv_backward_workspace(args, pool.threads)), pool);
  return {gu, gk, gpre, gpost, gskip};
}

// Lags 0 .. 2 tile - 1 for one tile of decoding: a causal spectrum of decode_points(tile) points.
Tensor decode_prepare(const Tensor& k, int64_t tile) {
  constexpr const char* op = "fftconv_decode_prepare";
  const View view(k);
  if (view.dim != 2 || view.dtype != dtypes().f32 || !view.contiguous || !(view.home == kCpu) || view.sizes[1] < 1)
    Arg{op, "k"}.fail("float32 [H, K] with K >= 1, contiguous, on cpu", view.text());
  if (tile < kDecodeTile || tile > kMaxFft / 2 || (tile & (tile - 1)) != 0)
    Arg{op, "tile"}.fail("a power of two from " + std::to_string(kDecodeTile) + " to " + std::to_string(kMaxFft / 2), std::to_string(tile));
  const int64_t h = view.sizes[0], taps = view.sizes[1], lags = 2 * tile, n_fft = 2 * decode_points(tile);
  std::vector<float> cut;  // rows of the first lags
  const float* rows = view.data<float>();
  if (taps > lags) {
    cut.resize(size_t(h * lags));
    for (int64_t i = 0; i < h; ++i) std::copy_n(rows + i * taps, lags, cut.data() + i * lags);
    rows = cut.data();
  }
  const int64_t used = std::min(taps, lags);
  constexpr auto mode = spectrum::Mode::causal;
  constexpr auto scheme = spectrum::Scheme::fft;
  Tensor spec = result({int64_t(fftconv_spec_floats(h, used, n_fft, mode, scheme))}, dtypes().f32);
  const ParallelFor pool = torch_pool();
  fftconv_prepare(rows, h, used, n_fft, mode, scheme, static_cast<float*>(spec.mutable_data_ptr()),
                  scratch(fftconv_prepare_workspace(h, used, n_fft, mode, scheme, pool.threads)), pool);
  return spec;
}

Tensor decode_step(const Tensor& x_t, Tensor xbuf, Tensor ybuf, const Tensor& k, std::vector<Tensor> specs, int64_t t) {
  constexpr const char* op = "fftconv_decode_step";
  const Dtypes& d = dtypes();
  const View x(xbuf), y(ybuf), now(x_t), taps(k);
  if (x.dim != 3 || x.dtype != d.f32 || !x.contiguous || !(x.home == kCpu)) Arg{op, "xbuf"}.fail("float32 [B, H, T], contiguous, on cpu", x.text());
  const int64_t b = x.sizes[0], h = x.sizes[1], capacity = x.sizes[2];
  expect(Arg{op, "ybuf"}, y, {d.f32}, {b, h, capacity});
  expect(Arg{op, "x_t"}, now, {d.f32}, {b, h});
  if (taps.dim != 2 || taps.sizes[1] < 1) Arg{op, "k"}.fail("float32 [H, K] with K >= 1, contiguous, on cpu", taps.text());
  expect(Arg{op, "k"}, taps, {d.f32}, {h, taps.sizes[1]});
  EFFK_CHECK(x.numel() == 0 || x.data() != y.data(), op, ": ybuf: expected another tensor than xbuf, got the same memory");
  EFFK_CHECK(t >= 0 && t < capacity, op, ": t: expected 0 to T - 1 = ", capacity - 1, ", got ", t);
  const int64_t s = t + 1, tile = s & -s;
  std::vector<const float*> prepared(specs.size());
  for (size_t i = 0; i < specs.size(); ++i) {
    const View spec(specs[i]);
    const int64_t points = decode_points(kDecodeTile << i);
    const Arg arg{op, "specs", int(i)};
    expect(arg, spec, {d.f32}, {spectrum::kHeaderFloats + h * 2 * points});
    prepared[i] = spec.data<float>();
    const int64_t lags = std::min(taps.sizes[1], 2 * (kDecodeTile << i));
    const spectrum::Header head = plain_header(prepared[i]);
    if (head.magic != spectrum::kMagic || head.plan != spectrum::kPlanCpu || head.points != points || head.channels != h ||
        head.taps != lags || head.scheme != spectrum::Scheme::fft)
      arg.fail("what fftconv_decode_prepare returns for tile " + std::to_string(kDecodeTile << i), "another tensor");
  }
  if (s < capacity && tile >= kDecodeTile) {
    const int64_t needed = log2_of(tile / kDecodeTile) + 1;
    EFFK_CHECK(int64_t(specs.size()) >= needed, op, ": specs: expected at least ", needed, " at t = ", t, ", got ", specs.size());
  }
  Tensor out = result({b, h}, d.f32);
  DecodeArgs args{now.data<float>(), static_cast<float*>(out.mutable_data_ptr()), static_cast<float*>(xbuf.mutable_data_ptr()),
                  static_cast<float*>(ybuf.mutable_data_ptr()), taps.data<float>(), prepared.data(), b, h, capacity, taps.sizes[1], t};
  const ParallelFor pool = torch_pool();
  fftconv_decode_step(args, scratch(fftconv_decode_workspace(args, pool.threads)), pool);
  return out;
}

}  // namespace
}  // namespace effk::binding

STABLE_TORCH_LIBRARY_IMPL(effk, CPU, m) {
  using namespace effk::binding;
  m.impl("fftconv_prepare", TORCH_BOX(&prepare));
  m.impl("fftconv", TORCH_BOX(&convolve));
  m.impl("fftconv_backward", TORCH_BOX(&backward));
  m.impl("fftconv_decode_prepare", TORCH_BOX(&decode_prepare));
  m.impl("fftconv_decode_step", TORCH_BOX(&decode_step));
}
