// quik_linear on CUDA: split and quantise, the choice of a product kernel, and the epilogue alone.
#include "ops/quik_linear/cuda.h"

#include <algorithm>

#include "cuda/gemm_problem.h"
#include "ops/quik_linear/cuda_mma.h"

namespace effk::cuda::quik {
namespace {

constexpr int kThreads = 256;
constexpr float kLeastScale = 1e-6f, kLeastNormal = 0x1p-126f;

struct Device {
  int sms = 0, smem = 0;  // multiprocessors; shared memory that a block may have
  bool int4 = false;
};

// Properties of the current device, asked once a thread and device.
cudaError_t current_device(Device& out) {
#ifdef EFFK_CUEMU
  out = {4, 99 * 1024, true};
  return cudaSuccess;
#else
  thread_local int known = -1;
  thread_local Device device;
  int current, major = 0;
  cudaError_t e = cudaGetDevice(&current);
  if (e == cudaSuccess && current != known) {
    const auto ask = [&](int& value, cudaDeviceAttr what) {
      if (e == cudaSuccess) e = cudaDeviceGetAttribute(&value, what, current);
    };
    ask(device.sms, cudaDevAttrMultiProcessorCount);
    ask(device.smem, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    ask(major, cudaDevAttrComputeCapabilityMajor);
    device.int4 = major == 8;
    if (e == cudaSuccess) known = current;
  }
  out = device;
  return e;
#endif
}

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

// Several rows a block, each of a team of whole warps. A row is read once, into shared memory, where the columns of the
// index lists are picked twice: for the range, and for the codes. Without `staged` (rows beyond shared memory) both read
// global memory. Bound: bytes, 2 + 1 a column of 16-bit x, 16 us for 2048 x 8192 on an H100; about 25 instructions a
// column, 15 us. The lists come from L1 or L2.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) quantise_kernel(const Quantise q, int rows, bool staged) {
  EFFK_DYN_SMEM(smem);
  __shared__ float low[kThreads / 32], high[kThreads / 32];
  __shared__ int wrong[kThreads / 32];
  const int team_threads = kThreads / rows, team = threadIdx.x / team_threads, i0 = threadIdx.x % team_threads;
  const int warp = threadIdx.x / 32, warps = team_threads / 32;
  const int64_t row = int64_t(blockIdx.x) * rows + team;
  const bool own = row < q.m;
  const T* x = static_cast<const T*>(q.x) + (own ? row * q.split.k : 0);
  const int k = int(q.split.k), base = int(q.split.n_base), outliers = int(q.split.n_out);

  if (staged) {
    // Rows of the block lie one behind the other there as in memory, the first one as far off 16 bytes as it is there.
    const int64_t first = int64_t(blockIdx.x) * rows * k, elements = min(int64_t(rows) * k, q.m * k - first);
    const T* const from = static_cast<const T*>(q.x) + first;
    const int shift = int(reinterpret_cast<uintptr_t>(from) % 16 / sizeof(T));
    T* const to = reinterpret_cast<T*>(smem) + shift;
    constexpr int kPiece = 16 / sizeof(T);
    for (int64_t i = int64_t(threadIdx.x) * kPiece - shift; i < elements; i += kThreads * kPiece) {
      if (i >= 0 && i + kPiece <= elements) {
        ptx::cp_async16(to + i, from + i, 16);
      } else {
        for (int e = 0; e < kPiece; ++e)
          if (i + e >= 0 && i + e < elements) to[i + e] = from[i + e];
      }
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    x = to + team * k;
  }

  float lo = INFINITY, hi = -INFINITY;
  bool bad = false;
  // Column j of one of the lists; an index out of range makes the row NaN.
  const auto column = [&](const int32_t* list, int j, int first) {
    const int c = list ? list[j] : first + j;
    bad = bad || uint32_t(c) >= uint32_t(k);
    return uint32_t(c) >= uint32_t(k) ? 0 : c;
  };
  // Of four base columns from j on, those that exist, to use(e, column).
  const bool wide = reinterpret_cast<uintptr_t>(q.split.base) % 16 == 0;
  const auto four = [&](int j, const auto& use) {
    if (wide && q.split.base && j + 4 <= base) {
      const int4 c = *reinterpret_cast<const int4*>(q.split.base + j);
      use(0, c.x), use(1, c.y), use(2, c.z), use(3, c.w);
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (j + e < base) use(e, q.split.base ? q.split.base[j + e] : j + e);
    }
  };
  if (own) {
    for (int j = 4 * i0; j < base; j += 4 * team_threads)
      four(j, [&](int, int c) {
        const bool inside = uint32_t(c) < uint32_t(k);
        const float v = widen(x[inside ? c : 0]);
        lo = fminf(lo, v), hi = fmaxf(hi, v);  // ignore NaN
        bad = bad || !inside || !(fabsf(v) < INFINITY);
      });
    for (int j = i0; j < q.out_ld; j += team_threads) {
      const T v = j < outliers ? x[column(q.split.outlier, j, base)] : T(0.0f);
      bad = bad || !(fabsf(widen(v)) < INFINITY);
      static_cast<T*>(q.x_out)[row * q.out_ld + j] = v;
    }
  }
  int any = bad;
#pragma unroll
  for (int distance = 16; distance; distance /= 2) {
    lo = fminf(lo, __shfl_xor_sync(0xffffffffu, lo, distance));
    hi = fmaxf(hi, __shfl_xor_sync(0xffffffffu, hi, distance));
    any |= __shfl_xor_sync(0xffffffffu, any, distance);
  }
  if (threadIdx.x % 32 == 0) low[warp] = lo, high[warp] = hi, wrong[warp] = any;
  __syncthreads();
  for (int w = team * warps; w < (team + 1) * warps; ++w) {
    lo = fminf(lo, low[w]), hi = fmaxf(hi, high[w]);
    any |= wrong[w];
  }
  if (!own) return;

  const float levels = float((1 << q.bits) - 1);
  const bool sim = q.mode == QuikMode::sim;
  float scale, zero, shift = 0.0f;
  if (sim) {
    lo = fminf(lo, 0.0f), hi = fmaxf(hi, 0.0f);
    if (lo == 0.0f && hi == 0.0f) lo = -1.0f, hi = 1.0f;
    scale = fmaxf((hi - lo) / levels, kLeastNormal);
    shift = rintf(-lo / scale);
    zero = -scale * shift;
  } else {
    scale = fmaxf((hi - lo) / levels, kLeastScale);
    zero = lo;
  }
  any = any || !(scale < INFINITY);
  const float inverse = 1.0f / scale;
  if (any) scale = zero = __uint_as_float(0x7fc00000u);
  if (i0 == 0) q.scale[row] = scale, q.zero[row] = zero;

  // A float plus 1.5 * 2^23 is rounded to an integer, ties to even, and holds it in its low bits. The product before it
  // must be rounded by itself, as on the CPU: no fused multiply-add. `sim` rounds before it adds the zero point.
  constexpr float kRound = 12582912.0f;
  const float from = sim ? 0.0f : zero, back = shift - kRound;
  // The unsigned codes of four columns, a byte each; columns behind the last have that of 0.
  const uint32_t half = 1u << (q.bits - 1);
  const auto codes = [&](int j) {
    uint32_t byte[4] = {half, half, half, half};
    four(j, [&](int e, int c) {
      const float u = __fmul_rn(widen(x[c]) - from, inverse) + kRound + back;
      byte[e] = __float_as_uint(fminf(fmaxf(u, 0.0f), levels) + kRound);
    });
    return __byte_perm(__byte_perm(byte[0], byte[1], 0x0040u), __byte_perm(byte[2], byte[3], 0x0040u), 0x5410u);
  };
  uint8_t* const to = q.codes + row * q.row_bytes;
  const bool words = reinterpret_cast<uintptr_t>(q.codes) % 4 == 0 && q.row_bytes % 4 == 0;
  for (int w = i0; w < (q.row_bytes + 3) / 4; w += team_threads) {
    uint32_t word;
    if (any) {
      word = 0;  // and nothing is read: an index may be out of range
    } else if (q.form == Form::bytes) {
      // Bytes less half of their range, without a borrow from one to the next.
      const uint32_t u = codes(4 * w);
      word = q.bits == 8 ? u ^ 0x80808080u : ((u | 0x80808080u) - 0x08080808u) ^ 0x80808080u;
    } else {
      const uint32_t low = codes(8 * w), high = codes(8 * w + 4);
      if (q.form == Form::units) {
        word = low | high << 4;
      } else {
        const uint32_t a = low | low >> 4, b = high | high >> 4;  // pairs of neighbours in bytes 0 and 2
        word = __byte_perm(a, b, 0x6420u);
      }
      word ^= 0x88888888u;
    }
    if (words) {
      *reinterpret_cast<uint32_t*>(to + 4 * w) = word;
    } else {
      for (int e = 0; e < 4 && 4 * w + e < q.row_bytes; ++e) to[4 * w + e] = uint8_t(word >> 8 * e);
    }
  }
}

// A word of the results a thread.
__global__ void __launch_bounds__(kThreads, 6) repack_kernel(const uint8_t* codes, bool packed, int64_t m, int64_t columns, bool units, uint32_t* out,
                                                             int64_t words) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= m * words) return;
  const int64_t row = i / words, ld = packed ? (columns + 1) / 2 : columns, first = i % words * (units ? 8 : 4);
  uint32_t word = 0;
  for (int e = 0; e < (units ? 8 : 4); ++e) {
    const int64_t j = first + e;
    if (j >= columns) break;
    const uint32_t byte = codes[row * ld + (packed ? j / 2 : j)], code = packed ? byte >> 4 * (j % 2) : byte;
    if (units) word |= (code & 15) << 4 * (e % 4 * 2 + e / 4);
    else word |= (packed ? (((code & 15) ^ 8) - 8) & 255 : code) << 8 * e;
  }
  out[i] = word;
}

__global__ void __launch_bounds__(kThreads, 6) dequantise_sums_kernel(const Dequantise d) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= d.m * d.n) return;
  const int64_t row = i / d.n, column = i % d.n;
  const float s = d.scale[row], offset = fmaf(d.half, s, d.zero[row]);
  float v = fmaf(s * d.w_scale[column], float(d.sums[i]), offset * d.w_reduced[column]);
  if (d.y_in) v += load_scalar(d.y_in, d.in_type, i);
  store_scalar(d.y, d.y_type, i, v);
}

