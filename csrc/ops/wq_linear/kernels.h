// What the driver asks of a tier, and the table of everything there is. A kernel works on any tile range and any block of
// rows; memory, threads and the choice of kernel belong to the driver.
#pragma once
#include <cstdint>

#include "isa/isa.h"
#include "ops/wq_linear/wq_linear.h"

namespace effk::wq {

// How x meets the weights in registers. Each is a 32-bit operand per row and step, broadcast against 16 weight rows:
//   int8: 4 bytes (k .. k+3), one step per 4 k;  bf16: pairs (k, k+2) then (k+1, k+3), two steps;  fp32: one k, four steps.
enum class Form : int32_t { int8 = 0, fp32 = 1, bf16 = 2 };
constexpr int steps_per_unit(Form f) { return f == Form::int8 ? 1 : f == Form::bf16 ? 2 : 4; }
constexpr int kPadK = 32;  // prepared rows are zero-padded to this, the largest chunk

// x prepared for one form and one block length: operands grouped in blocks of `block_rows` rows (the last may have fewer),
// inside a block step-major and row-minor, so that a kernel reads one contiguous stream whatever the number of rows.
struct Rows {
  int32_t* data;      // [block][steps][rows of block]
  float* scale;       // int8: a, [block][blocks of K][rows of block]
  int32_t* sum;       // int8: sum of xq; float forms: bits of the fp32 sum of x; same shape
  int64_t m, k, kpad;
  int block_rows, blocks;
  int span;           // length of a block of K: t16::act_group
  int64_t spans;      // ceil(k / span)
  int rows_in(int block) const { return int(block + 1 < blocks ? block_rows : m - int64_t(block) * block_rows); }
};

struct Tile {
  const WqWeight* w;
  const Rows* rows;
  int64_t tile;                // first tile of 16 weight rows
  int tiles;                   // 1 .. Kernel::gemv_tiles or gemm_tiles
  int block, blocks;           // row blocks of x
  const float* dense_x;        // only with outliers: fp32 x, [m][k] below kTransposeRows rows, else [m / 16][k][16]
  void* y;                     // whole output [m, n]
  DType y_dtype;
};
constexpr int kTransposeRows = 8;
constexpr int kMaxBlockRows = 12;      // rows of x that meet a pair of tiles in registers
constexpr int kMaxBlocks = 12;         // row blocks per call: their results and operands stay in a first-level cache
constexpr int kGemvRows = 4;

struct Kernel {
  isa::Tier tier;
  bool needs_bf16;
  Form form;
  const char* name;
  int block_rows;              // of gemm; gemv takes up to kGemvRows rows as one block
  int gemv_tiles, gemm_tiles;
  void (*prepare)(const void* x, DType dtype, int block, const Rows& rows);
  void (*gemv)(const Tile&);   // unpacks in registers: for at most kGemvRows rows; no codebooks in the int8 form, none per row
  void (*gemm)(const Tile&);   // unpacks one span of a pair of tiles to scratch and reuses it for every block
};

EFFK_EXPORT extern const Kernel* const kKernels[];  // highest tier first
EFFK_EXPORT extern const int kKernelCount;

}  // namespace effk::wq
