// Rows of features as n residue classes and back: element i of class r is row[i n + r]. For n = 2, 4 and 8 in registers: n vectors
// are split by the lowest bit of their index, then by the next, log2 n two-source permutations a vector; other n move one element
// at a time. Bound at n = 4: 8 permutations, 4 loads and 4 stores for 64 values of 32 bits.
#pragma once
#include <cstdint>

namespace effk::EFFK_TIER {
namespace {

// Lanes of 32 bits, and of 16 bits.
struct Lanes32 {
  using T = int32_t;
  static constexpr int kCount = 16;
  static EFFK_INLINE void unzip(vi a, vi b, vi& even, vi& odd) { unzip32(a, b, even, odd); }
};
struct Lanes16 {
  using T = int16_t;
  static constexpr int kCount = 32;
  static EFFK_INLINE void unzip(vi a, vi b, vi& even, vi& odd) { unzip16(a, b, even, odd); }
};

template <class L, int N> EFFK_INLINE void split(const vi* v, vi* out, int step) {
  if constexpr (N == 1) {
    out[0] = v[0];
  } else {
    vi even[N / 2], odd[N / 2];
#pragma GCC unroll 4
    for (int i = 0; i < N / 2; ++i) L::unzip(v[2 * i], v[2 * i + 1], even[i], odd[i]);
    split<L, N / 2>(even, out, 2 * step);
    split<L, N / 2>(odd, out + step, 2 * step);
  }
}
template <int N> EFFK_INLINE void join(const vf* in, int step, vf* v) {
  if constexpr (N == 1) {
    v[0] = in[0];
  } else {
    vf even[N / 2], odd[N / 2];
    join<N / 2>(in, 2 * step, even);
    join<N / 2>(in + step, 2 * step, odd);
#pragma GCC unroll 4
    for (int i = 0; i < N / 2; ++i) zip32(even[i], odd[i], v[2 * i], v[2 * i + 1]);
  }
}

template <class L, int N>
void deinterleave_as(const typename L::T* row, int64_t d, int64_t n, typename L::T* to, int64_t to_row, int64_t to_unit) {
  int64_t i = 0;
  if constexpr (N > 1)
    for (; i + L::kCount <= d; i += L::kCount) {
      vi v[N], out[N];
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) v[j] = load_unit(row + i * N + j * L::kCount);
      split<L, N>(v, out, 1);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) store_unit(to + j * to_row + i / L::kCount * to_unit, out[j]);
    }
  for (int64_t r = 0; r < n; ++r)
    for (int64_t j = i; j < d; ++j) to[r * to_row + j / L::kCount * to_unit + j % L::kCount] = row[j * n + r];
}
template <class L> void deinterleave_lanes(const void* row, int64_t d, int64_t n, void* to, int64_t to_row, int64_t to_unit) {
  const auto* from = static_cast<const typename L::T*>(row);
  auto* out = static_cast<typename L::T*>(to);
  switch (n) {
    case 2: return deinterleave_as<L, 2>(from, d, n, out, to_row, to_unit);
    case 4: return deinterleave_as<L, 4>(from, d, n, out, to_row, to_unit);
    case 8: return deinterleave_as<L, 8>(from, d, n, out, to_row, to_unit);
    default: return deinterleave_as<L, 1>(from, d, n, out, to_row, to_unit);
  }
}
void deinterleave(const void* row, int bytes, int64_t d, int64_t n, void* to, int64_t to_row, int64_t to_unit) {
  if (bytes == 4) return deinterleave_lanes<Lanes32>(row, d, n, to, to_row, to_unit);
  deinterleave_lanes<Lanes16>(row, d, n, to, to_row, to_unit);
}

template <int N> void interleave_add_as(const float* z, int64_t z_row, int64_t d, int64_t n, float* y) {
  int64_t i = 0;
  if constexpr (N > 1)
    for (; i + 16 <= d; i += 16) {
      vf in[N], v[N];
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) in[j] = load_f32(z + j * z_row + i);
      join<N>(in, 1, v);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) store_f32(y + i * N + j * 16, add_f(load_f32(y + i * N + j * 16), v[j]));
    }
  for (int64_t r = 0; r < n; ++r)
    for (int64_t j = i; j < d; ++j) y[j * n + r] += z[r * z_row + j];
}
void interleave_add(const float* z, int64_t z_row, int64_t d, int64_t n, float* y) {
  switch (n) {
    case 2: return interleave_add_as<2>(z, z_row, d, n, y);
    case 4: return interleave_add_as<4>(z, z_row, d, n, y);
    case 8: return interleave_add_as<8>(z, z_row, d, n, y);
    default: return interleave_add_as<1>(z, z_row, d, n, y);
  }
}

}  // namespace
}  // namespace effk::EFFK_TIER
