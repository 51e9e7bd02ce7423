// CUDA side of dense_linear: the launch functions of cuda*.cu in this folder, free of torch and of CUDA headers; the
// product itself is csrc/cuda/gemm.h's. They launch on `stream` of the current device, wait for nothing, allocate
// nothing, and return a cudaError_t.
//
// A weight that was packed on CUDA is its own thing, not the CPU's panels: tensor cores take rows as they are.
//
//   words 0-7 of 64 bytes: magic, version, kind, dtype, n, d_out, d_in, 0 | rows, each filled up with zeros to a
//   multiple of 16 bytes
//
// The host cannot read a header on a device without waiting for it, so the size of the buffer says the same: a multiple
// of kPackUnit, rounded up, plus a tag made of n, kind and dtype. The kernels compare the words with what the size
// said, and with the sides that the call named: NaN if they differ.
#pragma once
#include "cuda/gemm.h"
#include "formats/panel.h"

namespace effk::cuda {

constexpr int64_t kPackHeader = 64, kPackUnit = 16384;
constexpr uint32_t kPackMagic = 0x43464645, kPackVersion = 1;  // "EFFC"
constexpr int kMaxPackedBlocks = 1024;

// What was packed: one matrix of n = 1 block, or both components of DYAD, n blocks each, wl before wu.
struct Packed {
  panel::Kind kind;
  DType dtype;
  int64_t n, d_out, d_in;

  int64_t element() const { return dtype == DType::f32 ? 4 : 2; }
  int64_t ld() const { return (d_in * element() + 15) / 16 * 16 / element(); }  // elements of a row
  int64_t rows() const { return (kind == panel::Kind::dense ? 1 : 2) * n * d_out; }
  int64_t tag() const { return (kind == panel::Kind::dense ? 1 : 9 * n + 3 * (int64_t(kind) - 1)) + int64_t(dtype); }
  int64_t bytes() const { return (kPackHeader + rows() * ld() * element() + kPackUnit - 1) / kPackUnit * kPackUnit + tag(); }
  void words(uint32_t (&to)[8]) const {
    const uint32_t w[8] = {kPackMagic, kPackVersion, uint32_t(kind), uint32_t(dtype), uint32_t(n), uint32_t(d_out), uint32_t(d_in), 0};
    for (int i = 0; i < 8; ++i) to[i] = w[i];
  }
};

// The packed weight for f_out x f_in that a buffer of this size holds; false if there is none. dense: of kind dense.
bool packed_of_size(int64_t bytes, bool dense, int64_t f_out, int64_t f_in, Packed& out);

// y (tokens, d_out) = act(x W^T + bias) for a dense weight; x (tokens, d_in), y of x's type. `shape` chooses the tile:
// 0.
int dense_linear(const Packed& what, const void* packed, const void* x, DType x_type, int64_t tokens, const void* bias, DType bias_type, Activation act,
                 void* y, Stream stream, int shape = 0);

// to = header and rows of `from` (row-major, rows of d_in), second behind it where there is one, converted to
// what.dtype.
int pack(const Packed& what, const void* first, const void* second, DType from, void* to, Stream stream);
// out (f_out, f_in) fp32; NaN where the buffer is not what `what` says.
int dense_unpack(const Packed& what, const void* packed, float* out, Stream stream);

// sums[j] = sum over i of x[i * ld + j * step], i < rows, j < columns: threads, then a tree, in a fixed order.
int column_sums(const void* x, DType type, int64_t rows, int64_t columns, int64_t ld, int64_t step, float* sums, Stream stream);

}  // namespace effk::cuda
