// The int8 form on VNNI dot products; the fp32 form has nothing to gain here and stays with avx512.
#define EFFK_TIER avx512vnni
#define EFFK_BLOCK_ROWS 8
#include "simd/avx512.h"

#include "ops/wq_linear/body.h"

namespace effk::wq {
namespace tier = effk::avx512vnni;

extern const Kernel kAvx512VnniInt8{
    isa::Tier::avx512vnni, false, Form::int8, "avx512vnni:int8", EFFK_BLOCK_ROWS, /*gemv_rows*/ 8, /*gemv_tiles*/ 1, /*gemm_tiles*/ 2, tier::prepare<Form::int8>, tier::prepare_dense,
    tier::gemv<tier::Int8<false>, tier::Int8<true>, 1>, tier::gemm<tier::Int8<false>, tier::Int8<true>, tier::Int8<true>, 2>};

}  // namespace effk::wq
