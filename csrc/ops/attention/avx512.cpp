// 512-bit tier. The loops are in body.h, products.h and store.h.
#define EFFK_TIER avx512
#define EFFK_ATTENTION_ROWS 6
#define EFFK_ATTENTION_VECTORS 4
#include "simd/avx512.h"

#include "ops/attention/body.h"

namespace effk::attention {
namespace tier = effk::avx512;

extern const Kernel kAvx512{isa::Tier::avx512, "avx512:attention", EFFK_ATTENTION_KERNEL};

}  // namespace effk::attention
