// The product of quik_linear on tensor cores: y^T = W x^T, the weights as the 16-row operand and the tokens as the 8-wide
// one. One block a tile of features x tokens, a ring of stages filled by cp.async, one barrier a stage. First the
// integers, then, in the same registers, scaled fp32 sums that continue over the outlier columns in 16 bits.
//
//   stage    64 bytes of every token's codes: 64 columns, or 128 of 4 bits | the t16 units of the same columns
//            outliers: 32 columns of x_out | 32 of w_out (mma_tile.h)
//   lane     4g + t: of a token 16 bytes from 16t on, one load for both steps of a stage; of two tiles of weights the rows
//            4 (g % 4) .. + 3 of tile g / 4, one 16-byte load a unit. Step s of a stage takes
//              4-bit codes widened to int8    unit 2t + s: low halves meet words 2s of the tokens, high halves 2s + 1
//              8-bit codes, and int4          units 4t + 2s and 4t + 2s + 1
//            so k is permuted inside a stage, for both sides alike. Row g of the two mma of a pair of tiles is row 4 (g % 4)
//            and + 2 of tile g / 4, row g + 8 the one behind it: a lane ends with four neighbouring features of its tokens.
//   banks    a token's 64 bytes are what eight lanes read together: no conflict. Units t apart would meet, so the chunks
//            of 16 bytes of a tile exchange places: chunk ^ 2 t (unit_place)
//
// Bound: tensor cores. Predicted for an H100 (mma.sync int8 about 1190 Top/s, 60 % of wgmma): the 256 x 128 tile reads 64
// KiB (4-bit weights: 48) of shared memory for 512 mma of 1.6 clocks each, and writes 24 (16): 704 (512) of 820 clocks;
// L2: 30 (20) bytes a clock; a scheduler issues about 430 of the 820 instructions it could (SASS). Expected 85 to 90 % of what mma.sync reaches. Not run on a GPU.
#pragma once
#include "cuda/cu.h"
#include "cuda/gemm_problem.h"
#include "cuda/mma_tile.h"
#include "ops/quik_linear/cuda.h"

namespace effk::cuda::quik {

enum class Operands { w8, w4, int4 };  // 8-bit weights and 4-bit ones as int8; 4-bit ones as they are

// Features, tokens; of a warp; stages; blocks of a multiprocessor. 128 registers of sums in the large one, hence one
// block of eight warps, and 96 KiB, which 8.6 and 8.9 still have.
using LargeTile = MmaShape<256, 128, 64, 64, 4, 1>;
using SmallTile = MmaShape<64, 64, 32, 32, 4, 3>;

constexpr int kStageBytes = 64;                                        // of a token, and of a row of 32 outliers
template <Operands kOperands>
constexpr int kUnits = kOperands == Operands::w4 ? 8 : 16;             // of a tile in a stage
template <class S>
constexpr int kSlot = (S::bm + S::bn) * kStageBytes;                   // 8-bit codes and outliers; 4-bit ones take less
// Results leave through shared memory, 64 tokens at a time; four words more a row, so that the rows that a quarter of a
// warp writes lie in different banks.
template <class S>
constexpr int kResultRows = S::bn < 64 ? S::bn : 64;
template <class S>
constexpr int kResultPitch = S::bm + 4;

struct MmaArgs {
  Product p;
  int64_t tile_bytes, row_bytes;
  int tiles, int_stages, out_stages;
};

template <Operands kOperands>
cudaError_t launch_product(const MmaArgs& args, bool large, cudaStream_t stream);
extern template cudaError_t launch_product<Operands::w8>(const MmaArgs&, bool, cudaStream_t);
extern template cudaError_t launch_product<Operands::w4>(const MmaArgs&, bool, cudaStream_t);
extern template cudaError_t launch_product<Operands::int4>(const MmaArgs&, bool, cudaStream_t);

namespace {

// Place of a 16-byte chunk (4 rows of a unit) of a tile's stage.
template <Operands kOperands>
__device__ __forceinline__ int unit_place(int chunk) {
  constexpr int kOfLane = kUnits<kOperands>;  // chunks that one lane's units take: kUnits / 4 of four chunks
  return (chunk ^ (chunk / kOfLane & 3) << 1) * 16;
}

// The feature whose outlier weights lie in a line of the tile: the line is what ldmatrix hands to a row of an mma.
__device__ __forceinline__ int feature_of_line(int line) {
  const int g = line % 8, half = line / 8 % 2, second = line / 16 % 2;
  return line / 32 * 32 + g / 4 * 16 + g % 4 * 4 + 2 * second + half;
}

// A thread's copies of one stage of integers. Where they come from and go to advances by constants, so that a stage costs
// little more than the copies: the warps of a tile leave few issue slots beside their mma. A copy of no bytes does not
// touch its source, which may then lie anywhere.
template <Operands kOperands, class S>
struct IntegerLoader {
  static constexpr int kChunks = kUnits<kOperands> * 4, kTiles = S::bm / 16, kTileStep = S::threads / kChunks, kTokenStep = S::threads / 4;
  static_assert(S::threads % kChunks == 0 && kTiles % kTileStep == 0 && S::bn % kTokenStep == 0, "whole rounds of copies");

