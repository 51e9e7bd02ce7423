// relu_ffn on CUDA: what looks at all gates, the list of inputs, the last sum, and the launches of a call.
#include "ops/relu_ffn/cuda.h"

#include <algorithm>

#include "ops/relu_ffn/cuda_rows.h"

namespace effk::cuda::relu_ffn {

#define EFFK_ROWS(R)                                                                                      \
  extern template cudaError_t launch_gates<Rows::R>(const Step&, bool overlap, cudaStream_t); \
  extern template cudaError_t launch_down<Rows::R>(const Step&, bool overlap, cudaStream_t);
EFFK_ROWS(f32) EFFK_ROWS(bf16) EFFK_ROWS(f16) EFFK_ROWS(i8) EFFK_ROWS(i4)
#undef EFFK_ROWS

namespace {

constexpr int kThreads = 256, kAllThreads = 1024;

// Whether a kernel may start while the one before it ends, asked once a thread and device.
cudaError_t can_overlap(bool& answer) {
#ifdef EFFK_CUEMU
  answer = false;
  return cudaSuccess;
#else
  thread_local int known = -1, major = 0;
  int current;
  cudaError_t e = cudaGetDevice(&current);
  if (e == cudaSuccess && current != known) {
    e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, current);
    if (e == cudaSuccess) known = current;
  }
  answer = major >= 9;
  return e;
#endif
}

// The sum of what the threads of a block have, in one order; every thread gets it.
template <class T>
__device__ __forceinline__ T block_sum(T v, T* shared) {
#pragma unroll
  for (int distance = 16; distance; distance /= 2) v += __shfl_xor_sync(0xffffffffu, v, distance);
  __syncthreads();  // the sum before has been read
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  T sum = shared[0];
  for (int w = 1; w < kAllThreads / 32; ++w) sum += shared[w];
  return sum;
}

// gelu_gauss: a block a token. mean + z std, sums in double as on the CPU.
__global__ void __launch_bounds__(kAllThreads, 1) gate_cut_kernel(const Step p) {
  __shared__ double shared[kAllThreads / 32];
  ptx::grid_wait();
  ptx::grid_release();
  const float* const g = p.gates + int64_t(blockIdx.x) * p.f;
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < p.f; i += kAllThreads) sum += double(g[i]);
  const double mean = block_sum(sum, shared) / double(p.f);
  double squares = 0.0;
  for (int64_t i = threadIdx.x; i < p.f; i += kAllThreads) squares += (double(g[i]) - mean) * (double(g[i]) - mean);
  squares = block_sum(squares, shared);
  if (threadIdx.x == 0) p.cut[blockIdx.x] = float(mean + double(p.param[0]) * sqrt(squares / double(p.f)));
}

// top_k: a block a token. The k-th largest size, bit by bit from the highest, in 31 counts of all sizes; then its ties, lower
// indices first. No histogram, and so no atomics.
__global__ void __launch_bounds__(kAllThreads, 1) gate_top_kernel(const Step p) {
  __shared__ int shared[kAllThreads / 32];
  ptx::grid_wait();
  ptx::grid_release();
  const float* const g = p.gates + int64_t(blockIdx.x) * p.f;
  uint8_t* const kept = p.kept + int64_t(blockIdx.x) * p.f;
  // The bits of |g|, which are ordered as the numbers are; NaN is as large as infinity, and what is masked below zero.
  const auto size = [&](int64_t i) {
    if (p.mask && !in_mask(p, int(blockIdx.x), i)) return -1;
    const uint32_t bits = __float_as_uint(g[i]) & 0x7fffffffu;
    return int(min(bits, 0x7f800000u));
  };
  const auto count = [&](int least) {
    int n = 0;
    for (int64_t i = threadIdx.x; i < p.f; i += kAllThreads) n += size(i) >= least;
    return block_sum(n, shared);
  };
  const float k = p.param[0];
  const int most = count(0), keep = k > 0.0f ? int(min(double(most), double(k))) : 0;
  int cut = 0;
  for (int bit = 30; bit >= 0; --bit)
    if (count(cut | 1 << bit) >= keep) cut |= 1 << bit;
  const int ties = keep - count(cut + 1);  // of those with size `cut`
  // Ties of this thread's run of neurons start behind those of lower threads.
  const int64_t from = p.f * threadIdx.x / kAllThreads, to = p.f * (threadIdx.x + 1) / kAllThreads;
  int own = 0;
  for (int64_t i = from; i < to; ++i) own += size(i) == cut;
  int before = own;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_sync(0xffffffffu, before, lane >= distance ? lane - distance : lane);
    if (lane >= distance) before += other;
  }
  __syncthreads();
  if (lane == 31) shared[warp] = before;
  __syncthreads();
  before -= own;
  for (int w = 0; w < warp; ++w) before += shared[w];
  for (int64_t i = from; i < to; ++i) {
    const int s = size(i);
    kept[i] = keep > 0 && (s > cut || (s == cut && before < ties));
    before += s == cut;
  }
}

