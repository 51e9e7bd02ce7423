// The fused kernel of fftconv on CUDA: forward transform, spectral product and inverse of a row of 256 to 32K complex points
// as products with small DFT matrices on tensor cores, gates, padding, skip and crop included; one launch, one row in shared
// memory as two planes (re, im) of fp16.
//
//   load     v = x gate in registers, largest |v| of the row, row scaled by a power of two -> re plane
//   stage 1  (N_1 > 1) strips of 16 columns of the N_1 x M/N_1 matrix: C = F X, times the twiddle      in place, a warp a strip
//   tile     the N_2 x N_3 matrix k_1, one warp: C = F X (data as the right operand), twiddle; the accumulators of one
//            product are the left operand of the next, so that stage 3, the product with the spectrum and inverse stage 3
//            stay in registers; twiddle; transposed through the warp's own shared memory; inverse stage 2     in place
//   stage 1' the strips again, inverse; only the real part                                            in place
//   store    8 samples a thread: scale, skip, output gates, conversion
//
// Tensor-core flops of a sample (8 N_1 for the first factor, whose products are half, and 16 for each of the others) and bytes of a
// gated call in fp16, against the published times for B = 64, H = 768 (M = L; H100: 3.35 TB/s, mma.sync near 600 Tflop/s):
//
//   M            256    1K     4K     8K     16K    32K
//   flops        384    768    640    768    1024   1280
//   memory ms    0.03   0.12   0.48   0.96   1.9    3.9        4 tensors of 2 bytes
//   mma ms       0.008  0.06   0.21   0.5    1.4    3.4
//   predicted    0.05   0.2    0.9    1.9    4.3    9          bound by shared memory and by fp32 twiddles, overlapped by half
//   published    0.11   0.29   1.43   3.58   12.2   26.3
// Not run on a GPU: the prediction is arithmetic.
//
// Registers hold a tile's left operands (32), accumulators (32) and one matrix (32): 128 a thread without spilling.
#pragma once
#include "ops/fftconv/cuda_rows.h"

