// Quantised blocks through wq_linear, one block after the other. Compiled with baseline flags.
#include <algorithm>
#include <cstring>

#include "gemm/choose.h"
#include "ops/dyad_linear/dyad_linear.h"

namespace effk {
namespace {

using gemm::aligned;
using gemm::shifted;
using panel::bytes_of;

bool is_split(const DyadWqArgs& a) { return a.kind != panel::Kind::it; }
DType inner_dtype(const DyadWqArgs& a) { return is_split(a) ? DType::f32 : a.dtype; }

// The one or two products of a block.
struct Call {
  WqWeight weights[2];
  void* y[2];
  WqLinearArgs args;
  Call(const DyadWqArgs& a, int64_t d, const void* x, void* first, void* second) : y{first, second} {
    const int64_t tiles = a.d_out / t16::kTileRows;
    weights[0] = wq_cut(a.weight, d * tiles, (d + 1) * tiles);
    if (is_split(a)) {
      WqWeight rest = a.weight;
      rest.bias = nullptr;
      weights[1] = wq_cut(rest, (a.n + d) * tiles, (a.n + d + 1) * tiles);
    }
    args = {x, inner_dtype(a), a.tokens, a.weight.k, weights, y, is_split(a) && a.kind == panel::Kind::ot ? 2 : 1, a.compute};
  }
};

struct Layout {
  int64_t operands, operand, x, y, sums, wide, total;
  explicit Layout(const DyadWqArgs& a) {
    const int64_t size = bytes_of(inner_dtype(a));
    operands = a.kind == panel::Kind::dt ? 2 * a.n : a.n;
    operand = aligned(a.tokens * a.weight.k * size);
    x = operands * operand;
    y = aligned(a.tokens * a.d_out * size);
    sums = is_split(a) ? aligned(2 * a.tokens * a.n * a.d_out * 4) : 0;
    wide = is_split(a) ? aligned(a.tokens * a.n * a.d_in * 4) : 0;
    const Call probe(a, 0, nullptr, nullptr, nullptr);
    total = x + 2 * y + sums + wide + int64_t(wq_linear_workspace(probe.args));
  }
};

}  // namespace

size_t dyad_wq_workspace(const DyadWqArgs& a) { return a.tokens == 0 ? 0 : size_t(Layout(a).total); }

void dyad_wq_linear(const DyadWqArgs& a, void* workspace, const ParallelFor& pf) {
  if (a.tokens == 0) return;
  const Layout l(a);
  const gemm::Kernel& k = gemm::choose(DType::f32, DType::f32);
  char* xs = static_cast<char*>(workspace);
  char* y1 = xs + l.x;
  char* y2 = y1 + l.y;
  float* sums = reinterpret_cast<float*>(y2 + l.y);
  char* wide = reinterpret_cast<char*>(sums) + l.sums;
  char* room = wide + l.wide;
  const int64_t f_in = a.n * a.d_in, f_out = a.n * a.d_out, grain = 1 + (16 << 10) / (f_in + f_out);
  const DType inner = inner_dtype(a);
  const int64_t size = bytes_of(inner);

  // Operands [operand][token][k]: contiguous features and residues, beside each other (it) or apart.
  parallel_for(pf, a.tokens, grain, [&](int64_t t0, int64_t t1) {
    for (int64_t t = t0; t < t1; ++t) {
      const char* row = shifted(a.x, t * f_in, a.dtype);
      if (is_split(a) && a.dtype != DType::f32) {
        k.pack_rows({row, a.dtype, f_in, 1}, 1, f_in / 16 * 16, f_in / 16, wide + t * f_in * 4);
        if (const int64_t rest = f_in % 16) {
          float last[16];
          k.pack_rows({shifted(row, f_in - rest, a.dtype), a.dtype, f_in, 1}, 1, rest, 1, last);
          std::memcpy(wide + (t * f_in + f_in - rest) * 4, last, size_t(rest) * 4);
        }
        row = wide + t * f_in * 4;
      }
      char* to = xs + t * a.weight.k * size;
      for (int64_t d = 0; d < a.n; ++d) std::memcpy(to + d * l.operand, row + d * a.d_in * size, size_t(a.d_in * size));
      if (a.kind == panel::Kind::it) k.deinterleave(row, int(size), a.d_in, a.n, to + a.d_in * size, l.operand / size, 64 / size);
      if (a.kind == panel::Kind::dt) k.deinterleave(row, int(size), a.d_in, a.n, to + a.n * l.operand, l.operand / size, 64 / size);
    }
  });
  const auto place = [&](const char* from, int64_t d, int64_t half) {
    parallel_for(pf, a.tokens, grain, [&](int64_t t0, int64_t t1) {
      for (int64_t t = t0; t < t1; ++t) {
        char* to = is_split(a) ? reinterpret_cast<char*>(sums + (2 * t + half) * f_out + d * a.d_out)
                               : shifted(a.y, t * f_out + d * a.d_out, a.dtype);
        std::memcpy(to, from + t * a.d_out * size, size_t(a.d_out * size));
      }
    });
  };
  for (int64_t d = 0; d < a.n; ++d) {
    const bool direct = !is_split(a) && a.tokens == 1;
    Call call(a, d, xs + d * l.operand, direct ? shifted(a.y, d * a.d_out, a.dtype) : y1, y2);
    wq_linear(call.args, room, pf);
    if (a.kind == panel::Kind::dt) {
      call.args.x = xs + (a.n + d) * l.operand;
      call.args.weights = call.weights + 1;
      call.args.y = call.y + 1;
      wq_linear(call.args, room, pf);
    }
    if (!direct) place(y1, d, 0);
    if (is_split(a)) place(y2, d, 1);
  }
  if (!is_split(a)) return;
  parallel_for(pf, a.tokens, grain, [&](int64_t t0, int64_t t1) {
    for (int64_t t = t0; t < t1; ++t) {
      float* row = sums + 2 * t * f_out;
      k.interleave_add(row + f_out, a.d_out, a.d_out, a.n, row);
      k.finish(row, 2 * f_out, 1, f_out, {shifted(a.y, t * f_out, a.dtype), a.dtype, f_out, 1, Activation::none});
    }
  });
}

}  // namespace effk
