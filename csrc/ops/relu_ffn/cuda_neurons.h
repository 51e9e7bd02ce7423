// The two kernels of relu_ffn on CUDA that read weights, for one type of rows: a .cu file each. Chosen for every call; cuda.h says
// what they do and in which order they add.
//
// Bound: bytes of the rows that are read. A warp has 4 rows of gate, and with the loads of a step (below) 2 KiB to 4 KiB under way.
// Known gaps: x in fp32 costs the shared memory of 8 tokens as much time as the multiply-adds (half of what bf16 rows take to come
// from memory); int4 needs 5 instructions a weight, which is the time that its bytes take already at one token.
#pragma once
#include <algorithm>

#include "ops/relu_ffn/cuda_rows.h"

namespace effk::cuda::relu_ffn {
namespace {

// Tokens a kernel is compiled for; blocks of a multiprocessor.
template <int Tokens, int Blocks>
struct Shape {
  static constexpr int tokens = Tokens, blocks = Blocks;
};

constexpr int kGateThreads = 128, kGateWarps = 4, kRowsOfWarp = kBlock / kGateWarps;
constexpr int kDownThreads = 256, kDownWarps = 8;
static_assert(kDownWarps * kLists == kSlice && kRowsOfWarp == 4, "as cuda_rows.h deals neurons");

// Chunks that a lane has loaded of its 4 rows before it multiplies: 32 registers for one token, 16 beside more sums; less where weights
// are widened and scaled, which takes registers too (ptxas does it for all steps at once, and spills beyond this).
constexpr int steps_of(Rows r, int tokens) { return neuron::quantised(r) ? (tokens == 1 ? 2 : 1) : std::max(1, (tokens == 1 ? 8 : 4) / lane_words(r)); }

// x of this set of tokens, chunks [first, first + count), into [token][chunk][half][lane][4].
template <Rows R, int T>
__device__ __forceinline__ void stage(const Step& p, int set, int first, int count, float* xs) {
  const int tokens = tokens_of(p, set);
  for (int item = threadIdx.x; item < T * count * 32; item += kGateThreads) {
    const int lane = item % 32, chunk = item / 32 % count, token = item / 32 / count;
    float v[8] = {};
    if (token < tokens) {
      const int64_t row = (int64_t(set) * kMaxTokens + token) * p.d, from = int64_t(first + chunk) * kChunk;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t column = from + column_of(R, lane, 4 * half);
        if (R != Rows::i4 && p.quads && column + 4 <= p.d) {
          if (p.dtype == DType::f32) {
            const float4 q = *reinterpret_cast<const float4*>(static_cast<const float*>(p.x) + row + column);
            v[4 * half] = q.x, v[4 * half + 1] = q.y, v[4 * half + 2] = q.z, v[4 * half + 3] = q.w;
          } else {
            const uint2 q = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(p.x) + row + column);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const uint32_t word = e < 2 ? q.x : q.y;
              const __half2 pair = reinterpret_cast<const __half2&>(word);
              if (p.dtype == DType::f16) v[4 * half + e] = e % 2 ? __high2float(pair) : __low2float(pair);
              else v[4 * half + e] = __uint_as_float(e % 2 ? word & 0xffff0000u : word << 16);
            }
          }
        } else {
#pragma unroll
          for (int e = 4 * half; e < 4 * half + 4; ++e) {
            const int64_t own = from + column_of(R, lane, e);
            if (own < p.d) v[e] = load_scalar(p.x, p.dtype, row + own);
          }
        }
      }
    }
    float4* const to = reinterpret_cast<float4*>(xs) + ((token * count + chunk) * 2) * 32 + lane;
    to[0] = float4{v[0], v[1], v[2], v[3]};
    to[32] = float4{v[4], v[5], v[6], v[7]};
  }
}