namespace effk::cuda::fftconv {

// N_1 = 8 runs as a block-diagonal matrix of 16 rows: two halves of the columns at once.
template <int N1, int N2, int N3, int Rows, int Threads, int Blocks>
struct Shape {
  static constexpr int n1 = N1, n2 = N2, n3 = N3, rows = Rows, threads = Threads, blocks = Blocks;
  static constexpr int m = N1 * N2 * N3, points = Rows * m, warps = Threads / 32;
  static constexpr bool split = N1 == 8;
  static constexpr int tiles1 = N1 <= 16 ? 1 : 2, tiles2 = N2 / 16, tiles3 = N3 / 16;
  static constexpr int vectors = points / 8 / Threads;  // of a thread and plane
  static constexpr int row_threads = Threads / Rows;
};
using Shape256 = Shape<1, 16, 16, 32, 256, 2>;
using Shape512 = Shape<1, 32, 16, 16, 256, 2>;
using Shape1K = Shape<1, 32, 32, 8, 256, 2>;
using Shape2K = Shape<8, 16, 16, 4, 256, 2>;
using Shape4K = Shape<16, 16, 16, 2, 256, 2>;
using Shape8K = Shape<32, 16, 16, 1, 256, 2>;
using Shape16K = Shape<32, 32, 16, 1, 512, 1>;
using Shape32K = Shape<32, 32, 32, 1, 512, 1>;

struct FusedArgs {
  RowArgs r;
  const float* tables;     // start of the spectrum buffer
  Layout at;
  int log_outer, target;   // rows of this kernel are `outer` blocks of a row of the call when log_outer > 0
  int parts;               // 1: rows are real (L <= M); 2: complex
  float direction;         // 1: convolution, -1: correlation
  float gain;              // of results: 2^-odd_stages
  uint16_t* work;          // log_outer > 0: planes [row][2][m] in and out
  uint32_t* spectra;       // not null: write the rows' spectra here instead, [row][m] pairs of fp16, and
  float* spectrum_scale;   // what they are to be multiplied by (log_outer > 0: already there)
};

namespace {

// Chunks of 8 fp16 exchange places so that any 8 rows of a matrix, a power of two apart, lie in different banks. Linear:
// swizzle(a ^ b) = swizzle(a) ^ swizzle(b).
__host__ __device__ constexpr int swizzle(int chunk) { return chunk ^ ((chunk >> 3 ^ chunk >> 6 ^ chunk >> 9) & 7); }
__host__ __device__ constexpr int address(int chunk) { return swizzle(chunk) << 4; }

constexpr uint32_t kSigns = 0x80008000u;

// Plain loads, which L1 serves: through __ldg the compiler keeps tables in registers from one use to the next, and spills.
template <class T>
__device__ __forceinline__ T table(const float* tables, int64_t offset, int i) {
  return reinterpret_cast<const T*>(tables + offset)[i];
}
__device__ __forceinline__ uint4 fragment(const float* tables, int64_t offset, int i) {
  const float4 f = table<float4>(tables, offset, i);
  return {__float_as_uint(f.x), __float_as_uint(f.y), __float_as_uint(f.z), __float_as_uint(f.w)};
}
__device__ __forceinline__ void left_operand(uint32_t (&a)[4], const float* tables, int64_t offset, int i) {
  const uint4 f = fragment(tables, offset, i);
  a[0] = f.x, a[1] = f.y, a[2] = f.z, a[3] = f.w;
}
__device__ __forceinline__ void zero(float (&c)[4]) { c[0] = c[1] = c[2] = c[3] = 0.0f; }

// Chunk of row i, column 0 of the first stage's matrix.
template <class S>
__device__ __forceinline__ constexpr int first_row_chunk(int i) {
  return S::split ? (i & 7) * (S::m / S::n1 / 8) + (i >> 3) * (S::m / S::n1 / 16) : i * (S::m / S::n1 / 8);
}

// 16 rows of k by 16 columns as the right operands of two products: lane part of the address of an ldmatrix.
__device__ __forceinline__ int lane_row(int lane) { return (lane >> 3 & 1) * 8 + (lane & 7); }
__device__ __forceinline__ int lane_chunk(int lane) { return lane >> 4; }

// Stage 1 and its inverse over strips of 16 columns.
template <class S, bool kInverse>
__device__ __forceinline__ void strips(unsigned char* planes, const FusedArgs& p, int rows) {
  constexpr int kTiles = S::tiles1, kColumns3 = S::n3 / 16, kRows2 = S::split ? S::n2 / 2 : S::n2;
  constexpr int kPlane = S::points * 2;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  uint32_t are[kTiles][kTiles][4], aim[kTiles][kTiles][4];
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
      left_operand(are[m][k], p.tables, kInverse ? p.at.first_inverse : p.at.first, ((m * kTiles + k) * 2 + 0) * 32 + lane);
      left_operand(aim[m][k], p.tables, kInverse ? p.at.first_inverse : p.at.first, ((m * kTiles + k) * 2 + 1) * 32 + lane);
    }
  const int column = warp % kColumns3;
  const int from = address(first_row_chunk<S>(lane_row(lane)) ^ lane_chunk(lane));
  const int to = address(first_row_chunk<S>(g)) + 4 * t;
  for (int task = warp / kColumns3; task < rows * kRows2; task += S::warps / kColumns3) {
    const int row = S::rows == 1 ? 0 : task / kRows2, n2 = S::rows == 1 ? task : task % kRows2;
    const int place = address(row * (S::m / 8) + n2 * (S::n3 / 8) + column * 2);
    uint32_t re[kTiles][4], im[kTiles][4];
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
      const unsigned char* const at = planes + (from ^ place ^ address(first_row_chunk<S>(16 * k)));
      ptx::ldmatrix_x4_trans(re[k], at);
      if (kInverse || p.parts == 2) ptx::ldmatrix_x4_trans(im[k], at + kPlane);
    }
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      float cre[2][4], cim[2][4];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        zero(cre[n]), zero(cim[n]);
#pragma unroll
        for (int k = 0; k < kTiles; ++k) {
          ptx::mma_f16(cre[n], are[m][k], re[k][2 * n], re[k][2 * n + 1]);
          if (!kInverse || p.parts == 2) ptx::mma_f16(cim[n], aim[m][k], re[k][2 * n], re[k][2 * n + 1]);
          if (kInverse || p.parts == 2) {
            ptx::mma_f16(cre[n], aim[m][k], im[k][2 * n] ^ kSigns, im[k][2 * n + 1] ^ kSigns);
            if (p.parts == 2) ptx::mma_f16(cim[n], are[m][k], im[k][2 * n], im[k][2 * n + 1]);
          }
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = 16 * m + 8 * half + g, k1 = S::split ? g : i;
        float2 u{};
        if (!kInverse) u = table<float2>(p.tables, p.at.u, k1 * S::n2 + n2 + (S::split ? half * kRows2 : 0));
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          float2 a{cre[n][2 * half], cim[n][2 * half]}, b{cre[n][2 * half + 1], cim[n][2 * half + 1]};
          if (!kInverse) {
            const float4 v = table<float4>(p.tables, p.at.v, (k1 * S::n3 + column * 16 + n * 8) / 2 + t);
            a = multiply(a, multiply(u, {v.x, v.y}));
            b = multiply(b, multiply(u, {v.z, v.w}));
          }
          unsigned char* const at = planes + (to ^ place ^ address(first_row_chunk<S>(16 * m + 8 * half) ^ n));
          *reinterpret_cast<uint32_t*>(at) = pack_half(a.x, b.x);
          if (!kInverse || p.parts == 2) *reinterpret_cast<uint32_t*>(at + kPlane) = pack_half(a.y, b.y);
        }
      }
    }
  }
}

