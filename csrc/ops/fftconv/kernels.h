// What the driver asks of a tier: transforms of one row, cut into three phases so that threads can share a long one.
#pragma once
#include <cstdint>

#include "formats/spectrum.h"
#include "isa/isa.h"
#include "ops/fftconv/fftconv.h"

namespace effk::fft {

// One decimation step of a block of `size` points, seen as `radix` rows of size / radix points.
struct Level {
  int radix;
  int64_t size;
  int64_t row;                 // points between the starts of two rows, in the work buffer
  // Twiddles exp(-2 pi i (k + shift) c / size), shift 1/4 at the first level; tables hold [c / 16][k][re 16, im 16], k from
  // 0 at the first level and from 1 below it. Where that would not stay in cache, base[c / 16][k][re, im] times
  // lane[k][re 16, im 16].
  const float* table;
  const float* base;
  const float* lane;
};

// Tables of one transform size; made once by the driver, read-only afterwards.
struct Plan {
  int64_t points;
  int levels;
  int head;                    // levels that the first and last phase run together on strips of columns: 1 or 2
  int64_t blocks, block;       // what is left to the middle phase: blocks of `block` points, 1 block in short transforms
  Level level[spectrum::kMaxLevels];
  int64_t block_start(int64_t b) const {  // in the work buffer, in points
    if (blocks == 1) return 0;
    return head == 1 ? b * level[0].row : b / level[1].radix * level[0].row + b % level[1].radix * level[1].row;
  }
  int64_t columns() const { return level[head - 1].size / level[head - 1].radix; }
  const float* weight;         // [radix of level 0][cos, sin]: exp(-i pi a / 2 radix)
  int64_t work_points;         // of the work buffer
};

// The real sequence that enters: v(n) = a[n] * b[n], zero outside [0, length).
struct Source {
  const void* a;
  const void* b;               // gate or null
  DType dtype;
  int64_t length;
  int64_t origin;              // point 0 of the transform is v(origin); may be negative
};

// Where result n goes: index t = n + shift, kept for begin <= t < end:
//   value = result [+ skip * a[t] * b[t]];  y[t] = value * gate[t];  y2[t] = value * gate2[t]
struct Sink {
  void* y;
  const void* gate;            // or null: 1
  void* y2;                    // or null
  const void* gate2;
  const void* a;               // of the skip term, or null
  const void* b;
  float skip;
  DType dtype;                 // of everything above
  int64_t shift, begin, end;
  bool add;                    // fp32 only: y[t] += value
};

// Rows that the next item will touch, fetched into the second-level cache while this one computes. Spread evenly over all
// phases: memory is then read at the rate at which it is used, and not in bursts that stall on the fill buffers.
struct Ahead {
  // Of the lines of every row: step i of a phase (16 columns, or a quarter of a block) fetches [at + i rate, at + (i + 1) rate), in
  // 1/65536 of a line.
  struct Share { int64_t at, rate; };
  const char* row[9];
  int rows;
  Share first, middle, last;

  void add(const void* p) { if (p) row[rows++] = static_cast<const char*>(p); }
};

struct Kernel {
  isa::Tier tier;
  const char* name;
  // Columns [c0, c1) of Plan::columns(), multiples of 16: source -> work.
  void (*first)(const Plan&, const Source&, float* work, int64_t c0, int64_t c1, const Ahead&);
  // Blocks [b0, b1) of Plan::blocks, in place: multiplied by the spectrum of one channel or its conjugate.
  void (*multiply)(const Plan&, float* work, const float* coef, bool conjugate, int64_t b0, int64_t b1,
                   const Ahead&);
  // Coefficients, here and below: those of block b0 first. The two halves of that: work -> spectrum, scaled (work is spent);
  // spectrum -> work.
  void (*to_spectrum)(const Plan&, float* work, float* spec, float scale, int64_t b0, int64_t b1);
  void (*from_spectrum)(const Plan&, float* work, const float* spec, int64_t b0, int64_t b1);
  // The backward pass, in two work buffers at once: with G and V their spectra, sum += scale G conj(V), or without `sum` that
  // product's inverse into v; with `coef` the inverse of G conj(coef) into g.
  void (*multiply_pair)(const Plan&, float* g, float* v, const float* coef, float* sum, float scale, int64_t b0, int64_t b1);
  // Columns again: work -> sink; real parts are results [0, M), minus the imaginary parts results [M, 2 M).
  void (*last)(const Plan&, float* work, const Sink&, int64_t c0, int64_t c1, const Ahead&);
  // dst[i] = v(n + i), count a multiple of 16; and results n .. n + count from src to the sink.
  void (*gather)(const Source&, int64_t n, int64_t count, float* dst);
  void (*scatter)(const Sink&, int64_t n, int64_t count, const float* src);
  // Short filters, simd/fir.h.
  void (*fir)(const float* x, const float* taps, int64_t k, float* y, int64_t count);
  void (*fir_tile)(const float* x, const float* taps, int64_t tile, float* y);
};

EFFK_EXPORT extern const Kernel* const kKernels[];  // highest tier first
EFFK_EXPORT extern const int kKernelCount;

}  // namespace effk::fft
