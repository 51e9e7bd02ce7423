// Portable tier: every form on plain loops. The floor that runs anywhere, not meant to be fast; gemm serves few rows too.
#define EFFK_TIER scalar
#define EFFK_BLOCK_ROWS 1
#include "simd/scalar.h"

#include "ops/wq_linear/body.h"

namespace effk::wq {
namespace tier = effk::scalar;

extern const Kernel kScalarInt8{
    isa::Tier::scalar, false, Form::int8, "scalar:int8", EFFK_BLOCK_ROWS, /*gemv_rows*/ 0, /*gemv_tiles*/ 1, /*gemm_tiles*/ 1, tier::prepare<Form::int8>, tier::prepare_dense,
    nullptr, tier::gemm<tier::Int8<false>, tier::Int8<true>, tier::Int8<true>, 1>};

extern const Kernel kScalarFp32{
    isa::Tier::scalar, false, Form::fp32, "scalar:fp32", EFFK_BLOCK_ROWS, /*gemv_rows*/ 0, /*gemv_tiles*/ 1, /*gemm_tiles*/ 1, tier::prepare<Form::fp32>, tier::prepare_dense,
    nullptr, tier::gemm<tier::Fp32, tier::Fp32, tier::Fp32Rows, 1>};

}  // namespace effk::wq
