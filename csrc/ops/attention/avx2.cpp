// 256-bit tier. The loops are in body.h, products.h and store.h.
#define EFFK_TIER avx2
#define EFFK_ATTENTION_ROWS 3
#define EFFK_ATTENTION_VECTORS 2
#include "simd/avx2.h"

#include "ops/attention/body.h"

namespace effk::attention {
namespace tier = effk::avx2;

extern const Kernel kAvx2{isa::Tier::avx2, "avx2:attention", EFFK_ATTENTION_KERNEL};

}  // namespace effk::attention
