// Times the kernels of relu_ffn one by one and variants of them beside each other, without torch: blocks a multiprocessor of gate and
// down, at several densities (no GPU has run it yet: the constants of cuda_neurons.h were reasoned from registers and bytes under way).
//   nvcc -O3 -std=c++17 --expt-relaxed-constexpr -arch=sm_90a -Icsrc bench/lab/cuda_relu_ffn.cu csrc/ops/relu_ffn/cuda*.cu -o lab && ./lab
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "ops/relu_ffn/cuda_neurons.h"

namespace effk::cuda::relu_ffn {
namespace {

constexpr int kD = 4096, kF = 11008;  // 90 MB a matrix in bf16: nothing of it stays in L2 between launches

void check(int e, const char* what) {
  if (e == 0) return;
  std::printf("%s: %s\n", what, error_text(e));
  std::exit(1);
}

template <class F>
float best_us(const F& run) {
  cudaEvent_t start, stop;
  check(cudaEventCreate(&start), "event");
  check(cudaEventCreate(&stop), "event");
  float best = 1e30f;
  for (int repeat = 0; repeat < 8; ++repeat) {
    check(cudaEventRecord(start), "record");
    check(run(), "kernel");
    check(cudaEventRecord(stop), "record");
    check(cudaEventSynchronize(stop), "run");
    float ms;
    check(cudaEventElapsedTime(&ms, start, stop), "time");
    if (repeat) best = ms < best ? ms : best;
  }
  return 1000.0f * best;
}

template <class T>
T* filled(size_t count, int byte) {
  void* p;
  check(cudaMalloc(&p, count * sizeof(T)), "memory");
  check(cudaMemset(p, byte, count * sizeof(T)), "memory");
  return static_cast<T*>(p);
}

// Gates are the bias alone (weights are zeros): the first neurons of every `1 / density` are active.
void measure(double density) {
  std::vector<float> bias(kF, -1.0f);
  int active = 0;
  for (int i = 0; i < kF; ++i)
    if (int(density * (i + 1)) > int(density * i)) bias[i] = 1.0f, ++active;
  effk::relu_ffn::Args a{};
  const size_t bytes = size_t(kF) * neuron::row_bytes(Rows::bf16, kD);
  a.gate.rows = filled<uint8_t>(bytes, 0), a.up.rows = filled<uint8_t>(bytes, 0), a.down.rows = filled<uint8_t>(bytes, 0);
  float* const on_device = filled<float>(kF, 0);
  check(cudaMemcpy(on_device, bias.data(), kF * 4, cudaMemcpyHostToDevice), "copy");
  a.gate.bias = on_device;
  a.type = Rows::bf16, a.kind = Gate::relu, a.x = filled<uint16_t>(kD, 0x3c), a.dtype = DType::bf16, a.tokens = 1, a.d = kD, a.f = kF;
  a.y = filled<uint16_t>(kD, 0), a.nnz = filled<int32_t>(1, 0);
  void* const memory = filled<char>(workspace(a), 0);
  const auto line = [&](const char* what, float us, double moved) { std::printf("density %.2f  %-28s %8.1f us %7.0f GB/s\n", density, what, us, moved / us * 1e-3); };
  const double row = double(neuron::row_bytes(Rows::bf16, kD)), gate = kF * row, part = active * row;
  line("sparse", best_us([&] { return run(a, memory, nullptr); }), gate + 2 * part);
  a.dense = true;
  line("dense", best_us([&] { return run(a, memory, nullptr); }), 3 * gate);

  Step p{};
  p.gate = a.gate, p.up = a.up, p.down = a.down, p.type = a.type, p.group_shift = 31, p.kind = a.kind;
  p.row_bytes = p.out_bytes = int64_t(row), p.groups = p.out_groups = 1;
  p.x = a.x, p.dtype = a.dtype, p.quads = true, p.tokens = p.sets = p.width = 1, p.d = p.d_out = kD, p.f = kF;
  p.blocks = (kF + kBlock - 1) / kBlock, p.chunks = p.out_chunks = kD / kChunk, p.slices = (p.blocks + kSlice - 1) / kSlice, p.panel = 32;
  p.index = filled<int32_t>(p.blocks * kBlock, 0), p.counts = filled<int32_t>(p.blocks, 0), p.active = filled<int32_t>(p.blocks * kMaxTokens, 0);
  p.h = filled<float>(p.blocks * kBlock, 0), p.partial = filled<float>(size_t(p.slices) * kD, 0);
  line("gate, 4 blocks", best_us([&] { return gates_of<Rows::bf16, Shape<1, 4>>(p, false, nullptr); }), gate + part);
  line("gate, 6 blocks", best_us([&] { return gates_of<Rows::bf16, Shape<1, 6>>(p, false, nullptr); }), gate + part);
  line("gate, 8 blocks", best_us([&] { return gates_of<Rows::bf16, Shape<1, 8>>(p, false, nullptr); }), gate + part);
  line("down, 2 blocks", best_us([&] { return down_of<Rows::bf16, Shape<1, 2>>(p, false, nullptr); }), part);
  line("down, 3 blocks", best_us([&] { return down_of<Rows::bf16, Shape<1, 3>>(p, false, nullptr); }), part);
  line("down, 4 blocks", best_us([&] { return down_of<Rows::bf16, Shape<1, 4>>(p, false, nullptr); }), part);
  check(cudaDeviceReset(), "reset");
}

}  // namespace
}  // namespace effk::cuda::relu_ffn

int main() {
  for (double density : {0.05, 0.1, 0.2, 0.33, 0.5, 1.0}) effk::cuda::relu_ffn::measure(density);
}
