// What the CUDA bindings of dense_linear and dyad_linear share: weights packed on a device (ops/dense_linear/cuda.h),
// of which only the size can be looked at without waiting for it.
#pragma once
#include <string>

#include "ops/dense_linear/cuda.h"
#include "torch/cuda/stream.h"
#include "torch/dyad_linear_args.h"

namespace effk::binding {

inline void check_gemm_launch(const char* op, int error) {
  EFFK_CHECK(error == 0, op, ": CUDA error ", error, ": ", cuda::gemm_error_text(error), cuda_build_text());
}

// Sides that the kernels count in 32 bits.
inline void check_side(const Arg& arg, int64_t side) {
  if (side > cuda::kGemmMaxSide) arg.fail("at most " + std::to_string(cuda::kGemmMaxSide) + " rows and columns on CUDA", std::to_string(side));
}

// `kind` is dense, or that of DYAD which the call names.
inline cuda::Packed device_pack(const Arg& arg, const Tensor& packed, panel::Kind kind, int64_t f_out, int64_t f_in, const Home& home) {
  const View view(packed);
  const bool dense = kind == panel::Kind::dense;
  if (view.dim != 1 || view.dtype != dtypes().u8 || !(view.home == home) || !view.contiguous)
    arg.fail(std::string("what ") + (dense ? "dense_pack" : "dyad_pack") + " returned: uint8 [bytes], contiguous, on " + home.text(), view.text());
  const std::string wanted = std::string(dense ? "one of dense_pack" : "one of dyad_pack") + ", called on CUDA, for f_out = " + std::to_string(f_out) +
                             ", f_in = " + std::to_string(f_in) + (dense ? "" : std::string(", variant '") + kind_name(int(kind)) + "'");
  cuda::Packed p;
  if (f_out < 1 || f_in < 1 || f_out > cuda::kGemmMaxSide || f_in > cuda::kGemmMaxSide || !cuda::packed_of_size(view.sizes[0], dense, f_out, f_in, p))
    arg.fail(wanted, "another: " + std::to_string(view.sizes[0]) + " bytes");
  if (p.kind != kind) arg.fail(wanted, std::string("variant '") + kind_name(int(p.kind)) + "'");
  if (reinterpret_cast<uintptr_t>(view.data()) % 16) arg.fail(wanted, "a view of it, off alignment");
  return p;
}

inline Tensor new_pack(const char* op, const cuda::Packed& what, const void* first, const void* second, DType from, const OnDevice& device) {
  EFFK_CHECK(what.n <= cuda::kMaxPackedBlocks, op, ": wl: expected at most ", cuda::kMaxPackedBlocks, " blocks on CUDA, got ", what.n);
  check_side(Arg{op, "f_out"}, what.n * what.d_out);
  check_side(Arg{op, "f_in"}, what.n * what.d_in);
  Tensor packed = empty({what.bytes()}, dtypes().u8, device.home);
  check_gemm_launch(op, cuda::pack(what, first, second, from, packed.mutable_data_ptr(), device.stream()));
  return packed;
}

// f_in of a tokens-first x, for what must be known before x can be checked.
inline int64_t last_side(const Arg& arg, const Tensor& x) {
  const View view(x);
  if (view.dim < 1) arg.fail("[..., f_in]", view.text());
  return view.sizes[view.dim - 1];
}

}  // namespace effk::binding
