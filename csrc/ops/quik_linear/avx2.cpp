// 256-bit tier. The loops are in body.h.
#define EFFK_TIER avx2
#include "simd/avx2.h"

#include "ops/quik_linear/body.h"

namespace effk::quik {
namespace tier = effk::avx2;

extern const Kernel kAvx2{isa::Tier::avx2, "avx2:quik", tier::quantize_row, tier::split_row, tier::dequantize_rows};

}  // namespace effk::quik
