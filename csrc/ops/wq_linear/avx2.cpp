// 256-bit tier. Sixteen registers: 4 rows x 1 tile is 8 accumulators.
#define EFFK_TIER avx2
#define EFFK_BLOCK_ROWS 4
#include "simd/avx2.h"

#include "ops/wq_linear/body.h"

namespace effk::wq {
namespace tier = effk::avx2;

extern const Kernel kAvx2Int8{
    isa::Tier::avx2, false, Form::int8, "avx2:int8", EFFK_BLOCK_ROWS, /*gemv_rows*/ 4, /*gemv_tiles*/ 1, /*gemm_tiles*/ 1, tier::prepare<Form::int8>, tier::prepare_dense,
    tier::gemv<tier::Int8<false>, tier::Int8<true>, 1>, tier::gemm<tier::Int8<false>, tier::Int8<true>, tier::Int8<true>, 1>};

extern const Kernel kAvx2Fp32{
    isa::Tier::avx2, false, Form::fp32, "avx2:fp32", EFFK_BLOCK_ROWS, /*gemv_rows*/ 4, /*gemv_tiles*/ 1, /*gemm_tiles*/ 1, tier::prepare<Form::fp32>, tier::prepare_dense,
    tier::gemv<tier::Fp32, tier::Fp32, 1>, tier::gemm<tier::Fp32, tier::Fp32, tier::Fp32Rows, 1>};

}  // namespace effk::wq
