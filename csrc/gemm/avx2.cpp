// 256-bit tier. Sixteen registers: 6 rows x 1 tile is 12 accumulators. The loops are in body.h and simd/gemm.h.
#define EFFK_TIER avx2
#define EFFK_GEMM_ROWS 6
#define EFFK_GEMM_TILES 1
#include "simd/avx2.h"

#include "gemm/body.h"

namespace effk::gemm {
namespace tier = effk::avx2;

extern const Kernel kAvx2{isa::Tier::avx2, false, Form::fp32, "avx2:gemm:fp32", EFFK_GEMM_ROWS, EFFK_GEMM_TILES,
                      tier::pack_rows<Form::fp32>, tier::pack_tile, tier::multiply<Form::fp32>, tier::finish, tier::deinterleave,
                      tier::interleave_add, tier::sums};

}  // namespace effk::gemm
