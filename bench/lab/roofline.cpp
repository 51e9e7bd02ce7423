// Micro-kernels behind bench/machine.py: how fast this machine can read memory and multiply-accumulate.
//
// Each kernel is the plainest loop that can reach its limit: independent accumulators (enough to hide the latency of
// the instruction on current cores), nothing stored, no dependence on data. Threads are pinned one to a core, start
// together at a barrier, and a run lasts from the first start to the last end. Compiled with baseline flags: every ISA
// variant is a function with its own target attribute, taken only where the CPU has it, so the library runs on any
// x86-64 (and, with the portable kernels alone, elsewhere). Inline assembly, so that no compiler can fold or contract.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>
#ifdef __linux__
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#define X86(...) __VA_ARGS__
#define TARGET(isa) __attribute__((noinline, target(isa)))
#else
#define X86(...)
#endif

namespace {

// ---- reads: sum of everything; `bytes` is a multiple of 512 ----

__attribute__((noinline)) uint64_t read_portable(const char* p, size_t bytes) {
  uint64_t s[8] = {};
  for (size_t i = 0; i < bytes; i += 64)
    for (int j = 0; j < 8; ++j) {
      uint64_t v;
      std::memcpy(&v, p + i + 8 * j, 8);
      s[j] += v;
    }
  return s[0] + s[1] + s[2] + s[3] + s[4] + s[5] + s[6] + s[7];
}

#if defined(__x86_64__)
// Assembly keeps the loads in address order: compilers shuffle them, which halves the L2 figure on some cores.
#define READ8(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)
#define SUM8 s0 += s1 + s2 + s3 + s4 + s5 + s6 + s7;

TARGET("avx2") uint64_t read_avx2(const char* p, size_t bytes) {
#define INIT(i) __m256i s##i = _mm256_setzero_si256();
#define STEP(i) asm volatile("vpaddq %c2(%1), %0, %0" : "+x"(s##i) : "r"(p), "i"(32 * i));
  READ8(INIT)
  for (const char* end = p + bytes; p < end; p += 256) { READ8(STEP) }
#undef INIT
#undef STEP
  SUM8
  return uint64_t(s0[0]);
}

TARGET("avx512f") uint64_t read_avx512(const char* p, size_t bytes) {
#define INIT(i) __m512i s##i = _mm512_setzero_si512();
#define STEP(i) asm volatile("vpaddq %c2(%1), %0, %0" : "+v"(s##i) : "r"(p), "i"(64 * i));
  READ8(INIT)
  for (const char* end = p + bytes; p < end; p += 512) { READ8(STEP) }
#undef INIT
#undef STEP
  SUM8
  return uint64_t(s0[0]);
}
#endif

// ---- arithmetic: `reps` rounds over independent accumulators; returns operations (a multiply-add is two) ----

__attribute__((noinline)) double fma_portable(long reps) {
  float a[32];
  for (int i = 0; i < 32; ++i) a[i] = float(i);
  for (long r = 0; r < reps; ++r) {
    for (int i = 0; i < 32; ++i) a[i] = a[i] * 0.999f + 1e-3f;
    asm volatile("" ::: "memory");
  }
  volatile float keep = a[0] + a[31];
  (void)keep;
  return 64.0 * double(reps);
}

#if defined(__x86_64__)
// 12 accumulators with AVX2: 16 registers less the operands; two FMA pipes of latency 4 need 8. 20 with AVX-512: bf16
// dot products have a latency of 6 and two pipes need 12.
#define ACC12(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define ACC20(X) ACC12(X) X(12) X(13) X(14) X(15) X(16) X(17) X(18) X(19)

TARGET("avx2,fma") double fma_avx2(long reps) {
#define INIT(i) __m256 a##i = _mm256_set1_ps(float(i));
#define STEP(i) asm volatile("vfmadd231ps %2, %1, %0" : "+x"(a##i) : "x"(x), "x"(y));
  ACC12(INIT)
  const __m256 x = _mm256_set1_ps(0.999f), y = _mm256_set1_ps(1e-3f);
  for (long r = 0; r < reps; ++r) { ACC12(STEP) }
#undef INIT
#undef STEP
  return 12.0 * 8 * 2 * double(reps);
}

TARGET("avx512f") double fma_avx512(long reps) {
#define INIT(i) __m512 a##i = _mm512_set1_ps(float(i));
#define STEP(i) asm volatile("vfmadd231ps %2, %1, %0" : "+v"(a##i) : "v"(x), "v"(y));
  ACC20(INIT)
  const __m512 x = _mm512_set1_ps(0.999f), y = _mm512_set1_ps(1e-3f);
  for (long r = 0; r < reps; ++r) { ACC20(STEP) }
#undef INIT
#undef STEP
  return 20.0 * 16 * 2 * double(reps);
}

// Without VNNI an int8 dot product of length 4 is u8 x s8 pairs to s16, pairs to s32, add: three instructions.
TARGET("avx2") double int8_avx2(long reps) {
#define INIT(i) __m256i a##i = _mm256_set1_epi32(i);
#define STEP(i)                                                                                       \
  {                                                                                                   \
    __m256i t;                                                                                        \
    asm volatile("vpmaddubsw %2, %1, %0" : "=x"(t) : "x"(x), "x"(y));                                 \
    asm volatile("vpmaddwd %2, %1, %0" : "=x"(t) : "x"(t), "x"(one));                                 \
    asm volatile("vpaddd %1, %0, %0" : "+x"(a##i) : "x"(t));                                          \
  }
  ACC12(INIT)
  const __m256i x = _mm256_set1_epi8(1), y = _mm256_set1_epi8(2), one = _mm256_set1_epi16(1);
  for (long r = 0; r < reps; ++r) { ACC12(STEP) }
#undef INIT
#undef STEP
  return 12.0 * 32 * 2 * double(reps);
}

TARGET("avx512f,avx512bw") double int8_avx512(long reps) {
#define INIT(i) __m512i a##i = _mm512_set1_epi32(i);
#define STEP(i)                                                                                       \
  {                                                                                                   \
    __m512i t;                                                                                        \
    asm volatile("vpmaddubsw %2, %1, %0" : "=v"(t) : "v"(x), "v"(y));                                 \
    asm volatile("vpmaddwd %2, %1, %0" : "=v"(t) : "v"(t), "v"(one));                                 \
    asm volatile("vpaddd %1, %0, %0" : "+v"(a##i) : "v"(t));                                          \
  }
  ACC20(INIT)
  const __m512i x = _mm512_set1_epi8(1), y = _mm512_set1_epi8(2), one = _mm512_set1_epi16(1);
  for (long r = 0; r < reps; ++r) { ACC20(STEP) }
#undef INIT
#undef STEP
  return 20.0 * 64 * 2 * double(reps);
}

TARGET("avx512f,avx512vnni") double int8_avx512vnni(long reps) {
#define INIT(i) __m512i a##i = _mm512_set1_epi32(i);
#define STEP(i) asm volatile("vpdpbusd %2, %1, %0" : "+v"(a##i) : "v"(x), "v"(y));
  ACC20(INIT)
  const __m512i x = _mm512_set1_epi8(1), y = _mm512_set1_epi8(2);
  for (long r = 0; r < reps; ++r) { ACC20(STEP) }
#undef INIT
#undef STEP
  return 20.0 * 64 * 2 * double(reps);
}

TARGET("avx512f,avx512bf16") double bf16_avx512(long reps) {
#define INIT(i) __m512 a##i = _mm512_set1_ps(float(i));
#define STEP(i) asm volatile("vdpbf16ps %2, %1, %0" : "+v"(a##i) : "v"(x), "v"(y));
  ACC20(INIT)
  const __m512i x = _mm512_set1_epi16(0x3f80), y = _mm512_set1_epi16(0x3c00);  // 1.0 and 2^-7
  for (long r = 0; r < reps; ++r) { ACC20(STEP) }
#undef INIT
#undef STEP
  return 20.0 * 32 * 2 * double(reps);
}

#define HAS(f) +[] { return __builtin_cpu_supports(f) != 0; }
#endif

struct Kernel {
  const char *what, *isa;  // isa: the tier of effk that has these instructions
  uint64_t (*read)(const char*, size_t);
  double (*compute)(long);
  bool (*supported)();
};

const Kernel kKernels[] = {
    {"read", "scalar", read_portable, nullptr, +[] { return true; }},
    {"fp32", "scalar", nullptr, fma_portable, +[] { return true; }},
    X86({"read", "avx2", read_avx2, nullptr, HAS("avx2")},
        {"read", "avx512", read_avx512, nullptr, HAS("avx512f")},
        {"fp32", "avx2", nullptr, fma_avx2,
         +[] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
        {"fp32", "avx512", nullptr, fma_avx512, HAS("avx512f")},
        {"int8", "avx2", nullptr, int8_avx2, HAS("avx2")},
        {"int8", "avx512", nullptr, int8_avx512, HAS("avx512bw")},
        {"int8", "avx512vnni", nullptr, int8_avx512vnni, HAS("avx512vnni")},
        {"bf16", "avx512vnni", nullptr, bf16_avx512, HAS("avx512bf16")})};

void pin(int cpu) {
#ifdef __linux__
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  sched_setaffinity(0, sizeof set, &set);  // best effort: a refused pin only makes the figure noisier
#else
  (void)cpu;
#endif
}

}  // namespace

extern "C" {

int roofline_kernels() { return int(sizeof kKernels / sizeof *kKernels); }
const char* roofline_what(int i) { return kKernels[i].what; }
const char* roofline_isa(int i) { return kKernels[i].isa; }
int roofline_supported(int i) { return kKernels[i].supported(); }

// Runs kernel i on `threads` threads, thread t on cpus[t]. A read kernel reads buf + t * stride, `bytes` long (a
// multiple of 512), `reps` times; an arithmetic kernel does `reps` rounds. Returns seconds; *units = bytes read or
// operations done, all threads together.
double roofline_run(int i, int threads, const int* cpus, const char* buf, size_t stride, size_t bytes, long reps,
                    double* units) {
  using clock = std::chrono::steady_clock;
  const Kernel& k = kKernels[i];
  std::atomic<int> waiting{threads};
  std::vector<clock::time_point> t0(threads), t1(threads);
  std::vector<double> done(threads);
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t)
    pool.emplace_back([&, t] {
      pin(cpus[t]);
      waiting.fetch_sub(1);
      while (waiting.load(std::memory_order_acquire) > 0) {}
      t0[t] = clock::now();
      if (k.read) {
        uint64_t s = 0;
        for (long r = 0; r < reps; ++r) s += k.read(buf + size_t(t) * stride, bytes);
        asm volatile("" ::"r"(s));
        done[t] = double(bytes) * double(reps);
      } else {
        done[t] = k.compute(reps);
      }
      t1[t] = clock::now();
    });
  for (auto& t : pool) t.join();
  *units = 0;
  for (double d : done) *units += d;
  const auto first = *std::min_element(t0.begin(), t0.end()), last = *std::max_element(t1.begin(), t1.end());
  return std::chrono::duration<double>(last - first).count();
}

}  // extern "C"
