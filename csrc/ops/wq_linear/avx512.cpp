// 512-bit tier without VNNI: 8 rows x 2 tiles is 16 accumulators, the best of 5 to 12 rows measured on Zen 5.
#define EFFK_TIER avx512
#define EFFK_BLOCK_ROWS 8
#include "simd/avx512.h"

#include "ops/wq_linear/body.h"

namespace effk::wq {
namespace tier = effk::avx512;

extern const Kernel kAvx512Int8{
    isa::Tier::avx512, false, Form::int8, "avx512:int8", EFFK_BLOCK_ROWS, /*gemv_rows*/ 8, /*gemv_tiles*/ 1, /*gemm_tiles*/ 2, tier::prepare<Form::int8>, tier::prepare_dense,
    tier::gemv<tier::Int8<false>, tier::Int8<true>, 1>, tier::gemm<tier::Int8<false>, tier::Int8<true>, tier::Int8<true>, 2>};

extern const Kernel kAvx512Fp32{
    isa::Tier::avx512, false, Form::fp32, "avx512:fp32", EFFK_BLOCK_ROWS, /*gemv_rows*/ 8, /*gemv_tiles*/ 4, /*gemm_tiles*/ 2, tier::prepare<Form::fp32>, tier::prepare_dense,
    tier::gemv<tier::Fp32, tier::Fp32, 4>, tier::gemm<tier::Fp32, tier::Fp32, tier::Fp32Rows, 2>};

}  // namespace effk::wq
