// Storage types of activations.
#pragma once
#include <cstdint>

namespace effk {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

}  // namespace effk
