// 512-bit tier, for CPUs with VNNI too: there is nothing in a transform that VNNI would help.
#define EFFK_TIER avx512
#include "simd/avx512.h"

#include "ops/fftconv/body.h"

namespace effk::fft {
namespace tier = effk::avx512;

extern const Kernel kAvx512{isa::Tier::avx512, "avx512:fft", tier::first, tier::multiply, tier::to_spectrum, tier::from_spectrum,
                       tier::multiply_pair, tier::last, tier::gather, tier::scatter, tier::fir, tier::fir_tile};

}  // namespace effk::fft
