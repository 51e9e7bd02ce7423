// 512-bit tier with int8 dot products, for i8 caches. The loops are in body.h, products.h and store.h.
#define EFFK_TIER avx512vnni
#define EFFK_ATTENTION_ROWS 6
#define EFFK_ATTENTION_VECTORS 4
#include "simd/avx512.h"

#include "ops/attention/body.h"

namespace effk::attention {
namespace tier = effk::avx512vnni;

extern const Kernel kAvx512Vnni{isa::Tier::avx512vnni, "avx512vnni:attention", EFFK_ATTENTION_KERNEL};

}  // namespace effk::attention
