// The fiber scheduler behind cuemu.h. One cluster (usually one block) runs at a time, on the calling thread.
#include "emu/cuemu.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifndef __x86_64__
#error "the CUDA emulation switches stacks in x86-64 assembly"
#endif

// void cuemu_switch(void** save_sp, void* load_sp): saves the callee-saved registers and changes stacks.
asm(R"(
.text
.globl cuemu_switch
.hidden cuemu_switch
.type cuemu_switch,@function
cuemu_switch:
  endbr64
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuemu_switch,.-cuemu_switch
)");
extern "C" void cuemu_switch(void** save_sp, void* load_sp);

namespace cuemu {

thread_local Thread* cur = nullptr;

namespace {

constexpr size_t kStack = 256 * 1024, kGuard = 4096;
constexpr size_t kMaxSmem = 227 * 1024;  // of a block, on compute capability 9.0
constexpr int kMaxThreads = 1024, kMaxCluster = 8;

enum class State : uint8_t { ready, in_warp, in_block, in_cluster, done };

struct Fiber {
  Thread thread;
  void* sp = nullptr;
  void* fake_stack = nullptr;  // ASan's
  State state = State::done;
  const char* waits_in = "";
};

// Lanes that have arrived at a collective of their warp.
struct Gathering {
  uint32_t mask = 0, arrived = 0;
  Collective all = nullptr;
  const char* what = "";
  void* args[kWarp] = {};
};

struct Scheduler {
  std::vector<Fiber> fibers;
  std::vector<std::vector<Gathering>> gatherings;  // of each warp
  std::vector<unsigned char*> smem;                // of each block of the cluster
  size_t smem_bytes = 0;
  int block_threads = 0, threads = 0;              // of one block, of the cluster
  std::vector<int> in_block;                       // threads of a block at its barrier
  int in_cluster = 0;
  std::vector<int> exited;                         // threads of a block that have ended
  const std::function<void()>* body = nullptr;
  std::string error;

  char* stacks = nullptr;
  size_t stack_count = 0;
  int running = -1;
  void* main_sp = nullptr;
  void* main_fake_stack = nullptr;
  const void* main_bottom = nullptr;
  size_t main_size = 0;

  ~Scheduler() { if (stacks) munmap(stacks, stack_count * kStack); }
};
thread_local Scheduler s;

struct Unwind {};  // thrown through a parked fiber after an error elsewhere, so that its destructors run

void enter(Fiber& f) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&s.main_fake_stack, s.stacks + s.running * kStack + kGuard, kStack - kGuard);
#endif
  cuemu_switch(&s.main_sp, f.sp);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(s.main_fake_stack, nullptr, nullptr);
#endif
}

void leave(Fiber& f, [[maybe_unused]] bool for_good) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(for_good ? nullptr : &f.fake_stack, s.main_bottom, s.main_size);
#endif
  cuemu_switch(&f.sp, s.main_sp);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(f.fake_stack, &s.main_bottom, &s.main_size);
#endif
}

extern "C" void cuemu_entry() {
  Fiber& f = s.fibers[s.running];
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &s.main_bottom, &s.main_size);
#endif
  try {
    (*s.body)();
    if (!f.thread.copies.empty()) fail("the thread exits with cp.async copies that it never waited for");
  } catch (const Unwind&) {
  } catch (const std::exception& e) {
    if (s.error.empty()) s.error = e.what();
  }
  f.state = State::done;
  // With its last thread a block's shared memory is gone, also for peers that have not finished reading it.
  const int block = f.thread.block;
  if (++s.exited[block] == s.block_threads) std::memset(s.smem[block], 0xff, s.smem_bytes);
  leave(f, true);
  __builtin_trap();
}

// A stack on which the first switch "returns" into cuemu_entry.
void prepare(int i) {
  char* const top = s.stacks + size_t(i + 1) * kStack;
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(top - kStack + kGuard, kStack - kGuard);  // left by the fiber before
#endif
  void** sp = reinterpret_cast<void**>(top);
  *--sp = nullptr;  // a return address for cuemu_entry: keeps the alignment of the ABI
  *--sp = reinterpret_cast<void*>(&cuemu_entry);
  for (int r = 0; r < 6; ++r) *--sp = nullptr;
  s.fibers[i].sp = sp;
  s.fibers[i].state = State::ready;
}

void park(State state, const char* what) {
  Fiber& f = s.fibers[s.running];
  f.state = state;
  f.waits_in = what;
  leave(f, false);
  if (!s.error.empty()) throw Unwind{};
}

void wake(State state, int first, int count) {
  for (int i = first; i < first + count; ++i)
    if (s.fibers[i].state == state) s.fibers[i].state = State::ready;
}

