// Neuron rows from plain weights and back: offline, one thread a row. Compiled with baseline flags.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/half.h"
#include "ops/relu_ffn/relu_ffn.h"

namespace effk::relu_ffn {
namespace {

using neuron::Rows;

float value(const void* w, DType t, int64_t i) {
  if (t == DType::f32) return static_cast<const float*>(w)[i];
  const uint16_t h = static_cast<const uint16_t*>(w)[i];
  return t == DType::bf16 ? bf16_to_float(h) : f16_to_float(h);
}

struct Place { int64_t byte; int shift; };
Place place(Rows r, int64_t c) {
  if (r == Rows::f32) return {4 * c, 0};
  if (r == Rows::i8) return {c, 0};
  if (r == Rows::i4) { const int64_t in = c % 128; return {c / 128 * 64 + in % 16 * 4 + in / 32, int(in / 16 % 2) * 4}; }
  return {2 * c, 0};
}

}  // namespace

void pack(const void* w, DType t, bool transposed, int64_t f, int64_t d, Rows type, int64_t group, uint8_t* rows, float* scales, const ParallelFor& pf) {
  const int64_t bytes = neuron::row_bytes(type, d), groups = neuron::groups(d, group), width = group ? group : d;
  parallel_for(pf, f, std::max<int64_t>(1, (64 << 10) / (d + 1)), [&](int64_t i0, int64_t i1) {
    for (int64_t i = i0; i < i1; ++i) {
      const auto at = [&](int64_t c) { return value(w, t, transposed ? c * f + i : i * d + c); };
      uint8_t* row = rows + i * bytes;
      std::memset(row, type == Rows::i4 ? 0x88 : 0, size_t(bytes));  // zero in each type
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t c0 = g * width, c1 = std::min(d, c0 + width);
        float most = 0.0f;
        for (int64_t c = c0; neuron::quantised(type) && c < c1; ++c) most = std::max(most, std::fabs(at(c)));
        const float steps = type == Rows::i8 ? 127.0f : 7.0f, scale = most / steps;
        if (neuron::quantised(type)) scales[i * groups + g] = scale;
        for (int64_t c = c0; c < c1; ++c) {
          const Place p = place(type, c);
          const float v = at(c);
          if (type == Rows::f32) { std::memcpy(row + p.byte, &v, 4); continue; }
          if (type == Rows::bf16 || type == Rows::f16) {
            const uint16_t h = type == Rows::bf16 ? float_to_bf16(v) : float_to_f16(v);
            std::memcpy(row + p.byte, &h, 2);
            continue;
          }
          const int code = scale > 0 ? int(std::max(-steps, std::min(steps, std::nearbyint(v / scale)))) : 0;
          if (type == Rows::i8) row[p.byte] = uint8_t(int8_t(code));
          else row[p.byte] = uint8_t((row[p.byte] & (0xf0 >> p.shift)) | (code + 8) << p.shift);
        }
      }
    }
  });
}

void unpack(const uint8_t* rows, const float* scales, Rows type, int64_t group, int64_t f, int64_t d, float* w, const ParallelFor& pf) {
  const int64_t bytes = neuron::row_bytes(type, d), groups = neuron::groups(d, group), width = group ? group : d;
  parallel_for(pf, f, std::max<int64_t>(1, (64 << 10) / (d + 1)), [&](int64_t i0, int64_t i1) {
    for (int64_t i = i0; i < i1; ++i)
      for (int64_t c = 0; c < d; ++c) {
        const Place p = place(type, c);
        const uint8_t* at = rows + i * bytes + p.byte;
        float& to = w[i * d + c];
        if (type == Rows::i8) to = float(int8_t(*at)) * scales[i * groups + c / width];
        else if (type == Rows::i4) to = float((*at >> p.shift & 15) - 8) * scales[i * groups + c / width];
        else to = value(at, type == Rows::f32 ? DType::f32 : type == Rows::bf16 ? DType::bf16 : DType::f16, 0);
      }
  });
}

}  // namespace effk::relu_ffn
