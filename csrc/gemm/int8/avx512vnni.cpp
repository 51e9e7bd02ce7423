// 512-bit tier with VNNI: 8 rows x 3 tiles is 24 sums. The loops are in body.h and simd/gemm_int8.h.
#define EFFK_TIER avx512vnni
#define EFFK_INT8_ROWS 8
#define EFFK_INT8_TILES 3
#include "simd/avx512.h"

#include "gemm/int8/body.h"

namespace effk::gemm8 {
namespace tier = effk::avx512vnni;

extern const Kernel kAvx512Vnni{isa::Tier::avx512vnni, "avx512vnni:gemm:int8", EFFK_INT8_ROWS, EFFK_INT8_TILES, tier::multiply_int8, tier::pack_codes};

}  // namespace effk::gemm8
