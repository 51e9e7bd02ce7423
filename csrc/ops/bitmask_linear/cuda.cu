// bitmask_linear on CUDA. A block of threads has a panel of 8 rows and up to 4 tokens; its warps share the columns, each a run of
// blocks of 64. A lane takes two columns of a block: the values of a row's block lie one behind the other, so the set bits below its own
// say where its values are, and the warp's loads of them are one run of bytes. x is loaded once for 8 rows.
//
// Bound: bytes, (1 - s) size + 1/8 a weight; instructions come close: about 20 + 2 T a warp for 64 weights and T tokens, whatever the
// sparsity, 6 us for 4096 x 4096 on an H100, where int8 at 75 % is read in 2 us and bf16 at 50 % in 6. Known gap: values of one byte
// are loaded one by one.
#include "ops/bitmask_linear/cuda.h"

#include <algorithm>

#include "cuda/gemm_problem.h"

namespace effk::cuda::bitmask {
namespace {

using effk::bitmask::Args;
using effk::bitmask::kBlock;
using effk::bitmask::kRows;
using effk::bitmask::Values;
using effk::bitmask::Weight;

constexpr int kThreads = 256, kWarps = kThreads / 32;

// Tokens a kernel is compiled for; blocks of a multiprocessor.
template <int Tokens, int Blocks>
struct Shape {
  static constexpr int tokens = Tokens, blocks = Blocks;
};

struct Problem {
  Args a;
  int64_t stored, blocks, groups, ld;  // ld: elements of a row of x below
  int unit, sets;                      // blocks of a group, or 1; sets of tokens
  float* floats;                       // x in fp32, or
  int8_t* codes;                       // in int8, and
  float* scale;                        // what a code is worth, of each token
};

__device__ __forceinline__ float nan_value() { return __uint_as_float(0x7fc00000u); }

template <Values V>
struct Element {
  using Type = float;
};
template <>
struct Element<Values::bf16> {
  using Type = uint16_t;
};
template <>
struct Element<Values::i8> {
  using Type = int8_t;
};
__device__ __forceinline__ float number(float v) { return v; }
__device__ __forceinline__ float number(uint16_t v) { return __uint_as_float(uint32_t(v) << 16); }
__device__ __forceinline__ float number(int8_t v) { return float(v); }

// The blocks of a panel that are this warp's, whole groups of scales; and where its values begin.
struct Share {
  int64_t first, last, at;
};
__device__ __forceinline__ Share share_of(const Problem& p, int64_t panel, int warp, int lane, int* counts) {
  const int64_t units = (p.blocks + p.unit - 1) / p.unit;
  Share s{units * warp / kWarps * p.unit, units * (warp + 1) / kWarps * p.unit, p.a.w.ptr[panel]};
  s.last = min(s.last, p.blocks);
  const uint64_t* const masks = p.a.w.masks + panel * p.blocks * kRows;
  int count = 0;
  for (int64_t i = s.first * kRows + lane; i < s.last * kRows; i += 32) count += __popcll(masks[i]);
#pragma unroll
  for (int distance = 16; distance; distance /= 2) count += __shfl_xor_sync(0xffffffffu, count, distance);
  if (lane == 0) counts[warp] = count;
  __syncthreads();
  for (int w = 0; w < warp; ++w) s.at += counts[w];
  return s;
}

// Calls before(block), pair(row, value, value) for the 8 rows and this lane's two columns, after(block). Whether every value was there.
template <Values V, class Before, class Pair, class After>
__device__ __forceinline__ bool walk(const Problem& p, int64_t panel, const Share& share, int lane, const Before& before, const Pair& pair,
                                     const After& after) {
  using E = typename Element<V>::Type;
  const uint64_t* const masks = p.a.w.masks + panel * p.blocks * kRows;
  const E* const values = reinterpret_cast<const E*>(p.a.w.values);
  const int place = 2 * (lane % 16);
  int64_t at = share.at;
  bool good = true;
#pragma unroll 1
  for (int64_t b = share.first; b < share.last; b += 4) {
    // Four blocks' words, and how many values there are before each.
    const uint64_t word = b + lane / kRows < share.last ? masks[b * kRows + lane] : 0;
    const int own = __popcll(word);
    int offset = own;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int lower = __shfl_sync(0xffffffffu, offset, lane >= distance ? lane - distance : lane);
      if (lane >= distance) offset += lower;
    }
    const int all = __shfl_sync(0xffffffffu, offset, 31);
    offset -= own;
#pragma unroll 1
    for (int i = 0; i < 4 && b + i < share.last; ++i) {
      before(b + i);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int source = i * kRows + r;
        const uint32_t low = __shfl_sync(0xffffffffu, uint32_t(word), source), high = __shfl_sync(0xffffffffu, uint32_t(word >> 32), source);
        const uint32_t half = lane < 16 ? low : high;
        const int64_t index = at + __shfl_sync(0xffffffffu, offset, source) + (lane < 16 ? 0 : __popc(low)) + __popc(half & ((1u << place) - 1));
        const bool one = half >> place & 1, two = half >> place & 2, inside = uint64_t(index + one + two) <= uint64_t(p.stored) && index >= 0;
        good = good && inside;
        const E first = one && inside ? values[index] : E(0), second = two && inside ? values[index + one] : E(0);
        pair(r, first, second);
      }
      after(b + i);
    }
    at += all;
  }
  return good;
}

