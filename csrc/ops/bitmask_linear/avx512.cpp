// 512-bit tier without VNNI and VBMI2. The loops are in body.h.
#define EFFK_TIER avx512
#include "simd/avx512.h"

#include "ops/bitmask_linear/expand512.h"
#include "ops/bitmask_linear/sixteen.h"

#include "ops/bitmask_linear/body.h"

namespace effk::bitmask {
namespace tier = effk::avx512;

extern const Kernel kAvx512{isa::Tier::avx512, "avx512:bitmask", EFFK_BITMASK_KERNEL};

}  // namespace effk::bitmask
