// 512-bit tier. The loops are in body.h.
#define EFFK_TIER avx512
#include "simd/avx512.h"

#include "ops/decoder/body.h"

namespace effk::decoder {
namespace tier = effk::avx512;

extern const Kernel kAvx512{isa::Tier::avx512, "avx512:decoder", EFFK_DECODER_KERNEL};

}  // namespace effk::decoder