// A token a block: its row in fp32, or in int8 as the CPU rounds it.
__global__ void __launch_bounds__(kThreads, 6) bitmask_tokens_kernel(const Problem p) {
  __shared__ uint32_t largest[kWarps];
  const int64_t token = blockIdx.x, k = p.a.w.k;
  uint32_t most = 0;  // of the bits of |x|, which are ordered as the values are; NaN and infinity come last
  for (int64_t i = threadIdx.x; i < p.ld; i += kThreads) {
    const float v = i < k ? load_scalar(p.a.x, p.a.dtype, token * k + i) : 0.0f;
    if (p.floats) p.floats[token * p.ld + i] = v;
    most = max(most, __float_as_uint(v) & 0x7fffffffu);
  }
  if (p.floats) return;
#pragma unroll
  for (int distance = 16; distance; distance /= 2) most = max(most, __shfl_xor_sync(0xffffffffu, most, distance));
  if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = most;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) most = max(most, largest[w]);
  const bool finite = most < 0x7f800000u;
  float scale = __uint_as_float(most) / 127.0f;
  if (scale == 0.0f || !finite) scale = 1.0f;
  for (int64_t i = threadIdx.x; i < p.ld; i += kThreads) {
    const float v = i < k && finite ? load_scalar(p.a.x, p.a.dtype, token * k + i) / scale : 0.0f;
    p.codes[token * p.ld + i] = int8_t(rintf(fminf(fmaxf(v, -127.0f), 127.0f)));
  }
  if (threadIdx.x == 0) p.scale[token] = finite ? scale : nan_value();
}

