#include "torch/tensor.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <unordered_map>
#include <utility>
#include <vector>

#include "torch/check.h"

namespace effk::binding {

std::string dtype_name(int32_t dtype) {
  const struct { int32_t number; const char* name; } names[] = {
      {aoti_torch_dtype_float32(), "float32"}, {aoti_torch_dtype_bfloat16(), "bfloat16"},
      {aoti_torch_dtype_float16(), "float16"}, {aoti_torch_dtype_float64(), "float64"},
      {aoti_torch_dtype_uint8(), "uint8"},     {aoti_torch_dtype_int8(), "int8"},
      {aoti_torch_dtype_uint16(), "uint16"},   {aoti_torch_dtype_int16(), "int16"},
      {aoti_torch_dtype_int32(), "int32"},     {aoti_torch_dtype_int64(), "int64"},
      {aoti_torch_dtype_bool(), "bool"},
  };
  for (const auto& entry : names)
    if (entry.number == dtype) return entry.name;
  return "dtype " + std::to_string(dtype);
}

std::string Home::text() const {
  if (type == dtypes().cpu) return "cpu";
  return (type == aoti_torch_device_type_cuda() ? "cuda:" : "device type " + std::to_string(type) + ":") + std::to_string(index);
}

std::string View::text() const {
  return dtype_name(dtype) + " " + shape_text(sizes, dim) + (contiguous ? ", contiguous" : ", not contiguous") +
         ", on " + home.text();
}

Tensor empty(const int64_t* sizes, int64_t dim, int32_t dtype, const Home& home) {
  constexpr int64_t kMaxDim = 64;  // torch's own limit
  int64_t strides[kMaxDim], step = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    strides[i] = step;
    step *= sizes[i] > 1 ? sizes[i] : 1;
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, dtype, home.type, home.index, &handle));
  return Tensor(handle);
}

ParallelFor torch_pool() {
  struct Call { RangeBody body; void* ctx; };
  const auto run = [](void*, int64_t n, int64_t grain, RangeBody body, void* ctx) {
    Call call{body, ctx};
    const auto range = [](int64_t begin, int64_t end, void* c) {
      const Call& call = *static_cast<const Call*>(c);
      call.body(call.ctx, begin, end);
    };
    TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, grain, range, &call));
  };
  return {run, nullptr, int(torch::stable::get_num_threads())};
}

namespace {

// A hint to the system, which may ignore it.
void ask_for_large_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  madvise(data, bytes, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

// Buffers of results, whole large pages each where they are that large. A buffer serves a request that fills at least half of it.
class ResultPool {
 public:
  static constexpr size_t kPage = size_t(2) << 20, kSmallPage = size_t(4) << 10, kSmallest = size_t(16) << 10;
  static constexpr size_t kMostFree = 64;  // buffers: the search is linear

  static ResultPool& instance() {
    static ResultPool& pool = *new ResultPool;  // never destroyed: tensors may outlive main
    return pool;
  }
  void* take(size_t bytes) {
    const size_t page = bytes < kPage ? kSmallPage : kPage, size = (bytes + page - 1) / page * page;
    {
      const std::lock_guard<std::mutex> hold(mutex_);
      for (auto it = free_.begin(); it != free_.end(); ++it)
        if (it->second >= size && it->second / 2 <= size) {
          void* data = it->first;
          used_[data] = it->second;
          kept_ -= it->second;
          free_.erase(it);
          return data;
        }
    }
    void* data = std::aligned_alloc(page, size);
    if (!data) throw std::bad_alloc();
    if (page == kPage) ask_for_large_pages(data, size);
    const std::lock_guard<std::mutex> hold(mutex_);
    used_[data] = size;
    return data;
  }
  void give(void* data) {
    std::vector<void*> drop;
    {
      const std::lock_guard<std::mutex> hold(mutex_);
      const auto it = used_.find(data);
      const size_t size = it->second;
      used_.erase(it);
      if (size > limit_) {
        drop.push_back(data);
      } else {
        free_.emplace_back(data, size);
        kept_ += size;
        while (kept_ > limit_ || free_.size() > kMostFree) {  // the oldest go first
          drop.push_back(free_.front().first);
          kept_ -= free_.front().second;
          free_.erase(free_.begin());
        }
      }
    }
    for (void* p : drop) std::free(p);
  }

 private:
  ResultPool() {
#if defined(__linux__)
    const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGE_SIZE);
    if (pages > 0 && page > 0) limit_ = size_t(pages) * size_t(page) / 64;
#endif
  }
  std::mutex mutex_;
  std::unordered_map<void*, size_t> used_;
  std::vector<std::pair<void*, size_t>> free_;
  size_t kept_ = 0, limit_ = size_t(64) << 20;
};

// Weights side by side in blocks of large pages, one behind the other as they come. What is given back is used again only where it was
// the last of its block; a large page that holds no weight any more goes back to the system.
class WeightBlocks {
 public:
  static constexpr size_t kPage = ResultPool::kPage, kBlock = 16 * kPage, kLargest = kBlock / 4, kSmallest = size_t(4) << 10;

