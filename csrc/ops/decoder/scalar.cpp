// Portable tier. The loops are in body.h.
#define EFFK_TIER scalar
#include "simd/scalar.h"

#include "ops/decoder/body.h"

namespace effk::decoder {
namespace tier = effk::scalar;

extern const Kernel kScalar{isa::Tier::scalar, "scalar:decoder", EFFK_DECODER_KERNEL};

}  // namespace effk::decoder
