// Runs a driver's cases and says which of them are wrong.
#pragma once
#include <cmath>
#include <cstdio>
#include <exception>
#include <string>

namespace effk::test {

class Cases {
 public:
  // check(): error over its bound; more than 1, NaN and exceptions are failures.
  template <class Check> void run(const std::string& name, const Check& check) {
    double ratio = INFINITY;
    std::string error;
    try {
      ratio = check();
    } catch (const std::exception& e) {
      error = e.what();
    }
    ++ran_;
    if (ratio <= 1.0) return;
    ++failures_;
    std::printf("FAILED %s: error over bound %.3g %s\n", name.c_str(), ratio, error.c_str());
  }
  int finish() const {  // the exit status
    std::printf("%d cases, %d failed\n", ran_, failures_);
    return failures_ != 0 || ran_ == 0;
  }

 private:
  int failures_ = 0, ran_ = 0;
};

}  // namespace effk::test
