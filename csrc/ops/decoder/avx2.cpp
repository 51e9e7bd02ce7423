// 256-bit tier. The loops are in body.h.
#define EFFK_TIER avx2
#include "simd/avx2.h"

#include "ops/decoder/body.h"

namespace effk::decoder {
namespace tier = effk::avx2;

extern const Kernel kAvx2{isa::Tier::avx2, "avx2:decoder", EFFK_DECODER_KERNEL};

}  // namespace effk::decoder