// One N_2 x N_3 tile: rest of the forward transform, spectral product, start of the inverse. r: its row in this block of threads; block: in
// this launch.
template <class S>
__device__ __forceinline__ void tile(unsigned char* planes, const FusedArgs& p, int r, int k1, int block) {
  constexpr int kTiles2 = S::tiles2, kTiles3 = S::tiles3, kStride = S::n3 / 8, kPlane = S::points * 2;
  constexpr bool kAlone = S::n1 == 1;  // the first stage of all is in here
  const int lane = ptx::lane_id(), g = lane / 4, t = lane % 4;
  const bool complex_rows = !kAlone || p.parts == 2;
  const int base = r * (S::m / 8) + k1 * (S::n2 * S::n3 / 8);
  const int from = address(base) ^ address(lane_row(lane) * kStride ^ lane_chunk(lane));
  const int to = (address(base) ^ address(g * kStride)) + 4 * t;

  uint32_t xre[kTiles2][kTiles3][4] = {}, xim[kTiles2][kTiles3][4] = {};  // left operands of stage 3
  // Code that is there once for all columns, and for all rows of stage 3: unrolled, the compiler loads ahead until it spills.
  // So the operands move past fixed places: here into the last row and column, in stage 3 out of the first row.
#pragma unroll 1
  for (int j = 0; j < kTiles3; ++j) {
#pragma unroll
    for (int m = 0; m < kTiles2; ++m)
#pragma unroll
      for (int k = 1; k < kTiles3; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) xre[m][k - 1][i] = xre[m][k][i], xim[m][k - 1][i] = xim[m][k][i];
    uint32_t re[kTiles2][4], im[kTiles2][4];
#pragma unroll
    for (int k = 0; k < kTiles2; ++k) {
      const unsigned char* const at = planes + (from ^ address(16 * k * kStride ^ 2 * j));
      ptx::ldmatrix_x4_trans(re[k], at);
      if (complex_rows) ptx::ldmatrix_x4_trans(im[k], at + kPlane);
    }
#pragma unroll(kTiles2* kTiles3 > 2 ? 1 : kTiles2)
    for (int m = 0; m < kTiles2; ++m) {
#pragma unroll
      for (int r = 1; r < kTiles2; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i) xre[r - 1][kTiles3 - 1][i] = xre[r][kTiles3 - 1][i], xim[r - 1][kTiles3 - 1][i] = xim[r][kTiles3 - 1][i];
      float cre[2][4], cim[2][4];
#pragma unroll
      for (int n = 0; n < 2; ++n) zero(cre[n]), zero(cim[n]);
#pragma unroll
      for (int k = 0; k < kTiles2; ++k) {
        uint32_t are[4], aim[4];
        left_operand(are, p.tables, p.at.second, ((m * kTiles2 + k) * 2 + 0) * 32 + lane);
        left_operand(aim, p.tables, p.at.second, ((m * kTiles2 + k) * 2 + 1) * 32 + lane);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          ptx::mma_f16(cre[n], are, re[k][2 * n], re[k][2 * n + 1]);
          ptx::mma_f16(cim[n], aim, re[k][2 * n], re[k][2 * n + 1]);
          if (complex_rows) {
            ptx::mma_f16(cre[n], aim, im[k][2 * n] ^ kSigns, im[k][2 * n + 1] ^ kSigns);
            ptx::mma_f16(cim[n], are, im[k][2 * n], im[k][2 * n + 1]);
          }
        }
      }
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float4 w = table<float4>(p.tables, p.at.w, ((16 * m + 8 * half + g) * S::n3 + 16 * j + 8 * n) / 2 + t);
          const float2 a = multiply({cre[n][2 * half], cim[n][2 * half]}, {w.x, w.y});
          const float2 b = multiply({cre[n][2 * half + 1], cim[n][2 * half + 1]}, {w.z, w.w});
          xre[kTiles2 - 1][kTiles3 - 1][2 * n + half] = pack_half(a.x, b.x);
          xim[kTiles2 - 1][kTiles3 - 1][2 * n + half] = pack_half(a.y, b.y);
        }
    }
  }

  const auto next_rows = [&] {
#pragma unroll
    for (int m = 1; m < kTiles2; ++m)
#pragma unroll
      for (int k = 0; k < kTiles3; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) xre[m - 1][k][i] = xre[m][k][i], xim[m - 1][k][i] = xim[m][k][i];
  };
