// 16 x 16 values transposed, over the vocabulary of a tier. Included by a tier after its vector header.
#pragma once

namespace effk::EFFK_TIER {
namespace {

// rows (16 x 16, destroyed) transposed to `to`.
[[maybe_unused]] void transpose16(float* rows, float* to) {
  for (int i = 0; i < 16; i += 4)
    for (int h = 0; h < 16; h += kLanes) {
      float* p = rows + i * 16 + h;
      vr r0 = load_r(p), r1 = load_r(p + 16), r2 = load_r(p + 32), r3 = load_r(p + 48);
      transpose_quads(r0, r1, r2, r3);
      store_r(p, r0), store_r(p + 16, r1), store_r(p + 32, r2), store_r(p + 48, r3);
    }
  for (int g = 0; g < 16; g += kLanes)
    for (int j = 0; j < 4; ++j) {
      vr r[4];
      load_columns(rows, 16, g, j, r);
      for (int i = 0; i < 4; ++i) store_r(to + (j + 4 * i) * 16 + g, r[i]);
    }
}

}  // namespace
}  // namespace effk::EFFK_TIER
