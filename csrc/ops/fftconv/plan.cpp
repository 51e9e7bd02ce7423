// Twiddle tables and the choice of scheme. Phases are computed in double precision from exact integer arguments.
#include "ops/fftconv/plan.h"

#include <cmath>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

namespace effk::fft {
namespace {

constexpr int64_t kTablePoints = 2048;   // a full table up to here (16 KiB): larger ones push the row out of the first-level cache
constexpr int64_t kHeadPoints = 65536;   // from here two levels share one sweep over memory
constexpr int64_t kNearPoints = 4096;    // up to here the middle phase is one block, level by level
constexpr int64_t kPad = 16;             // points between rows that would share cache sets: two lines

constexpr double kPi = 3.14159265358979323846;

struct Tables {
  Plan plan{};
  std::vector<std::vector<float>> storage;

  float* room(size_t floats) {
    storage.emplace_back(floats + 16);
    float* p = storage.back().data();
    return p + (64 - reinterpret_cast<uintptr_t>(p) % 64) % 64 / 4;
  }
};

// exp(-2 pi i (k + quarter / 4) c / size)
void phase(int64_t k, bool quarter, int64_t c, int64_t size, float* re, float* im) {
  const int64_t turns = (4 * k + (quarter ? 1 : 0)) * c % (4 * size);
  const double angle = -2.0 * kPi * double(turns) / double(4 * size);
  *re = float(std::cos(angle));
  *im = float(std::sin(angle));
}

void fill(Tables& t, Level& l, bool first) {
  const int64_t columns = l.size / l.radix;
  const int from = first ? 0 : 1, rows = l.radix - from;
  if (l.size <= kTablePoints) {
    float* table = t.room(size_t(columns) * rows * 2);
    for (int64_t c = 0; c < columns; ++c)
      for (int k = 0; k < rows; ++k) {
        float* at = table + (c / 16 * rows + k) * 32 + c % 16;
        phase(k + from, first, c, l.size, at, at + 16);
      }
    l.table = table;
    return;
  }
  float* base = t.room(size_t(columns / 16) * rows * 2);
  float* lane = t.room(size_t(rows) * 32);
  for (int k = 0; k < rows; ++k) {
    for (int64_t v = 0; v < columns / 16; ++v) {
      float* at = base + (v * rows + k) * 2;
      phase(k + from, first, v * 16, l.size, at, at + 1);
    }
    for (int c = 0; c < 16; ++c) phase(k + from, first, c, l.size, lane + k * 32 + c, lane + k * 32 + 16 + c);
  }
  l.base = base;
  l.lane = lane;
}

std::unique_ptr<Tables> make(int64_t m) {
  auto t = std::make_unique<Tables>();
  Plan& p = t->plan;
  int radix[spectrum::kMaxLevels];
  p.points = m;
  p.levels = spectrum::factors(m, radix);
  p.head = m >= kHeadPoints && p.levels > 2 ? 2 : 1;
  int64_t size = m;
  for (int i = 0; i < p.levels; ++i) {
    p.level[i].radix = radix[i];
    p.level[i].size = size;
    size /= radix[i];
    p.level[i].row = size;
    fill(*t, p.level[i], i == 0);
  }
  p.blocks = 1;
  p.block = m;
  p.work_points = m;
  if (p.head == 2) {
    p.level[1].row += kPad;
    p.level[0].row = p.level[1].row * radix[1] + kPad;
    p.blocks = radix[0] * radix[1];
    p.block = m / p.blocks;
    p.work_points = p.level[0].row * radix[0];
  } else if (m > kNearPoints) {
    p.level[0].row += kPad;
    p.blocks = radix[0];
    p.block = m / p.blocks;
    p.work_points = p.level[0].row * radix[0];
  }
  float* weight = t->room(size_t(radix[0]) * 2);
  for (int a = 0; a < radix[0]; ++a) phase(a, false, 1, 4 * radix[0], weight + 2 * a, weight + 2 * a + 1);
  p.weight = weight;
  return t;
}

}  // namespace

const Plan* plan_of(int64_t m) {
  static std::mutex mutex;
  static auto& plans = *new std::map<int64_t, std::unique_ptr<Tables>>();  // never destroyed: threads may outlive main
  const std::lock_guard<std::mutex> hold(mutex);
  auto found = plans.find(m);
  if (found == plans.end()) found = plans.emplace(m, make(m)).first;
  return &found->second->plan;
}

namespace {

// Flops a result: the split-radix count of both transforms and the product, over the results kept for each point, with what the measured rate loses once a transform leaves the first- and second-level caches (Zen 5).
double cost(int64_t points, double kept) {
  double log = 0;
  for (int64_t m = points; m > 1; m /= 2) ++log;
  const double memory = points <= 4096 ? 1.0 : points <= 16384 ? 1.1 : 1.7;
  return (8 * log + 10) * memory / kept;
}
constexpr double kFirFlops = 2.0;      // a tap; runs at about the rate of the transform: loads bound it
constexpr double kSaveOverhead = 1.1;  // of copying at the borders of blocks

}  // namespace

Choice choose(int64_t taps, int64_t n_fft, spectrum::Mode mode, spectrum::Scheme scheme) {
  using spectrum::Mode;
  using spectrum::Scheme;
  const int64_t full = spectrum::smallest_points(mode == Mode::circular ? n_fft : (n_fft + 1) / 2);
  const int64_t fits = full <= spectrum::kMaxPoints ? full : 0;
  if (mode != Mode::causal || scheme == Scheme::fft) return {Scheme::fft, fits};
  if (scheme == Scheme::direct) return {scheme, 0};
  const int64_t length = n_fft - taps + 1;
  double best = 0;
  int64_t block = 0;
  for (int64_t m = 512; m <= spectrum::kMaxPoints && m <= 65536; m *= 2) {
    if (m < taps) continue;
    const double c = cost(m, double(2 * m - taps + 1) / double(m)) * kSaveOverhead;
    if (block == 0 || c < best) { best = c; block = m; }
  }
  if (scheme == Scheme::overlap_save) return {scheme, block ? block : fits};
  const double whole = cost(fits, double(length) / double(fits));
  if (fits == 0) return {Scheme::fft, 0};
  const double direct = kFirFlops * double(taps);
  if (direct <= whole && (block == 0 || direct <= best)) return {Scheme::direct, 0};
  if (block && block < fits && best < whole) return {Scheme::overlap_save, block};
  return {Scheme::fft, fits};
}

std::string describe(int64_t taps, int64_t n_fft, spectrum::Mode mode, spectrum::Scheme scheme) {
  const Choice c = choose(taps, n_fft, mode, scheme);
  if (c.scheme == spectrum::Scheme::direct) return "direct: " + std::to_string(taps) + " taps";
  if (c.points == 0) return "none: no transform of that size";
  const Plan& p = *plan_of(c.points);
  std::string text = c.scheme == spectrum::Scheme::fft ? "fft" : "overlap_save, blocks of " + std::to_string(2 * c.points);
  text += ": " + std::to_string(c.points) + " complex points = ";
  for (int i = 0; i < p.levels; ++i) text += std::to_string(p.level[i].radix) + " x ";
  text += std::to_string(spectrum::kLane);
  if (p.blocks == 1) return text + ", one block";
  return text + ", " + std::to_string(p.blocks) + " blocks of " + std::to_string(p.block) + (p.head == 2 ? ", two levels a sweep" : "");
}

}  // namespace effk::fft
