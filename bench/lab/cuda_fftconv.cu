// Times variants of the fused CUDA kernel of fftconv beside each other, without torch: rows a block, threads and blocks a
// multiprocessor (no GPU has run it yet: the constants of cuda_mma.h were reasoned from registers and shared memory).
//   nvcc -O3 -std=c++17 --expt-relaxed-constexpr -arch=sm_90a -Icsrc bench/lab/cuda_fftconv.cu csrc/ops/fftconv/cuda*.cu -o lab && ./lab
#include <cstdio>
#include <cstdlib>

#include "ops/fftconv/cuda_mma.h"

namespace effk::cuda::fftconv {
namespace {

void check(int e, const char* what) {
  if (e == 0) return;
  std::printf("%s: %s\n", what, error_text(e));
  std::exit(1);
}

constexpr int kBatch = 64;

template <class S>
void variant(FusedArgs f, int log, int64_t samples) {
  Launch at;
  at.grid = dim3(unsigned((f.r.rows + S::rows - 1) / S::rows));
  at.block = dim3(S::threads);
  at.smem = S::points * 4 + kReduceBytes;
  if (at.smem > 227 * 1024) return;
  cudaEvent_t start, stop;
  check(cudaEventCreate(&start), "event");
  check(cudaEventCreate(&stop), "event");
  float best = 1e30f;
  for (int repeat = 0; repeat < 6; ++repeat) {
    check(cudaEventRecord(start), "record");
    check(launch(fused_kernel<S>, at, f), "kernel");
    check(cudaEventRecord(stop), "record");
    check(cudaEventSynchronize(stop), "run");
    float ms;
    check(cudaEventElapsedTime(&ms, start, stop), "time");
    if (repeat) best = ms < best ? ms : best;
  }
  int resident = 0;
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, fused_kernel<S>), "attributes");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, fused_kernel<S>, S::threads, at.smem), "occupancy");
  std::printf("2^%-2d rows %2d threads %3d blocks %d | regs %3d local %zu smem %3zuK resident %d | %8.3f ms %6.0f GB/s of rows\n", log, S::rows,
              S::threads, S::blocks, attributes.numRegs, attributes.localSizeBytes, at.smem / 1024, resident, best,
              8e-6 * double(samples) / best);
  std::fflush(stdout);
}

// Gated causal rows of 2^log samples with 2 M = 2^(log + 1): 64 x `channels` of them.
template <class... S>
void size(int log) {
  const int64_t length = int64_t(1) << log, channels = (int64_t(1) << 27) / length / kBatch, samples = length * channels * kBatch;
  Problem p{2 * length, Mode::causal, Scheme::fft, kBatch, channels, length, DType::f16, nullptr, make_plan(2 * length, Mode::causal, kMaxInnerLog)};
  void *rows[4], *spec, *k;
  for (void*& q : rows) check(cudaMalloc(&q, samples * 2), "memory"), check(cudaMemset(q, 0x2c, samples * 2), "memory");
  check(cudaMalloc(&spec, spec_floats(p.plan, p.n_fft, p.mode, p.scheme, channels) * 4), "memory");
  check(cudaMalloc(&k, channels * length * 4), "memory");
  check(cudaMemset(k, 0x3c, channels * length * 4), "memory");
  check(prepare(static_cast<float*>(k), channels, length, p.n_fft, p.mode, p.scheme, p.plan, static_cast<float*>(spec), nullptr), "prepare");
  FusedArgs f{};
  f.r.s.x = rows[0], f.r.s.gate = rows[1], f.r.s.out_gate[0] = rows[2], f.r.s.y[0] = rows[3];
  f.r.type = DType::f16;
  f.r.aligned = true;
  f.r.batch = kBatch, f.r.channels = int(channels), f.r.length = int(length), f.r.rows = int(kBatch * channels);
  f.r.header = f.tables = static_cast<float*>(spec);
  f.at = make_layout(p.plan, channels);
  f.target = target_exponent(p.plan);
  f.parts = 1;
  f.direction = f.gain = 1.0f;
  (variant<S>(f, log, samples), ...);
  for (void* q : rows) cudaFree(q);
  cudaFree(spec), cudaFree(k);
}

}  // namespace
}  // namespace effk::cuda::fftconv

int main() {
  using namespace effk::cuda::fftconv;
  size<Shape256, Shape<1, 16, 16, 16, 128, 4>, Shape<1, 16, 16, 16, 256, 2>>(8);
  size<Shape512, Shape<1, 32, 16, 8, 128, 4>>(9);
  size<Shape1K, Shape<1, 32, 32, 4, 128, 4>, Shape<1, 32, 32, 8, 256, 1>>(10);
  size<Shape2K, Shape<8, 16, 16, 2, 128, 4>>(11);
  size<Shape4K, Shape<16, 16, 16, 1, 128, 4>, Shape<16, 16, 16, 1, 256, 2>>(12);
  size<Shape8K, Shape<32, 16, 16, 1, 512, 1>>(13);
  size<Shape16K, Shape<32, 32, 16, 1, 256, 2>>(14);
  size<Shape32K, Shape<32, 32, 32, 1, 384, 1>, Shape<32, 32, 32, 1, 256, 1>>(15);
}
