// The phases of one right-angle convolution, for every tier alike. Included by the tier files after their vector header.
//
// Roofline, per result of a causal row (M complex points for M results): 2 (4 log2 M - 6) + 6 flops in the split-radix
// count, 8 bytes of input and output and, once per channel, 8 bytes of spectrum. With the row in the first-level cache the
// bound is arithmetic: 74 flops at M = 1024.
#pragma once
#include <cstring>

#include "ops/fftconv/stages.h"

#include "ops/fftconv/io.h"
#include "simd/fir.h"

namespace effk::EFFK_TIER {
namespace {

constexpr int64_t kStrip = 128;     // columns converted or gated at a time: 8 rows of them are 4 KiB
constexpr int64_t kHeadStrip = 64;  // columns that two levels share: 64 rows of them are 32 KiB

// Where column c of the first level lies in a row of the work buffer, which has gaps when the head is two levels.
EFFK_INLINE int64_t place(const Plan& p, int64_t c) {
  if (p.head == 1) return c;
  const int64_t row = p.columns();
  return c / row * p.level[1].row + c % row;
}

template <int R> void first_level(const Plan& p, const Source& s, float* work, int64_t c0, int64_t c1, const Ahead& ahead) {
  const Level& l = p.level[0];
  const int64_t row = l.size / R;
  const bool complex = s.origin + p.points < s.length;
  const auto columns = [&](In in, const float* re, const float* im, int64_t in_row, int64_t c, int64_t count) {
    float* x = work + place(p, c) * 2;
    const int64_t v0 = c / 16, vecs = count / 16;
    if (l.table) {
      if (in == In::complex) first_columns<R, false, In::complex>(l, p.weight, re, im, in_row, x, v0, vecs, ahead);
      else if (in == In::gated) first_columns<R, false, In::gated>(l, p.weight, re, im, in_row, x, v0, vecs, ahead);
      else first_columns<R, false, In::real>(l, p.weight, re, im, in_row, x, v0, vecs, ahead);
    } else {
      if (in == In::complex) first_columns<R, true, In::complex>(l, p.weight, re, im, in_row, x, v0, vecs, ahead);
      else if (in == In::gated) first_columns<R, true, In::gated>(l, p.weight, re, im, in_row, x, v0, vecs, ahead);
      else first_columns<R, true, In::real>(l, p.weight, re, im, in_row, x, v0, vecs, ahead);
    }
  };
  if (plain(s, complex ? 2 * p.points : p.points) && !(complex && s.b)) {
    const float* re = static_cast<const float*>(s.a) + s.origin + c0;
    if (complex) return columns(In::complex, re, re + p.points, row, c0, c1 - c0);
    return columns(s.b ? In::gated : In::real, re, s.b ? static_cast<const float*>(s.b) + s.origin + c0 : nullptr, row, c0, c1 - c0);
  }
  alignas(64) float re[R * kStrip], im[R * kStrip];
  for (int64_t c = c0; c < c1; c += kStrip) {
    const int64_t count = c1 - c < kStrip ? c1 - c : kStrip;
    for (int a = 0; a < R; ++a) gather_source(s, s.origin + a * row + c, count, re + a * kStrip);
    if (complex)
      for (int a = 0; a < R; ++a) gather_source(s, s.origin + p.points + a * row + c, count, im + a * kStrip);
    columns(complex ? In::complex : In::real, re, im, kStrip, c, count);
  }
}

template <int R> void last_level(const Plan& p, const float* work, const Sink& s, int64_t c0, int64_t c1, const Ahead& ahead) {
  const Level& l = p.level[0];
  const int64_t row = l.size / R;
  const bool re_wanted = s.shift < s.end && s.shift + p.points > s.begin;
  const bool im_wanted = s.shift + p.points < s.end && s.shift + 2 * p.points > s.begin;
  const auto columns = [&](Out out, float* re, float* im, int64_t out_row, int64_t c, int64_t count) {
    const float* x = work + place(p, c) * 2;
    const int64_t v0 = c / 16, vecs = count / 16;
    if (l.table) {
      if (out == Out::re) last_columns<R, false, Out::re>(l, p.weight, x, re, im, out_row, v0, vecs, ahead);
      else if (out == Out::gated) last_columns<R, false, Out::gated>(l, p.weight, x, re, im, out_row, v0, vecs, ahead);
      else if (out == Out::im) last_columns<R, false, Out::im>(l, p.weight, x, re, im, out_row, v0, vecs, ahead);
      else last_columns<R, false, Out::both>(l, p.weight, x, re, im, out_row, v0, vecs, ahead);
    } else {
      if (out == Out::re) last_columns<R, true, Out::re>(l, p.weight, x, re, im, out_row, v0, vecs, ahead);
      else if (out == Out::gated) last_columns<R, true, Out::gated>(l, p.weight, x, re, im, out_row, v0, vecs, ahead);
      else if (out == Out::im) last_columns<R, true, Out::im>(l, p.weight, x, re, im, out_row, v0, vecs, ahead);
      else last_columns<R, true, Out::both>(l, p.weight, x, re, im, out_row, v0, vecs, ahead);
    }
  };
  if (!re_wanted && !im_wanted) return;
  const Out out = re_wanted ? im_wanted ? Out::both : Out::re : Out::im;
  if (plain(s, out == Out::im ? p.points : 0, p.points * (out == Out::both ? 2 : 1)) && !(out != Out::re && s.gate)) {
    float* y = static_cast<float*>(s.y) + s.shift + c0;
    if (s.gate)  // read only
      return columns(Out::gated, y, const_cast<float*>(static_cast<const float*>(s.gate)) + s.shift + c0, row, c0, c1 - c0);
    return columns(out, y, y + p.points, row, c0, c1 - c0);
  }
  alignas(64) float re[R * kStrip], im[R * kStrip];
  for (int64_t c = c0; c < c1; c += kStrip) {
    const int64_t count = c1 - c < kStrip ? c1 - c : kStrip;
    columns(out, re, im, kStrip, c, count);
    if (re_wanted)
      for (int a = 0; a < R; ++a) scatter_sink(s, a * row + c, count, re + a * kStrip);
    if (im_wanted)
      for (int a = 0; a < R; ++a) scatter_sink(s, p.points + a * row + c, count, im + a * kStrip);
  }
}

void first_level(const Plan& p, const Source& s, float* work, int64_t c0, int64_t c1, const Ahead& ahead) {
  switch (p.level[0].radix) {
    case 3: return first_level<3>(p, s, work, c0, c1, ahead);
    case 4: return first_level<4>(p, s, work, c0, c1, ahead);
    case 5: return first_level<5>(p, s, work, c0, c1, ahead);
    case 8: return first_level<8>(p, s, work, c0, c1, ahead);
  }
}
void last_level(const Plan& p, const float* work, const Sink& s, int64_t c0, int64_t c1, const Ahead& ahead) {
  switch (p.level[0].radix) {
    case 3: return last_level<3>(p, work, s, c0, c1, ahead);
    case 4: return last_level<4>(p, work, s, c0, c1, ahead);
    case 5: return last_level<5>(p, work, s, c0, c1, ahead);
    case 8: return last_level<8>(p, work, s, c0, c1, ahead);
  }
}

template <bool Inv> void second_level(const Plan& p, float* work, int64_t c0, int64_t c1) {
  const Level& l = p.level[1];
  for (int k = 0; k < p.level[0].radix; ++k) {
    float* x = work + k * p.level[0].row * 2;
    if (l.radix == 8) {
      if (l.table) pass_columns<8, Inv, false, false>(l, x, c0 / 16, c1 / 16);
      else pass_columns<8, Inv, true, false>(l, x, c0 / 16, c1 / 16);
    } else {
      if (l.table) pass_columns<4, Inv, false, false>(l, x, c0 / 16, c1 / 16);
      else pass_columns<4, Inv, true, false>(l, x, c0 / 16, c1 / 16);
    }
  }
}

void first(const Plan& p, const Source& s, float* work, int64_t c0, int64_t c1, const Ahead& ahead) {
  if (p.head == 1) return first_level(p, s, work, c0, c1, ahead);
  const int64_t row = p.columns();
  for (int64_t c = c0; c < c1; c += kHeadStrip) {
    const int64_t end = c + kHeadStrip < c1 ? c + kHeadStrip : c1;
    for (int a = 0; a < p.level[1].radix; ++a) first_level(p, s, work, a * row + c, a * row + end, ahead);
    second_level<false>(p, work, c, end);
  }
}

void last(const Plan& p, float* work, const Sink& s, int64_t c0, int64_t c1, const Ahead& ahead) {
  if (p.head == 1) return last_level(p, work, s, c0, c1, ahead);
  const int64_t row = p.columns();
  for (int64_t c = c0; c < c1; c += kHeadStrip) {
    const int64_t end = c + kHeadStrip < c1 ? c + kHeadStrip : c1;
    second_level<true>(p, work, c, end);
    for (int a = 0; a < p.level[1].radix; ++a) last_level(p, work, s, a * row + c, a * row + end, ahead);
  }
}

template <class Middle> void middle(const Plan& p, float* work, int64_t b0, int64_t b1, const Middle& m) {
  for (int64_t b = b0; b < b1; ++b) inner(p, p.head, p.block, work + p.block_start(b) * 2, (b - b0) * p.block, m);
}

void multiply(const Plan& p, float* work, const float* coef, bool conjugate, int64_t b0, int64_t b1, const Ahead& ahead) {
  if (conjugate) middle(p, work, b0, b1, Multiply<true>{coef, ahead});
  else middle(p, work, b0, b1, Multiply<false>{coef, ahead});
}
void to_spectrum(const Plan& p, float* work, float* spec, float scale, int64_t b0, int64_t b1) {
  middle(p, work, b0, b1, ToSpectrum{spec, scale});
}
void from_spectrum(const Plan& p, float* work, const float* spec, int64_t b0, int64_t b1) {
  middle(p, work, b0, b1, FromSpectrum<Other::none>{spec, nullptr});
}
void multiply_pair(const Plan& p, float* g, float* v, const float* coef, float* sum, float scale, int64_t b0, int64_t b1) {
  if (sum && coef) middle(p, g, b0, b1, Pair<true, true>{v - g, coef, sum, scale});
  else if (sum) middle(p, g, b0, b1, Pair<true, false>{v - g, coef, sum, scale});
  else if (coef) middle(p, g, b0, b1, Pair<false, true>{v - g, coef, sum, scale});
  else middle(p, g, b0, b1, Pair<false, false>{v - g, coef, sum, scale});
}

void scatter(const Sink& s, int64_t n, int64_t count, const float* src) {
  scatter_sink(s, n, count, src);
}
void gather(const Source& s, int64_t n, int64_t count, float* dst) { gather_source(s, n, count, dst); }

}  // namespace
}  // namespace effk::EFFK_TIER