// input_sparse_linear: the inputs above their threshold, as the gates of relu_ffn would leave them. Half a warp a list.
__global__ void __launch_bounds__(kThreads, 4) input_list_kernel(const Step p) {
  const int set = blockIdx.y, block = blockIdx.x * (kThreads / kBlock) + threadIdx.x / kBlock, j = threadIdx.x % kBlock;
  const int tokens = tokens_of(p, set), lane = threadIdx.x % 32;
  const int64_t i = int64_t(j) * p.blocks + block;
  const bool there = block < p.blocks && i < p.f;
  const float least = there && p.param ? p.param[p.param_each ? i : 0] : 0.0f;
  float v[kMaxTokens];
  uint32_t any = 0, own = 0;
#pragma unroll
  for (int t = 0; t < kMaxTokens; ++t) {
    v[t] = there && t < tokens ? load_scalar(p.x, p.dtype, (int64_t(set) * kMaxTokens + t) * p.f + i) : 0.0f;
    const bool on = there && t < tokens && !(fabsf(v[t]) <= least);
    if (!on) v[t] = 0.0f;
    const uint32_t votes = __ballot_sync(0xffffffffu, on) >> (lane & kBlock) & 0xffffu;
    any |= votes;
    if (t == j) own = __popc(votes);
  }
  if (block >= p.blocks) return;
  const int64_t run = (int64_t(set) * p.blocks + block) * kBlock;
  if (j < kMaxTokens) p.active[run / kBlock * kMaxTokens + j] = own;
  if (j == 0) p.counts[run / kBlock] = __popc(any);
  if (any >> j & 1) {
    const int64_t to = run + __popc(any & ((1u << j) - 1));
    p.index[to] = int32_t(i);
#pragma unroll
    for (int t = 0; t < kMaxTokens; ++t)
      if (t < p.width) p.h[to * p.width + t] = v[t];
  }
}

// A thread a result; behind them a warp a token for nnz.
__global__ void __launch_bounds__(kThreads, 6) neuron_finish_kernel(const Step p, int result_blocks) {
  ptx::grid_wait();
  ptx::grid_release();
  if (int(blockIdx.x) >= result_blocks) {
    const int set = blockIdx.x - result_blocks, token = threadIdx.x / 32, lane = threadIdx.x % 32;
    const bool there = token < tokens_of(p, set);
    int sum = 0;
    for (int64_t b = lane; there && b < p.blocks; b += 32) sum += p.active[(int64_t(set) * p.blocks + b) * kMaxTokens + token];
#pragma unroll
    for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (there && lane == 0) p.nnz[set * kMaxTokens + token] = sum;
    return;
  }
  const int64_t ld = int64_t(p.out_chunks) * kChunk, item = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= p.tokens * ld) return;
  const int64_t token = item / ld, place = item % ld;
  const int at = int(place % kChunk), half = at / 128, lane = at % 128 / 4;
  const int64_t column = place - at + column_of(p.type, lane, 4 * half + at % 4);
  if (column >= p.d_out) return;
  const float* const from = p.partial + ((token / kMaxTokens * p.slices) * p.width + token % kMaxTokens) * ld + place;
  float sum = 0.0f;
#pragma unroll 4
  for (int slice = 0; slice < p.slices; ++slice) sum += from[slice * p.width * ld];
  if (p.down.bias) sum += p.down.bias[column];
  store_scalar(p.y, p.dtype, token * p.d_out + column, sum);
}

