// CPU binding of the decoder_* ops. A decoder is built by a few calls that check every weight once; a step then checks its tokens
// and its cache only. The tensor that stands for a decoder holds a number; the decoder dies with that tensor.
#include "ops/decoder/decoder.h"

#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "torch/quik_linear_args.h"
#include "torch/relu_ffn_args.h"
#include "torch/attention_args.h"

namespace effk::binding {
namespace {

using decoder::kMaxOutputs;
using decoder::Kind;

struct PlaceStore {
  std::vector<decoder::DenseWeight> dense;
  std::vector<WqWeight> wq;
  std::vector<QuikWeight> quik;
  std::vector<decoder::Part> parts;
  std::vector<int64_t> widths;
  int64_t k = 0;
};
struct LayerStore {
  PlaceStore qkv, out, up, down;
  decoder::Norm attention_norm{}, ffn_norm{};
  std::unique_ptr<relu_ffn::Args> sparse;
};

// A decoder and what it points into. Deques: growing one moves nothing.
struct Decoder {
  decoder::Model model{};
  std::deque<LayerStore> layers;
  PlaceStore head;
  WqWeight embedding{};
  std::vector<decoder::Layer> ready;  // filled by decoder_finish
  std::vector<Tensor> owned;
  int64_t inner = 0, max_positions = 0;
  bool complete = false;
};

std::mutex registry_lock;
std::map<int64_t, std::shared_ptr<Decoder>>& registry() {
  static auto& all = *new std::map<int64_t, std::shared_ptr<Decoder>>;  // never destroyed: tensors may outlive main
  return all;
}

std::shared_ptr<Decoder> find(const char* op, const Tensor& handle, bool complete) {
  const View view(handle);
  const Arg arg{op, "decoder"};
  expect(arg, view, {dtypes().i32}, {1});
  const int64_t number = *view.data<int32_t>();
  const std::lock_guard<std::mutex> hold(registry_lock);
  const auto it = registry().find(number);
  if (it == registry().end()) arg.fail("what decoder_create returned, alive", "number " + std::to_string(number));
  if (it->second->complete != complete) arg.fail(complete ? "one that decoder_finish has completed" : "one that is not finished", complete ? "an unfinished one" : "a finished one");
  return it->second;
}

const float* keep_floats(Decoder& d, const Arg& arg, const Tensor& t, std::initializer_list<int64_t> shape) {
  const View view(t);
  bool ok = view.dtype == dtypes().f32 && view.contiguous && view.home == kCpu && view.dim == int64_t(shape.size());
  int64_t i = 0;
  for (int64_t side : shape) ok = ok && (side < 0 || view.sizes[i] == side), ++i;
  if (!ok) arg.fail("float32 " + shape_text(shape.begin(), int64_t(shape.size())) + ", contiguous, on cpu", view.text());
  d.owned.push_back(t);
  return view.data<float>();
}

Tensor create(const Tensor& embedding, const OptionalTensor& scales, const OptionalTensor& positions, int64_t vocab, int64_t width, int64_t layers,
              int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t inner, const std::string& act, bool gated, double scale, int64_t window,
              const OptionalTensor& cosine, const OptionalTensor& sine, const std::string& dtype, int64_t group_size) {
  constexpr const char* op = "decoder_create";
  const auto positive = [&](const char* name, int64_t value) { EFFK_CHECK(value >= 1 && value <= kMaxSide, op, ": ", name, ": expected 1 to ", kMaxSide, ", got ", value); };
  positive("vocab", vocab), positive("width", width), positive("heads", heads), positive("kv_heads", kv_heads);
  positive("head_dim", head_dim), positive("inner", inner);
  EFFK_CHECK(layers >= 0 && layers <= 4096, op, ": layers: expected 0 to 4096, got ", layers);
  EFFK_CHECK(heads % kv_heads == 0, op, ": heads: expected a multiple of kv_heads = ", kv_heads, ", got ", heads);
  EFFK_CHECK(window >= 0, op, ": window: expected 0 or more, got ", window);
  auto made = std::make_shared<Decoder>();
  Decoder& d = *made;
  decoder::Model& m = d.model;
  m.width = width, m.vocab = vocab, m.n_layers = layers, m.heads = heads, m.kv_heads = kv_heads, m.head_dim = head_dim, m.window = window;
  m.scale = float(scale);
  m.act = parse_act(op, act);
  m.gated = gated;
  m.dtype = parse_dtype(op, dtype);
  EFFK_CHECK(m.dtype != DType::f16, op, ": dtype: expected 'fp32' or 'bf16', got 'fp16'");
  d.inner = inner;
  d.layers.resize(size_t(layers));
  const View table(embedding);
  if (scales) {
    d.embedding = make_weight(op, -1, embedding, *scales, std::nullopt, std::nullopt, vocab, width, 8, group_size);
    m.embedding.codes = &d.embedding;
    d.owned.push_back(*scales);
  } else {
    m.embedding.dtype = float_dtype(Arg{op, "embedding"}, table);
    expect(Arg{op, "embedding"}, table, {table.dtype}, {vocab, width});
    m.embedding.table = table.data();
  }
  d.owned.push_back(embedding);
  d.max_positions = kMaxSide;
  if (positions) {
    m.embedding.positions = keep_floats(d, Arg{op, "positions"}, *positions, {-1, width});
    d.max_positions = View(*positions).sizes[0];
  }
  EFFK_CHECK(cosine.has_value() == sine.has_value(), op, ": sine: expected beside cosine, got one of the two");
  if (cosine) {
    const View view(*cosine);
    m.cosine = keep_floats(d, Arg{op, "cosine"}, *cosine, {-1, -1});
    const int64_t longest = view.sizes[0], half = view.sizes[1];
    EFFK_CHECK(2 * half <= head_dim, op, ": cosine: expected [positions, at most head_dim / 2 = ", head_dim / 2, "], got ", view.text());
    m.sine = keep_floats(d, Arg{op, "sine"}, *sine, {longest, half});
    m.rotary = 2 * half;
    d.max_positions = std::min(d.max_positions, longest);
  }
  static int32_t next = 1;
  const std::lock_guard<std::mutex> hold(registry_lock);
  auto* number = new int32_t(next++);
  registry()[*number] = std::move(made);
  const int64_t one = 1;
  return adopt(number, &one, 1, dtypes().i32, [](void* data, void*) {
    std::shared_ptr<Decoder> last;  // destroyed behind the lock: it frees tensors
    auto* number = static_cast<int32_t*>(data);
    const std::lock_guard<std::mutex> hold(registry_lock);
    if (const auto it = registry().find(*number); it != registry().end()) {
      last = std::move(it->second);
      registry().erase(it);
    }
    delete number;
  });
}

LayerStore& layer_of(const char* op, Decoder& d, int64_t layer) {
  EFFK_CHECK(layer >= 0 && layer < int64_t(d.layers.size()), op, ": layer: expected 0 to ", int64_t(d.layers.size()) - 1, ", got ", layer);
  return d.layers[size_t(layer)];
}

void norm(const Tensor& handle, int64_t layer, const std::string& place, const Tensor& weight, const OptionalTensor& bias, double eps, bool centred) {
  constexpr const char* op = "decoder_norm";
  const auto made = find(op, handle, false);
  Decoder& d = *made;
  decoder::Norm n{};
  n.weight = keep_floats(d, Arg{op, "weight"}, weight, {d.model.width});
  if (bias) n.bias = keep_floats(d, Arg{op, "bias"}, *bias, {d.model.width});
  EFFK_CHECK(eps >= 0, op, ": eps: expected 0 or more, got ", eps);
  n.eps = float(eps);
  n.centred = centred;
  if (place == "final") d.model.final_norm = n;
  else if (place == "attention") layer_of(op, d, layer).attention_norm = n;
  else if (place == "ffn") layer_of(op, d, layer).ffn_norm = n;
  else fail(op, ": place: expected 'attention', 'ffn' or 'final', got '", place, "'");
}

PlaceStore& place_of(const char* op, Decoder& d, int64_t layer, const std::string& place) {
  if (place == "head") return d.head;
  LayerStore& l = layer_of(op, d, layer);
  if (place == "qkv") return l.qkv;
  if (place == "out") return l.out;
  if (place == "up") return l.up;
  if (place == "down") return l.down;
  fail(op, ": place: expected 'qkv', 'out', 'up', 'down' or 'head', got '", place, "'");
}
int64_t depth_of(const Decoder& d, const std::string& place) {
  return place == "out" ? d.model.heads * d.model.head_dim : place == "down" ? d.inner : d.model.width;
}

void append(PlaceStore& p, const decoder::Part& part, int64_t width, bool joins) {
  if (joins) ++p.parts.back().count;
  else p.parts.push_back(part);
  p.widths.push_back(width);
}
decoder::Part part_of(const PlaceStore& p, Kind kind) {
  decoder::Part part{};
  part.kind = kind;
  part.first = int(p.widths.size());
  part.count = 1;
  return part;
}
PlaceStore& open_place(const char* op, Decoder& d, int64_t layer, const std::string& place, int64_t k) {
  PlaceStore& p = place_of(op, d, layer, place);
  EFFK_CHECK(p.widths.size() < size_t(kMaxOutputs), op, ": place: expected at most ", kMaxOutputs, " weights in '", place, "', got one more");
  p.k = depth_of(d, place);
  EFFK_CHECK(k == p.k, op, ": k: expected ", p.k, " for '", place, "', got ", k);
  return p;
}

void add_dense(const Tensor& handle, int64_t layer, const std::string& place, const Tensor& packed, int64_t f_out, const OptionalTensor& bias) {
  constexpr const char* op = "decoder_dense";
  const auto made = find(op, handle, false);
  Decoder& d = *made;
  const View panels(packed);
  const panel::Shape s = read_panels(Arg{op, "packed"}, panels, panel::Kind::dense, -1, f_out);
  const Bias b = make_bias(op, "bias", bias, f_out);
  PlaceStore& p = open_place(op, d, layer, place, s.d_in);
  p.dense.push_back({s, panels.data<uint8_t>() + panel::kHeaderBytes, b.data, b.dtype});
  append(p, part_of(p, Kind::dense), f_out, !p.parts.empty() && p.parts.back().kind == Kind::dense);
  d.owned.push_back(packed);
  if (bias) d.owned.push_back(*bias);
}

void add_wq(const Tensor& handle, int64_t layer, const std::string& place, const Tensor& packed, const Tensor& scales, const OptionalTensor& zeros,
            const OptionalTensor& codebook, const OptionalTensor& out_ptr, const OptionalTensor& out_col, const OptionalTensor& out_val,
            const OptionalTensor& bias, int64_t n, int64_t k, int64_t bits, int64_t group_size, const std::string& compute) {
  constexpr const char* op = "decoder_wq";
  const auto made = find(op, handle, false);
  Decoder& d = *made;
  const Compute form = parse_compute(op, compute);
  WqWeight w = make_weight(op, -1, packed, scales, zeros, codebook, n, k, bits, group_size);
  check_form(op, -1, w, form);
  add_outliers(op, -1, out_ptr, out_col, out_val, w);
  add_bias(op, -1, bias, w);
  PlaceStore& p = open_place(op, d, layer, place, k);
  decoder::Part part = part_of(p, Kind::wq);
  part.compute = form;
  const bool joins = !p.parts.empty() && p.parts.back().kind == Kind::wq && p.parts.back().compute == form;
  p.wq.push_back(w);
  append(p, part, n, joins);
  d.owned.insert(d.owned.end(), {packed, scales});
  for (const OptionalTensor* t : {&zeros, &codebook, &out_ptr, &out_col, &out_val, &bias})
    if (*t) d.owned.push_back(**t);
}

void add_quik(const Tensor& handle, int64_t layer, const std::string& place, const Tensor& packed, const Tensor& w_scale, const Tensor& w_reduced,
              const OptionalTensor& w_out, const OptionalTensor& bias, const OptionalTensor& int_idx, const OptionalTensor& fp_idx, int64_t f_out,
              int64_t n_base, int64_t bits_w, int64_t bits_a, const std::string& mode) {
  constexpr const char* op = "decoder_quik";
  const auto made = find(op, handle, false);
  Decoder& d = *made;
  const QuikMode how = parse_quik_mode(op, mode);
  decoder::Part part{};
  part.bits_a = check_bits(op, "bits_a", bits_a, true);
  const QuikSplit split = make_split(op, int_idx, fp_idx, depth_of(d, place), n_base);
  QuikWeight w = make_quik_weight(op, -1, packed, w_scale, w_reduced, f_out, n_base, bits_w);
  add_outlier_panels(op, -1, w_out, split.n_out, w);
  add_quik_bias(op, -1, bias, w);
  PlaceStore& p = open_place(op, d, layer, place, split.k);
  const int32_t bits = part.bits_a;
  part = part_of(p, Kind::quik);
  part.bits_a = bits;
  part.mode = how;
  part.split = split;
  const auto same = [&](const decoder::Part& o) {  // one quantisation of x serves both
    return o.kind == Kind::quik && o.bits_a == bits && o.mode == how && o.split.n_base == split.n_base && o.split.base == split.base &&
           o.split.outlier == split.outlier;
  };
  const bool joins = !p.parts.empty() && same(p.parts.back());
  p.quik.push_back(w);
  append(p, part, f_out, joins);
  d.owned.insert(d.owned.end(), {packed, w_scale, w_reduced});
  for (const OptionalTensor* t : {&w_out, &bias, &int_idx, &fp_idx})
    if (*t) d.owned.push_back(**t);
}

void add_relu_ffn(const Tensor& handle, int64_t layer, const OptionalTensor& wg, const Tensor& wu, const Tensor& wd, const OptionalTensor& sg,
                  const OptionalTensor& su, const OptionalTensor& sd, const OptionalTensor& bg, const OptionalTensor& bu, const OptionalTensor& bd,
                  const std::string& rows, const std::string& gate, const OptionalTensor& param, const OptionalTensor& mask, int64_t mask_group,
                  const std::string& mode) {
  constexpr const char* op = "decoder_relu_ffn";
  const auto made = find(op, handle, false);
  Decoder& d = *made;
  LayerStore& l = layer_of(op, d, layer);
  const Tensor x = empty({1, d.model.width}, dtypes().f32);  // stands for those of the steps
  auto a = std::make_unique<relu_ffn::Args>(make_relu_ffn(op, x, wg, wu, wd, sg, su, sd, bg, bu, bd, rows, gate, param, mask, mask_group, mode, kCpu).a);
  EFFK_CHECK(a->f == d.inner, op, ": wu: expected ", d.inner, " neurons, got ", a->f);
  l.sparse = std::move(a);
  d.owned.insert(d.owned.end(), {wu, wd});
  for (const OptionalTensor* t : {&wg, &sg, &su, &sd, &bg, &bu, &bd, &param, &mask})
    if (*t) d.owned.push_back(**t);
}

// The place as the driver reads it; widths must be one of `expected`.
decoder::Place close_place(const char* op, PlaceStore& p, const std::string& name, std::initializer_list<std::vector<int64_t>> expected) {
  bool ok = false;
  std::string wanted;
  for (const auto& widths : expected) {
    ok |= p.widths == widths;
    wanted += (wanted.empty() ? "" : " or ") + shape_text(widths.data(), int64_t(widths.size()));
  }
  EFFK_CHECK(ok, op, ": ", name, ": expected weights with outputs ", wanted, ", got ", shape_text(p.widths.data(), int64_t(p.widths.size())));
  size_t dense = 0, wq = 0, quik = 0;
  for (decoder::Part& part : p.parts) {
    if (part.kind == Kind::dense) part.dense = p.dense.data() + std::exchange(dense, dense + size_t(part.count));
    else if (part.kind == Kind::wq) part.wq = p.wq.data() + std::exchange(wq, wq + size_t(part.count));
    else part.quik = p.quik.data() + std::exchange(quik, quik + size_t(part.count));
  }
  decoder::Place place{p.parts.data(), int(p.parts.size()), int(p.widths.size()), p.k, {}};
  std::copy(p.widths.begin(), p.widths.end(), place.width);
  return place;
}

void finish(const Tensor& handle) {
  constexpr const char* op = "decoder_finish";
  const auto made = find(op, handle, false);
  Decoder& d = *made;
  decoder::Model& m = d.model;
  const int64_t q = m.heads * m.head_dim, kv = m.kv_heads * m.head_dim, f = d.inner;
  int64_t index = 0;
  d.ready.clear();
  for (LayerStore& l : d.layers) {
    const std::string at = "layer " + std::to_string(index++) + ", ";
    EFFK_CHECK(l.attention_norm.weight && l.ffn_norm.weight, op, ": ", at, "norms: expected 'attention' and 'ffn', got less");
    decoder::Layer ready{l.attention_norm, l.ffn_norm, close_place(op, l.qkv, at + "qkv", {{q, kv, kv}, {q + 2 * kv}}),
                         close_place(op, l.out, at + "out", {{m.width}}), {}, {}, l.sparse.get()};
    if (!l.sparse) {
      ready.up = close_place(op, l.up, at + "up", {m.gated ? std::vector<int64_t>{f, f} : std::vector<int64_t>{f}});
      ready.down = close_place(op, l.down, at + "down", {{m.width}});
    }
    d.ready.push_back(ready);
  }
  EFFK_CHECK(m.final_norm.weight, op, ": final norm: expected one, got none");
  m.head = close_place(op, d.head, "head", {{m.vocab}});
  m.layers = d.ready.data();
  d.complete = true;
}

void step(const Tensor& handle, const Tensor& tokens, const Tensor& runs, Tensor k_cache, Tensor v_cache, OptionalTensor k_scale,
          OptionalTensor v_scale, const std::string& which, Tensor logits) {
  constexpr const char* op = "decoder_step";
  const auto made = find(op, handle, true);
  const decoder::Model& m = made->model;
  decoder::Step s{};
  const View t(tokens), r(runs), out(logits);
  if (t.dim != 1 || t.dtype != aoti_torch_dtype_int64() || !t.contiguous || !(t.home == kCpu)) Arg{op, "tokens"}.fail("int64 [rows], contiguous, on cpu", t.text());
  s.tokens = t.data<int64_t>();
  s.rows = t.sizes[0];
  for (int64_t i = 0; i < s.rows; ++i)
    EFFK_CHECK(s.tokens[i] >= 0 && s.tokens[i] < m.vocab, op, ": tokens: expected 0 to ", m.vocab - 1, ", got ", s.tokens[i], " at ", i);
  const View keys(k_cache), values(v_cache);
  std::optional<View> k_scales, v_scales;
  if (k_scale) k_scales.emplace(*k_scale);
  if (v_scale) v_scales.emplace(*v_scale);
  s.cache = make_cache(op, keys, values, k_scales, v_scales, 1);
  EFFK_CHECK(values.sizes[0] == m.n_layers && s.cache.kv_heads == m.kv_heads && s.cache.head_dim == m.head_dim, op, ": v_cache: expected [", m.n_layers,
             ", slots, ", m.kv_heads, ", positions, ", m.head_dim, "], got ", values.text());
  const int64_t head = kv::head_bytes(s.cache.type, s.cache.capacity, m.head_dim) * s.cache.slots * m.kv_heads;
  s.k_layer = s.v_layer = head;
  s.scale_layer = s.cache.slots * m.kv_heads * s.cache.capacity;
  s.cache.k = k_cache.mutable_data_ptr(), s.cache.v = v_cache.mutable_data_ptr();
  if (k_scale) s.cache.k_scale = static_cast<float*>(k_scale->mutable_data_ptr());
  if (v_scale) s.cache.v_scale = static_cast<float*>(v_scale->mutable_data_ptr());
  attention::Cache reachable = s.cache;
  reachable.capacity = std::min(reachable.capacity, made->max_positions);
  const std::vector<attention::Run> checked = make_runs(op, r, reachable, s.rows);
  s.runs = checked.data();
  s.n_runs = int64_t(checked.size());
  s.which = which == "last" ? decoder::Logits::last : which == "all" ? decoder::Logits::all : decoder::Logits::none;
  EFFK_CHECK(which == "last" || which == "all" || which == "none", op, ": which: expected 'last', 'all' or 'none', got '", which, "'");
  const int64_t rows = s.which == decoder::Logits::last ? s.n_runs : s.which == decoder::Logits::all ? s.rows : 0;
  expect(Arg{op, "logits"}, out, {dtypes().f32}, {rows, m.vocab});
  s.logits = static_cast<float*>(logits.mutable_data_ptr());
  if (s.rows == 0) return;
  const ParallelFor pool = torch_pool();
  decoder::step(m, s, scratch(decoder::workspace(m, s, pool.threads)), pool);
}

}  // namespace
}  // namespace effk::binding

STABLE_TORCH_LIBRARY_IMPL(effk, CPU, m) {
  using namespace effk::binding;
  m.impl("decoder_create", TORCH_BOX(&create));
  m.impl("decoder_norm", TORCH_BOX(&norm));
  m.impl("decoder_dense", TORCH_BOX(&add_dense));
  m.impl("decoder_wq", TORCH_BOX(&add_wq));
  m.impl("decoder_quik", TORCH_BOX(&add_quik));
  m.impl("decoder_relu_ffn", TORCH_BOX(&add_relu_ffn));
  m.impl("decoder_finish", TORCH_BOX(&finish));
  m.impl("decoder_step", TORCH_BOX(&step));
}
