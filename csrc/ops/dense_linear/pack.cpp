// Panels back to rows, portable: what tests compare and gradients read.
#include <cstring>

#include "common/half.h"
#include "ops/dense_linear/dense_linear.h"

namespace effk {

void dense_unpack(const panel::Shape& s, const uint8_t* panels, float* w) {
  for (int64_t o = 0; o < s.d_out; ++o)
    for (int64_t i = 0; i < s.d_in; ++i) {
      const uint8_t* at = panels + panel::place(s, 0, 0, i, o);
      uint16_t h;
      std::memcpy(&h, at, 2);
      float v = s.dtype == DType::bf16 ? bf16_to_float(h) : f16_to_float(h);
      if (s.dtype == DType::f32) std::memcpy(&v, at, 4);
      w[o * s.d_in + i] = v;
    }
}

}  // namespace effk
