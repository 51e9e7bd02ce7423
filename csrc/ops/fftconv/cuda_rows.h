// Rows of fftconv on CUDA: reading v = x gate eight samples at a time, and finishing eight results: scale, skip, gates.
#pragma once
#include "cuda/cu.h"
#include "cuda/ptx.h"
#include "ops/fftconv/cuda.h"

namespace effk::cuda::fftconv {

// What the kernels know of a call. Row r of all B H rows is channel r / batch, batch entry r mod batch: neighbours share a
// filter. A launch works on rows first_row .. first_row + rows - 1.
struct RowArgs {
  Signals s;
  DType type;
  bool aligned;         // every row of every tensor starts at a multiple of 16 bytes
  int batch, channels, length;
  int first_row, rows;
  const float* header;  // of the spectrum
  float expected[7];    // words kMagic .. kChannels as they must be; scheme 0, automatic: any
  int room;             // taps that the length leaves room for
};

namespace {

__device__ __forceinline__ float widen(uint32_t bits, bool half) {
  return half ? __half2float(__ushort_as_half((unsigned short)(bits))) : __uint_as_float(bits << 16);
}
__device__ __forceinline__ uint32_t pack_half(float low, float high) {
  const __half2 h = __floats2half2_rn(low, high);
  return uint32_t(__half_as_ushort(__high2half(h))) << 16 | __half_as_ushort(__low2half(h));
}
__device__ __forceinline__ float2 unpack_half(uint32_t word) { return {widen(word & 0xffffu, true), widen(word >> 16, true)}; }
__device__ __forceinline__ uint32_t narrow(float v, bool half) {
  return half ? __half_as_ushort(__float2half_rn(v)) : __bfloat16_as_ushort(__float2bfloat16_rn(v));
}
__device__ __forceinline__ float2 multiply(float2 a, float2 b) {
  return {fmaf(a.x, b.x, -a.y * b.y), fmaf(a.x, b.y, a.y * b.x)};
}
__device__ __forceinline__ float2 multiply_conj(float2 a, float2 b) {  // a conj(b)
  return {fmaf(a.x, b.x, a.y * b.y), fmaf(a.y, b.x, -a.x * b.y)};
}

// Eight samples p[at + n ..], zero from `length` on. kWide: fp32 is possible; without it the code is half as long.
template <bool kWide>
__device__ __forceinline__ void load8(float (&v)[8], const void* p, int64_t at, int n, const RowArgs& a) {
  const int count = min(8, a.length - n);
  at += n;
  if (kWide && a.type == DType::f32) {
    const float* const x = static_cast<const float*>(p) + at;
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = i < count ? x[i] : 0.0f;
    return;
  }
  const uint16_t* const x = static_cast<const uint16_t*>(p) + at;
  uint4 w{0, 0, 0, 0};
  if (a.aligned && count == 8) {
    w = *reinterpret_cast<const uint4*>(x);
  } else {
    if (count > 0) w.x = x[0];
    if (count > 1) w.x |= uint32_t(x[1]) << 16;
    if (count > 2) w.y = x[2];
    if (count > 3) w.y |= uint32_t(x[3]) << 16;
    if (count > 4) w.z = x[4];
    if (count > 5) w.z |= uint32_t(x[5]) << 16;
    if (count > 6) w.w = x[6];
    if (count > 7) w.w |= uint32_t(x[7]) << 16;
  }
  const bool half = a.type == DType::f16;
  v[0] = widen(w.x & 0xffffu, half), v[1] = widen(w.x >> 16, half), v[2] = widen(w.y & 0xffffu, half), v[3] = widen(w.y >> 16, half);
  v[4] = widen(w.z & 0xffffu, half), v[5] = widen(w.z >> 16, half), v[6] = widen(w.w & 0xffffu, half), v[7] = widen(w.w >> 16, half);
}

template <bool kWide>
__device__ __forceinline__ void store8(void* p, int64_t at, int n, const float (&v)[8], const RowArgs& a) {
  const int count = min(8, a.length - n);
  at += n;
  if (kWide && a.type == DType::f32) {
    float* const y = static_cast<float*>(p) + at;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < count) y[i] = v[i];
    return;
  }
  const bool half = a.type == DType::f16;
  uint16_t* const y = static_cast<uint16_t*>(p) + at;
  uint32_t w[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i] = narrow(v[2 * i], half) | narrow(v[2 * i + 1], half) << 16;
  if (a.aligned && count == 8) {
    *reinterpret_cast<uint4*>(y) = {w[0], w[1], w[2], w[3]};
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < count) y[i] = uint16_t(w[i / 2] >> 16 * (i % 2));
}

// Where row r of the call starts.
__device__ __forceinline__ int64_t row_offset(const RowArgs& a, int row) {
  return (int64_t(row % a.batch) * a.channels + row / a.batch) * a.length;
}

template <bool kWide>
__device__ __forceinline__ void load_input(float (&v)[8], const RowArgs& a, int64_t offset, int n) {
  load8<kWide>(v, a.s.x, offset, n, a);
  if (a.s.gate) {
    float g[8];
    load8<kWide>(g, a.s.gate, offset, n, a);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] *= g[i];
  }
}

// y = (c + skip v) out_gate for eight samples from n on.
template <bool kWide>
__device__ __forceinline__ void finish8(const RowArgs& a, int row, int n, float (&c)[8]) {
  if (n >= a.length) return;
  const int64_t offset = row_offset(a, row);
  if (a.s.skip) {
    const float d = a.s.skip[row / a.batch];
    float v[8];
    load_input<kWide>(v, a, offset, n);
#pragma unroll
    for (int i = 0; i < 8; ++i) c[i] = fmaf(d, v[i], c[i]);
  }
#pragma unroll
  for (int out = 0; out < 2; ++out) {
    if (!a.s.y[out]) continue;
    float y[8];
    if (a.s.out_gate[out]) {
      load8<kWide>(y, a.s.out_gate[out], offset, n, a);
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] *= c[i];
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] = c[i];
    }
    store8<kWide>(a.s.y[out], offset, n, y, a);
  }
}

// 1, or NaN for a spectrum that was not prepared for this call.
__device__ __forceinline__ float verdict(const RowArgs& a) {
  bool ok = true;
#pragma unroll
  for (int i = 0; i < 7; ++i) ok = ok && (a.header[i] == a.expected[i] || (i == kScheme && a.expected[i] <= 0.0f));
  ok = ok && a.header[kTaps] <= float(a.room);
  return ok ? 1.0f : __uint_as_float(0x7fc00000u);
}

// 2^e for -126 <= e <= 127.
__device__ __forceinline__ float power_of_two(int e) { return __uint_as_float(uint32_t(e + 127) << 23); }

// Exponent e by which a row with this largest |v| is scaled: |v| 2^e lies in [2^t, 2^(t+1)). Zero and non-finite rows: 0.
__device__ __forceinline__ int row_exponent(float largest, int target) {
  const int biased = int(__float_as_uint(largest) >> 23);
  if (biased == 0 || biased == 255) return biased ? 0 : largest > 0.0f ? 100 : 0;
  return max(-126, min(126, target - (biased - 127)));
}

}  // namespace
}  // namespace effk::cuda::fftconv