  const uint8_t *unit, *code;       // of the next stage, first round
  int64_t unit_step, code_step;     // from one round to the next
  int unit_to, left;                // place in a slot; stages in which the units exist
  int tiles, tokens;                // rounds whose tile or token exists

  __device__ __forceinline__ IntegerLoader(const MmaArgs& a, int tile0, int token0) {
    const int i = int(threadIdx.x), tile = i / kChunks, chunk = i % kChunks, token = i / 4;
    unit = a.p.packed + (tile0 + tile) * a.tile_bytes + chunk * 16;
    unit_step = kTileStep * a.tile_bytes;
    unit_to = tile * (kChunks * 16) + unit_place<kOperands>(chunk);
    left = int((a.tile_bytes - chunk * 16 + kChunks * 16 - 1) / (kChunks * 16));
    tiles = (a.tiles - tile0 - tile + kTileStep - 1) / kTileStep;
    code = a.p.codes + (int64_t(token0) + token) * a.row_bytes + i % 4 * 16;
    code_step = kTokenStep * a.row_bytes;
    tokens = int(min((a.p.m - token0 - token + kTokenStep - 1) / kTokenStep, int64_t(S::bn)));
  }

  __device__ __forceinline__ void load(unsigned char* to) {
#pragma unroll
    for (int j = 0; j < kTiles / kTileStep; ++j)
      ptx::cp_async16(to + unit_to + j * (kTileStep * kChunks * 16), unit + j * unit_step, j < tiles && left > 0 ? 16 : 0);
#pragma unroll
    for (int j = 0; j < S::bn / kTokenStep; ++j)
      ptx::cp_async16(to + S::bm * kStageBytes + (int(threadIdx.x) + j * S::threads) * 16, code + j * code_step, j < tokens ? 16 : 0);
    unit += kChunks * 16;
    code += kStageBytes;
    --left;
  }
};

template <class S>
__device__ __forceinline__ void load_outliers(unsigned char* to, const MmaArgs& a, int stage, int feature0, int token0) {
  const auto copy = [&](unsigned char* tile, int i, const void* base, int64_t row, bool inside) {
    const int chunk = i % 4, k = stage * kTileK + 8 * chunk;
    const bool there = inside && k < a.p.out_ld;
    const uint16_t* const from = static_cast<const uint16_t*>(base) + (there ? row * a.p.out_ld + k : 0);
    ptx::cp_async16(tile + tile_place<4>(i / 4, chunk), from, there ? 16 : 0);
  };
#pragma unroll
  for (int j = 0; j < S::bm * 4 / S::threads; ++j) {
    const int i = int(threadIdx.x) + j * S::threads, feature = feature0 + feature_of_line(i / 4);
    copy(to, i, a.p.w_out, feature, feature < a.p.n);
  }
#pragma unroll
  for (int j = 0; j < S::bn * 4 / S::threads; ++j) {
    const int i = int(threadIdx.x) + j * S::threads, token = token0 + i / 4;
    copy(to + S::bm * kStageBytes, i, a.p.x_out, token, token < a.p.m);
  }
}

// sums += the warp's part of one stage of integers.
template <Operands kOperands, class S>
__device__ __forceinline__ void multiply_integers(int (&sums)[S::tiles_m][S::tiles_n][4], const unsigned char* slot, int warp_m, int warp_n, int lane) {
  const int g = lane / 4, t = lane % 4;
  uint4 b[S::tiles_n];
#pragma unroll
  for (int j = 0; j < S::tiles_n; ++j)
    b[j] = *reinterpret_cast<const uint4*>(slot + (S::bm + warp_n * S::wn + 8 * j + g) * kStageBytes + 16 * t);
#pragma unroll
  for (int pair = 0; pair < S::tiles_m / 2; ++pair) {
    const unsigned char* const tile = slot + (warp_m * (S::wm / 16) + 2 * pair + g / 4) * (kUnits<kOperands> * t16::kUnitBytes);
    const auto rows = [&](int unit, uint32_t (&to)[4]) {
      const uint4 v = *reinterpret_cast<const uint4*>(tile + unit_place<kOperands>(4 * unit + g % 4));
      to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    };
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t first[4], second[4];  // of the four rows: the lane's lower and upper half of the mma's k
      if constexpr (kOperands == Operands::w4) {
        uint32_t v[4];
        rows(2 * t + step, v);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          first[r] = (v[r] << 4 & 0xf0f0f0f0u) ^ 0x80808080u;  // 16 (code - 8)
          second[r] = (v[r] & 0xf0f0f0f0u) ^ 0x80808080u;
        }
      } else {
        constexpr uint32_t kSigns = kOperands == Operands::w8 ? 0x80808080u : 0x88888888u;
        rows(4 * t + 2 * step, first);
        rows(4 * t + 2 * step + 1, second);
#pragma unroll
        for (int r = 0; r < 4; ++r) first[r] ^= kSigns, second[r] ^= kSigns;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t a[4] = {first[2 * i], first[2 * i + 1], second[2 * i], second[2 * i + 1]};
#pragma unroll
        for (int j = 0; j < S::tiles_n; ++j) {
          const uint32_t b0 = step == 0 ? b[j].x : b[j].z, b1 = step == 0 ? b[j].y : b[j].w;
          if constexpr (kOperands == Operands::int4) ptx::mma_s4(sums[2 * pair + i][j], a, b0, b1);
          else ptx::mma_s8(sums[2 * pair + i][j], a, b0, b1);
        }
      }
    }
  }
}

