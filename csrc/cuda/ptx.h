// All inline assembly of the project: one wrapper an instruction, and for each its twin for the emulation, which follows
// the PTX manual. On a GPU machine `make gpu-check` runs every wrapper on random data and compares (tests/cuda/golden).
#pragma once
#include "cuda/cu.h"

namespace effk::ptx {

#ifndef EFFK_CUEMU
#define EFFK_PTX __device__ __forceinline__

EFFK_PTX uint32_t smem_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Starts a copy of 16 bytes to shared memory past L1; only the first `bytes` are read, the rest is filled with zeros.
// Both addresses are aligned to 16; with bytes = 0 the source is not touched, and may lie outside any array.
EFFK_PTX void cp_async16(void* smem, const void* gmem, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(smem_address(smem)), "l"(gmem), "r"(bytes) : "memory");
}
// Closes the group of copies that this thread has started since the last commit.
EFFK_PTX void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until at most the N youngest groups of this thread are unfinished; other threads' copies need a barrier as well.
template <int N>
EFFK_PTX void cp_async_wait() { asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory"); }

// Asks for the 128-byte line at p to be brought to L2. Touches no register and no visible memory.
EFFK_PTX void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];\n" ::"l"(p)); }

// Four 8x8 matrices of 16-bit elements: lane 8i + r gives the address of row r of matrix i, lane t gets of matrix i the
// elements 2(t%4), 2(t%4)+1 of row t/4 in r[i].
EFFK_PTX void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(smem_address(row)) : "memory");
}
// The same with each matrix transposed: lane t gets of matrix i column t/4, rows 2(t%4) and 2(t%4)+1.
EFFK_PTX void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(smem_address(row)) : "memory");
}

// c[16x8] += a[16x16] b[16x8] over a warp, fp32 sums. Lane 4g + t holds: a[0], a[2] row g, a[1], a[3] row g + 8; a[0], a[1]
// columns 2t, 2t+1, a[2], a[3] columns 2t+8, 2t+9; b0 rows 2t, 2t+1 of column g, b1 rows 2t+8, 2t+9; c[0], c[1] row g and
// c[2], c[3] row g + 8, columns 2t, 2t+1.
EFFK_PTX void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The same for bf16.
EFFK_PTX void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// c[16x8] += a[16x32] b[32x8] for int8, exact: as above with four elements a register, the upper half 16 further on.
EFFK_PTX void mma_s8(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// c[16x8] += a[16x64] b[64x8] for signed 4-bit integers, exact: eight elements a register, the first in the lowest bits,
// the upper half 32 further on. An instruction of compute capability 8.x; the compiler expands it on later devices, where
// nothing launches it.
EFFK_PTX void mma_s4(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// This thread's place in its warp. Volatile: what is computed from it in a loop stays there instead of in registers around it.
EFFK_PTX int lane_id() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;\n" : "=r"(lane));
  return lane;
}

// Any bitwise function of three words: bit i of Table is its value where (a, b, c) are the bits of i, a highest.
template <int Table>
EFFK_PTX uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;\n" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(Table));
  return d;
}

