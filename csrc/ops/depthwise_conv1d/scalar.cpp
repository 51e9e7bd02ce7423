// Portable tier. The loops are in body.h.
#define EFFK_TIER scalar
#include "simd/scalar.h"

#include "ops/depthwise_conv1d/body.h"

namespace effk::depthwise {
namespace tier = effk::scalar;

extern const Kernel kScalar{isa::Tier::scalar, "scalar:fir", tier::row, tier::channels, tier::taps};

}  // namespace effk::depthwise
