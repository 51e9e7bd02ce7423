// 512-bit tier with bf16 dot products. The loops are in body.h and simd/gemm.h.
#define EFFK_TIER avx512bf16
#define EFFK_GEMM_ROWS 8
#define EFFK_GEMM_TILES 3
#include "simd/avx512.h"

#include "gemm/body.h"

namespace effk::gemm {
namespace tier = effk::avx512bf16;

extern const Kernel kAvx512Bf16{isa::Tier::avx512vnni, true, Form::bf16, "avx512vnni:gemm:bf16", EFFK_GEMM_ROWS, EFFK_GEMM_TILES,
                      tier::pack_rows<Form::bf16>, tier::pack_tile, tier::multiply<Form::bf16>, tier::finish, tier::deinterleave,
                      tier::interleave_add, tier::sums};

}  // namespace effk::gemm
