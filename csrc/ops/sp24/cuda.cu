// sp24 on CUDA: pruned weights back to dense ones. Bound: bytes.
#include "ops/sp24/cuda.h"

#include "cuda/cu.h"
#include "formats/t16.h"

namespace effk::cuda::sp24 {
namespace {

constexpr int kThreads = 256;

// A word of four columns a thread. Of a group's two places, those in the word: "2:4", both, one value each; pairs, those
// in the word's half of the eight columns, two values each.
__global__ void __launch_bounds__(kThreads, 6) expand_kernel(const int8_t* values, const uint8_t* meta, int64_t n, int64_t k, bool pairs, bool tiled,
                                                             uint32_t* out, int64_t words) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= words) return;
  const int64_t per_row = k / 4;
  // In t16 the rows of a tile lie beside each other.
  const int64_t row = tiled ? i / (16 * per_row) * 16 + i % 16 : i / per_row, column = tiled ? i / 16 % per_row : i % per_row;
  uint32_t word = 0;
  if (row < n) {
    const int64_t group = pairs ? column / 2 : column, kept = pairs ? k / 4 : k / 2, meta_bytes = (kept + 3) / 4;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int64_t at = 2 * group + e;
      const int place = meta[row * meta_bytes + at / 4] >> 2 * (at % 4) & 3;
      const int8_t* const from = values + row * (k / 2) + (pairs ? 2 * at : at);
      if (!pairs) word |= uint32_t(uint8_t(from[0])) << 8 * place;
      else if (place / 2 == column % 2) word |= (uint32_t(uint8_t(from[0])) | uint32_t(uint8_t(from[1])) << 8) << 16 * (place % 2);
    }
    if (tiled) word ^= 0x80808080u;
  }
  out[i] = word;
}

}  // namespace

int expand(const int8_t* values, const uint8_t* meta, int64_t n, int64_t k, Sp24 pattern, bool tiled, void* w, Stream stream) {
  const int64_t words = (tiled ? t16::tiles(n) * 16 : n) * (k / 4);
  if (words == 0) return 0;
  Launch at;
  at.grid = dim3(unsigned((words + kThreads - 1) / kThreads));
  at.block = dim3(kThreads);
  at.stream = static_cast<cudaStream_t>(stream);
  return int(launch(expand_kernel, at, values, meta, n, k, pattern == Sp24::pairs, tiled, static_cast<uint32_t*>(w), words));
}

}  // namespace effk::cuda::sp24
