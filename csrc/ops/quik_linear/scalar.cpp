// Portable tier. The loops are in body.h.
#define EFFK_TIER scalar
#include "simd/scalar.h"

#include "ops/quik_linear/body.h"

namespace effk::quik {
namespace tier = effk::scalar;

extern const Kernel kScalar{isa::Tier::scalar, "scalar:quik", tier::quantize_row, tier::split_row, tier::dequantize_rows};

}  // namespace effk::quik
