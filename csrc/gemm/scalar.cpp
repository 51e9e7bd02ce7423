// Portable tier, on the compiler's own vectors. The loops are in body.h and simd/gemm.h.
#define EFFK_TIER scalar
#define EFFK_GEMM_ROWS 2
#define EFFK_GEMM_TILES 1
#include "simd/scalar.h"

#include "gemm/body.h"

namespace effk::gemm {
namespace tier = effk::scalar;

extern const Kernel kScalar{isa::Tier::scalar, false, Form::fp32, "scalar:gemm:fp32", EFFK_GEMM_ROWS, EFFK_GEMM_TILES,
                      tier::pack_rows<Form::fp32>, tier::pack_tile, tier::multiply<Form::fp32>, tier::finish, tier::deinterleave,
                      tier::interleave_add, tier::sums};

}  // namespace effk::gemm
