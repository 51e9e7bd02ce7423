// Rows of features as n residue classes and back: element i of class r is row[i n + r].
#pragma once
#include <cstdint>
#include <cstring>

namespace effk::EFFK_TIER {
namespace {

template <class T> void deinterleave_any(const T* row, int64_t d, int64_t n, T* to, int64_t to_row) {
  for (int64_t r = 0; r < n; ++r)
    for (int64_t i = 0; i < d; ++i) to[r * to_row + i] = row[i * n + r];
}
void deinterleave(const void* row, int bytes, int64_t d, int64_t n, void* to, int64_t to_row) {
  if (bytes == 4) return deinterleave_any(static_cast<const int32_t*>(row), d, n, static_cast<int32_t*>(to), to_row);
  deinterleave_any(static_cast<const int16_t*>(row), d, n, static_cast<int16_t*>(to), to_row);
}
void interleave_add(const float* z, int64_t z_row, int64_t d, int64_t n, float* y) {
  for (int64_t r = 0; r < n; ++r)
    for (int64_t i = 0; i < d; ++i) y[i * n + r] += z[r * z_row + i];
}

}  // namespace
}  // namespace effk::EFFK_TIER