// The warp's sums to rows of kResultPitch words, tokens from row 0 on; a lane's four neighbouring features at once.
template <class S, class V>
__device__ __forceinline__ void hand_over(const V (&sums)[S::tiles_m][S::tiles_n][4], unsigned char* smem, int row0, int feature, int lane) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int pair = 0; pair < S::tiles_m / 2; ++pair)
#pragma unroll
    for (int j = 0; j < S::tiles_n; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        V* const to = reinterpret_cast<V*>(smem) + (row0 + 8 * j + 2 * t + e) * kResultPitch<S> + feature + 32 * pair + 16 * (g / 4) + 4 * (g % 4);
        alignas(16) const V v[4] = {sums[2 * pair][j][e], sums[2 * pair][j][2 + e], sums[2 * pair + 1][j][e], sums[2 * pair + 1][j][2 + e]};
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(v);
      }
}

// Rows that were handed over: y_in, bias, one rounding, or integers as they are. In loops of four elements, because all of
// it unrolled over every register would be most of the kernel's code.
template <class S, int kShift>
__device__ __forceinline__ void store_rows(const Product& p, const unsigned char* smem, int feature0, int token0, bool known) {
  const int rows = int(min(int64_t(kResultRows<S>), p.m - token0)), columns = int(min(int64_t(S::bm), p.n - feature0));
  void* const y = p.sums ? p.sums : p.y;
  const int size = p.sums || p.y_type == DType::f32 ? 4 : 2;
  const bool wide = p.n % 4 == 0 && reinterpret_cast<uintptr_t>(y) % (4 * size) == 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * (S::bm / 4); i += S::threads) {
    const int row = i / (S::bm / 4), column = i % (S::bm / 4) * 4;
    if (column >= columns) continue;
    const int64_t at = (int64_t(token0) + row) * p.n + feature0 + column;
    const uint4 words = reinterpret_cast<const uint4*>(smem)[row * (kResultPitch<S> / 4) + column / 4];
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
    uint32_t out[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float v = __uint_as_float(word[e]);
      if (p.sums) {
        v = __uint_as_float(uint32_t(int(word[e]) >> kShift));
      } else if (column + e < columns) {
        if (p.y_in) v += p.y_in[at + e];
        if (p.bias) v += load_scalar(p.bias, p.bias_type, feature0 + column + e);
        if (!known) v = __uint_as_float(0x7fc00000u);
      }
      out[e] = __float_as_uint(v);
      if (size == 2) store_scalar(out + e, p.y_type, 0, v);
    }
    if (wide) {
      if (size == 4) *reinterpret_cast<uint4*>(static_cast<uint32_t*>(y) + at) = {out[0], out[1], out[2], out[3]};
      else *reinterpret_cast<uint2*>(static_cast<uint16_t*>(y) + at) = {__byte_perm(out[0], out[1], 0x5410u), __byte_perm(out[2], out[3], 0x5410u)};
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (column + e >= columns) continue;
        if (size == 4) static_cast<uint32_t*>(y)[at + e] = out[e];
        else static_cast<uint16_t*>(y)[at + e] = uint16_t(out[e]);
      }
    }
  }
}