// sums[r T + t] += row neurons[r] (-1: none) of w times x of token t over the chunks begin, begin + stride, ... < end of a panel that starts at chunk
// `first` and has `count`.
template <Rows R, int T>
__device__ __forceinline__ void dots(const Step& p, const NeuronRows& w, const int (&neurons)[kRowsOfWarp], const float* xs, int first, int count, int begin, int stride,
                                     int lane, float (&sums)[kRowsOfWarp * T]) {
  constexpr int kSteps = steps_of(R, T);
#pragma unroll 1
  for (int c = begin; c < count; c += kSteps * stride) {
    Raw<R> raw[kSteps][kRowsOfWarp];
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
#pragma unroll
      for (int r = 0; r < kRowsOfWarp; ++r)
        raw[s][r] = load_raw<R>(w.rows + max(neurons[r], 0) * p.row_bytes, p.row_bytes, first + c + s * stride, lane,
                                neurons[r] >= 0 && c + s * stride < count);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int chunk = c + s * stride;
      if (chunk >= count) continue;
      float v[kRowsOfWarp][8];
#pragma unroll
      for (int r = 0; r < kRowsOfWarp; ++r) {
        const float* const scales = neuron::quantised(R) ? w.scales + max(neurons[r], 0) * p.groups : nullptr;
        widen<R>(raw[s][r], load_scales<R>(scales, p.groups, p.group_shift, first + chunk, lane, neurons[r] >= 0), v[r]);
      }
#pragma unroll
      for (int t = 0; t < T; ++t) {
        const float4* const x = reinterpret_cast<const float4*>(xs) + ((t * count + chunk) * 2) * 32 + lane;
        const float4 a = x[0], b = x[32];
#pragma unroll
        for (int r = 0; r < kRowsOfWarp; ++r) {
          float& sum = sums[r * T + t];
          sum = fmaf(v[r][0], a.x, sum), sum = fmaf(v[r][1], a.y, sum), sum = fmaf(v[r][2], a.z, sum), sum = fmaf(v[r][3], a.w, sum);
          sum = fmaf(v[r][4], b.x, sum), sum = fmaf(v[r][5], b.y, sum), sum = fmaf(v[r][6], b.z, sum), sum = fmaf(v[r][7], b.w, sum);
        }
      }
    }
  }
}

// a(g), and whether the neuron is active: relu_ffn.h.
__device__ __forceinline__ bool open_gate(Gate kind, float g, float param, float cut, float& a) {
  a = g;
  switch (kind) {
    case Gate::relu2: a = g * g; return !(g <= 0.0f);
    case Gate::shifted_relu: a = g - param; return !(g <= param);
    case Gate::fatrelu: return !(g <= param);
    case Gate::silu_threshold: a = activate(g, Activation::silu); return !(fabsf(a) < param);
    case Gate::gelu_gauss: a = activate(g - cut, Activation::gelu_tanh); return !(g <= cut);
    case Gate::top_k: return true;  // `kept` says
    default: return !(g <= 0.0f);
  }
}

