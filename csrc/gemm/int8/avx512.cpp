// 512-bit tier without VNNI: 16 sums, and what cutting codes into nibbles takes. The loops are in body.h and simd/gemm_int8.h.
#define EFFK_TIER avx512
#define EFFK_INT8_ROWS 8
#define EFFK_INT8_TILES 2
#include "simd/avx512.h"

#include "gemm/int8/body.h"

namespace effk::gemm8 {
namespace tier = effk::avx512;

extern const Kernel kAvx512{isa::Tier::avx512, "avx512:gemm:int8", EFFK_INT8_ROWS, EFFK_INT8_TILES, tier::multiply_int8, tier::pack_codes};

}  // namespace effk::gemm8
