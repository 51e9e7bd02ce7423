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

constexpr int kMaxBlockRows = 8;       // rows of x that meet a pair of tiles in registers
constexpr int kMaxBlocks = 16;         // row blocks per call: their results and operands stay in a first-level cache
constexpr int kMaxGemvTiles = 32;      // tiles that one call of gemv may be given
constexpr int64_t kGrainBytes = 64 << 10;  // of packed weights: about 2 us of streaming, above the cost of waking a thread

// x prepared for one form and one span length, in the order in which gemm consumes it: batches of kMaxBlocks blocks of
// `block_rows` rows (the last batch and the last block may be shorter), and inside a batch
//   data [span][block][step][row of block]      scale, sum [span][block][row of block]
// so that one call over one batch reads a single stream, whatever the number of rows. (Blocks outermost, each span of a
// block lay in the same cache sets as that of its neighbours: half the speed at 128 rows.)
struct Rows {
  int32_t* data;
  float* scale;       // int8: a
  int32_t* sum;       // int8: sum of xq; float forms: bits of the fp32 sum of x
  int64_t m, k, kpad;
  int block_rows, blocks;
  int span;           // t16::act_group
  int64_t spans;      // ceil(k / span)

  int64_t first_row(int block) const { return int64_t(block) * block_rows; }
  int rows_in(int block) const { return int(block + 1 < blocks ? block_rows : m - first_row(block)); }
  // Start of (block, span) in units of steps x rows: `steps_before` of earlier spans, `steps` in this one.
  int64_t at(int block, int64_t steps_before, int64_t steps, int64_t steps_total) const {
    const int64_t batch_row = int64_t(block / kMaxBlocks) * kMaxBlocks * block_rows;
    const int64_t batch_end = batch_row + int64_t(kMaxBlocks) * block_rows;
    const int64_t batch_rows = (batch_end < m ? batch_end : m) - batch_row;
    return batch_row * steps_total + batch_rows * steps_before + (first_row(block) - batch_row) * steps;
  }
  int64_t data_at(int block, int64_t span_index, int steps_per_four) const {
    const int64_t k0 = span_index * span, k1 = k0 + span < kpad ? k0 + span : kpad;
    return at(block, k0 / 4 * steps_per_four, (k1 - k0) / 4 * steps_per_four, kpad / 4 * steps_per_four);
  }
  int64_t scale_at(int block, int64_t span_index) const { return at(block, span_index, 1, spans); }
};

struct Tile {
  const WqWeight* w;
  const Rows* rows;
  int64_t tile;                // first tile of 16 weight rows
  int tiles;                   // gemv: 1 .. kMaxGemvTiles; gemm: 1 .. Kernel::gemm_tiles
  int block, blocks;           // row blocks of x
  const float* dense_x;        // only with outliers: fp32 x as prepare_dense leaves it
  void* y;                     // whole output [m, n]
  DType y_dtype;
};

struct Kernel {
  isa::Tier tier;
  bool needs_bf16;
  Form form;
  const char* name;
  int block_rows;              // of gemm
  int gemv_rows;               // gemv takes up to this many rows of x, as one block; 0: there is no gemv
  int gemv_tiles, gemm_tiles;
  void (*prepare)(const void* x, DType dtype, int block, const Rows& rows);
  // For outliers: the rows [16 block, 16 block + 16) of x in fp32; [k] if there is one row, else out[block][k][16], zeros beyond m.
  void (*prepare_dense)(const void* x, DType dtype, int64_t m, int64_t k, int64_t block, float* out);
  void (*gemv)(const Tile&);   // results stay in registers over all of K; no codebooks in the int8 form, none per row
  void (*gemm)(const Tile&);   // any number of rows, span by span over a batch of row blocks
};

// What the driver decides for one weight of a call; wq_grouped_linear asks the same for each expert.
const Kernel* choose(const WqLinearArgs&, const WqWeight&);
bool is_gemv(const Kernel&, const WqLinearArgs&, const WqWeight&);
Rows describe(const WqLinearArgs&, const WqWeight&, const Kernel&);  // without memory

EFFK_EXPORT extern const Kernel* const kKernels[];  // highest tier first
EFFK_EXPORT extern const int kKernelCount;

}  // namespace effk::wq
