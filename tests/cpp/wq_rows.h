// Random low-bit weights as plain rows, for fuzz programs that pack them.
#pragma once
#include "fuzz.h"
#include "ops/wq_linear/wq_linear.h"

namespace effk::test {

struct WqRows {
  int64_t n, k;
  int bits;
  int64_t group;
  bool scales_f32;
  std::vector<uint8_t> codes, scales, zeros;  // zeros: empty in a symmetric weight

  int scale_bytes() const { return scales_f32 ? 4 : 2; }
  size_t packed_bytes() const { return size_t(t16::packed_bytes(n, k, bits)); }
  size_t packed_groups() const { return size_t(t16::tiles(n) * t16::groups(k, group) * t16::kTileRows); }  // scales, and zeros
  WqWeight pack(uint8_t* packed, void* packed_scales, uint8_t* packed_zeros) const {
    wq_pack(codes.data(), scales.data(), zeros.empty() ? nullptr : zeros.data(), n, k, bits, group, scale_bytes(), packed, packed_scales, packed_zeros);
    WqWeight w{};
    w.packed = packed, w.scales = packed_scales, w.zeros = packed_zeros;
    w.n = n, w.k = k, w.bits = bits, w.group = int32_t(group), w.scales_f32 = scales_f32;
    return w;
  }
};

inline WqRows random_wq_rows(Random& r, int64_t n, int64_t k, int bits, int64_t group, bool scales_f32, bool zeros) {
  const int64_t groups = n * t16::groups(k, group);
  WqRows w{n, k, bits, group, scales_f32, {}, {}, {}};
  w.codes.resize(size_t(n * t16::ceil_div(k * bits, 8))), w.scales.resize(size_t(groups * w.scale_bytes()));
  for (uint8_t& byte : w.codes) byte = uint8_t(r.below(256));
  for (int64_t i = 0; i < groups; ++i) store(w.scales.data(), scales_f32 ? DType::f32 : DType::f16, i, 0.01f + 0.05f * float(r.below(100)) / 100);
  for (int64_t i = 0; zeros && i < groups; ++i) w.zeros.push_back(uint8_t(r.below(int64_t(1) << bits)));
  return w;
}

}  // namespace effk::test
