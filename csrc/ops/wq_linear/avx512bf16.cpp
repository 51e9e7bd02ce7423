// The float form for bf16 activations on BF16 dot products: a feature on top of avx512vnni.
#define EFFK_TIER avx512bf16
#define EFFK_BLOCK_ROWS 8
#include "simd/avx512.h"

#include "ops/wq_linear/body.h"

namespace effk::wq {
namespace tier = effk::avx512bf16;

extern const Kernel kAvx512VnniBf16{
    isa::Tier::avx512vnni, true, Form::bf16, "avx512vnni:bf16", EFFK_BLOCK_ROWS, /*gemv_rows*/ 8, /*gemv_tiles*/ 4, /*gemm_tiles*/ 2, tier::prepare<Form::bf16>, tier::prepare_dense,
    tier::gemv<tier::Bf16, tier::Bf16, 4>, tier::gemm<tier::Bf16, tier::Bf16, tier::Bf16, 2>};

}  // namespace effk::wq
