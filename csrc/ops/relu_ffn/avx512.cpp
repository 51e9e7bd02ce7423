// 512-bit tier. The loops are in body.h.
#define EFFK_TIER avx512
#include "simd/avx512.h"

#include "ops/relu_ffn/body.h"

namespace effk::relu_ffn {
namespace tier = effk::avx512;

extern const Kernel kAvx512{isa::Tier::avx512, "avx512:neurons", EFFK_RELU_FFN_KERNEL};

}  // namespace effk::relu_ffn
