// Portable tier. The loops are in body.h, products.h and store.h.
#define EFFK_TIER scalar
#define EFFK_ATTENTION_ROWS 2
#define EFFK_ATTENTION_VECTORS 2
#include "simd/scalar.h"

#include "ops/attention/body.h"

namespace effk::attention {
namespace tier = effk::scalar;

extern const Kernel kScalar{isa::Tier::scalar, "scalar:attention", EFFK_ATTENTION_KERNEL};

}  // namespace effk::attention