#pragma unroll 1
  for (int m = 0; m < kTiles2; ++m) {
    const int row2 = 16 * m + g;
    // Blocks of m bins before this one's.
    const int64_t bins = (int64_t((p.r.first_row + (block >> p.log_outer)) / p.r.batch) << p.log_outer) +
                         (block & ((1 << p.log_outer) - 1));
    const float4* const filter = reinterpret_cast<const float4*>(p.tables + p.at.spectrum + 2 * (bins * S::m + k1 * (S::n2 * S::n3)));
    float zre[2][4], zim[2][4];
    // 16 columns of a product with F, or with conj(F), whose imaginary part is negated in the data.
    const auto third = [&](const uint32_t(&re)[kTiles3][4], const uint32_t(&im)[kTiles3][4], int j, bool inverse) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        zero(zre[n]), zero(zim[n]);
#pragma unroll
        for (int k = 0; k < kTiles3; ++k) {
          const uint4 f = fragment(p.tables, p.at.third, (k * 2 * kTiles3 + 2 * j + n) * 32 + lane);
          uint32_t negated[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) negated[i] = (inverse ? re[k][i] : im[k][i]) ^ kSigns;
          ptx::mma_f16(zre[n], re[k], f.x, f.y);
          ptx::mma_f16(zim[n], im[k], f.x, f.y);
          if (inverse) {
            ptx::mma_f16(zre[n], im[k], f.z, f.w);
            ptx::mma_f16(zim[n], negated, f.z, f.w);
          } else {
            ptx::mma_f16(zre[n], negated, f.z, f.w);
            ptx::mma_f16(zim[n], re[k], f.z, f.w);
          }
        }
      }
    };
    uint32_t yre[kTiles3][4] = {}, yim[kTiles3][4] = {};
