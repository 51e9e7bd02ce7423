// Times variants of the CUDA kernel of wq_linear beside each other, without torch: what the constants of cuda_mma.h are
// to be chosen with (no GPU has run it yet). Weights are rotated past the L2 cache and launches are replayed from a CUDA graph.
//   nvcc -O3 -std=c++17 --expt-relaxed-constexpr -arch=sm_90a -Icsrc bench/lab/cuda_wq_linear.cu -o lab && ./lab
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "ops/wq_linear/cuda_mma.h"

namespace effk::cuda {  // nvcc wants all unnamed namespaces of a file to be the same one
namespace {

void check(cudaError_t e, const char* what) {
  if (e == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(e));
  std::exit(1);
}

constexpr int64_t kRotate = int64_t(400) << 20;  // bytes of weights per timing: several times the L2 cache
cudaStream_t stream;
uint8_t* weights;     // kRotate bytes of random codes
uint16_t *scales, *x, *y;
double copy_gbps;

__global__ void fill(uint32_t* p, int64_t n, uint32_t mask, uint32_t base) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    uint32_t h = uint32_t(i) * 2654435761u;
    h ^= h >> 15;
    h *= 2246822519u;
    h ^= h >> 13;
    p[i] = (h & mask) | base;
  }
}

// Sums everything: the rate at which this device can read.
__global__ void read_all(const uint4* p, int64_t n, uint32_t* out) {
  uint32_t sum = 0;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i + 3 * step < n; i += 4 * step) {
    const uint4 a = p[i], b = p[i + step], c = p[i + 2 * step], d = p[i + 3 * step];
    sum += a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w ^ c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
  }
  if (sum == 12345u) *out = sum;
}

// Microseconds of one of `launches` calls of f(i), replayed from a graph; the best of several replays.
template <class F>
float time_us(int launches, F f) {
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  for (int i = 0; i < launches; ++i) f(i);
  check(cudaStreamEndCapture(stream, &graph), "end of capture");
  check(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
  cudaEvent_t start, stop;
  check(cudaEventCreate(&start), "event");
  check(cudaEventCreate(&stop), "event");
  float best = 1e30f;
  for (int repeat = 0; repeat < 6; ++repeat) {
    check(cudaEventRecord(start, stream), "record");
    check(cudaGraphLaunch(exec, stream), "launch");
    check(cudaEventRecord(stop, stream), "record");
    check(cudaEventSynchronize(stop), "run");
    float ms;
    check(cudaEventElapsedTime(&ms, start, stop), "time");
    if (repeat) best = ms < best ? ms : best;
  }
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  return best * 1000.0f / launches;
}

template <class T, int kBits, class S>
void variant(int n, int k, int m, int warps, int ranks, bool overlap) {
  MmaArgs p{};
  p.w.n = n;
  p.w.k = k;
  p.w.bits = kBits;
  p.w.group = 128;
  p.w.scales = scales;
  p.x = x;
  p.y = y;
  p.m = m;
  p.k = k;
  p.ldx = k;
  p.tiles = int(t16::tiles(n));
  p.groups = int(t16::groups(k, 128));
  p.tile_bytes = t16::chunks(k, kBits) * t16::chunk_bytes(kBits);
  p.group_shift = 7;
  p.x_aligned = true;
  Launch at;
  at.grid = dim3(unsigned(t16::ceil_div(p.tiles, S::tiles)), ranks);
  at.block = dim3(warps * 32);
  at.smem = ring_bytes<kBits, S>(m, warps);
  at.stream = stream;
  at.cluster = ranks;
  at.overlap = overlap;
  if (at.smem > 227 * 1024) return;
  const int64_t bytes = t16::packed_bytes(n, k, kBits), moved = bytes + int64_t(p.tiles) * p.groups * 32 + 2 * int64_t(m) * (n + k);
  const int copies = int(kRotate / bytes);
  const float us = time_us(2 * copies, [&](int i) {
    p.w.packed = weights + i % copies * bytes;
    check(launch(mma_kernel<T, kBits, Kind::symmetric, S>, at, p), "kernel");
  });
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, mma_kernel<T, kBits, Kind::symmetric, S>), "attributes");
  int resident = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, mma_kernel<T, kBits, Kind::symmetric, S>, warps * 32, at.smem), "occupancy");
  const double gbps = moved / us * 1e-3;
  std::printf("%5d %5d m %2d %db %s col %d tiles %d stages %d warps %2d ranks %d overlap %d | regs %3d smem %3zuK blocks/SM %d grid %4u | %7.2f us %6.0f GB/s %5.1f %% of copy\n",
              n, k, m, kBits, sizeof(T) == 2 && std::is_same<T, __half>::value ? "f16 " : "bf16", S::columns, S::tiles, S::stages, warps, ranks, overlap,
              attributes.numRegs, at.smem / 1024, resident, at.grid.x * at.grid.y, us, gbps, 100 * gbps / copy_gbps);
  std::fflush(stdout);
}

