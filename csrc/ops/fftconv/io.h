// Between the caller's rows and fp32 strips: conversion, gates, skip, zero padding and cropping.
#pragma once
#include "ops/fftconv/kernels.h"
#include "simd/convert.h"

namespace effk::EFFK_TIER {
namespace {

using fft::Sink;
using fft::Source;

// dst[i] = v(n + i) for i < count, a multiple of 16; v is zero outside [0, length).
template <DType T> void gather_as(const Source& s, int64_t n, int64_t count, float* dst) {
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t t = n + i;
    vf v = zero_f();
    if (t >= 0 && t + 16 <= s.length) {
      v = load_as<T>(s.a, t);
      if (s.b) v = mul_f(v, load_as<T>(s.b, t));
    } else if (t + 16 > 0 && t < s.length) {
      const int64_t lo = t < 0 ? 0 : t, hi = t + 16 < s.length ? t + 16 : s.length;
      v = load_part<T>(s.a, lo, int(hi - lo));
      if (s.b) v = mul_f(v, load_part<T>(s.b, lo, int(hi - lo)));
      if (lo > t) {  // the row begins inside these 16
        float part[16], moved[16] = {};
        store_f32(part, v);
        std::memcpy(moved + (lo - t), part, size_t(hi - lo) * 4);
        v = load_f32(moved);
      }
    }
    store_f32(dst + i, v);
  }
}
void gather_source(const Source& s, int64_t n, int64_t count, float* dst) {
  switch (s.dtype) {
    case DType::f32: return gather_as<DType::f32>(s, n, count, dst);
    case DType::bf16: return gather_as<DType::bf16>(s, n, count, dst);
    case DType::f16: return gather_as<DType::f16>(s, n, count, dst);
  }
}

// Sink of results n .. n + count, of which src holds fp32 values.
template <DType T> EFFK_INLINE void put(const Sink& s, int64_t t, int count, vf v) {
  const bool whole = count == 16;
  const auto get = [&](const void* p) { return whole ? load_as<T>(p, t) : load_part<T>(p, t, count); };
  const auto set = [&](void* p, vf x) { whole ? store_as<T>(p, t, x) : store_part<T>(p, t, count, x); };
  if (s.a) {
    vf w = get(s.a);
    if (s.b) w = mul_f(w, get(s.b));
    v = fma(set_f(s.skip), w, v);
  }
  if (s.add) v = add_f(v, get(s.y));
  set(s.y, s.gate ? mul_f(v, get(s.gate)) : v);
  if (s.y2) set(s.y2, s.gate2 ? mul_f(v, get(s.gate2)) : v);
}
template <DType T> void scatter_as(const Sink& s, int64_t n, int64_t count, const float* src) {
  int64_t t = n + s.shift, end = t + count;
  if (t < s.begin) { src += s.begin - t; t = s.begin; }
  if (end > s.end) end = s.end;
  for (; t + 16 <= end; t += 16, src += 16) put<T>(s, t, 16, load_f32(src));
  if (t < end) put<T>(s, t, int(end - t), load_f32_part(src, int(end - t)));
}
void scatter_sink(const Sink& s, int64_t n, int64_t count, const float* src) {
  switch (s.dtype) {
    case DType::f32: return scatter_as<DType::f32>(s, n, count, src);
    case DType::bf16: return scatter_as<DType::bf16>(s, n, count, src);
    case DType::f16: return scatter_as<DType::f16>(s, n, count, src);
  }
}

// Strips that need no copy: fp32 as it lies in memory, perhaps with a gate.
EFFK_INLINE bool plain(const Source& s, int64_t points) {
  return s.dtype == DType::f32 && s.origin >= 0 && s.origin + points <= s.length;
}
EFFK_INLINE bool plain(const Sink& s, int64_t n, int64_t points) {
  return s.dtype == DType::f32 && !s.y2 && !s.a && !s.add && n + s.shift >= s.begin && n + s.shift + points <= s.end;
}

}  // namespace
}  // namespace effk::EFFK_TIER