#pragma unroll 1
    for (int j = 0; j < kTiles3; ++j) {
#pragma unroll
      for (int k = 1; k < kTiles3; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) yre[k - 1][i] = yre[k][i], yim[k - 1][i] = yim[k][i];
      third(xre[0], xim[0], j, false);
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at = ((row2 + 8 * half) * S::n3 + 16 * j + 8 * n) / 2 + t;
          if (p.spectra) {
            reinterpret_cast<uint2*>(p.spectra + int64_t(block) * S::m + k1 * (S::n2 * S::n3))[at] = {
                pack_half(zre[n][2 * half], zim[n][2 * half]), pack_half(zre[n][2 * half + 1], zim[n][2 * half + 1])};
            continue;
          }
          const float4 k = filter[at];
          const float2 a = multiply({zre[n][2 * half], zim[n][2 * half]}, {k.x, p.direction * k.y});
          const float2 b = multiply({zre[n][2 * half + 1], zim[n][2 * half + 1]}, {k.z, p.direction * k.w});
          yre[kTiles3 - 1][2 * n + half] = pack_half(a.x, b.x);
          yim[kTiles3 - 1][2 * n + half] = pack_half(a.y, b.y);
        }
    }
    next_rows();
    if (p.spectra) continue;
#pragma unroll 1
    for (int j = 0; j < kTiles3; ++j) {
      third(yre, yim, j, true);
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float4 w = table<float4>(p.tables, p.at.w, ((row2 + 8 * half) * S::n3 + 16 * j + 8 * n) / 2 + t);
          const float2 a = multiply_conj({zre[n][2 * half], zim[n][2 * half]}, {w.x, w.y});
          const float2 b = multiply_conj({zre[n][2 * half + 1], zim[n][2 * half + 1]}, {w.z, w.w});
          unsigned char* const at = planes + (to ^ address((16 * m + 8 * half) * kStride ^ 2 * j ^ n));
          *reinterpret_cast<uint32_t*>(at) = pack_half(a.x, b.x);
          *reinterpret_cast<uint32_t*>(at + kPlane) = pack_half(a.y, b.y);
        }
    }
  }
  if (p.spectra) return;
  __syncwarp();  // the tile, by rows until here, is now read by columns

#pragma unroll 1
  for (int j = 0; j < kTiles3; ++j) {
    uint32_t re[kTiles2][4], im[kTiles2][4];
#pragma unroll
    for (int k = 0; k < kTiles2; ++k) {
      const unsigned char* const at = planes + (from ^ address(16 * k * kStride ^ 2 * j));
      ptx::ldmatrix_x4_trans(re[k], at);
      ptx::ldmatrix_x4_trans(im[k], at + kPlane);
    }
#pragma unroll
    for (int m = 0; m < kTiles2; ++m) {
      float cre[2][4], cim[2][4];
#pragma unroll
      for (int n = 0; n < 2; ++n) zero(cre[n]), zero(cim[n]);
#pragma unroll
      for (int k = 0; k < kTiles2; ++k) {
        uint32_t are[4], aim[4];
        left_operand(are, p.tables, p.at.second_inverse, ((m * kTiles2 + k) * 2 + 0) * 32 + lane);
        left_operand(aim, p.tables, p.at.second_inverse, ((m * kTiles2 + k) * 2 + 1) * 32 + lane);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          ptx::mma_f16(cre[n], are, re[k][2 * n], re[k][2 * n + 1]);
          ptx::mma_f16(cre[n], aim, im[k][2 * n] ^ kSigns, im[k][2 * n + 1] ^ kSigns);
          if (complex_rows) {
            ptx::mma_f16(cim[n], are, im[k][2 * n], im[k][2 * n + 1]);
            ptx::mma_f16(cim[n], aim, re[k][2 * n], re[k][2 * n + 1]);
          }
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int n2 = 16 * m + 8 * half + g;
        float2 u{};
        if (!kAlone) u = table<float2>(p.tables, p.at.u, k1 * S::n2 + n2);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          float2 a{cre[n][2 * half], cim[n][2 * half]}, b{cre[n][2 * half + 1], cim[n][2 * half + 1]};
          if (!kAlone) {
            const float4 v = table<float4>(p.tables, p.at.v, (k1 * S::n3 + 16 * j + 8 * n) / 2 + t);
            a = multiply_conj(a, multiply(u, {v.x, v.y}));
            b = multiply_conj(b, multiply(u, {v.z, v.w}));
          }
          unsigned char* const at = planes + (to ^ address((16 * m + 8 * half) * kStride ^ 2 * j ^ n));
          *reinterpret_cast<uint32_t*>(at) = pack_half(a.x, b.x);
          if (complex_rows) *reinterpret_cast<uint32_t*>(at + kPlane) = pack_half(a.y, b.y);
        }
      }
    }
  }
}

