// 512-bit tier with VNNI and VBMI2, which expands bytes. The loops are in body.h.
#define EFFK_TIER avx512vnni
#include "simd/avx512.h"

#include "ops/bitmask_linear/expand512.h"

#include "ops/bitmask_linear/body.h"

namespace effk::bitmask {
namespace tier = effk::avx512vnni;

extern const Kernel kAvx512Vnni{isa::Tier::avx512vnni, "avx512vnni:bitmask", EFFK_BITMASK_KERNEL};

}  // namespace effk::bitmask