template <Rows R, class S>
__global__ void __launch_bounds__(kGateThreads, S::blocks) neuron_gate_kernel(const Step p) {
  constexpr int T = S::tokens, kSums = kRowsOfWarp * T, kLanes = 32 / kSums;  // lanes that end with the same sum
  EFFK_DYN_SMEM(smem);
  float* const xs = reinterpret_cast<float*>(smem);
  __shared__ float gates[T][kBlock];
  __shared__ uint32_t active[T];
  __shared__ int list[kBlock];
  __shared__ float parts[kGateWarps][kSums];
  const int set = blockIdx.x % p.sets, block = blockIdx.x / p.sets;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tokens = tokens_of(p, set);
  const auto neuron = [&](int j) { return int64_t(j) * p.blocks + block; };
  ptx::grid_wait();
  ptx::grid_release();

  const bool seen = p.gates && !p.only_gates;
  const bool one_panel = p.chunks <= p.panel;
  if (!seen) {
    int rows[kRowsOfWarp];
    const bool masked = p.mask && p.kind != Gate::gelu_gauss;  // its cut counts every gate
#pragma unroll
    for (int r = 0; r < kRowsOfWarp; ++r) {
      const int64_t i = neuron(warp * kRowsOfWarp + r);
      bool wanted = i < p.f;
      if (wanted && masked) {
        wanted = false;
        for (int t = 0; t < (p.mask_rows == 1 ? 1 : tokens); ++t) wanted = wanted || in_mask(p, set * kMaxTokens + t, i);
      }
      rows[r] = wanted ? int(i) : -1;
    }
    float sums[kSums] = {};
    for (int first = 0; first < p.chunks; first += p.panel) {
      const int count = min(p.panel, p.chunks - first);
      if (first) __syncthreads();  // everybody is done with the panel before
      stage<R, T>(p, set, first, count, xs);
      __syncthreads();
      dots<R, T>(p, p.gate, rows, xs, first, count, 0, 1, lane, sums);
    }
    const float sum = lane_totals(sums, lane);
    const int own = lane / kLanes, j = warp * kRowsOfWarp + own / T;
    if (lane % kLanes == 0) gates[own % T][j] = p.gate.bias && neuron(j) < p.f ? sum + p.gate.bias[neuron(j)] : sum;
  }
  __syncthreads();

  // A thread a token and neuron; the lists come from ballots.
  {
    const int t = threadIdx.x / kBlock, j = threadIdx.x % kBlock;
    const int64_t i = neuron(j);
    const bool there = t < T && t < tokens && i < p.f;
    const int64_t token = int64_t(set) * kMaxTokens + t;
    bool on = false;
    float a = 0.0f;
    if (there) {
      const float g = seen ? p.gates[token * p.f + i] : gates[t][j];
      if (p.only_gates) p.gates[token * p.f + i] = g;
      on = open_gate(p.kind, g, p.param ? p.param[p.param_each ? i : 0] : 0.0f, p.kind == Gate::gelu_gauss && seen ? p.cut[token] : 0.0f, a);
      if (p.mask) on = on && in_mask(p, int(token), i);
      if (p.kind == Gate::top_k && seen) on = on && p.kept[token * p.f + i];
    }
    const uint32_t votes = __ballot_sync(0xffffffffu, on);
    if (t < T) {
      gates[t][j] = on ? a : 0.0f;
      if (j == 0) active[t] = votes >> (lane & kBlock) & 0xffffu;
    }
  }
  if (p.only_gates) return;
  __syncthreads();
  uint32_t any = 0;
#pragma unroll
  for (int t = 0; t < T; ++t) any |= active[t];
  if (p.dense) {
    const int64_t left = p.f - block;
    any = (1u << (left <= 0 ? 0 : min(int64_t(kBlock), (left + p.blocks - 1) / p.blocks))) - 1;
  }
  const int count = __popc(any);
  const int64_t run = (int64_t(set) * p.blocks + block) * kBlock;
  if (threadIdx.x < kBlock && any >> threadIdx.x & 1) {
    const int place = __popc(any & ((1u << threadIdx.x) - 1));
    list[place] = threadIdx.x;
    p.index[run + place] = int32_t(neuron(threadIdx.x));
  }
  if (threadIdx.x == 0) p.counts[run / kBlock] = count;
  if (threadIdx.x < T) p.active[run / kBlock * kMaxTokens + threadIdx.x] = __popc(active[threadIdx.x]);
  __syncthreads();

  if (!p.up.rows) {
    for (int i = threadIdx.x; i < count * T; i += kGateThreads) p.h[run * T + i] = gates[i % T][list[i / T]];
    return;
  }
  // u, four rows at a time: a warp has every fourth chunk of them, because there may be fewer rows than warps.
#pragma unroll 1
  for (int first_row = 0; first_row < count; first_row += kRowsOfWarp) {
    int rows[kRowsOfWarp];
#pragma unroll
    for (int r = 0; r < kRowsOfWarp; ++r) rows[r] = first_row + r < count ? int(neuron(list[first_row + r])) : -1;
    float sums[kSums] = {};
    for (int first = 0; first < p.chunks; first += p.panel) {
      const int part = min(p.panel, p.chunks - first);
      if (!one_panel || (seen && first_row == 0)) {  // nobody reads what was there: every panel but the last has a multiple of four chunks
        stage<R, T>(p, set, first, part, xs);
        __syncthreads();
      }
      dots<R, T>(p, p.up, rows, xs, first, part, warp, kGateWarps, lane, sums);
    }
    const float sum = lane_totals(sums, lane);
    if (lane % kLanes == 0) parts[warp][lane / kLanes] = sum;
    __syncthreads();
    const int t = threadIdx.x % T, k = first_row + threadIdx.x / T;
    if (threadIdx.x < kSums && k < count) {
      float u = parts[0][threadIdx.x];
#pragma unroll
      for (int w = 1; w < kGateWarps; ++w) u += parts[w][threadIdx.x];
      const int j = list[k];
      if (p.up.bias) u += p.up.bias[neuron(j)];
      if (p.kind == Gate::drelu && u <= 0.0f) u = 0.0f;
      const float a = gates[t][j];
      p.h[(run + k) * T + t] = a == 0.0f ? 0.0f : a * u;  // a token for which the neuron is inactive takes nothing from it
    }
    __syncthreads();
  }
}

