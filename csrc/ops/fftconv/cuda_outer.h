// Transforms of fftconv above 32K complex points on CUDA: the outer factor N_0 of 16 to 256 as a kernel of its own before and
// after the fused one, on strips of 64 columns (32 for N_0 = 256) of the N_0 x M/N_0 matrix in shared memory.
//
//   largest    partial maxima of |v| of a row
//   outer      gate, padding, scale, C = F X, twiddle: real samples -> planes [row][k_0][re, im][M / N_0] of fp16
//   fused      the inner transform of every (row, k_0), in place (cuda_mma.h)
//   outer'     twiddle, inverse F, crop, scale, skip, gates
//
// Rows are taken as many at a time as keep the planes in L2. Bound: memory, 4 tensors of 2 bytes and the reading for the maximum;
// rows of zeros beyond L are not multiplied, results beyond L are not computed.
#pragma once
#include "ops/fftconv/cuda_mma.h"

namespace effk::cuda::fftconv {

constexpr int kPartials = 64;  // partial maxima of a row
constexpr int kOuterThreads = 256;

struct OuterArgs {
  FusedArgs f;
  int outer, inner;     // N_0, M / N_0
  int columns;          // of a strip: 32 or 64
  int parts;            // of the rows of the call
  float* largest;       // [rows][kPartials]
};

namespace {

// grid: (kPartials, rows).
__global__ void __launch_bounds__(256) largest_kernel(const RowArgs p, float* largest) {
  __shared__ float shared[8];
  const int64_t offset = row_offset(p, p.first_row + blockIdx.y);
  float v[8], most = 0.0f;
  for (int n = int(blockIdx.x * blockDim.x + threadIdx.x) * 8; n < p.length; n += gridDim.x * blockDim.x * 8) {
    load_input<false>(v, p, offset, n);
#pragma unroll
    for (int i = 0; i < 8; ++i) most = fmaxf(most, fabsf(v[i]));
  }
  for (int distance = 16; distance; distance /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, distance));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = most;
  __syncthreads();
  for (int i = 0; i < 8; ++i) most = fmaxf(most, shared[i]);
  if (threadIdx.x == 0) largest[blockIdx.y * kPartials + blockIdx.x] = most;
}

__device__ __forceinline__ int outer_exponent(const OuterArgs& p) {
  const float* const partial = p.largest + blockIdx.y * kPartials;
  const int lane = threadIdx.x % 32;
  float most = fmaxf(partial[lane], partial[lane + 32]);
  for (int distance = 16; distance; distance /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, distance));
  return row_exponent(most, p.f.target);
}

// exp(-2 pi i (k_0 + 3/4) c / M) for c = column .. column + 7 of matrix row k.
__device__ __forceinline__ float2 outer_twiddle(const OuterArgs& p, int k, int c) {
  return multiply(table<float2>(p.f.tables, p.f.at.outer_u, k * (p.inner / 32) + c / 32),
                  table<float2>(p.f.tables, p.f.at.outer_v, k * 32 + c % 32));
}

