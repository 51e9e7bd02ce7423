// Memory with an inaccessible page on either side. A buffer of any size lies against one of the two, so that the first
// byte read or written beyond it, by whatever instruction, ends the program; a sanitizer alone would miss some loads.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace effk::test {

class Guarded {
 public:
  explicit Guarded(size_t capacity) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    capacity_ = (capacity + page - 1) / page * page;
    void* whole = mmap(nullptr, capacity_ + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    data_ = static_cast<uint8_t*>(whole) + page;
    if (whole == MAP_FAILED || mprotect(data_, capacity_, PROT_READ | PROT_WRITE) != 0) {
      std::perror("guarded memory");
      std::exit(2);
    }
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  // Room for `bytes` against the upper or the lower guard page. The room and kMargin bytes on its free side are filled
  // with 0xff, which is NaN in every floating-point type.
  uint8_t* place(size_t bytes, bool upper) {
    if (bytes + kMargin > capacity_) {
      std::fprintf(stderr, "guarded memory: %zu bytes do not fit\n", bytes);
      std::exit(2);
    }
    at_ = upper ? data_ + capacity_ - bytes : data_;
    margin_ = upper ? at_ - kMargin : at_ + bytes;
    std::memset(at_, 0xff, bytes);
    std::memset(margin_, 0xff, kMargin);
    return at_;
  }

  bool margin_intact() const {
    for (size_t i = 0; i < kMargin; ++i)
      if (margin_[i] != 0xff) return false;
    return true;
  }

 private:
  static constexpr size_t kMargin = 128;
  size_t capacity_;
  uint8_t *data_, *at_ = nullptr, *margin_ = nullptr;
};

}  // namespace effk::test
