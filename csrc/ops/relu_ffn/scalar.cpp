// Portable tier. The loops are in body.h.
#define EFFK_TIER scalar
#include "simd/scalar.h"

#include "ops/relu_ffn/body.h"

namespace effk::relu_ffn {
namespace tier = effk::scalar;

extern const Kernel kScalar{isa::Tier::scalar, "scalar:neurons", EFFK_RELU_FFN_KERNEL};

}  // namespace effk::relu_ffn
