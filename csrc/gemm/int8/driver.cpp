// The table of the integer product's kernels. Compiled with baseline flags.
#include "gemm/int8/int8.h"

namespace effk::gemm8 {

extern const Kernel kScalar;
#ifdef EFFK_X86
extern const Kernel kAvx2, kAvx512, kAvx512Vnni;
#endif

const Kernel* const kKernels[] = {
#ifdef EFFK_X86
    &kAvx512Vnni, &kAvx512, &kAvx2,
#endif
    &kScalar,
};
const int kKernelCount = int(sizeof(kKernels) / sizeof(kKernels[0]));

const Kernel& choose() {
  for (const Kernel* k : kKernels)
    if (k->tier <= isa::active()) return *k;
  return kScalar;
}

}  // namespace effk::gemm8