// Memory of a step, cut in order.
struct Room {
  char* at;
  template <class T>
  T* take(int64_t count) {
    T* const here = reinterpret_cast<T*>(at);
    at += (count * int64_t(sizeof(T)) + 255) / 256 * 256;
    return here;
  }
};
void furnish(Step& p, Room& room, bool looks_first) {
  const int64_t lists = int64_t(p.sets) * p.blocks;
  if (looks_first) {
    p.gates = room.take<float>(p.tokens * p.f);
    p.cut = room.take<float>(p.tokens);
    p.kept = room.take<uint8_t>(p.tokens * p.f);
  }
  p.index = room.take<int32_t>(lists * kBlock);
  p.counts = room.take<int32_t>(lists);
  p.active = room.take<int32_t>(lists * kMaxTokens);
  p.h = room.take<float>(lists * kBlock * p.width);
  p.partial = room.take<float>(int64_t(p.sets) * p.slices * p.width * p.out_chunks * kChunk);
}

int shift_of(int64_t group) { return group == 32 ? 5 : group == 64 ? 6 : group == 128 ? 7 : 31; }

// Sizes of a step of `tokens`, from `rows` neurons or inputs to d_out columns.
void measure(Step& p, int64_t tokens, int64_t rows, int64_t d_out, neuron::Rows type, int64_t group) {
  p.type = type;
  p.group_shift = shift_of(group);
  p.tokens = int(std::min<int64_t>(tokens, kRound));
  p.sets = (p.tokens + kMaxTokens - 1) / kMaxTokens;
  p.width = p.tokens == 1 ? 1 : p.tokens <= 4 ? 4 : 8;
  p.f = rows, p.d_out = d_out;
  p.blocks = int((rows + kBlock - 1) / kBlock);
  p.slices = (p.blocks + kSlice - 1) / kSlice;
  p.out_chunks = int((d_out + kChunk - 1) / kChunk);
  p.out_bytes = neuron::row_bytes(type, d_out), p.out_groups = neuron::groups(d_out, group);
}
Step step_of(const effk::relu_ffn::Args& a, int64_t first) {
  Step p{};
  measure(p, a.tokens - first, a.f, a.d, a.type, a.group);
  p.gate = a.gate, p.up = a.up, p.down = a.down;
  p.row_bytes = p.out_bytes, p.groups = p.out_groups, p.chunks = p.out_chunks, p.d = a.d;
  constexpr int kPanelBytes = 32 * 1024;
  p.panel = kPanelBytes / (p.width * kChunk * 4);
  p.kind = a.kind, p.param = a.param, p.param_each = a.param_each, p.dense = a.dense;
  p.mask = a.mask, p.mask_rows = a.mask_rows, p.mask_bytes = a.mask_bytes, p.mask_group = a.mask_group, p.first = first;
  const int64_t size = a.dtype == DType::f32 ? 4 : 2;
  p.x = static_cast<const char*>(a.x) + first * a.d * size, p.dtype = a.dtype;
  p.quads = a.d % 4 == 0 && reinterpret_cast<uintptr_t>(p.x) % (4 * size) == 0;
  p.y = static_cast<char*>(a.y) + first * a.d * size;
  p.nnz = a.nnz + first;
  return p;
}
bool looks_first(Gate kind) { return kind == Gate::gelu_gauss || kind == Gate::top_k; }

// f(rows as a type)
template <class F>
cudaError_t for_rows(neuron::Rows type, const F& f) {
  switch (type) {
    case Rows::f32: return f(std::integral_constant<Rows, Rows::f32>());
    case Rows::bf16: return f(std::integral_constant<Rows, Rows::bf16>());
    case Rows::f16: return f(std::integral_constant<Rows, Rows::f16>());
    case Rows::i8: return f(std::integral_constant<Rows, Rows::i8>());
    default: return f(std::integral_constant<Rows, Rows::i4>());
  }
}

Launch grid(unsigned x, unsigned y, int threads, bool overlap, cudaStream_t stream) {
  Launch at;
  at.grid = dim3(x, y);
  at.block = dim3(unsigned(threads));
  at.stream = stream;
  at.overlap = overlap;
  return at;
}