template <class T, int kBits, class S>
void sweep(int n, int k, int m) {
  for (int warps : {4, 8, 16})
    if (warps <= S::max_warps)
      for (int ranks : {1, 2, 4})
        for (bool overlap : {false, true}) {
          const int panels = int(t16::ceil_div(t16::tiles(n), S::tiles));
          if (panels * ranks > 132 * 8 || (ranks > 1 && panels * ranks / 2 >= 132 * 4)) continue;
          variant<T, kBits, S>(n, k, m, warps, ranks, overlap);
        }
}

void run() {
  check(cudaStreamCreate(&stream), "stream");
  check(cudaMalloc(&weights, kRotate), "memory");
  check(cudaMalloc(&scales, 64 << 20), "memory");
  check(cudaMalloc(&x, 8 << 20), "memory");
  check(cudaMalloc(&y, 8 << 20), "memory");
  fill<<<1024, 256, 0, stream>>>(reinterpret_cast<uint32_t*>(weights), kRotate / 4, 0xffffffffu, 0);
  fill<<<1024, 256, 0, stream>>>(reinterpret_cast<uint32_t*>(scales), (64 << 20) / 4, 0x83ff83ffu, 0x20002000u);
  fill<<<1024, 256, 0, stream>>>(reinterpret_cast<uint32_t*>(x), (8 << 20) / 4, 0x8fff8fffu, 0x30003000u);
  uint8_t *from, *to;
  const int64_t big = int64_t(2) << 30;
  check(cudaMalloc(&from, big), "memory");
  check(cudaMalloc(&to, big), "memory");
  copy_gbps = 2.0 * big / time_us(4, [&](int) { check(cudaMemcpyAsync(to, from, big, cudaMemcpyDeviceToDevice, stream), "copy"); }) * 1e-3;
  std::printf("device copy %.0f GB/s\n", copy_gbps);
  for (int64_t size : {int64_t(32) << 20, big}) {
    const int copies = int(big / size);
    const double us = time_us(copies > 1 ? 32 : 4, [&](int i) {
      read_all<<<132 * 8, 256, 0, stream>>>(reinterpret_cast<const uint4*>(from + i % copies * size), size / 16, reinterpret_cast<uint32_t*>(y));
    });
    std::printf("plain read of %lld MiB: %.2f us, %.0f GB/s\n", static_cast<long long>(size >> 20), us, size / us * 1e-3);
  }

  for (auto [n, k] : {std::pair<int, int>{8192, 8192}, {4096, 14336}}) {
    sweep<__half, 4, Shape<1, 1, 4, 16>>(n, k, 1);
    sweep<__half, 4, Shape<1, 2, 3, 16>>(n, k, 1);
    sweep<__half, 4, Shape8>(n, k, 1);
    sweep<__half, 4, Shape<1, 2, 6, 16>>(n, k, 1);
    sweep<__half, 4, Shape<1, 4, 3, 16>>(n, k, 1);
    sweep<__half, 4, Shape<1, 4, 4, 16>>(n, k, 1);
    sweep<__half, 4, Shape<1, 4, 6, 8>>(n, k, 1);
    for (int m : {16}) {
      sweep<__half, 4, Shape<2, 2, 4, 8>>(n, k, m);
      sweep<__half, 4, Shape<2, 4, 3, 8>>(n, k, m);
      sweep<__half, 4, Shape16>(n, k, m);
      sweep<__half, 4, Shape<2, 8, 3, 8>>(n, k, m);
      sweep<__half, 4, Shape<2, 8, 4, 8>>(n, k, m);
    }
  }
  for (auto [n, k] : {std::pair<int, int>{8192, 8192}}) {
    sweep<__half, 2, Shape8>(n, k, 1);
    sweep<__half, 2, Shape<1, 4, 4, 16>>(n, k, 1);
    sweep<__half, 3, Shape8>(n, k, 1);
    sweep<__half, 3, Shape<1, 4, 4, 16>>(n, k, 1);
    sweep<__half, 8, Shape8>(n, k, 1);
    sweep<__nv_bfloat16, 4, Shape8>(n, k, 1);
    sweep<__nv_bfloat16, 2, Shape8>(n, k, 1);
    sweep<__half, 4, Shape<4, 2, 3, 8>>(n, k, 32);
    sweep<__half, 4, Shape32>(n, k, 32);
    sweep<__half, 4, Shape64>(n, k, 64);
    sweep<__half, 4, Shape<8, 2, 3, 8>>(n, k, 64);
  }
}

}  // namespace
}  // namespace effk::cuda

int main() { effk::cuda::run(); }