  static WeightBlocks& instance() {
    static WeightBlocks& blocks = *new WeightBlocks;  // never destroyed, as above
    return blocks;
  }
  void* take(size_t bytes) {
    const size_t size = (bytes + 63) / 64 * 64;
    const std::lock_guard<std::mutex> hold(mutex_);
    if (!current_ || kBlock - blocks_[current_].end < size) {
      char* data = static_cast<char*>(std::aligned_alloc(kBlock, kBlock));
      if (!data) throw std::bad_alloc();
      ask_for_large_pages(data, kBlock);
      char* full = std::exchange(current_, data);
      blocks_[data];
      if (full) drop_if_empty(full);
    }
    Block& block = blocks_[current_];
    char* at = current_ + block.end;
    block.end += size;
    sizes_[at] = size;
    for (size_t page = size_t(at - current_) / kPage; page <= (block.end - 1) / kPage; ++page) ++block.held[page];
    return at;
  }
  void give(void* data) {
    const std::lock_guard<std::mutex> hold(mutex_);
    const auto it = sizes_.find(static_cast<char*>(data));
    char* base = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(data) / kBlock * kBlock);
    Block& block = blocks_[base];
    const size_t begin = size_t(it->first - base), end = begin + it->second;
    sizes_.erase(it);
    if (end == block.end) block.end = begin;
    for (size_t page = begin / kPage; page <= (end - 1) / kPage; ++page)
      if (--block.held[page] == 0) give_back(base + page * kPage);
    drop_if_empty(base);
  }

 private:
  struct Block {
    size_t end = 0;                        // where the next weight goes
    std::array<int, kBlock / kPage> held{};  // weights in each large page
  };
  static void give_back(char* page) {
#if defined(__linux__)
    madvise(page, kPage, MADV_DONTNEED);
#else
    (void)page;
#endif
  }
  void drop_if_empty(char* base) {
    Block& block = blocks_[base];
    if (std::any_of(block.held.begin(), block.held.end(), [](int n) { return n > 0; })) return;
    block.end = 0;
    if (base == current_) return;
    blocks_.erase(base);
    std::free(base);
  }
  std::mutex mutex_;
  std::unordered_map<char*, Block> blocks_;
  std::unordered_map<char*, size_t> sizes_;
  char* current_ = nullptr;
};

size_t bytes_of(const int64_t* sizes, int64_t dim, int32_t dtype) {
  const Dtypes& d = dtypes();
  size_t bytes = 8;  // of an element; 8 are enough for any other type
  if (dtype == d.u8 || dtype == d.i8) bytes = 1;
  else if (dtype == d.bf16 || dtype == d.f16 || dtype == d.u16) bytes = 2;
  else if (dtype == d.f32 || dtype == d.i32) bytes = 4;
  for (int64_t i = 0; i < dim; ++i) bytes *= size_t(sizes[i]);
  return bytes;
}

}  // namespace

Tensor adopt(void* data, const int64_t* sizes, int64_t dim, int32_t dtype, void (*release)(void* data, void* context)) {
  constexpr int64_t kMaxDim = 64;  // torch's own limit
  int64_t strides[kMaxDim], step = 1;
  for (int64_t i = dim; i-- > 0;) {
    strides[i] = step;
    step *= sizes[i] > 1 ? sizes[i] : 1;
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(torch_from_blob(data, dim, sizes, strides, 0, dtype, dtypes().cpu, -1, &handle,
                                         aoti_torch_layout_strided(), nullptr, 0, release, nullptr));
  return Tensor(handle);
}

Tensor result(const int64_t* sizes, int64_t dim, int32_t dtype) {
  const size_t bytes = bytes_of(sizes, dim, dtype);
  if (bytes < ResultPool::kSmallest) return empty(sizes, dim, dtype);
  return adopt(ResultPool::instance().take(bytes), sizes, dim, dtype, [](void* p, void*) { ResultPool::instance().give(p); });
}

Tensor weights(const int64_t* sizes, int64_t dim, int32_t dtype) {
  const size_t bytes = bytes_of(sizes, dim, dtype), page = ResultPool::kPage;
  if (bytes < WeightBlocks::kSmallest) return empty(sizes, dim, dtype);
  if (bytes <= WeightBlocks::kLargest)
    return adopt(WeightBlocks::instance().take(bytes), sizes, dim, dtype, [](void* p, void*) { WeightBlocks::instance().give(p); });
  void* data = std::aligned_alloc(page, (bytes + page - 1) / page * page);
  if (!data) throw std::bad_alloc();
  ask_for_large_pages(data, bytes / page * page);  // what is left over stays in small ones, or up to 2 MB would be wasted
  return adopt(data, sizes, dim, dtype, [](void* p, void*) { std::free(p); });
}

void* scratch(size_t bytes) {
  constexpr size_t kAlign = 64, kKeep = size_t(4) << 20;
  struct Room {  // what is large comes from the pool and goes back there
    void* data = nullptr;
    size_t size = 0;
    ~Room() { release(); }
    void release() {
      if (size > kKeep) ResultPool::instance().give(data);
      else std::free(data);
      data = nullptr;
      size = 0;
    }
  };
  thread_local Room room;
  if (room.size < bytes || (room.size > kKeep && bytes <= kKeep)) {
    room.release();
    if (bytes > kKeep) {
      room.data = ResultPool::instance().take(bytes);
      room.size = bytes;
    } else {
      const size_t rounded = std::max((bytes + kAlign - 1) / kAlign * kAlign, kAlign);
      room.data = std::aligned_alloc(kAlign, rounded);
      if (!room.data) throw std::bad_alloc();
      room.size = rounded;
    }
  }
  return room.data;
}

}  // namespace effk::binding
