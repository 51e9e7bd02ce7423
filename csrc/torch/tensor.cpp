#include "torch/tensor.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

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

void* large_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  const uintptr_t begin = (uintptr_t(data) + kPage - 1) / kPage * kPage, end = (uintptr_t(data) + bytes) / kPage * kPage;
  if (bytes >= 2 * kPage && end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: may fail
#else
  (void)bytes;
#endif
  return data;
}

void* scratch(size_t bytes) {
  constexpr size_t kAlign = 64, kKeep = size_t(4) << 20;
  struct Free { void operator()(void* p) const { std::free(p); } };
  thread_local std::unique_ptr<void, Free> buffer;
  thread_local size_t size = 0;
  if (size < bytes || (size > kKeep && bytes <= kKeep)) {
    buffer.reset();
    size = 0;
    const size_t rounded = (bytes + kAlign - 1) / kAlign * kAlign;
    buffer.reset(std::aligned_alloc(kAlign, rounded ? rounded : kAlign));
    if (!buffer) throw std::bad_alloc();
    large_pages(buffer.get(), rounded);
    size = rounded;
  }
  return buffer.get();
}

}  // namespace effk::binding
