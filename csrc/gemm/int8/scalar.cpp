// Portable tier. The loops are in body.h and simd/gemm_int8.h.
#define EFFK_TIER scalar
#define EFFK_INT8_ROWS 2
#define EFFK_INT8_TILES 1
#include "simd/scalar.h"

#include "gemm/int8/body.h"

namespace effk::gemm8 {
namespace tier = effk::scalar;

extern const Kernel kScalar{isa::Tier::scalar, "scalar:gemm:int8", EFFK_INT8_ROWS, EFFK_INT8_TILES, tier::multiply_int8, tier::pack_codes};

}  // namespace effk::gemm8
