// What cuda.cu hands to the kernels of one width, each compiled in a translation unit of its own (cuda_mma_<bits>.cu).
#pragma once
#include "cuda/cu.h"
#include "ops/wq_linear/wq_linear.h"

namespace effk::cuda {

struct MmaArgs {
  WqWeight w;
  const void* x;
  void* y;
  int m, k, tiles, groups;
  int64_t tile_bytes, ldx;  // elements from one row of x to the next
  const float* y_in;  // [m, n], added before the bias, or null
  int outliers;       // entries of out_col and out_val
  int group_shift;    // log2 of the group; 30: one group a row
  bool x_aligned;     // rows of x start at multiples of 16 bytes
};

struct Device {
  int sms;            // multiprocessors
  int smem;           // shared memory that one block may have, bytes
  int cluster;        // largest cluster; 1: the device has none
  bool overlap;       // a kernel may start while the one before it ends
};

struct MmaPlan {
  int panels, warps, ranks;
  size_t smem;
};

template <int kBits>
cudaError_t launch_mma(const MmaArgs& args, DType dtype, const Device& device, cudaStream_t stream);
extern template cudaError_t launch_mma<2>(const MmaArgs&, DType, const Device&, cudaStream_t);
extern template cudaError_t launch_mma<3>(const MmaArgs&, DType, const Device&, cudaStream_t);
extern template cudaError_t launch_mma<4>(const MmaArgs&, DType, const Device&, cudaStream_t);
extern template cudaError_t launch_mma<8>(const MmaArgs&, DType, const Device&, cudaStream_t);

}  // namespace effk::cuda