Launch one_each(int64_t elements, Stream stream) {
  Launch at;
  at.grid = dim3(unsigned((elements + kThreads - 1) / kThreads));
  at.block = dim3(kThreads);
  at.stream = static_cast<cudaStream_t>(stream);
  return at;
}

template <class T>
cudaError_t launch_quantise(const Quantise& q, const Device& device, cudaStream_t stream) {
  constexpr int kLargest = kThreads / 32, kWanted = 32 * 1024 + 32;
  const auto bytes = [&](int rows) { return (rows * q.split.k * int64_t(sizeof(T)) + 31) / 16 * 16; };
  int rows = kLargest;
  while (rows > 1 && (bytes(rows) > kWanted || q.m / rows < 2 * device.sms)) rows /= 2;
  const bool staged = bytes(rows) <= device.smem - 1024;
  Launch at;
  at.grid = dim3(unsigned((q.m + rows - 1) / rows));
  at.block = dim3(kThreads);
  at.smem = staged ? size_t(bytes(rows)) : 0;
  at.stream = stream;
  return launch(quantise_kernel<T>, at, q, rows, staged);
}

}  // namespace

int quantise(const Quantise& q, Stream stream) {
  if (q.m == 0) return 0;
  Device device;
  const cudaError_t e = current_device(device);
  if (e != cudaSuccess) return int(e);
  const auto s = static_cast<cudaStream_t>(stream);
  if (q.dtype == DType::f32) return int(launch_quantise<float>(q, device, s));
  if (q.dtype == DType::f16) return int(launch_quantise<__half>(q, device, s));
  return int(launch_quantise<__nv_bfloat16>(q, device, s));
}

