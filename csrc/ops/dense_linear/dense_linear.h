// Contract of dense_linear: y = act(x W^T + bias) with W packed once into panels (formats/panel.h, kind dense). The product is
// gemm::linear (gemm/gemm.h), shared with dyad_linear; this is what that layer is measured against, and how plain layers run.
#pragma once
#include <cstdint>

#include "formats/panel.h"

namespace effk {

// Panels of kind dense back to W [f_out, f_in] in fp32, exact.
void dense_unpack(const panel::Shape& shape, const uint8_t* panels, float* w);

}  // namespace effk