// Largest of the threads of a row; every thread of the block calls it.
template <class S>
__device__ __forceinline__ float row_largest(float largest, float* shared) {
  constexpr int kWide = S::row_threads < 32 ? S::row_threads : 32, kRowWarps = S::row_threads / kWide;
#pragma unroll
  for (int distance = kWide / 2; distance; distance /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
  if (kRowWarps > 1) {
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) shared[warp] = largest;
    __syncthreads();
    const int first = warp / kRowWarps * kRowWarps;
    largest = shared[first];
    for (int i = 1; i < kRowWarps; ++i) largest = fmaxf(largest, shared[first + i]);
  }
  return largest;
}

// grid: groups of S::rows rows. Two planes of S::points fp16, then 32 floats, in dynamic shared memory.
template <class S>
__global__ void __launch_bounds__(S::threads, S::blocks) fused_kernel(const FusedArgs p) {
  EFFK_DYN_SMEM(planes);
  float* const shared = reinterpret_cast<float*>(planes + S::points * 4);
  const int row_in_block = S::rows == 1 ? 0 : threadIdx.x / S::row_threads, thread = threadIdx.x % S::row_threads;
  const int first = int(blockIdx.x) * S::rows;
  const int rows = S::rows == 1 ? 1 : min(S::rows, (p.r.rows << p.log_outer) - first);
  const bool mine = S::rows == 1 || row_in_block < rows;
  const int local = first + row_in_block;                // among the rows of this size of this launch
  const int row = p.r.first_row + local;                 // among the rows of the call, if log_outer = 0
  const int64_t offset = p.log_outer || !mine ? 0 : row_offset(p.r, row);
  const int chunk0 = row_in_block * (S::m / 8) + thread;

  if (p.log_outer) {
    for (int part = 0; part < 2 && mine; ++part)
#pragma unroll
      for (int e = 0; e < S::vectors; ++e)
        *reinterpret_cast<uint4*>(planes + part * S::points * 2 + address(chunk0 + e * S::row_threads)) =
            reinterpret_cast<const uint4*>(p.work + int64_t(local * 2 + part) * S::m)[thread + e * S::row_threads];
  } else {
    // A row of 32K is read twice, the second time from L2: as many registers as it takes would spill elsewhere.
    constexpr bool kKeep = S::vectors <= 4;
    constexpr int kKept = kKeep ? S::vectors : 1;
    float v[kKept][8], largest = 0.0f;
    const auto load = [&](float(&to)[8], int n) {
#pragma unroll
      for (int i = 0; i < 8; ++i) to[i] = 0.0f;
      if (mine && n < p.r.length) load_input<false>(to, p.r, offset, n);
    };
    for (int part = p.parts - 1; part >= 0; --part)
#pragma unroll kKept
      for (int e = 0; e < S::vectors; ++e) {
        float(&at)[8] = v[kKeep ? e : 0];
        load(at, part * S::m + (thread + e * S::row_threads) * 8);
#pragma unroll
        for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(at[i]));
      }
    const int exponent = row_exponent(row_largest<S>(largest, shared), p.target);
    const float scale = power_of_two(exponent), undo = power_of_two(-exponent);
    if (thread == 0) shared[S::warps + row_in_block] = undo;  // for the end; a register less until then
    for (int part = 0; part < p.parts; ++part)
#pragma unroll kKept
      for (int e = 0; e < S::vectors; ++e) {
        float(&at)[8] = v[kKeep ? e : 0];
        if (part || !kKeep) load(at, part * S::m + (thread + e * S::row_threads) * 8);
        const uint4 w = {pack_half(at[0] * scale, at[1] * scale), pack_half(at[2] * scale, at[3] * scale),
                         pack_half(at[4] * scale, at[5] * scale), pack_half(at[6] * scale, at[7] * scale)};
        *reinterpret_cast<uint4*>(planes + part * S::points * 2 + address(chunk0 + e * S::row_threads)) = w;
      }
    if (p.spectra && mine && thread == 0) p.spectrum_scale[local] = undo;
  }
  __syncthreads();
  if constexpr (S::n1 > 1) {
    strips<S, false>(planes, p, rows);
    __syncthreads();
  }
  for (int task = threadIdx.x / 32; task < rows * S::n1; task += S::warps) {
    const int r = S::rows == 1 ? 0 : task / S::n1, k1 = S::rows == 1 ? task : task % S::n1;
    tile<S>(planes, p, r, k1, first + r);
  }
  if (p.spectra) return;
  __syncthreads();
  if constexpr (S::n1 > 1) {
    strips<S, true>(planes, p, rows);
    __syncthreads();
  }

  if (!mine) return;
  if (p.log_outer) {
    for (int part = 0; part < 2; ++part)
#pragma unroll
      for (int e = 0; e < S::vectors; ++e)
        reinterpret_cast<uint4*>(p.work + int64_t(local * 2 + part) * S::m)[thread + e * S::row_threads] =
            *reinterpret_cast<const uint4*>(planes + part * S::points * 2 + address(chunk0 + e * S::row_threads));
    return;
  }
  const float gain = p.gain * verdict(p.r) * p.tables[p.at.scale + row / p.r.batch], undo = shared[S::warps + row_in_block];
  for (int part = 0; part < p.parts; ++part)
    for (int e = 0; e < S::vectors; ++e) {
      const uint4 w = *reinterpret_cast<const uint4*>(planes + part * S::points * 2 + address(chunk0 + e * S::row_threads));
      const float2 a = unpack_half(w.x), b = unpack_half(w.y), c = unpack_half(w.z), d = unpack_half(w.w);
      float y[8] = {a.x, a.y, b.x, b.y, c.x, c.y, d.x, d.y};
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] = y[i] * undo * gain;
      finish8<false>(p.r, row, part * S::m + (thread + e * S::row_threads) * 8, y);
    }
}

}  // namespace

// Defined in cuda_mma_<n>.cu, a few sizes each, for the build's sake.
cudaError_t launch_fused_small(const FusedArgs&, int log, cudaStream_t);   // 256 to 2K
cudaError_t launch_fused_large(const FusedArgs&, int log, cudaStream_t);   // 4K to 32K

template <class S>
cudaError_t launch_fused(const FusedArgs& p, cudaStream_t stream) {
  const int64_t rows = int64_t(p.r.rows) << p.log_outer;
  Launch at;
  at.grid = dim3(unsigned((rows + S::rows - 1) / S::rows));
  at.block = dim3(S::threads);
  at.smem = S::points * 4 + kReduceBytes;
  at.stream = stream;
  return launch(fused_kernel<S>, at, p);
}

}  // namespace effk::cuda::fftconv