std::string where(const Thread& t) {
  char text[120];
  std::snprintf(text, sizeof text, "block (%u,%u,%u) thread (%u,%u,%u)", t.block_index.x, t.block_index.y,
                t.block_index.z, t.index.x, t.index.y, t.index.z);
  return text;
}

std::string deadlock() {
  std::string text = "deadlock: ";
  int done = 0, shown = 0;
  for (int i = 0; i < s.threads; ++i) {
    const Fiber& f = s.fibers[i];
    if (f.state == State::done) ++done;
    else if (shown++ < 4) text += where(f.thread) + " waits in " + f.waits_in + "; ";
  }
  return text + std::to_string(s.threads - done) + " threads wait, " + std::to_string(done) + " have exited";
}

void make_stacks(size_t count) {
  if (count <= s.stack_count) return;
  if (s.stacks) munmap(s.stacks, s.stack_count * kStack);
  void* p = mmap(nullptr, count * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  s.stacks = static_cast<char*>(p);
  s.stack_count = count;
  for (size_t i = 0; i < count; ++i) mprotect(s.stacks + i * kStack, kGuard, PROT_NONE);
}

void resume(int i) {
  s.running = i;
  cur = &s.fibers[i].thread;
  enter(s.fibers[i]);
}

void run_cluster(dim3 grid, dim3 block, int cluster, const std::vector<uint3>& blocks, const std::vector<int>& warps,
                 const std::vector<int>& lanes, bool interleaved) {
  s.block_threads = int(block.x * block.y * block.z);
  s.threads = s.block_threads * cluster;
  make_stacks(s.threads);
  s.fibers.resize(std::max<size_t>(s.fibers.size(), s.threads));
  s.gatherings.assign(s.threads / kWarp, {});
  s.in_block.assign(cluster, 0);
  s.in_cluster = 0;
  s.exited.assign(cluster, 0);
  for (unsigned char* p : s.smem) std::memset(p, 0xff, s.smem_bytes);
  for (int i = 0; i < s.threads; ++i) {
    Thread& t = s.fibers[i].thread;
    const int in_block = i % s.block_threads;
    t.index = make_uint3(in_block % block.x, in_block / block.x % block.y, in_block / (block.x * block.y));
    t.block = i / s.block_threads;
    t.block_index = blocks[t.block];
    t.block_dim = block;
    t.grid_dim = grid;
    t.lane = i % kWarp;
    t.warp = i / kWarp;
    t.copy_group = 0;
    t.copies.clear();
    prepare(i);
  }
  // A warp runs until all its lanes wait for other warps or have exited, then the next one: each gets as far ahead of the
  // others as the barriers allow, which is what exposes a missing one. Interleaved, it runs to its next collective only,
  // which exposes warps that use the same memory at the same time.
  for (bool progress = true; progress;) {
    progress = false;
    for (int w : warps)
      for (bool again = true; again;) {
        again = false;
        for (int lane : lanes) {
          const int i = w * kWarp + lane;
          if (s.fibers[i].state != State::ready) continue;
          progress = true;
          again = !interleaved;
          resume(i);
        }
      }
  }
  const auto is_done = [](const Fiber& f) { return f.state == State::done; };
  if (!std::all_of(s.fibers.begin(), s.fibers.begin() + s.threads, is_done)) {
    if (s.error.empty()) s.error = deadlock();
    for (int i = 0; i < s.threads; ++i)
      while (!is_done(s.fibers[i])) resume(i);
  }
  cur = nullptr;
  if (!s.error.empty()) {
    const std::string text = "cuemu: " + std::exchange(s.error, "");
    throw std::runtime_error(text);
  }
}

std::string order_name() {
  const char* const env = std::getenv("CUEMU_ORDER");
  return env ? env : "fwd";
}

// Indices 0..n-1 in the order that CUEMU_ORDER asks for; `what` keeps the shuffles of warps and lanes apart.
std::vector<int> ordered(int n, unsigned what) {
  std::vector<int> order(n);
  std::iota(order.begin(), order.end(), 0);
  const std::string name = order_name();
  if (name == "fwd") return order;
  if (name == "rev") {
    std::reverse(order.begin(), order.end());
    return order;
  }
  char* end = nullptr;
  const unsigned long seed = std::strtoul(name.c_str(), &end, 10);
  if (end == name.c_str() || *end) throw std::runtime_error("cuemu: CUEMU_ORDER: expected fwd, rev or a number, got " + name);
  std::mt19937 random(unsigned(seed) * 7919u + what);
  std::shuffle(order.begin(), order.end(), random);
  return order;
}

// Shared memory of a cluster's blocks, each of the exact size.
struct SharedMemory {
  SharedMemory(int blocks, size_t bytes) {
    for (int i = 0; i < blocks; ++i) {
      void* p = nullptr;
      if (posix_memalign(&p, 1024, std::max<size_t>(bytes, 1)) != 0) throw std::bad_alloc();
      s.smem.push_back(static_cast<unsigned char*>(p));
    }
    s.smem_bytes = bytes;
  }
  ~SharedMemory() {
    for (unsigned char* p : s.smem) std::free(p);
    s.smem.clear();
  }
};

}  // namespace