template <Operands kOperands, class S>
__global__ void __launch_bounds__(S::threads, S::blocks) quik_mma_kernel(const MmaArgs a) {
  EFFK_DYN_SMEM(smem);
  const Product& p = a.p;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_m = warp / S::warps_n, warp_n = warp % S::warps_n;
  // Eight tiles of tokens, then the next tile of features: neighbours in time share both.
  constexpr int kGroup = 8;
  const int tiles_m = int((p.n + S::bm - 1) / S::bm), tiles_n = int((p.m + S::bn - 1) / S::bn);
  const int group = blockIdx.x / (kGroup * tiles_m), in_group = blockIdx.x % (kGroup * tiles_m);
  const int columns = min(kGroup, tiles_n - group * kGroup);
  const int feature0 = in_group / columns * S::bm, token0 = (group * kGroup + in_group % columns) * S::bn;

  const int stages = a.int_stages + a.out_stages;
  IntegerLoader<kOperands, S> integer_loader(a, feature0 / t16::kTileRows, token0);
  const auto load = [&](int stage) {
    unsigned char* const to = smem + stage % S::stages * kSlot<S>;
    if (stage < a.int_stages) integer_loader.load(to);
    else load_outliers<S>(to, a, stage - a.int_stages, feature0, token0);
  };
  // Waits for a stage and starts the copies of the one that takes the place of the stage before it.
  const auto next = [&](int stage) {
    ptx::cp_async_wait<S::stages - 2>();
    __syncthreads();  // every thread's part of the stage has landed, and the stage that the next load replaces has been read
    if (stage + S::stages - 1 < stages) load(stage + S::stages - 1);
    ptx::cp_async_commit();
    return smem + stage % S::stages * kSlot<S>;
  };
#pragma unroll
  for (int i = 0; i < S::stages - 1; ++i) {
    if (i < stages) load(i);
    ptx::cp_async_commit();
  }

  int integers[S::tiles_m][S::tiles_n][4] = {};
  int stage = 0;
  for (; stage < a.int_stages; ++stage) {
    const unsigned char* const slot = next(stage);
    multiply_integers<kOperands, S>(integers, slot, warp_m, warp_n, lane);
  }
  const int feature = feature0 + warp_m * S::wm, token = token0 + warp_n * S::wn, g = lane / 4, t = lane % 4;
  constexpr int kShift = kOperands == Operands::w4 ? 4 : 0;
  // Results take the place of the ring, then of the rows before.
  const auto finish = [&](auto& sums, bool known) {
    ptx::cp_async_wait<0>();
#pragma unroll 1
    for (int row0 = 0; row0 < S::bn; row0 += kResultRows<S>) {
      __syncthreads();
      const int own = warp_n * S::wn - row0;
      if (own >= 0 && own < kResultRows<S>) hand_over<S>(sums, smem, own, warp_m * S::wm, lane);
      __syncthreads();
      store_rows<S, kShift>(p, smem, feature0, token0 + row0, known);
    }
  };
  if (p.sums) {
    finish(integers, true);
    return;
  }

  // A = 16 A / 16: the factor is a power of two, so that it rounds nothing.
  float sums[S::tiles_m][S::tiles_n][4];
#pragma unroll
  for (int pair = 0; pair < S::tiles_m / 2; ++pair) {
    const int first = feature + 32 * pair + 16 * (g / 4) + 4 * (g % 4);
    float scale[4], reduced[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const bool inside = first + r < p.n;
      scale[r] = inside ? p.w_scale[first + r] * (1.0f / (1 << kShift)) : 0.0f;
      reduced[r] = inside ? p.w_reduced[first + r] : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < S::tiles_n; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int row = token + 8 * j + 2 * t + e;
        const float s = row < p.m ? p.scale[row] : 0.0f, offset = row < p.m ? fmaf(p.half, s, p.zero[row]) : 0.0f;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int i = 2 * pair + r / 2, c = 2 * (r % 2) + e;
          sums[i][j][c] = fmaf(s * scale[r], float(integers[i][j][c]), offset * reduced[r]);
        }
      }
  }
  for (; stage < stages; ++stage) {
    const unsigned char* const slot = next(stage);
    const unsigned char* const tokens = slot + S::bm * kStageBytes;
    if (p.out_type == DType::f16) multiply_tiles<__half, S, true, true>(sums, slot, tokens, warp_m, warp_n, lane);
    else multiply_tiles<__nv_bfloat16, S, true, true>(sums, slot, tokens, warp_m, warp_n, lane);
  }
  bool known = true;
  if (p.header)
#pragma unroll
    for (int i = 0; i < 8; ++i) known = known && p.header[i] == p.expected[i];
  finish(sums, known);
}

template <Operands kOperands, class S>
cudaError_t launch_tile(const MmaArgs& a, cudaStream_t stream) {
  const int64_t blocks = ((a.p.n + S::bm - 1) / S::bm) * ((a.p.m + S::bn - 1) / S::bn);
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  Launch at;
  at.grid = dim3(unsigned(blocks));
  at.block = dim3(S::threads);
  at.smem = S::stages * kSlot<S>;
  static_assert(kResultRows<S> * kResultPitch<S> * 4 <= S::stages * kSlot<S>, "results fit in place of the ring");
  at.stream = stream;
  return launch(quik_mma_kernel<kOperands, S>, at, a);
}

}  // namespace

template <Operands kOperands>
cudaError_t launch_product(const MmaArgs& a, bool large, cudaStream_t stream) {
  return large ? launch_tile<kOperands, LargeTile>(a, stream) : launch_tile<kOperands, SmallTile>(a, stream);
}

}  // namespace effk::cuda::quik
