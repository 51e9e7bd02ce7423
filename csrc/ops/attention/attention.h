// Contract of attention: rotary positions, appending to a key-value cache, and causal attention with grouped queries, in one call.
//
//   q', k' = q, k with channels (i, i + R/2), i < R/2, turned by the angle of their position: (x cos - y sin, y cos + x sin)
//   cache[slot, position] = k', v, rounded to the type of the cache
//   out[t, h] = sum_j softmax_j(scale q'[t, h] . k[j, h / G]) v[j, h / G]     over the cached j <= p(t), and j > p(t) - window
//
// G = heads / kv_heads. The softmax is computed in fp32 over blocks of 64 positions with a running maximum, chunks of 256 positions apart
// and put together in order, both at fixed positions. Keys and values are read as the cache stores them, also those of the same call.
// With an i8 cache q' is rounded to 15 bits of the largest of its head, products with keys are exact integers.
// A token's result depends neither on the number of threads, nor on the other runs, nor on the runs in which its sequence was fed,
// bit for bit, as long as keys and values are finite.
// Nothing here checks arguments, allocates or throws; no alignment is asked for. Positions of a slot that are beyond what it holds may
// contain anything.
//
// Cost of a token at position p: 2 p D kv_heads elements of cache and 2 p D heads multiply-adds.
#pragma once
#include <cstddef>
#include <cstdint>

#include "common/parallel.h"
#include "formats/kv.h"

namespace effk::attention {

using CacheType = kv::Type;

struct Cache {               // of one layer; layout: formats/kv.h
  void *k, *v;               // [slots, kv_heads, kv::head_bytes(type, capacity, head_dim)]
  float *k_scale, *v_scale;  // i8: [slots, kv_heads, kv::padded(capacity)]; else null
  CacheType type;
  int64_t slots, capacity, kv_heads, head_dim;
};

// Rows [row, row + count) of q, k, v and out are the tokens at positions start.. of sequence `slot`, whose positions below start are
// cached. Runs are of different slots.
struct Run { int64_t row, count, slot, start; };

struct Args {
  const float *q, *k, *v;                // [rows, heads * D], [rows, kv_heads * D] twice
  int64_t q_stride, k_stride, v_stride;  // floats between rows
  int64_t heads;                         // a multiple of cache.kv_heads
  float scale;
  const float *cosine, *sine;            // [positions, rotary / 2], or null: nothing is turned
  int64_t rotary;                        // channels that are turned, even, at most D
  int64_t window;                        // 0: all positions
  Cache cache;
  const Run* runs;
  int64_t n_runs;
  float* out;                            // [rows, heads * D]; rows of no run are left alone
  int64_t out_stride;
};
size_t workspace(const Args&, int threads);  // bytes; depends on the runs, not on what pointers point to
void run(const Args&, void* workspace, const ParallelFor&);

const char* kernel_name();

}  // namespace effk::attention