void fail(const char* format, ...) {
  char text[400];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof text, format, args);
  va_end(args);
  throw std::runtime_error(cur ? where(*cur) + ": " + text : text);
}

unsigned char* dyn_smem() { return s.smem[cur->block]; }

void* peer_smem(const void* mine, uint32_t rank) {
  const ptrdiff_t offset = static_cast<const unsigned char*>(mine) - s.smem[cur->block];
  if (offset < 0 || size_t(offset) >= s.smem_bytes) fail("cluster_peer: not an address in dynamic shared memory");
  if (rank >= s.smem.size()) fail("cluster_peer: rank %u in a cluster of %zu", rank, s.smem.size());
  return s.smem[rank] + offset;
}

void finish_copies(int keep_groups) {
  auto& copies = cur->copies;
  const auto finished = [&](const PendingCopy& c) {
    if (c.group >= cur->copy_group - keep_groups) return false;
    std::memset(c.to, 0, 16);
    if (c.bytes) std::memcpy(c.to, c.from, c.bytes);
    return true;
  };
  copies.erase(std::remove_if(copies.begin(), copies.end(), finished), copies.end());
}

void warp_collective(uint32_t mask, Collective all, void* arg, const char* what) {
  const int lane = cur->lane, warp = cur->warp;
  if (!(mask >> lane & 1)) fail("%s: the calling lane %d is not in mask %08x", what, lane, mask);
  auto& open = s.gatherings[warp];
  auto it = std::find_if(open.begin(), open.end(), [&](const Gathering& g) { return (g.mask & mask) != 0; });
  if (it == open.end()) {
    open.push_back({mask, 0, all, what, {}});
    it = open.end() - 1;
  }
  if (it->mask != mask || it->all != all)
    fail("divergence: this lane calls %s (mask %08x) while others wait in %s (mask %08x)", what, mask, it->what, it->mask);
  it->args[lane] = arg;
  it->arrived |= 1u << lane;
  if (it->arrived != mask) return park(State::in_warp, what);
  const Gathering complete = *it;
  open.erase(it);
  complete.all(complete.args, mask);
  for (int i = 0; i < kWarp; ++i)
    if (mask >> i & 1) s.fibers[warp * kWarp + i].state = State::ready;
}

void block_barrier() {
  int& arrived = s.in_block[cur->block];
  if (++arrived < s.block_threads) return park(State::in_block, "__syncthreads");
  arrived = 0;
  wake(State::in_block, cur->block * s.block_threads, s.block_threads);
}

void cluster_barrier() {
  if (++s.in_cluster < s.threads) return park(State::in_cluster, "cluster_sync");
  s.in_cluster = 0;
  wake(State::in_cluster, 0, s.threads);
}

void run_grid(dim3 grid, dim3 block, size_t smem, int cluster, const std::function<void()>& body) {
  const auto require = [](bool ok, const char* what) {
    if (!ok) throw std::runtime_error(std::string("cuemu: launch: ") + what);
  };
  const int64_t block_threads = int64_t(block.x) * block.y * block.z;
  require(grid.x && grid.y && grid.z && block_threads, "empty grid or block");
  require(grid.y <= 65535 && grid.z <= 65535, "grid.y or grid.z above 65535");
  require(block_threads <= kMaxThreads && block_threads % kWarp == 0, "threads of a block: expected a multiple of 32 up to 1024");
  require(smem <= kMaxSmem, "more than 227 KiB of dynamic shared memory");
  require(cluster >= 1 && cluster <= kMaxCluster && grid.y % cluster == 0, "cluster: expected 1 to 8, a divisor of grid.y");

  const SharedMemory memory(cluster, smem);
  s.body = &body;
  const int rows = int(grid.y * grid.z) / cluster;
  const bool interleaved = order_name() != "fwd" && order_name() != "rev";
  const std::vector<int> warps = ordered(int(block_threads / kWarp) * cluster, 1), lanes = ordered(kWarp, 2);
  for (int i : ordered(int(grid.x) * rows, 3)) {
    std::vector<uint3> blocks;
    for (int rank = 0; rank < cluster; ++rank) {
      const unsigned row = i / grid.x * cluster + rank;
      blocks.push_back(make_uint3(i % grid.x, row % grid.y, row / grid.y));
    }
    run_cluster(grid, block, cluster, blocks, warps, lanes, interleaved);
  }
}

}  // namespace cuemu
