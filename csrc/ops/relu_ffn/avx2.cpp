// 256-bit tier. The loops are in body.h.
#define EFFK_TIER avx2
#include "simd/avx2.h"

#include "ops/relu_ffn/body.h"

namespace effk::relu_ffn {
namespace tier = effk::avx2;

extern const Kernel kAvx2{isa::Tier::avx2, "avx2:neurons", EFFK_RELU_FFN_KERNEL};

}  // namespace effk::relu_ffn
