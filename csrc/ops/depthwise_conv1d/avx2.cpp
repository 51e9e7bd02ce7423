// 256-bit tier. The loops are in body.h.
#define EFFK_TIER avx2
#include "simd/avx2.h"

#include "ops/depthwise_conv1d/body.h"

namespace effk::depthwise {
namespace tier = effk::avx2;

extern const Kernel kAvx2{isa::Tier::avx2, "avx2:fir", tier::row, tier::channels, tier::taps};

}  // namespace effk::depthwise
