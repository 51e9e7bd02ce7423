// Activations that an op may apply to its result, in fp32 and before the result is rounded to storage.
#pragma once
#include <cstdint>

namespace effk {

enum class Activation : int32_t { none = 0, silu = 1, relu = 2, gelu = 3, gelu_tanh = 4 };

}  // namespace effk
