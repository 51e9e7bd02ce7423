// What a binding needs of torch's stable ABI, at the least cost per call: every accessor there is a call through a C
// function, so a View reads each once.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>

#include "common/parallel.h"

namespace effk::binding {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// torch's numbers of the dtypes that effk uses, asked once.
struct Dtypes {
  int32_t f32 = aoti_torch_dtype_float32(), bf16 = aoti_torch_dtype_bfloat16(), f16 = aoti_torch_dtype_float16();
  int32_t u8 = aoti_torch_dtype_uint8(), u16 = aoti_torch_dtype_uint16(), i8 = aoti_torch_dtype_int8(), i32 = aoti_torch_dtype_int32();
  int32_t i64 = aoti_torch_dtype_int64();
  int32_t cpu = aoti_torch_device_type_cpu();
};
inline const Dtypes& dtypes() {
  static const Dtypes numbers;
  return numbers;
}

std::string dtype_name(int32_t dtype);

// The device that a tensor lives on.
struct Home {
  int32_t type, index;
  bool operator==(const Home& other) const { return type == other.type && (index == other.index || type == dtypes().cpu); }
  std::string text() const;  // "cpu", "cuda:1"
};
inline const Home kCpu{dtypes().cpu, 0};

// Borrowed metadata of a tensor that outlives it.
struct View {
  AtenTensorHandle handle;
  const int64_t* sizes;
  int64_t dim;
  int32_t dtype;
  Home home;
  bool contiguous;

  explicit View(const Tensor& t) : handle(t.get()) {
    int64_t* borrowed;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &borrowed));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &home.type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &home.index));
    TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(handle, &contiguous));
    sizes = borrowed;
  }

  template <class T = void>
  const T* data() const {
    const void* p;
    TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(handle, &p));
    return static_cast<const T*>(p);
  }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t i = 0; i < dim; ++i) n *= sizes[i];
    return n;
  }
  std::string text() const;  // "float32 [2, 3], not contiguous, on cpu"
};

// A new, uninitialised, contiguous tensor. Half a microsecond cheaper than the stable empty(), which goes through
// the dispatcher.
Tensor empty(const int64_t* sizes, int64_t dim, int32_t dtype, const Home& home = kCpu);
inline Tensor empty(std::initializer_list<int64_t> sizes, int32_t dtype, const Home& home = kCpu) {
  return empty(sizes.begin(), int64_t(sizes.size()), dtype, home);
}

// torch's own thread pool, as the callback that drivers take. A second pool beside it would fight it for the cores.
ParallelFor torch_pool();

// The same for the result of a kernel on the CPU. From 16 KiB on its memory comes from a small pool of buffers that earlier results
// gave back, large ones in large pages: the first touch of fresh memory costs a fault per 4 KiB (0.7 to 1.4 us each), as much
// as the arithmetic, and the aligned allocations of glibc before 2.38 do not reuse what was freed (its bug 14581): results of
// 64 KiB made the heap grow by 64 KiB a call. The pool keeps at most 1/64 of the machine's memory.
Tensor result(const int64_t* sizes, int64_t dim, int32_t dtype);
inline Tensor result(std::initializer_list<int64_t> sizes, int32_t dtype) { return result(sizes.begin(), int64_t(sizes.size()), dtype); }

// The same for packed weights, bytes that stay: in large pages, up to 8 MB side by side with other weights, from 4 KiB on. A product with
// one row reads them 6 to 9 % faster (4096 x 4096 and 11008 x 4096, 4 bits).
Tensor weights(const int64_t* sizes, int64_t dim, int32_t dtype);
inline Tensor weights(std::initializer_list<int64_t> sizes, int32_t dtype) { return weights(sizes.begin(), int64_t(sizes.size()), dtype); }

// A contiguous tensor over memory that `release` takes back.
Tensor adopt(void* data, const int64_t* sizes, int64_t dim, int32_t dtype, void (*release)(void* data, void* context));

// 64-byte aligned scratch of at least `bytes`, valid until this thread's next call. Grows and is kept, so that a call in
// a decoding loop allocates nothing; what is larger than a decoding step needs goes back to the pool of results at the
// next small call.
void* scratch(size_t bytes);

}  // namespace effk::binding
