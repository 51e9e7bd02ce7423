// 512-bit tier: 8 rows x 3 tiles is 24 accumulators. The loops are in body.h and simd/gemm.h.
#define EFFK_TIER avx512
#define EFFK_GEMM_ROWS 8
#define EFFK_GEMM_TILES 3
#include "simd/avx512.h"

#include "gemm/body.h"

namespace effk::gemm {
namespace tier = effk::avx512;

extern const Kernel kAvx512{isa::Tier::avx512, false, Form::fp32, "avx512:gemm:fp32", EFFK_GEMM_ROWS, EFFK_GEMM_TILES,
                      tier::pack_rows<Form::fp32>, tier::pack_tile, tier::multiply<Form::fp32>, tier::finish, tier::deinterleave,
                      tier::interleave_add, tier::sums};

}  // namespace effk::gemm