template <Values V, bool Int8, class S>
__global__ void __launch_bounds__(kThreads, S::blocks) bitmask_kernel(const Problem p) {
  constexpr int T = S::tokens;
  using Sum = std::conditional_t<Int8, int, float>;
  EFFK_DYN_SMEM(smem);
  float* const terms = reinterpret_cast<float*>(smem);  // int8 with groups: [groups][8][T]
  __shared__ int counts[kWarps];
  __shared__ Sum parts[kWarps][kRows * T];
  __shared__ uint32_t wrong[kWarps];
  const int set = blockIdx.x % p.sets, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t panel = blockIdx.x / p.sets, row0 = panel * kRows, token0 = int64_t(set) * T;
  const Weight& w = p.a.w;
  const bool grouped = V == Values::i8 && w.group != 0;

  Sum sums[kRows][T] = {}, x[2][T];
  float scale[kRows];
  const auto before = [&](int64_t block) {
    const int64_t column = block * kBlock + 2 * lane;
#pragma unroll
    for (int t = 0; t < T; ++t) {
      x[0][t] = x[1][t] = 0;
      if (token0 + t >= p.a.m) continue;
      const int64_t at = (token0 + t) * p.ld + column;
      if constexpr (Int8) {
        const uint16_t two = *reinterpret_cast<const uint16_t*>(p.codes + at);
        x[0][t] = int8_t(two & 255), x[1][t] = int8_t(two >> 8);
      } else {
        const float2 two = *reinterpret_cast<const float2*>(p.floats + at);
        x[0][t] = two.x, x[1][t] = two.y;
      }
    }
    if constexpr (V == Values::i8 && !Int8)
#pragma unroll
      for (int r = 0; r < kRows; ++r) scale[r] = grouped && row0 + r < w.n ? w.scale[(row0 + r) * p.groups + block * kBlock / w.group] : 1.0f;
  };
  const auto pair = [&](int r, auto first, auto second) {
#pragma unroll
    for (int t = 0; t < T; ++t) {
      if constexpr (Int8) {
        sums[r][t] += int(first) * x[0][t] + int(second) * x[1][t];
      } else {
        const float times = V == Values::i8 ? scale[r] : 1.0f;
        sums[r][t] = fmaf(number(first) * times, x[0][t], sums[r][t]);
        sums[r][t] = fmaf(number(second) * times, x[1][t], sums[r][t]);
      }
    }
  };
  // The warp's sums over a group to their term; lane 0 has it.
  const auto totals = [&](const auto& use) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int t = 0; t < T; ++t) {
        Sum sum = sums[r][t];
#pragma unroll
        for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
        if (lane == 0) use(r, t, sum);
        sums[r][t] = 0;
      }
  };
  const auto after = [&](int64_t block) {
    if constexpr (Int8) {
      if (!grouped || ((block + 1) % p.unit != 0 && block + 1 != p.blocks)) return;
      const int64_t group = block / p.unit;
      totals([&](int r, int t, Sum sum) {
        if (row0 + r < w.n) terms[(group * kRows + r) * T + t] = __fmul_rn(w.scale[(row0 + r) * p.groups + group], float(sum));
      });
    }
  };
  const Share share = share_of(p, panel, warp, lane, counts);
  const bool good = walk<V>(p, panel, share, lane, before, pair, after);
  const uint32_t bad = __ballot_sync(0xffffffffu, !good);
  if (lane == 0) wrong[warp] = bad;
  if (!Int8 || !grouped) totals([&](int r, int t, Sum sum) { parts[warp][r * T + t] = sum; });
  __syncthreads();

  const int r = threadIdx.x / T, t = threadIdx.x % T;
  const int64_t row = row0 + r, token = token0 + t;
  if (r >= kRows || row >= w.n || token >= p.a.m) return;
  float y;
  if (Int8 && grouped) {
    y = 0.0f;
    for (int64_t group = 0; group < p.groups; ++group) y = __fadd_rn(y, terms[(group * kRows + r) * T + t]);
  } else {
    Sum sum = parts[0][r * T + t];
    for (int part = 1; part < kWarps; ++part) sum += parts[part][r * T + t];
    y = float(sum);
    if (V == Values::i8 && !grouped) y = __fmul_rn(w.scale[row], y);
  }
  if (Int8) y = __fmul_rn(y, p.scale[token]);
  if (p.a.bias) y = __fadd_rn(y, load_scalar(p.a.bias, p.a.bias_dtype, row));
  for (int part = 0; part < kWarps; ++part)
    if (wrong[part]) y = nan_value();
  store_scalar(p.a.y, p.a.dtype, token * w.n + row, y);
}

template <Values V>
__global__ void __launch_bounds__(kThreads, 4) bitmask_expand_kernel(const Problem p, bool codes, DType dtype, void* out) {
  __shared__ int counts[kWarps];
  const int64_t panel = blockIdx.x, row0 = panel * kRows;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Weight& w = p.a.w;
  const Share share = share_of(p, panel, warp, lane, counts);
  int64_t column = 0;
  const auto pair = [&](int r, auto first, auto second) {
    using E = decltype(first);
    const int64_t row = row0 + r;
    if (row >= w.n) return;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int64_t c = column + e;
      if (c >= w.k) continue;
      const E v = e ? second : first;
      if (codes) static_cast<E*>(out)[row * w.k + c] = v;
      else store_scalar(out, dtype, row * w.k + c, V == Values::i8 ? number(v) * w.scale[row * p.groups + (w.group ? c / w.group : 0)] : number(v));
    }
  };
  walk<V>(p, panel, share, lane, [&](int64_t block) { column = block * kBlock + 2 * lane; }, pair, [](int64_t) {});
}

