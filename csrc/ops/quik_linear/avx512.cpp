// 512-bit tier. The loops are in body.h.
#define EFFK_TIER avx512
#include "simd/avx512.h"

#include "ops/quik_linear/body.h"

namespace effk::quik {
namespace tier = effk::avx512;

extern const Kernel kAvx512{isa::Tier::avx512, "avx512:quik", tier::quantize_row, tier::split_row, tier::dequantize_rows};

}  // namespace effk::quik