// One 16-row tile of a product of the outer matrix with 16 columns of the strip; k tiles 0 .. count - 1.
// kInverse: real part alone unless `both`.
template <bool kInverse>
__device__ __forceinline__ void outer_product(float (&cre)[2][4], float (&cim)[2][4], const unsigned char* strip, int plane,
                                              const OuterArgs& p, int tile_row, int count, int group, bool both) {
  const int lane = threadIdx.x % 32, tiles = p.outer / 16, row_chunks = p.columns / 8;
  const int from = address(lane_row(lane) * row_chunks ^ lane_chunk(lane) ^ 2 * group);
#pragma unroll
  for (int n = 0; n < 2; ++n) zero(cre[n]), zero(cim[n]);
  for (int k = 0; k < count; ++k) {
    uint32_t are[4], aim[4], re[4], im[4];
    const int64_t matrix = kInverse ? p.f.at.outer_inverse : p.f.at.outer;
    left_operand(are, p.f.tables, matrix, ((tile_row * tiles + k) * 2 + 0) * 32 + lane);
    left_operand(aim, p.f.tables, matrix, ((tile_row * tiles + k) * 2 + 1) * 32 + lane);
    const unsigned char* const at = strip + (from ^ address(16 * k * row_chunks));
    ptx::ldmatrix_x4_trans(re, at);
    if (kInverse || both) ptx::ldmatrix_x4_trans(im, at + plane);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      ptx::mma_f16(cre[n], are, re[2 * n], re[2 * n + 1]);
      if (!kInverse || both) ptx::mma_f16(cim[n], aim, re[2 * n], re[2 * n + 1]);
      if (kInverse || both) {
        ptx::mma_f16(cre[n], aim, im[2 * n] ^ kSigns, im[2 * n + 1] ^ kSigns);
        if (both) ptx::mma_f16(cim[n], are, im[2 * n], im[2 * n + 1]);
      }
    }
  }
}

// grid: (strips, rows). Shared: `parts` planes [outer][columns] of fp16.
__global__ void __launch_bounds__(kOuterThreads, 2) outer_kernel(const OuterArgs p) {
  EFFK_DYN_SMEM(strip);
  const int column0 = int(blockIdx.x) * p.columns, row_chunks = p.columns / 8, plane = p.outer * p.columns * 2;
  const int exponent = outer_exponent(p);
  const float scale = power_of_two(exponent);
  const int64_t offset = row_offset(p.f.r, p.f.r.first_row + blockIdx.y), m = int64_t(p.outer) * p.inner;
  if (blockIdx.x == 0 && threadIdx.x == 0) p.f.spectrum_scale[blockIdx.y] = power_of_two(-exponent);
  for (int part = 0; part < p.parts; ++part)
    for (int i = threadIdx.x; i < p.outer * row_chunks; i += blockDim.x) {
      const int64_t n = part * m + int64_t(i / row_chunks) * p.inner + column0 + i % row_chunks * 8;
      float v[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = 0.0f;
      if (n < p.f.r.length) load_input<false>(v, p.f.r, offset, int(n));
      *reinterpret_cast<uint4*>(strip + part * plane + address(i)) = {
          pack_half(v[0] * scale, v[1] * scale), pack_half(v[2] * scale, v[3] * scale), pack_half(v[4] * scale, v[5] * scale),
          pack_half(v[6] * scale, v[7] * scale)};
    }
  __syncthreads();

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int groups = p.columns / 16, group = warp % groups, step = kOuterThreads / 32 / groups;
  // Rows of the matrix beyond L are zero.
  const int count = p.parts == 2 ? p.outer / 16 : int(min(int64_t(p.outer), (p.f.r.length + p.inner - 1) / int64_t(p.inner)) + 15) / 16;
  for (int tile = warp / groups; tile < p.outer / 16; tile += step) {
    float cre[2][4], cim[2][4];
    outer_product<false>(cre, cim, strip, plane, p, tile, count, group, p.parts == 2);
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int k = 16 * tile + 8 * half + g, c = column0 + 16 * group + 8 * n + 2 * t;
        const float2 a = multiply({cre[n][2 * half], cim[n][2 * half]}, outer_twiddle(p, k, c));
        const float2 b = multiply({cre[n][2 * half + 1], cim[n][2 * half + 1]}, outer_twiddle(p, k, c + 1));
        uint16_t* const to = p.f.work + ((int64_t(blockIdx.y) * p.outer + k) * 2) * p.inner + c;
        *reinterpret_cast<uint32_t*>(to) = pack_half(a.x, b.x);
        *reinterpret_cast<uint32_t*>(to + p.inner) = pack_half(a.y, b.y);
      }
  }
}

