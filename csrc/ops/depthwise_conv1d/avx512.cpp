// 512-bit tier. The loops are in body.h.
#define EFFK_TIER avx512
#include "simd/avx512.h"

#include "ops/depthwise_conv1d/body.h"

namespace effk::depthwise {
namespace tier = effk::avx512;

extern const Kernel kAvx512{isa::Tier::avx512, "avx512:fir", tier::row, tier::channels, tier::taps};

}  // namespace effk::depthwise
