// The prepared filter of fftconv on the CPU: one fp32 buffer, the same for every tier. Version 1.
//
//   floats [0, 64)                    header, small integers stored as floats (exact below 2^24): struct Header, in order
//   then per channel, `stride` floats: the taps padded with zeros to a multiple of 16 (direct, overlap-save), then their
//   transform, 2 * points floats, scaled by 1 / points (fft, overlap-save)
//
// The transform of `points` = M complex points is the right-angle one: with w = exp(-i pi / 2M),
//   z[n] = (k[n] - i k[n + M]) w^n,   Z[f] = sum_n z[n] exp(-2 pi i n f / M)      n, f < M
// which turns pointwise products into products of real polynomials of 2 M coefficients modulo x^2M + 1. M = r_1 r_2 ... r_p 16
// (factors(), below). The result stays where the decimation leaves it: frequency f = k_1 + r_1 k_2 + r_1 r_2 k_3 + ... lies in
// row R = (k_1, ..., k_p) row-major, at place j = k_(p+1) < 16. 16 rows make a block of 256 points:
//   float index = ((R / 16) * 16 + j) * 32 + R % 16    real part;    + 16    imaginary part
// Why blocks: a kernel transposes 16 x 16 values to run the last 16 points of 16 rows side by side, and meets the spectrum
// there with plain loads.
#pragma once
#include <cstdint>
#include <initializer_list>

namespace effk::spectrum {

constexpr int kVersion = 1;
constexpr int kHeaderFloats = 64;
constexpr int kMagic = 0x46535;       // "FFS" in spirit; below 2^24
constexpr int kPlanCpu = 1, kPlanCuda = 2;
constexpr int kLane = 16;             // last factor
constexpr int kBlockPoints = 256;
constexpr int64_t kMinPoints = 256, kMaxPoints = int64_t(1) << 23;  // n_fft = 2 * points, to 2^24
constexpr int kMaxLevels = 8;

enum class Mode : int32_t { causal = 0, circular = 1, bidirectional = 2 };
enum class Scheme : int32_t { automatic = 0, fft = 1, overlap_save = 2, direct = 3 };

// What the buffer says of itself, each number in one float.
struct Header {
  int magic, version, plan;
  int64_t n_fft;
  Mode mode;
  Scheme scheme;                      // never automatic
  int64_t channels, taps, points;     // points: 0 when direct
  int64_t stride;                     // floats per channel
  int64_t coef_at() const { return scheme == Scheme::fft ? 0 : (taps + 15) / 16 * 16; }  // start of the transform in them
};

static inline void write_header(const Header& h, float* to) {
  for (int i = 0; i < kHeaderFloats; ++i) to[i] = 0.0f;
  const int64_t values[] = {h.magic, h.version, h.plan, h.n_fft, int64_t(h.mode), int64_t(h.scheme),
                            h.channels, h.taps, h.points, h.stride};
  for (int i = 0; i < 10; ++i) to[i] = float(values[i]);
}
static inline Header read_header(const float* from) {
  const auto at = [&](int i) { return int64_t(from[i]); };
  return {int(at(0)), int(at(1)), int(at(2)), at(3), Mode(at(4)), Scheme(at(5)), at(6), at(7), at(8), at(9)};
}

// M = 2^a, 3 * 2^a or 5 * 2^a, where the power of two is at least 256: whole blocks.
static inline bool valid_points(int64_t m) {
  if (m < kMinPoints || m > kMaxPoints) return false;
  int64_t odd = m;
  while (odd % 2 == 0) odd /= 2;
  return (odd == 1 || odd == 3 || odd == 5) && m / odd >= kMinPoints;
}
static inline int64_t smallest_points(int64_t at_least) {
  int64_t best = kMaxPoints * 2;
  for (int64_t odd : {1, 3, 5}) {
    int64_t m = odd * kMinPoints;
    while (m < at_least) m *= 2;
    if (m < best) best = m;
  }
  return best;
}

// The radices r_1 .. r_p with r_1 ... r_p * 16 = m; returns p. Part of the format: it fixes the order of frequencies.
// Eights and at most two fours: a radix-8 step lives in 16 vector registers, a radix-16 step does not in 32 (3.6 times as
// slow on Zen 5 with g++ 12). An odd factor comes first.
static inline int factors(int64_t m, int* radix) {
  int count = 0, log = 0;
  int64_t rest = m / kLane;
  for (int odd : {3, 5})
    if (rest % odd == 0) { radix[count++] = odd; rest /= odd; }
  while (rest > 1) { rest /= 2; ++log; }
  const int fours = log % 3 == 0 ? 0 : log % 3 == 1 ? 2 : 1;
  for (int i = 0; i < (log - 2 * fours) / 3; ++i) radix[count++] = 8;
  for (int i = 0; i < fours; ++i) radix[count++] = 4;
  return count;
}

}  // namespace effk::spectrum
