// A quantised weight on a device, checked and aligned, for the CUDA bindings of wq_linear and dyad_linear.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "ops/wq_linear/cuda.h"
#include "torch/cuda/other_ops.h"
#include "torch/cuda/stream.h"
#include "torch/wq_linear_args.h"

namespace effk::binding {

inline void check_wq_launch(const char* op, int error) {
  EFFK_CHECK(error == 0, op, ": CUDA error ", error, ": ", cuda::error_text(error), cuda_build_text());
}

// The tensors of a weight, as an op receives them.
struct WeightTensors {
  const Tensor &packed, &scales;
  const OptionalTensor &zeros, &codebook, &out_ptr, &out_col, &out_val;
};

// A checked weight. `copies` keeps aligned copies of arrays that do not start at a multiple of cuda::kAlignment.
struct DeviceWeight {
  WqWeight w;
  int outliers = 0;
  std::vector<Tensor> copies;
};

inline DeviceWeight device_weight(const char* op, int index, const WeightTensors& t, int64_t n, int64_t k, int64_t bits, int64_t group,
                                  const Home& home) {
  DeviceWeight d;
  d.w = make_weight(op, index, t.packed, t.scales, t.zeros, t.codebook, n, k, bits, group, home);
  if (k > cuda::kMaxColumns) Arg{op, "k", index}.fail("at most " + std::to_string(cuda::kMaxColumns) + " on CUDA", std::to_string(k));
  add_outliers(op, index, t.out_ptr, t.out_col, t.out_val, d.w, home);
  if (d.w.out_ptr) {
    const int64_t count = View(*t.out_val).numel();
    if (count > INT32_MAX) Arg{op, "out_val", index}.fail("at most 2147483647 entries", std::to_string(count));
    d.outliers = int(count);
  }
  align(d.w.packed, t.packed, d.copies);
  align(d.w.scales, t.scales, d.copies);
  if (t.zeros) align(d.w.zeros, *t.zeros, d.copies);
  return d;
}

// W in `type`.
inline Tensor dequantized(const char* op, const DeviceWeight& d, const Home& home, DType type, cuda::Stream stream) {
  const int32_t dtype = type == DType::f32 ? dtypes().f32 : type == DType::f16 ? dtypes().f16 : dtypes().bf16;
  Tensor w = empty({d.w.n, d.w.k}, dtype, home);
  if (d.w.n) check_wq_launch(op, cuda::wq_dequantize(d.w, d.outliers, w.mutable_data_ptr(), type, stream));
  return w;
}

}  // namespace effk::binding
