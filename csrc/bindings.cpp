// effk._C: what Python asks the library about itself. No tensors cross it; those go through torch.ops.effk.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "formats/kv.h"
#include "formats/panel.h"
#include "formats/t16.h"
#include "gemm/int8/int8.h"
#include "gemm/kernels.h"
#include "isa/isa.h"
#include "ops/attention/kernels.h"
#include "ops/bitmask_linear/kernels.h"
#include "ops/decoder/kernels.h"
#include "ops/depthwise_conv1d/kernels.h"
#include "ops/fftconv/kernels.h"
#include "ops/fftconv/plan.h"
#include "ops/relu_ffn/kernels.h"
#include "ops/quik_linear/kernels.h"
#include "ops/wq_linear/kernels.h"

namespace py = pybind11;
using namespace effk;

namespace {

std::vector<std::string> tier_names(isa::Tier highest) {
  std::vector<std::string> names;
  for (int t = 0; t <= int(highest); ++t) names.push_back(isa::name(isa::Tier(t)));
  return names;
}

void use(const std::string& name, bool bf16) {
  isa::Tier tier;
  if (isa::parse(name.c_str(), &tier) && isa::force(tier, bf16)) return;
  std::string message = "effk.isa.use: name: expected one of ";
  for (const std::string& valid : tier_names(isa::detected())) message += valid + ", ";
  message.replace(message.size() - 2, 2, " on this CPU, got '" + name + "'");
  throw py::value_error(message);
}

const char* form_name(wq::Form form) {
  switch (form) {
    case wq::Form::int8: return "int8";
    case wq::Form::bf16: return "bf16";
    case wq::Form::fp32: return "fp32";
  }
  return "";
}

py::dict kernel_row(const char* op, const char* name, isa::Tier tier, const char* form, bool needs_bf16) {
  py::dict row;
  row["op"] = op;
  row["name"] = name;
  row["tier"] = isa::name(tier);
  row["form"] = form;
  row["needs_bf16"] = needs_bf16;
  row["supported"] = tier <= isa::detected() && (!needs_bf16 || isa::detected_bf16());
  return row;
}

py::list kernel_table() {
  py::list rows;
  for (int i = 0; i < wq::kKernelCount; ++i) {
    const wq::Kernel& kernel = *wq::kKernels[i];
    rows.append(kernel_row("wq_linear", kernel.name, kernel.tier, form_name(kernel.form), kernel.needs_bf16));
  }
  for (int i = 0; i < fft::kKernelCount; ++i)
    rows.append(kernel_row("fftconv", fft::kKernels[i]->name, fft::kKernels[i]->tier, "fp32", false));
  for (int i = 0; i < depthwise::kKernelCount; ++i)
    rows.append(kernel_row("depthwise_conv1d", depthwise::kKernels[i]->name, depthwise::kKernels[i]->tier, "fp32", false));
  for (int i = 0; i < gemm8::kKernelCount; ++i)
    rows.append(kernel_row("quik_linear", gemm8::kKernels[i]->name, gemm8::kKernels[i]->tier, "int8", false));
  for (int i = 0; i < quik::kKernelCount; ++i)
    rows.append(kernel_row("quik_linear", quik::kKernels[i]->name, quik::kKernels[i]->tier, "fp32", false));
  for (int i = 0; i < relu_ffn::kKernelCount; ++i)
    rows.append(kernel_row("relu_ffn", relu_ffn::kKernels[i]->name, relu_ffn::kKernels[i]->tier, "fp32", false));
  for (int i = 0; i < decoder::kKernelCount; ++i)
    rows.append(kernel_row("decoder", decoder::kKernels[i]->name, decoder::kKernels[i]->tier, "fp32", false));
  for (int i = 0; i < attention::kKernelCount; ++i)
    rows.append(kernel_row("attention", attention::kKernels[i]->name, attention::kKernels[i]->tier, "fp32", false));
  for (int i = 0; i < bitmask::kKernelCount; ++i)
    rows.append(kernel_row("bitmask_linear", bitmask::kKernels[i]->name, bitmask::kKernels[i]->tier, "int8", false));
  for (const char* op : {"dense_linear", "dyad_linear"})  // both run on csrc/gemm
    for (int i = 0; i < gemm::kKernelCount; ++i) {
      const gemm::Kernel& kernel = *gemm::kKernels[i];
      rows.append(kernel_row(op, kernel.name, kernel.tier, kernel.form == gemm::Form::bf16 ? "bf16" : "fp32", kernel.needs_bf16));
    }
  return rows;
}

template <class T> T one_of(const char* op, const char* what, const std::string& got, std::initializer_list<std::pair<const char*, T>> known) {
  std::string names;
  for (const auto& [name, value] : known) {
    if (got == name) return value;
    names += std::string(names.empty() ? "'" : ", '") + name + "'";
  }
  throw py::value_error(std::string(op) + ": " + what + ": expected one of " + names + ", got '" + got + "'");
}
spectrum::Mode mode_of(const std::string& mode) {
  return one_of<spectrum::Mode>("fftconv", "mode", mode, {{"causal", spectrum::Mode::causal}, {"circular", spectrum::Mode::circular},
                                               {"bidirectional", spectrum::Mode::bidirectional}});
}
spectrum::Scheme scheme_of(const std::string& scheme) {
  return one_of<spectrum::Scheme>("fftconv", "scheme", scheme, {{"auto", spectrum::Scheme::automatic}, {"fft", spectrum::Scheme::fft},
                                                     {"overlap_save", spectrum::Scheme::overlap_save}, {"direct", spectrum::Scheme::direct}});
}
size_t spec_floats(int64_t h, int64_t taps, int64_t n_fft, const std::string& mode, const std::string& scheme) {
  return fftconv_spec_floats(h, taps, n_fft, mode_of(mode), scheme_of(scheme));
}
size_t decode_floats(int64_t h, int64_t tile) { return spectrum::kHeaderFloats + size_t(h * 2 * decode_points(tile)); }
std::string fft_plan(int64_t n_fft, int64_t taps, const std::string& mode, const std::string& scheme) {
  return fft::describe(taps, n_fft, mode_of(mode), scheme_of(scheme));
}

int64_t panel_bytes(panel::Kind kind, int64_t n, int64_t d_out, int64_t d_in, const std::string& dtype) {
  const DType type = one_of<DType>("panels", "dtype", dtype, {{"fp32", DType::f32}, {"bf16", DType::bf16}, {"fp16", DType::f16}});
  return panel::Shape{kind, type, n, d_out, d_in}.bytes();
}
int64_t dense_packed_bytes(int64_t f_out, int64_t f_in, const std::string& dtype) { return panel_bytes(panel::Kind::dense, 1, f_out, f_in, dtype); }
int64_t dyad_packed_bytes(int64_t n, int64_t d_out, int64_t d_in, const std::string& variant, const std::string& dtype) {
  using panel::Kind;
  return panel_bytes(one_of<Kind>("panels", "variant", variant, {{"it", Kind::it}, {"ot", Kind::ot}, {"dt", Kind::dt}}), n, d_out, d_in, dtype);
}

// For each code, row by row: (byte of the low bits, their shift, byte of the high bit, its shift); the last two are
// -1 and 0 unless bits is 3.
std::vector<std::tuple<int64_t, int, int64_t, int>> tile_map(int64_t n, int64_t k, int bits) {
  if (n < 0 || k < 1 || !t16::valid_bits(bits))
    throw py::value_error("tile_map: n, k, bits: expected n >= 0, k >= 1 and 2, 3, 4 or 8 bits, got " +
                          std::to_string(n) + ", " + std::to_string(k) + ", " + std::to_string(bits));
  std::vector<std::tuple<int64_t, int, int64_t, int>> places;
  places.reserve(size_t(n * k));
  for (int64_t row = 0; row < n; ++row)
    for (int64_t column = 0; column < k; ++column) {
      const t16::Place p = t16::place(row, column, k, bits);
      places.emplace_back(p.byte, p.shift, p.high_byte, p.high_shift);
    }
  return places;
}

py::dict build_info() {
  py::dict info;
  info["version"] = EFFK_VERSION;
  info["compiler"] = EFFK_COMPILER;
  info["build_type"] = EFFK_BUILD_TYPE;
  info["oldest_torch"] = std::to_string((EFFK_TORCH_TARGET >> 56) & 0xff) + "." +
                         std::to_string((EFFK_TORCH_TARGET >> 48) & 0xff);
  info["cuda"] = EFFK_CUDA_INFO;
  info["t16_version"] = t16::kVersion;
  info["panel_version"] = panel::kVersion;
  info["kv_version"] = kv::kVersion;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "ISA tiers, kernel table, packed layouts and build facts of the effk library";
  m.def("isa_names", [] { return tier_names(isa::Tier(isa::kTiers - 1)); }, "all tiers, lowest first");
  m.def("isa_supported", [] { return tier_names(isa::detected()); }, "the tiers of this CPU, lowest first");
  m.def("isa_active", [] { return isa::name(isa::active()); });
  m.def("isa_bf16", &isa::has_bf16, "whether BF16 dot products are in use");
  m.def("isa_detected_bf16", &isa::detected_bf16);
  m.def("isa_use", &use, py::arg("name"), py::arg("bf16") = true);
  m.def("isa_environment_error", &isa::environment_error);
  m.def("kernel_table", &kernel_table, "one dict per kernel: op, name, tier, form, needs_bf16, supported");
  m.def("fftconv_spec_floats", &spec_floats, py::arg("h"), py::arg("k"), py::arg("n_fft"), py::arg("mode"), py::arg("scheme"));
  m.def("fftconv_decode_floats", &decode_floats, py::arg("h"), py::arg("tile"));
  m.def("fftconv_plan", &fft_plan, py::arg("n_fft"), py::arg("k"), py::arg("mode"), py::arg("scheme"), "one line");
  m.def("dense_packed_bytes", &dense_packed_bytes, py::arg("f_out"), py::arg("f_in"), py::arg("dtype"));
  m.def("dyad_packed_bytes", &dyad_packed_bytes, py::arg("n"), py::arg("d_out"), py::arg("d_in"), py::arg("variant"), py::arg("dtype"));
  m.attr("kv_tile") = kv::kTile;
  m.attr("kv_max_head_dim") = kv::kMaxHeadDim;
  m.def("tile_map", &tile_map, py::arg("n"), py::arg("k"), py::arg("bits"));
  m.def("build_info", &build_info);
}
