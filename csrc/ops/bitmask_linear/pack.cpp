// Packing, unpacking and checking. Compiled with baseline flags; bound by memory or done once.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/half.h"
#include "ops/bitmask_linear/bitmask_linear.h"

namespace effk::bitmask {
namespace {

float weight_at(const PackArgs& a, int64_t i) {
  if (a.dtype == DType::f32) return static_cast<const float*>(a.w)[i];
  const uint16_t h = static_cast<const uint16_t*>(a.w)[i];
  return a.dtype == DType::bf16 ? bf16_to_float(h) : f16_to_float(h);
}
int64_t grain_of(int64_t k) { return std::max<int64_t>(1, (64 << 10) / (k * kRows)); }

// Weight i as it is stored, and whether it is.
union Stored { float f; uint16_t h; int8_t b; };
bool stored(const PackArgs& a, const float* scale, int64_t row, int64_t c, Stored* out) {
  const int64_t i = row * a.k + c;
  if (a.keep && !a.keep[i]) return false;
  if (a.codes) return out->b = static_cast<const int8_t*>(a.w)[i], out->b != 0;
  const float v = weight_at(a, i);
  switch (a.type) {
    case Values::f32: return out->f = v, a.keep || v != 0.0f;
    case Values::bf16: return out->h = float_to_bf16(v), a.keep || (out->h & 0x7fff) != 0;
    case Values::i8: break;
  }
  const float by = scale[row * groups(a.k, a.group) + (a.group ? c / a.group : 0)];
  return out->b = int8_t(std::min(127.0f, std::max(-127.0f, std::nearbyint(v / by)))), out->b != 0;
}

}  // namespace

void count(const PackArgs& a, float* scale, uint64_t* masks, int64_t* ptr, const ParallelFor& pf) {
  const int64_t all = panels(a.n), width = blocks(a.k), scales = groups(a.k, a.group), span = a.group ? a.group : a.k;
  std::memset(masks, 0, size_t(all * width * kRows) * 8);
  parallel_for(pf, all, grain_of(a.k), [&](int64_t p0, int64_t p1) {
    for (int64_t p = p0; p < p1; ++p) {
      int64_t kept = 0;
      for (int64_t row = p * kRows; row < std::min(a.n, (p + 1) * kRows); ++row) {
        for (int64_t g = 0; a.type == Values::i8 && !a.codes && g < scales; ++g) {
          float most = 0;
          for (int64_t c = g * span; c < std::min(a.k, (g + 1) * span); ++c)
            if (!a.keep || a.keep[row * a.k + c]) most = std::max(most, std::fabs(weight_at(a, row * a.k + c)));
          const float s = most / 127.0f;
          scale[row * scales + g] = s == 0.0f ? 1.0f : s;
        }
        Stored value;
        for (int64_t c = 0; c < a.k; ++c) {
          if (!stored(a, scale, row, c, &value)) continue;
          masks[word(width, row, c / kBlock)] |= uint64_t(1) << (c % kBlock);
          ++kept;
        }
      }
      ptr[p + 1] = kept;
    }
  });
  ptr[0] = 0;
  for (int64_t p = 0; p < all; ++p) ptr[p + 1] += ptr[p];
}

void fill(const PackArgs& a, const float* scale, const uint64_t* masks, const int64_t* ptr, uint8_t* values, int32_t* row_sum, const ParallelFor& pf) {
  const int64_t all = panels(a.n), width = blocks(a.k), scales = groups(a.k, a.group), span = a.group ? a.group : blocks(a.k) * kBlock;
  const size_t size = size_t(bytes_of(a.type));
  if (row_sum) std::memset(row_sum, 0, size_t(a.n * scales) * 4);
  std::memset(values + ptr[all] * int64_t(size), 0, kTailBytes);
  parallel_for(pf, all, grain_of(a.k), [&](int64_t p0, int64_t p1) {
    for (int64_t p = p0; p < p1; ++p) {
      uint8_t* to = values + ptr[p] * int64_t(size);
      for (int64_t b = 0; b < width; ++b)
        for (int64_t row = p * kRows; row < std::min(a.n, (p + 1) * kRows); ++row)
          for (uint64_t left = masks[word(width, row, b)]; left; left &= left - 1) {
            const int64_t c = b * kBlock + __builtin_ctzll(left);
            Stored value;
            stored(a, scale, row, c, &value);
            if (row_sum) row_sum[row * scales + c / span] += value.b;
            std::memcpy(to, &value, size);
            to += size;
          }
    }
  });
}

void unpack(const Weight& w, uint8_t* to, const ParallelFor& pf) {
  const int64_t width = blocks(w.k), span = w.group ? w.group : width * kBlock, scales = groups(w.k, w.group);
  const int64_t size = w.scale ? 4 : bytes_of(w.type);
  parallel_for(pf, panels(w.n), grain_of(w.k), [&](int64_t p0, int64_t p1) {
    for (int64_t p = p0; p < p1; ++p) {
      const uint8_t* at = w.values + w.ptr[p] * bytes_of(w.type);
      const int64_t last = std::min(w.n, (p + 1) * kRows);
      std::memset(to + p * kRows * w.k * size, 0, size_t((last - p * kRows) * w.k * size));
      for (int64_t b = 0; b < width; ++b)
        for (int64_t row = p * kRows; row < last; ++row)
          for (uint64_t left = w.masks[word(width, row, b)]; left; left &= left - 1) {
            const int64_t c = b * kBlock + __builtin_ctzll(left);
            uint8_t* place = to + (row * w.k + c) * size;
            if (w.scale) {
              const float v = float(static_cast<int8_t>(*at)) * w.scale[row * scales + c / span];
              std::memcpy(place, &v, 4);
            } else {
              std::memcpy(place, at, size_t(size));
            }
            at += bytes_of(w.type);
          }
    }
  });
}

const char* validate(const Weight& w, int64_t stored, int64_t* at) {
  const int64_t all = panels(w.n), width = blocks(w.k);
  *at = 0;
  if (w.ptr[0] != 0) return "ptr: expected 0 first";
  const uint64_t last = w.k % kBlock ? (uint64_t(1) << (w.k % kBlock)) - 1 : ~uint64_t(0);
  for (int64_t p = 0; p < all; ++p) {
    *at = p;
    int64_t kept = 0;
    for (int64_t b = 0; b < width; ++b)
      for (int64_t r = 0; r < kRows; ++r) {
        const uint64_t mask = w.masks[(p * width + b) * kRows + r];
        if (p * kRows + r >= w.n && mask) return "masks: expected no bits in rows beyond n";
        if (b == width - 1 && (mask & ~last)) return "masks: expected no bits beyond column k";
        kept += __builtin_popcountll(mask);
      }
    // Bounded before the difference: numbers from a file may overflow it.
    if (w.ptr[p] < 0 || w.ptr[p + 1] < w.ptr[p] || w.ptr[p + 1] > stored) return "ptr: expected numbers that ascend up to that of the values";
    if (w.ptr[p + 1] - w.ptr[p] != kept) return "masks: expected as many bits as the panel has values";
  }
  if (w.ptr[all] != stored) return "values: expected as many as ptr ends with, and 64 bytes behind them";
  return nullptr;
}

}  // namespace effk::bitmask
