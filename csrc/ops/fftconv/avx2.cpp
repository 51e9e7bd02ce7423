// 256-bit tier: a radix-8 step of 8 columns is 16 registers, all there are; the compiler spills some of it.
#define EFFK_TIER avx2
#include "simd/avx2.h"

#include "ops/fftconv/body.h"

namespace effk::fft {
namespace tier = effk::avx2;

extern const Kernel kAvx2{isa::Tier::avx2, "avx2:fft", tier::first, tier::multiply, tier::to_spectrum, tier::from_spectrum,
                       tier::multiply_pair, tier::last, tier::gather, tier::scatter, tier::fir, tier::fir_tile};

}  // namespace effk::fft
