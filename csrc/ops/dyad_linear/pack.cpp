// The matrix that a DYAD layer stands for, portable.
#include <cstring>

#include "common/half.h"
#include "ops/dyad_linear/dyad_linear.h"

namespace effk {
namespace {

float get(const void* p, DType t, int64_t i) {
  if (t == DType::f32) return static_cast<const float*>(p)[i];
  const uint16_t h = static_cast<const uint16_t*>(p)[i];
  return t == DType::bf16 ? bf16_to_float(h) : f16_to_float(h);
}
void put(void* p, DType t, int64_t i, float v) {
  if (t == DType::f32) static_cast<float*>(p)[i] = v;
  else static_cast<uint16_t*>(p)[i] = t == DType::bf16 ? float_to_bf16(v) : float_to_f16(v);
}

}  // namespace

void dyad_to_dense(panel::Kind kind, int64_t n, int64_t d_out, int64_t d_in, const void* wl, const void* wu, DType dtype, void* w,
                   const ParallelFor& pf) {
  const int64_t f_in = n * d_in;
  const bool rows = kind != panel::Kind::it, columns = kind != panel::Kind::ot;
  parallel_for(pf, n * d_out, 1 + 65536 / f_in, [&](int64_t r0, int64_t r1) {
    for (int64_t r = r0; r < r1; ++r) {
      std::memset(static_cast<char*>(w) + r * f_in * panel::bytes_of(dtype), 0, size_t(f_in * panel::bytes_of(dtype)));
      const int64_t d = r / d_out;
      for (int64_t i = 0; i < d_in; ++i) put(w, dtype, r * f_in + d * d_in + i, get(wl, dtype, r * d_in + i));
      const int64_t e = rows ? r % n : d, o = rows ? r / n : r % d_out;  // the block and row of wu that ends in this row
      for (int64_t i = 0; i < d_in; ++i) {
        const int64_t at = r * f_in + (columns ? i * n + e : e * d_in + i);
        put(w, dtype, at, get(w, dtype, at) + get(wu, dtype, (e * d_out + o) * d_in + i));
      }
    }
  });
}

}  // namespace effk