// Thread-block clusters and overlapping grids exist from compute capability 9.0 on; the launchers use neither below it.
#if __CUDA_ARCH__ >= 900
// Place of this block in its cluster.
EFFK_PTX uint32_t cluster_rank() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(r));
  return r;
}
// Barrier of all threads of the cluster; shared memory written before it is visible to peers after it.
EFFK_PTX void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n" ::: "memory");
}
// Where the same shared variable lies in the block `rank` of the cluster.
template <class T>
EFFK_PTX T* cluster_peer(T* smem, uint32_t rank) {
  uint64_t p;
  asm volatile("mapa.u64 %0, %1, %2;\n" : "=l"(p) : "l"(reinterpret_cast<uint64_t>(smem)), "r"(rank));
  return reinterpret_cast<T*>(p);
}
// Waits until the kernels that this one overlaps with have ended and their writes are visible.
EFFK_PTX void grid_wait() { asm volatile("griddepcontrol.wait;\n" ::: "memory"); }
// Lets the next kernel of the stream start once every block has said so.
EFFK_PTX void grid_release() { asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory"); }
#else
EFFK_PTX uint32_t cluster_rank() { return 0; }
EFFK_PTX void cluster_sync() { __syncthreads(); }
template <class T>
EFFK_PTX T* cluster_peer(T* smem, uint32_t) { return smem; }
EFFK_PTX void grid_wait() {}
EFFK_PTX void grid_release() {}
#endif
#undef EFFK_PTX

#else  // EFFK_CUEMU

// The copy happens as late as it may: the destination holds 0xff bytes (NaN in every floating type) until the wait that
// covers it, so that a missing or too weak wait gives a wrong result.
inline void cp_async16(void* smem, const void* gmem, int bytes) {
  if ((reinterpret_cast<uintptr_t>(smem) | reinterpret_cast<uintptr_t>(gmem)) & 15)
    cuemu::fail("cp.async: address not aligned to 16 bytes");
  if (bytes < 0 || bytes > 16) cuemu::fail("cp.async: %d source bytes", bytes);
  std::memset(smem, 0xff, 16);
  cuemu::cur->copies.push_back({smem, gmem, bytes, cuemu::cur->copy_group});
}
inline void cp_async_commit() { ++cuemu::cur->copy_group; }
template <int N>
void cp_async_wait() { cuemu::finish_copies(N); }
inline void prefetch_l2(const void*) {}

inline void ldmatrix(uint32_t (&r)[4], const void* row, bool transpose) {
  struct Arg { uint32_t* r; const char* row; bool transpose; };
  if (reinterpret_cast<uintptr_t>(row) & 15) cuemu::fail("ldmatrix: row address not aligned to 16 bytes");
  Arg arg{r, static_cast<const char*>(row), transpose};
  cuemu::warp_collective(0xffffffffu, [](void* const* lanes, uint32_t) {
    const auto at = [&](int i) { return static_cast<Arg*>(lanes[i]); };
    for (int t = 0; t < 32; ++t)
      for (int i = 0; i < 4; ++i)
        for (int e = 0; e < 2; ++e) {
          const int row = at(t)->transpose ? 2 * (t % 4) + e : t / 4, column = at(t)->transpose ? t / 4 : 2 * (t % 4) + e;
          std::memcpy(reinterpret_cast<char*>(&at(t)->r[i]) + 2 * e, at(8 * i + row)->row + 2 * column, 2);
        }
  }, &arg, transpose ? "ldmatrix.x4.trans" : "ldmatrix.x4");
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { ldmatrix(r, row, false); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { ldmatrix(r, row, true); }

// Element e of a register, for each type of elements.
template <class E>
struct MmaElement {
  static constexpr int count = 4 / sizeof(E);
  static double at(uint32_t word, int e) {
    E v;
    std::memcpy(&v, reinterpret_cast<const char*>(&word) + e * sizeof(E), sizeof(E));
    return value(v);
  }
  static double value(__half v) { return __half2float(v); }
  static double value(__nv_bfloat16 v) { return __bfloat162float(v); }
  static double value(int8_t v) { return v; }
};
struct Int4 {};
template <>
struct MmaElement<Int4> {
  static constexpr int count = 8;
  static double at(uint32_t word, int e) { return int(word >> 4 * e & 15) - int(word >> 4 * e & 8) * 2; }
};

// m16n8 with P elements of type E a register, k = 8 P. Sums are exact to double and rounded once; a tensor core rounds
// more often, in an order of its own.
template <class E, class C>
void mma(C (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const char* what) {
  struct Arg { C* c; const uint32_t* a; uint32_t b[2]; };
  Arg arg{c, a, {b0, b1}};
  cuemu::warp_collective(0xffffffffu, [](void* const* lanes, uint32_t) {
    constexpr int P = MmaElement<E>::count, K = 8 * P;
    constexpr auto element = &MmaElement<E>::at;
    double A[16][K], B[8][K];
    for (int lane = 0; lane < 32; ++lane) {
      const Arg& x = *static_cast<Arg*>(lanes[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int e = 0; e < P; ++e) {
        for (int r = 0; r < 4; ++r) A[g + 8 * (r & 1)][t * P + e + (r >> 1) * K / 2] = element(x.a[r], e);
        for (int r = 0; r < 2; ++r) B[g][t * P + e + r * K / 2] = element(x.b[r], e);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      Arg& x = *static_cast<Arg*>(lanes[lane]);
      for (int r = 0; r < 4; ++r) {
        const int row = lane / 4 + 8 * (r >> 1), column = 2 * (lane % 4) + (r & 1);
        double sum = double(x.c[r]);
        for (int k = 0; k < K; ++k) sum += A[row][k] * B[column][k];
        x.c[r] = C(sum);
      }
    }
  }, &arg, what);
}
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma<__half>(c, a, b0, b1, "mma.m16n8k16.f16"); }
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma<__nv_bfloat16>(c, a, b0, b1, "mma.m16n8k16.bf16"); }
inline void mma_s8(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma<int8_t>(c, a, b0, b1, "mma.m16n8k32.s8"); }
inline void mma_s4(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma<Int4>(c, a, b0, b1, "mma.m16n8k64.s4"); }

inline int lane_id() { return cuemu::cur->lane; }

template <int Table>
uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d = 0;
  for (int i = 0; i < 8; ++i)
    if (Table >> i & 1) d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return d;
}

inline uint32_t cluster_rank() { return uint32_t(cuemu::cur->block); }
inline void cluster_sync() { cuemu::cluster_barrier(); }
template <class T>
T* cluster_peer(T* smem, uint32_t rank) { return static_cast<T*>(cuemu::peer_smem(smem, rank)); }
// Emulated grids run one after the other.
inline void grid_wait() {}
inline void grid_release() {}
#endif

}  // namespace effk::ptx