// grid: (strips, rows). Shared: planes re and im, then `parts` planes of results, each [outer][columns] of fp16.
__global__ void __launch_bounds__(kOuterThreads, 2) outer_inverse_kernel(const OuterArgs p) {
  EFFK_DYN_SMEM(strip);
  const int column0 = int(blockIdx.x) * p.columns, row_chunks = p.columns / 8, plane = p.outer * p.columns * 2;
  for (int i = threadIdx.x; i < p.outer * row_chunks; i += blockDim.x) {
    const int k = i / row_chunks, c = column0 + i % row_chunks * 8;
    const uint16_t* const at = p.f.work + ((int64_t(blockIdx.y) * p.outer + k) * 2) * p.inner + c;
    const uint4 re = *reinterpret_cast<const uint4*>(at), im = *reinterpret_cast<const uint4*>(at + p.inner);
    const uint32_t from[2][4] = {{re.x, re.y, re.z, re.w}, {im.x, im.y, im.z, im.w}};
    uint32_t to[2][4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 x = unpack_half(from[0][j]), y = unpack_half(from[1][j]);
      const float2 a = multiply_conj({x.x, y.x}, outer_twiddle(p, k, c + 2 * j));
      const float2 b = multiply_conj({x.y, y.y}, outer_twiddle(p, k, c + 2 * j + 1));
      to[0][j] = pack_half(a.x, b.x);
      to[1][j] = pack_half(a.y, b.y);
    }
    *reinterpret_cast<uint4*>(strip + address(i)) = {to[0][0], to[0][1], to[0][2], to[0][3]};
    *reinterpret_cast<uint4*>(strip + plane + address(i)) = {to[1][0], to[1][1], to[1][2], to[1][3]};
  }
  __syncthreads();

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int groups = p.columns / 16, group = warp % groups, step = kOuterThreads / 32 / groups;
  const int wanted = p.parts == 2 ? p.outer : int(min(int64_t(p.outer), (p.f.r.length + p.inner - 1) / int64_t(p.inner)));
  for (int tile = warp / groups; 16 * tile < wanted; tile += step) {
    float cre[2][4], cim[2][4];
    outer_product<true>(cre, cim, strip, plane, p, tile, p.outer / 16, group, p.parts == 2);
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        unsigned char* const to = strip + 2 * plane + address((16 * tile + 8 * half + g) * row_chunks + 2 * group + n) + 4 * t;
        *reinterpret_cast<uint32_t*>(to) = pack_half(cre[n][2 * half], cre[n][2 * half + 1]);
        if (p.parts == 2) *reinterpret_cast<uint32_t*>(to + plane) = pack_half(cim[n][2 * half], cim[n][2 * half + 1]);
      }
  }
  __syncthreads();

  const int row = p.f.r.first_row + int(blockIdx.y);
  const int64_t m = int64_t(p.outer) * p.inner;
  const float undo = p.f.spectrum_scale[blockIdx.y], gain = p.f.gain * verdict(p.f.r) * p.f.tables[p.f.at.scale + row / p.f.r.batch];
  for (int part = 0; part < p.parts; ++part)
    for (int i = threadIdx.x; i < wanted * row_chunks; i += blockDim.x) {
      const int64_t n = part * m + int64_t(i / row_chunks) * p.inner + column0 + i % row_chunks * 8;
      if (n >= p.f.r.length) continue;
      const uint4 w = *reinterpret_cast<const uint4*>(strip + (2 + part) * plane + address(i));
      const float2 a = unpack_half(w.x), b = unpack_half(w.y), c = unpack_half(w.z), d = unpack_half(w.w);
      float y[8] = {a.x, a.y, b.x, b.y, c.x, c.y, d.x, d.y};
#pragma unroll
      for (int j = 0; j < 8; ++j) y[j] = y[j] * undo * gain;
      finish8<false>(p.f.r, row, int(n), y);
    }
}

}  // namespace
}  // namespace effk::cuda::fftconv