Problem problem_of(const Args& a, int64_t stored) {
  Problem p{};
  p.a = a, p.stored = stored;
  p.blocks = effk::bitmask::blocks(a.w.k), p.groups = effk::bitmask::groups(a.w.k, a.w.group), p.ld = p.blocks * kBlock;
  p.unit = a.w.group ? int(a.w.group / kBlock) : 1;
  return p;
}
// Terms of groups in shared memory limit the tokens of a block: 64 KiB hold those of the widest row for one.
constexpr int64_t kTermBytes = 64 * 1024;
int64_t term_bytes(const Problem& p, int tokens) { return p.a.int8 && p.a.w.group ? p.groups * kRows * tokens * 4 : 0; }

Launch grid(int64_t blocks, cudaStream_t stream) {
  Launch at;
  at.grid = dim3(unsigned(blocks));
  at.block = dim3(kThreads);
  at.stream = stream;
  return at;
}

template <Values V, bool Int8>
cudaError_t multiply(Problem p, cudaStream_t stream) {
  const int tokens = p.a.m == 1 || term_bytes(p, 4) > kTermBytes ? 1 : 4;
  p.sets = int((p.a.m + tokens - 1) / tokens);
  Launch at = grid(effk::bitmask::panels(p.a.w.n) * p.sets, stream);
  at.smem = size_t(term_bytes(p, tokens));
  if (tokens == 1) return launch(bitmask_kernel<V, Int8, Shape<1, 3>>, at, p);
  return launch(bitmask_kernel<V, Int8, Shape<4, 2>>, at, p);
}

int64_t whole(int64_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace

size_t workspace(const Args& a) {
  const int64_t ld = effk::bitmask::blocks(a.w.k) * kBlock;
  return size_t(whole(a.m * ld * (a.int8 ? 1 : 4)) + whole(a.m * 4));
}

int linear(const Args& a, int64_t stored, void* memory, Stream stream) {
  if (a.m == 0) return 0;
  Problem p = problem_of(a, stored);
  char* const room = static_cast<char*>(memory);
  if (a.int8) p.codes = reinterpret_cast<int8_t*>(room);
  else p.floats = reinterpret_cast<float*>(room);
  p.scale = reinterpret_cast<float*>(room + whole(a.m * p.ld * (a.int8 ? 1 : 4)));
  const auto s = static_cast<cudaStream_t>(stream);
  const cudaError_t e = launch(bitmask_tokens_kernel, grid(a.m, s), p);
  if (e != cudaSuccess) return int(e);
  if (a.int8) return int(multiply<Values::i8, true>(p, s));
  if (a.w.type == Values::f32) return int(multiply<Values::f32, false>(p, s));
  return int(a.w.type == Values::bf16 ? multiply<Values::bf16, false>(p, s) : multiply<Values::i8, false>(p, s));
}

int expand(const Weight& w, int64_t stored, bool codes, DType dtype, void* out, Stream stream) {
  Args a{};
  a.w = w;
  const Problem p = problem_of(a, stored);
  const Launch at = grid(effk::bitmask::panels(w.n), static_cast<cudaStream_t>(stream));
  if (w.type == Values::f32) return int(launch(bitmask_expand_kernel<Values::f32>, at, p, codes, dtype, out));
  if (w.type == Values::bf16) return int(launch(bitmask_expand_kernel<Values::bf16>, at, p, codes, dtype, out));
  return int(launch(bitmask_expand_kernel<Values::i8>, at, p, codes, dtype, out));
}

const char* error_text(int error) {
#ifdef EFFK_CUEMU
  (void)error;
  return "the emulation has no CUDA errors";
#else
  return cudaGetErrorString(static_cast<cudaError_t>(error));
#endif
}

}  // namespace effk::cuda::bitmask
