// 256-bit tier, without VNNI. The loops are in body.h and simd/gemm_int8.h.
#define EFFK_TIER avx2
#define EFFK_INT8_ROWS 4
#define EFFK_INT8_TILES 1
#include "simd/avx2.h"

#include "gemm/int8/body.h"

namespace effk::gemm8 {
namespace tier = effk::avx2;

extern const Kernel kAvx2{isa::Tier::avx2, "avx2:gemm:int8", EFFK_INT8_ROWS, EFFK_INT8_TILES, tier::multiply_int8, tier::pack_codes};

}  // namespace effk::gemm8
