// Buffers of the kernels' test programs: of exact size, so that sanitizers see the first byte read behind them.
#pragma once
#ifndef EFFK_CUEMU
#include <cuda_runtime.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <stdexcept>

#include "common/dtype.h"
#include "common/half.h"

namespace {
using namespace effk;

// An array whose end is the end of its allocation, so that ASan sees the first byte read behind it.
template <class T>
struct Buffer {
  explicit Buffer(size_t count, size_t offset = 0) : offset_(offset), size_(count), memory_(allocate(count + offset), &std::free) {}
  T* data() const { return memory_.get() + offset_; }
  T& operator[](size_t i) const { return data()[i]; }
  size_t size() const { return size_; }

 private:
  static T* allocate(size_t count) {
    void* p = nullptr;
    if (posix_memalign(&p, 64, count ? count * sizeof(T) : 1) != 0) std::abort();
    return static_cast<T*>(p);
  }
  size_t offset_, size_;
  std::unique_ptr<T, decltype(&std::free)> memory_;
};

// What the kernels see of a buffer: itself under the emulation, a copy of its exact size on a GPU.
template <class T>
struct Mirror {
#ifdef EFFK_CUEMU
  explicit Mirror(const Buffer<T>& host) : host_(host), p_(host.data()) {}
  void fetch() const {}
#else
  explicit Mirror(const Buffer<T>& host) : host_(host) {
    const size_t bytes = std::max<size_t>(host.size() * sizeof(T), 1);
    check(cudaMalloc(&base_, bytes + kShift));
    p_ = reinterpret_cast<T*>(base_ + reinterpret_cast<uintptr_t>(host.data()) % kShift);  // as far off alignment
    if (host.size()) check(cudaMemcpy(p_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~Mirror() { cudaFree(base_); }
  Mirror(const Mirror&) = delete;
  void fetch() const { check(cudaMemcpy(host_.data(), p_, host_.size() * sizeof(T), cudaMemcpyDeviceToHost)); }
#endif
  T* get() const { return p_; }

 private:
  const Buffer<T>& host_;
  T* p_;
#ifndef EFFK_CUEMU
  static constexpr size_t kShift = 16;
  static void check(cudaError_t e) {
    if (e != cudaSuccess) throw std::runtime_error(cudaGetErrorString(e));
  }
  char* base_;
#endif
};

float decode(uint16_t bits, DType type) { return type == DType::f16 ? f16_to_float(bits) : bf16_to_float(bits); }
uint16_t encode(float value, DType type) { return type == DType::f16 ? float_to_f16(value) : float_to_bf16(value); }

}  // namespace
