// Contract of fftconv: depthwise convolution of rows u[b, h, :] with filters k[h, :].
//
//   v = u * pregate,   c = v (*) k,   y = (c + skip[h] v) * postgate          gates and skip each optional
//   causal:        c[t] = sum_{j=0}^{min(t, K-1)} k[j] v[t-j]                              n_fft >= L + K - 1
//   circular:      c[t] = sum_{j<K} k[j] v[(t-j) mod L]                                    n_fft = L >= K
//   bidirectional: c[t] = sum_{j=-n_fft/2}^{n_fft/2-1} k[j mod n_fft] v[t-j], v = 0 outside   n_fft = K >= 2 L
//
// The filter is prepared once (formats/spectrum.h). All arithmetic is fp32 whatever the storage type, and no two rows share a
// transform: a row's result depends neither on the other rows nor on the number of threads, and large rows do not leak
// into small ones. Causal and bidirectional convolutions need only the product modulo x^n + 1, because nothing wraps;
// circular ones fold a product of twice the length.
// Nothing here checks arguments or throws; buffers need no alignment. B, H, L >= 0.
#pragma once
#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "common/export.h"
#include "common/parallel.h"
#include "formats/spectrum.h"

namespace effk {

struct FftConvArgs {
  const float* spec;          // header and coefficients
  const void* u;              // [b, h, l], dense
  const void* pregate;        // of the shape and type of u, or null
  const void* postgate;
  const float* skip;          // [h] or null
  DType dtype;                // of u, the gates and y
  int64_t b, h, l;
  void* y;
};

struct FftConvBackwardArgs {
  FftConvArgs forward;        // y unused
  const void* gy;
  int64_t k_len;
  void *gu, *gpre, *gpost;    // of u's type, or null
  float *gk, *gskip;          // [h, k_len], [h], or null
};

// Floats of the prepared filter, or 0 when there is no transform of that size.
EFFK_EXPORT size_t fftconv_spec_floats(int64_t h, int64_t taps, int64_t n_fft, spectrum::Mode mode, spectrum::Scheme scheme);
void fftconv_prepare(const float* k, int64_t h, int64_t taps, int64_t n_fft, spectrum::Mode mode, spectrum::Scheme scheme, float* spec,
                     void* workspace, const ParallelFor&);
size_t fftconv_prepare_workspace(int64_t h, int64_t taps, int64_t n_fft, spectrum::Mode mode, spectrum::Scheme scheme, int threads);

size_t fftconv_workspace(const FftConvArgs&, int threads);  // bytes, 64-byte aligned, allocated by the caller
void fftconv(const FftConvArgs&, void* workspace, const ParallelFor&);

size_t fftconv_backward_workspace(const FftConvBackwardArgs&, int threads);
void fftconv_backward(const FftConvBackwardArgs&, void* workspace, const ParallelFor&);

// One step of exact autoregressive decoding (Oncescu et al., arXiv:2410.12982, relaxed convolution): after x[t], y[t] is final.
// With s = t + 1 and U the largest power of two that divides s, the tile x[s - U, s) is added to y[s, s + U): every pair of
// an input and a later result meets once. Tiles below kDecodeTile are direct sums, others transforms.
constexpr int64_t kDecodeTile = 128;
constexpr int64_t decode_points(int64_t tile) { return tile < spectrum::kMinPoints ? spectrum::kMinPoints : tile; }
constexpr int log2_of(int64_t power) { int n = 0; while (power > 1) { power /= 2; ++n; } return n; }

struct DecodeArgs {
  const float* x_t;           // [b, h]
  float* y_t;                 // [b, h]
  float *x, *y;               // [b, h, capacity]: inputs so far, and results with what is known of later ones
  const float* k;             // [h, taps]; lags beyond are zero
  const float* const* specs;  // [i]: fftconv_prepare of lags 0 .. 2 U - 1 with decode_points(U) points, U = kDecodeTile << i
  int64_t b, h, capacity, taps, t;
};

size_t fftconv_decode_workspace(const DecodeArgs&, int threads);
void fftconv_decode_step(const DecodeArgs&, void* workspace, const ParallelFor&);

}  // namespace effk