int repack(const uint8_t* codes, Form from, int64_t m, int64_t columns, Form to, uint8_t* out, Stream stream) {
  if (m == 0) return 0;
  const int64_t words = row_bytes(columns, to) / 4;
  return int(launch(repack_kernel, one_each(m * words, stream), codes, from == Form::nibbles, m, columns, to == Form::units,
                    reinterpret_cast<uint32_t*>(out), words));
}

int has_int4(bool& answer) {
  Device device;
  const cudaError_t e = current_device(device);
  answer = device.int4;
  return int(e);
}

int product(const Product& p, Stream stream) {
  if (p.m == 0 || p.n == 0) return 0;
  Device device;
  const cudaError_t e = current_device(device);
  if (e != cudaSuccess) return int(e);
  const auto s = static_cast<cudaStream_t>(stream);
  MmaArgs a{};
  a.p = p;
  a.tile_bytes = t16::chunks(p.n_base, p.bits) * t16::chunk_bytes(p.bits);
  a.row_bytes = row_bytes(p.n_base, p.int4 ? Form::units : Form::bytes);
  a.tiles = int(t16::tiles(p.n));
  a.int_stages = int(a.row_bytes / kStageBytes);
  a.out_stages = p.sums ? 0 : int((p.out_ld + kTileK - 1) / kTileK);
  // The tile with the least predicted time: waves of blocks times operations of a tile over the share of the peak that
  // its bytes allow.
  const auto cost = [&](int bm, int bn, int resident, double share) {
    const int64_t tiles = ((p.n + bm - 1) / bm) * ((p.m + bn - 1) / bn), slots = int64_t(device.sms) * resident;
    return double((tiles + slots - 1) / slots) * bm * bn * resident / share;
  };
  const bool large = p.shape ? p.shape == 1
                             : cost(LargeTile::bm, LargeTile::bn, LargeTile::blocks, 0.85) <= cost(SmallTile::bm, SmallTile::bn, SmallTile::blocks, 0.45);
  if (p.int4) return int(launch_product<Operands::int4>(a, large, s));
  return int(p.bits == 4 ? launch_product<Operands::w4>(a, large, s) : launch_product<Operands::w8>(a, large, s));
}

int dequantise(const Dequantise& d, Stream stream) {
  if (d.m == 0 || d.n == 0) return 0;
  return int(launch(dequantise_sums_kernel, one_each(d.m * d.n, stream), d));
}

const char* error_text(int error) {
#ifdef EFFK_CUEMU
  (void)error;
  return "the emulation has no CUDA errors";
#else
  return cudaGetErrorString(static_cast<cudaError_t>(error));
#endif
}

}  // namespace effk::cuda::quik