cudaError_t down_and_finish(const Step& p, bool overlap, cudaStream_t stream) {
  const cudaError_t e = for_rows(p.type, [&](auto rows) { return launch_down<decltype(rows)::value>(p, overlap, stream); });
  if (e != cudaSuccess) return e;
  const int64_t results = int64_t(p.tokens) * p.out_chunks * kChunk;
  const int blocks = int((results + kThreads - 1) / kThreads);
  return launch(neuron_finish_kernel, grid(unsigned(blocks + p.sets), 1, kThreads, overlap, stream), p, blocks);
}

cudaError_t run_step(Step p, bool overlap, cudaStream_t stream) {
  const auto gates = [&](bool after) { return for_rows(p.type, [&](auto rows) { return launch_gates<decltype(rows)::value>(p, after, stream); }); };
  if (looks_first(p.kind)) {
    p.only_gates = true;
    cudaError_t e = gates(false);
    p.only_gates = false;
    if (e != cudaSuccess) return e;
    const auto look = p.kind == Gate::top_k ? gate_top_kernel : gate_cut_kernel;
    e = launch(look, grid(unsigned(p.tokens), 1, kAllThreads, overlap, stream), p);
    if (e != cudaSuccess) return e;
  }
  const cudaError_t e = gates(overlap && looks_first(p.kind));
  return e == cudaSuccess ? down_and_finish(p, overlap, stream) : e;
}

template <class P>
size_t bytes_of(P p, bool looks) {
  Room room{nullptr};
  furnish(p, room, looks);
  return size_t(reinterpret_cast<uintptr_t>(room.at));
}

Step step_of(const effk::relu_ffn::InputSparseArgs& a, int64_t first) {
  Step p{};
  measure(p, a.tokens - first, a.d_in, a.d_out, a.type, a.group);
  p.down = a.w;
  p.param = a.threshold, p.param_each = a.threshold_each;
  const int64_t size = a.dtype == DType::f32 ? 4 : 2;
  p.x = static_cast<const char*>(a.x) + first * a.d_in * size, p.dtype = a.dtype;
  p.y = static_cast<char*>(a.y) + first * a.d_out * size;
  p.nnz = a.nnz + first;
  return p;
}

}  // namespace

size_t workspace(const effk::relu_ffn::Args& a) { return a.tokens ? bytes_of(step_of(a, 0), looks_first(a.kind)) : 0; }
size_t input_sparse_workspace(const effk::relu_ffn::InputSparseArgs& a) { return a.tokens ? bytes_of(step_of(a, 0), false) : 0; }

int run(const effk::relu_ffn::Args& a, void* memory, Stream stream) {
  bool overlap;
  cudaError_t e = can_overlap(overlap);
  for (int64_t first = 0; e == cudaSuccess && first < a.tokens; first += kRound) {
    Step p = step_of(a, first);
    Room room{static_cast<char*>(memory)};
    furnish(p, room, looks_first(a.kind));
    e = run_step(p, overlap, static_cast<cudaStream_t>(stream));
  }
  return int(e);
}

int input_sparse(const effk::relu_ffn::InputSparseArgs& a, void* memory, Stream stream) {
  bool overlap;
  cudaError_t e = can_overlap(overlap);
  for (int64_t first = 0; e == cudaSuccess && first < a.tokens; first += kRound) {
    Step p = step_of(a, first);
    Room room{static_cast<char*>(memory)};
    furnish(p, room, false);
    const auto s = static_cast<cudaStream_t>(stream);
    const int lists = kThreads / kBlock;
    e = launch(input_list_kernel, grid(unsigned((p.blocks + lists - 1) / lists), unsigned(p.sets), kThreads, false, s), p);
    if (e == cudaSuccess) e = down_and_finish(p, overlap, s);
  }
  return int(e);
}

const char* error_text(int error) {
#ifdef EFFK_CUEMU
  (void)error;
  return "the emulation has no CUDA errors";
#else
  return cudaGetErrorString(static_cast<cudaError_t>(error));
#endif
}

}  // namespace effk::cuda::relu_ffn
