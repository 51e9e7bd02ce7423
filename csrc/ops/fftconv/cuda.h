// CUDA side of fftconv: the launch functions of cuda*.cu in this folder, free of torch and of CUDA headers. Every pointer is
// device memory. They launch on `stream` (a cudaStream_t) of the current device, wait for nothing, allocate nothing, and
// return a cudaError_t (0: launched).
//
// fp16 and bf16 rows go through tensor cores: fp16 operands, fp32 sums, each row scaled by a power of two of its own, the
// filter's spectrum in fp32. fp32 rows go through fp32 butterflies in global memory. The result of a row depends on no
// other row; sums over rows (gradients of k and skip) have a fixed order, the same for every call of a shape.
//
// A spectrum whose header is not that of the call, or was prepared for more taps than the call leaves room for, makes
// every result NaN: reading a header before launching would have to wait for the device.
#pragma once
#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "ops/fftconv/cuda_plan.h"

namespace effk::cuda::fftconv {

using Stream = void*;

struct Problem {
  int64_t n_fft;
  Mode mode;
  Scheme scheme;         // of the call; a spectrum of any scheme serves `automatic`
  int64_t batch, channels, length;
  DType type;            // of x, gates and results
  const float* spec;
  Plan plan;
};

// y[i] = (c + skip[h] v) out_gate[i] with v = x gate and c = v (*) k, or the correlation of v with k; [B][H][L] all of them.
// gate, out_gate[i], y[i] and skip may be null.
struct Signals {
  const void *x, *gate;
  const void* out_gate[2];
  void* y[2];
  const float* skip;
};

// Largest transform of one kernel on the current device, by its shared memory; -1 with an error set.
int log_limit(int& error);

int64_t spec_floats(const Plan&, int64_t n_fft, Mode, Scheme, int64_t channels);
int prepare(const float* k, int64_t channels, int64_t taps, int64_t n_fft, Mode, Scheme, const Plan&, float* spec, Stream);

size_t convolve_workspace(const Problem&);
int convolve(const Problem&, const Signals&, bool correlate, void* workspace, Stream);

// gk[h, j] = d/dk of sum(g c), fp32 [H][taps]: v = x gate as in the forward pass, g = gy post.
size_t filter_gradient_workspace(const Problem&);
int filter_gradient(const Problem&, const void* x, const void* gate, const void* gy, const void* post, int64_t taps, float* gk,
                    void* workspace, Stream);

// gskip[h] = sum_{b, t} g v, fp32 [H]; partial: fp32 [B * H].
int skip_gradient(const Problem&, const void* x, const void* gate, const void* gy, const void* post, float* partial, float* gskip,
                  Stream);

const char* error_text(int error);

}  // namespace effk::cuda::fftconv
