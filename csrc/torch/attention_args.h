// The cache and the runs of attention, checked, as its driver takes them: for attention and decoder.
#pragma once
#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ops/attention/attention.h"
#include "torch/check.h"
#include "torch/tensor.h"

namespace effk::binding {

// The cache in four tensors, all on the CPU and contiguous; see cache() in python/effk/ops/attention.py. `lead` dimensions stand before
// it (1: the layers of a decoder); the result is the first of them, without its addresses.
inline attention::Cache make_cache(const char* op, const View& k, const View& v, const std::optional<View>& k_scale,
                                   const std::optional<View>& v_scale, int lead) {
  using kv::Type;
  attention::Cache c{};
  const Dtypes& d = dtypes();
  const Arg arg{op, "v_cache"};
  const bool known = v.dtype == d.f32 || v.dtype == d.f16 || v.dtype == d.i8;
  const int64_t* at = v.sizes + lead;
  if (!known || v.dim != 4 + lead || at[2] % kv::kTile || at[1] < 1 || !kv::valid_head_dim(at[3]))
    arg.fail("float16, int8 or float32 [slots, kv heads, positions, D], whole tiles of 16 positions, D a multiple of 16 up to 256", v.text());
  c.type = v.dtype == d.f32 ? Type::f32 : v.dtype == d.f16 ? Type::f16 : Type::i8;
  c.slots = at[0], c.kv_heads = at[1], c.capacity = at[2], c.head_dim = at[3];
  const int64_t tiles = c.capacity / kv::kTile;
  const auto shaped = [&](const char* name, const View& t, int32_t dtype, std::vector<int64_t> shape) {
    if (lead) shape.insert(shape.begin(), v.sizes[0]);
    const bool ok = t.dtype == dtype && t.dim == int64_t(shape.size()) && std::equal(shape.begin(), shape.end(), t.sizes) && t.contiguous && t.home == kCpu;
    if (!ok) Arg{op, name}.fail(dtype_name(dtype) + " " + shape_text(shape.data(), int64_t(shape.size())) + ", contiguous, on cpu", t.text());
  };
  shaped("v_cache", v, v.dtype, {c.slots, c.kv_heads, c.capacity, c.head_dim});
  if (c.type == Type::i8) shaped("k_cache", k, d.u8, {c.slots, c.kv_heads, tiles, c.head_dim / 4, kv::kTile, 4});
  else shaped("k_cache", k, v.dtype, {c.slots, c.kv_heads, tiles, c.head_dim, kv::kTile});
  const std::pair<const char*, const std::optional<View>*> scales[] = {{"k_scale", &k_scale}, {"v_scale", &v_scale}};
  for (const auto& [name, scale] : scales) {
    EFFK_CHECK(bool(*scale) == (c.type == Type::i8), op, ": ", name, ": expected ", *scale ? "none for a cache of floats, got one" : "scales for an int8 cache, got none");
    if (*scale) shaped(name, **scale, d.f32, {c.slots, c.kv_heads, c.capacity});
  }
  return c;
}

inline std::vector<attention::Run> make_runs(const char* op, const View& t, const attention::Cache& c, int64_t rows) {
  const Arg arg{op, "runs"};
  if (t.dim != 2) arg.fail("int32 [runs, 3]: slot, start, count", t.text());
  expect(arg, t, {dtypes().i32}, {t.sizes[0], 3});
  std::vector<attention::Run> runs;
  std::vector<bool> taken(size_t(c.slots), false);
  int64_t row = 0;
  for (int64_t i = 0; i < t.sizes[0]; ++i) {
    const int32_t* at = t.data<int32_t>() + 3 * i;
    const int64_t slot = at[0], start = at[1], count = at[2];
    EFFK_CHECK(slot >= 0 && slot < c.slots, op, ": runs[", i, "]: expected a slot from 0 to ", c.slots - 1, ", got ", slot);
    EFFK_CHECK(!taken[size_t(slot)], op, ": runs[", i, "]: expected a slot of its own, got ", slot, " again");
    EFFK_CHECK(count >= 1, op, ": runs[", i, "]: expected at least one token, got ", count);
    EFFK_CHECK(start >= 0 && start + count <= c.capacity, op, ": runs[", i, "]: expected positions within the capacity of ", c.capacity, ", got ",
               start, " to ", start + count - 1);
    taken[size_t(slot)] = true;
    runs.push_back({row, count, slot, start});
    row += count;
  }
  EFFK_CHECK(row == rows, op, ": runs: expected the ", rows, " rows of q, got ", row);
  return runs;
}

}  // namespace effk::binding
