// Portable tier: plain loops over 16 lanes. The floor that runs anywhere, not meant to be fast.
#define EFFK_TIER scalar
#include "simd/scalar.h"

#include "ops/fftconv/body.h"

namespace effk::fft {
namespace tier = effk::scalar;

extern const Kernel kScalar{isa::Tier::scalar, "scalar:fft", tier::first, tier::multiply, tier::to_spectrum, tier::from_spectrum,
                       tier::multiply_pair, tier::last, tier::gather, tier::scatter, tier::fir, tier::fir_tile};

}  // namespace effk::fft
