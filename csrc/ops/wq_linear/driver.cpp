// Chooses a kernel, prepares x once for all weights, cuts the work into tiles. Compiled with baseline flags.
#include "ops/wq_linear/kernels.h"

namespace effk {
namespace wq {

extern const Kernel kScalarInt8, kScalarFp32;
#ifdef EFFK_X86
extern const Kernel kAvx2Int8, kAvx2Fp32, kAvx512Int8, kAvx512Fp32, kAvx512VnniInt8, kAvx512VnniBf16;
#endif

// Every kernel there is, best first; the first that the active tier allows wins.
const Kernel* const kKernels[] = {
#ifdef EFFK_X86
    &kAvx512VnniInt8, &kAvx512VnniBf16, &kAvx512Int8, &kAvx512Fp32, &kAvx2Int8, &kAvx2Fp32,
#endif
    &kScalarInt8, &kScalarFp32,
};
const int kKernelCount = int(sizeof(kKernels) / sizeof(kKernels[0]));

namespace {

const Kernel* find(Form form) {
  for (const Kernel* k : kKernels)
    if (k->form == form && k->tier <= isa::active() && (!k->needs_bf16 || isa::has_bf16())) return k;
  return nullptr;
}

}  // namespace

// bf16 activations meet integer codes exactly in bf16 dot products; everything else in float form is fp32.
const Kernel* choose(const WqLinearArgs& a, const WqWeight& w) {
  if (a.compute == Compute::int8) return find(Form::int8);
  const Kernel* k = a.x_dtype == DType::bf16 && !w.codebook ? find(Form::bf16) : nullptr;
  return k ? k : find(Form::fp32);
}
bool is_gemv(const Kernel& k, const WqLinearArgs& a, const WqWeight& w) {
  return a.m <= k.gemv_rows && !(w.codebook && (k.form == Form::int8 || w.codebook_per_row));
}

Rows describe(const WqLinearArgs& a, const WqWeight& w, const Kernel& k) {
  Rows r{};
  r.m = a.m;
  r.k = a.k;
  r.kpad = t16::ceil_div(a.k, kPadK) * kPadK;
  r.span = t16::act_group(w.group);
  r.spans = t16::ceil_div(a.k, r.span);
  r.blocks = int(a.m <= k.gemv_rows ? 1 : t16::ceil_div(a.m, k.block_rows));
  r.block_rows = int(t16::ceil_div(a.m, r.blocks));  // even blocks: 16 rows are 8 + 8, not 12 + 4
  r.blocks = int(t16::ceil_div(a.m, r.block_rows));
  return r;
}

namespace {

constexpr size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

// The distinct ways in which the weights of a call want x prepared; q, k, v usually share one.
struct Layout {
  static constexpr int kMax = 8;
  Rows rows[kMax];
  const Kernel* kernel[kMax];
  size_t data[kMax], scale[kMax], sum[kMax], dense, total;
  int count;
};

int key_of(const Layout& l, const Kernel* k, const Rows& r) {
  for (int i = 0; i < l.count; ++i)
    if (l.kernel[i] == k && l.rows[i].span == r.span) return i;
  return l.count;
}

bool has_outliers(const WqLinearArgs& a) {
  for (int i = 0; i < a.n_weights; ++i) if (a.weights[i].out_ptr) return true;
  return false;
}

// Forms times span lengths (32, 64, 128) bound the number of keys below Layout::kMax.
Layout layout_of(const WqLinearArgs& a) {
  Layout l{};
  size_t at = 0;
  for (int i = 0; i < a.n_weights; ++i) {
    const Kernel* k = choose(a, a.weights[i]);
    const Rows r = describe(a, a.weights[i], *k);
    const int key = key_of(l, k, r);
    if (key < l.count) continue;
    l.rows[key] = r;
    l.kernel[key] = k;
    l.data[key] = at;
    at += aligned(size_t(r.m * r.kpad) * steps_per_unit(k->form)) ;
    l.scale[key] = at;
    at += aligned(size_t(r.m * r.spans) * 4);
    l.sum[key] = at;
    at += aligned(size_t(r.m * r.spans) * 4);
    ++l.count;
  }
  l.dense = at;
  if (has_outliers(a)) at += aligned(size_t(a.m == 1 ? 1 : t16::ceil_div(a.m, 16) * 16) * size_t(a.k) * 4);
  l.total = at;
  return l;
}

}  // namespace
}  // namespace wq

size_t wq_linear_workspace(const WqLinearArgs& a) { return a.m == 0 ? 0 : wq::layout_of(a).total; }

void wq_linear(const WqLinearArgs& a, void* workspace, const ParallelFor& pf) {
  using namespace wq;
  if (a.m == 0) return;
  Layout l = layout_of(a);
  char* base = static_cast<char*>(workspace);
  for (int i = 0; i < l.count; ++i) {
    Rows& r = l.rows[i];
    r.data = reinterpret_cast<int32_t*>(base + l.data[i]);
    r.scale = reinterpret_cast<float*>(base + l.scale[i]);
    r.sum = reinterpret_cast<int32_t*>(base + l.sum[i]);
    const int64_t grain = t16::ceil_div(16 << 10, a.k * r.block_rows);  // 16 Ki elements: a few microseconds
    parallel_for(pf, r.blocks, grain, [&](int64_t b0, int64_t b1) {
      for (int64_t b = b0; b < b1; ++b) l.kernel[i]->prepare(a.x, a.x_dtype, int(b), r);
    });
  }
  const float* dense = nullptr;
  if (has_outliers(a)) {
    if (a.x_dtype == DType::f32 && a.m == 1) {
      dense = static_cast<const float*>(a.x);
    } else {
      float* to = reinterpret_cast<float*>(base + l.dense);
      const int64_t grain = t16::ceil_div(16 << 10, a.k * 16);
      parallel_for(pf, t16::ceil_div(a.m, 16), grain, [&](int64_t b0, int64_t b1) {
        for (int64_t b = b0; b < b1; ++b) l.kernel[0]->prepare_dense(a.x, a.x_dtype, a.m, a.k, b, to);
      });
      dense = to;
    }
  }

  // One flat list of items: for each weight, for each group of row blocks, the tiles. Neighbouring items share rows of x.
  struct Work { const WqWeight* w; void* y; const Kernel* k; const Rows* r; bool gemv; int step; int64_t tiles, columns, end; };
  constexpr int kBatch = 64;
  for (int first = 0; first < a.n_weights; first += kBatch) {
    const int count = a.n_weights - first < kBatch ? a.n_weights - first : kBatch;
    Work work[kBatch];
    int64_t items = 0, bytes = 0;
    for (int i = 0; i < count; ++i) {
      const WqWeight& w = a.weights[first + i];
      const Kernel* k = choose(a, w);
      const int key = key_of(l, k, describe(a, w, *k));
      Work& o = work[i];
      o = {&w, a.y[first + i], k, &l.rows[key], is_gemv(*k, a, w), 0, t16::tiles(w.n), 0, 0};
      o.step = o.gemv ? k->gemv_tiles : k->gemm_tiles;
      if (o.gemv) {  // long items share what is worked out per call, and keep outliers out of the stream; four a thread
        const int64_t share = o.tiles / (4 * pf.threads) / o.step * o.step;
        o.step = int(share < o.step ? o.step : share > kMaxGemvTiles ? kMaxGemvTiles : share);
      }
      o.columns = t16::ceil_div(o.tiles, o.step);
      items += o.columns * t16::ceil_div(o.r->blocks, kMaxBlocks);
      o.end = items;
      bytes += t16::packed_bytes(w.n, w.k, w.bits) * (1 + a.m / kMaxBlockRows);
    }
    if (items == 0) continue;
    const int64_t grain = t16::ceil_div(kGrainBytes * items, bytes ? bytes : 1);
    parallel_for(pf, items, grain, [&](int64_t i0, int64_t i1) {
      int at = 0;
      for (int64_t i = i0; i < i1; ++i) {
        while (i >= work[at].end) ++at;
        const Work& o = work[at];
        const int64_t j = i - (at ? work[at - 1].end : 0), group = j / o.columns, column = j % o.columns;
        Tile t{};
        t.w = o.w;
        t.rows = o.r;
        t.tile = column * o.step;
        t.tiles = int(o.tiles - t.tile < o.step ? o.tiles - t.tile : o.step);
        t.block = int(group) * kMaxBlocks;
        t.blocks = o.r->blocks - t.block < kMaxBlocks ? o.r->blocks - t.block : kMaxBlocks;
        t.dense_x = dense;
        t.y = o.y;
        t.y_dtype = a.x_dtype;
        (o.gemv ? o.k->gemv : o.k->gemm)(t);
      }
    });
  }
}

const char* wq_linear_kernel_name(const WqLinearArgs& a) { return wq::choose(a, a.weights[0])->name; }

}  // namespace effk