template <Rows R, class S>
__global__ void __launch_bounds__(kDownThreads, S::blocks) neuron_down_kernel(const Step p) {
  constexpr int T = S::tokens, kPlaces = kLists * kBlock, kRows = R == Rows::f32 || R == Rows::i4 ? 4 : 8;  // rows under way
  __shared__ int32_t index[kDownWarps][kPlaces];
  __shared__ __align__(16) float h[kDownWarps][kPlaces][T];
  __shared__ __align__(16) float sums[kDownWarps][kChunk];
  const int set = blockIdx.x % p.sets, chunk = blockIdx.x / p.sets, slice = blockIdx.y;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tokens = tokens_of(p, set);
  ptx::grid_wait();
  ptx::grid_release();

  // The warp's lists as one.
  int count = 0;
#pragma unroll
  for (int place = 0; place < kPlaces; place += 32) {
    const int list = slice * kSlice + warp * kLists + (place + lane) / kBlock;
    const int64_t run = int64_t(set) * p.blocks + list;
    const bool there = list < p.blocks && lane % kBlock < p.counts[run];
    const uint32_t votes = __ballot_sync(0xffffffffu, there);
    if (there) {
      const int to = count + __popc(votes & ((1u << lane) - 1));
      index[warp][to] = p.index[run * kBlock + lane % kBlock];
#pragma unroll
      for (int t = 0; t < T; ++t) h[warp][to][t] = p.h[(run * kBlock + lane % kBlock) * T + t];
    }
    count += __popc(votes);
  }
  __syncwarp();

  float acc[T][8] = {};
#pragma unroll 1
  for (int k = 0; k < count; k += kRows) {
    Raw<R> raw[kRows];
    Scales<R> scales[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const bool there = k + r < count;
      const int64_t i = there ? index[warp][k + r] : 0;
      raw[r] = load_raw<R>(p.down.rows + i * p.out_bytes, p.out_bytes, chunk, lane, there);
      scales[r] = load_scales<R>(neuron::quantised(R) ? p.down.scales + i * p.out_groups : nullptr, p.out_groups, p.group_shift, chunk, lane, there);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (k + r >= count) continue;
      float w[8];
      widen<R>(raw[r], scales[r], w);
#pragma unroll
      for (int t = 0; t < T; ++t) {
        const float factor = h[warp][k + r][t];
#pragma unroll
        for (int e = 0; e < 8; ++e) acc[t][e] = fmaf(factor, w[e], acc[t][e]);
      }
    }
  }

  float* const to = p.partial + (int64_t(set) * p.slices + slice) * T * p.out_chunks * kChunk + chunk * kChunk + threadIdx.x;
#pragma unroll
  for (int t = 0; t < T; ++t) {
    if (t >= tokens) break;
    float4* const own = reinterpret_cast<float4*>(sums[warp]) + lane;
    own[0] = float4{acc[t][0], acc[t][1], acc[t][2], acc[t][3]};
    own[32] = float4{acc[t][4], acc[t][5], acc[t][6], acc[t][7]};
    __syncthreads();
    float sum = sums[0][threadIdx.x];
#pragma unroll
    for (int w = 1; w < kDownWarps; ++w) sum += sums[w][threadIdx.x];
    to[int64_t(t) * p.out_chunks * kChunk] = sum;
    __syncthreads();
  }
}

template <Rows R, class S>
cudaError_t gates_of(const Step& p, bool overlap, cudaStream_t stream) {
  Launch at;
  at.grid = dim3(unsigned(p.sets) * unsigned(p.blocks));
  at.block = dim3(kGateThreads);
  at.smem = size_t(S::tokens) * std::min(p.panel, p.chunks) * kChunk * 4;
  at.stream = stream;
  at.overlap = overlap;
  return launch(neuron_gate_kernel<R, S>, at, p);
}
template <Rows R, class S>
cudaError_t down_of(const Step& p, bool overlap, cudaStream_t stream) {
  Launch at;
  at.grid = dim3(unsigned(p.sets) * unsigned(p.out_chunks), unsigned(p.slices));
  at.block = dim3(kDownThreads);
  at.stream = stream;
  at.overlap = overlap;
  return launch(neuron_down_kernel<R, S>, at, p);
}

}  // namespace

template <Rows R>
cudaError_t launch_gates(const Step& p, bool overlap, cudaStream_t stream) {
  if (p.width == 1) return gates_of<R, Shape<1, 6>>(p, overlap, stream);
  if (p.width == 4) return gates_of<R, Shape<4, 4>>(p, overlap, stream);
  return gates_of<R, Shape<8, 4>>(p, overlap, stream);
}
template <Rows R>
cudaError_t launch_down(const Step& p, bool overlap, cudaStream_t stream) {
  if (p.width == 1) return down_of<R, Shape<1, 3>>(p, overlap, stream);
  if (p.width == 4) return down_of<R, Shape<4, 2>>(p, overlap, stream);
  return down_of<R, Shape<8, 2>>(p, overlap, stream);
}

}  // namespace effk::cuda::relu_ffn
