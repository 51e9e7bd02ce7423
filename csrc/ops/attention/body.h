// The loop of attention over the vector vocabulary of csrc/simd: blocks of 64 positions, rows of queries in groups, scores, a running
// maximum, weights times values.
#pragma once
#include <type_traits>

#include "ops/attention/kernels.h"
#include "ops/attention/store.h"
#include "simd/activation.h"

namespace effk::EFFK_TIER {
namespace {

using attention::State;
using attention::Tile;

constexpr float kInf = __builtin_inff();
#define EFFK_16(x) x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x
constexpr float kFirst[32] = {EFFK_16(kInf), EFFK_16(-kInf)};  // from 16 - n on: n lanes that stay, the others become -infinity
constexpr float kLast[32] = {EFFK_16(-kInf), EFFK_16(kInf)};   // from 16 - n on: n lanes that become -infinity
#undef EFFK_16
EFFK_INLINE int64_t within(int64_t n, int64_t low, int64_t high) { return n < low ? low : n > high ? high : n; }

// Positions of one block: [from, to) of [begin, begin + kBlock) are cached and not behind every window. Bytes from its keys and values to
// those that are fetched meanwhile, 0: nothing.
struct Block { int64_t begin, from, to, keys_ahead, values_ahead; };

// What a row sees of a block, as lanes.
struct Seen { int64_t from, to; };
EFFK_INLINE Seen seen_by(const Tile& t, int64_t row, const Block& b) {
  const int64_t p = t.first + row / t.group;
  const int64_t from = t.window ? p - t.window + 1 : b.from;
  return {(from > b.from ? from : b.from) - b.begin, (p + 1 < b.to ? p + 1 : b.to) - b.begin};
}

// What rows keep between the two products of a block, and their running sums of weights by lanes.
struct Between { float *weights /* [rows][kBlock] */, *alpha /* [rows, and 16 more] */, *lanes /* [rows][16] */; };

// Weights of the rows [r0, r0 + rows) for one block whose keys lie at k as K says.
template <Type K> void score_group(const Tile& t, int64_t r0, int rows, const Block& b, const uint8_t* k, const Between& m, const State& state) {
  const Seen first = seen_by(t, r0, b), last = seen_by(t, r0 + rows - 1, b);
  if (first.from >= last.to) return;
  const int t0 = int(first.from / 16), tiles = int((last.to + 15) / 16) - t0;
  float *s = m.weights + r0 * kBlock, *max = state.max + r0;
  const float* k_scale = t.k_scale ? t.k_scale + b.begin + t0 * 16 : nullptr;
  scores<K>(t.q + r0 * t.d, rows, t.d, k + t0 * kv::tile_bytes(K, t.d), k_scale, tiles, s + t0 * 16, b.keys_ahead);

  alignas(64) float alpha[16] = {};
  for (int r = 0; r < rows; ++r) {
    float* row = s + r * kBlock;
    const Seen own = seen_by(t, r0 + r, b);
    vf most = set_f(attention::kNothing);
    for (int i = t0; i < t0 + tiles; ++i) {
      vf v = load_f32(row + 16 * i);
      if (own.to < 16 * i + 16 || own.from > 16 * i) {
        v = min_f(v, load_f32(kFirst + 16 - within(own.to - 16 * i, 0, 16)));
        v = min_f(v, load_f32(kLast + 16 - within(own.from - 16 * i, 0, 16)));
        store_f32(row + 16 * i, v);
      }
      most = max_f(most, v);
    }
    const float now = reduce_max_f(most), before = max[r];
    max[r] = now > before ? now : before;
    alpha[r] = before - max[r];
  }
  store_f32(m.alpha + r0, exp2_f(load_f32(alpha)));
  for (int r = 0; r < rows; ++r) {
    float *row = s + r * kBlock, *norm = m.lanes + (r0 + r) * 16;
    const vf by = set_f(max[r]);
    vf sum = mul_f(load_f32(norm), set_f(m.alpha[r0 + r]));
    for (int i = t0; i < t0 + tiles; ++i) {
      vf e = exp2_f(sub_f(load_f32(row + 16 * i), by));
      sum = add_f(sum, e);
      if (t.v_scale) e = mul_f(e, load_f32(t.v_scale + b.begin + 16 * i));
      store_f32(row + 16 * i, e);
    }
    store_f32(norm, sum);
  }
}
template <Type V> void weigh_group(const Tile& t, int64_t r0, int rows, const Block& b, const uint8_t* v, const Between& m, const State& state) {
  const int64_t from = seen_by(t, r0, b).from, to = seen_by(t, r0 + rows - 1, b).to;
  if (from >= to) return;
  weigh<V>(m.weights + r0 * kBlock + from, rows, to - from, v + from * t.d * kv::element_bytes(V), t.d, m.alpha + r0, state.sum + r0 * t.d,
           b.values_ahead);
}
// First all scores and then all sums: what rows share of a block, keys or values, stays in the first-level cache.
template <Type K, Type V>
EFFK_INLINE void attend_block(const Tile& t, const Block& b, const uint8_t* k, const uint8_t* v, const Between& m, const State& state) {
  const auto groups = [&](const auto& f) {
    for (int64_t r = 0; r < t.rows; r += kRows) f(r, int(t.rows - r < kRows ? t.rows - r : kRows));
  };
  groups([&](int64_t r, int rows) { score_group<K>(t, r, rows, b, k, m, state); });
  groups([&](int64_t r, int rows) { weigh_group<V>(t, r, rows, b, v, m, state); });
}

template <Type T> EFFK_INLINE void widen(const uint8_t* from, int64_t count, float* to, int64_t ahead) {
  for (int64_t i = 0; i < count; i += 16, from += 16 * kv::element_bytes(T)) {
    prefetch(from + ahead);
    store_f32(to + i, load_values<T>(from));
  }
}

template <Type T> void attend_as(const Tile& t, int64_t begin, int64_t end, float* keys, float* values, const Between& m, const State& state) {
  constexpr Type kWideKeys = T == Type::i8 ? Type::i8 : Type::f32;
  const int64_t size = kv::element_bytes(T), step = kBlock * t.d * size;
  const bool wide = T != Type::f32 && t.rows > kRows;
  for (int64_t at = begin / kBlock * kBlock; at < end; at += kBlock) {
    const uint8_t *k = t.k + at * t.d * size, *v = t.v + at * t.d * size;
    const bool more = at + kBlock < t.end;
    Block b{at, at > begin ? at : begin, at + kBlock < end ? at + kBlock : end,
            more ? step : t.next_k ? t.next_k - k : 0, more ? step : t.next_v ? t.next_v - v : 0};
    if (!wide) {
      attend_block<T, T>(t, b, k, v, m, state);
      continue;
    }
    const int64_t from = b.from - at, to = b.to - at, k0 = from / 16 * 16 * t.d, k1 = (to + 15) / 16 * 16 * t.d;
    if constexpr (T != Type::i8) widen<T>(k + k0 * size, k1 - k0, keys + k0, b.keys_ahead);
    widen<T>(v + from * t.d * size, (to - from) * t.d, values + from * t.d, b.values_ahead);
    b.keys_ahead = b.values_ahead = 0;
    attend_block<kWideKeys, Type::f32>(t, b, T == Type::i8 ? k : reinterpret_cast<const uint8_t*>(keys), reinterpret_cast<const uint8_t*>(values),
                                       m, state);
  }
}

[[maybe_unused]] void attend(const Tile& t, int64_t begin, int64_t end, float* scratch, const State& state) {
  float *keys = scratch, *values = keys + kBlock * t.d, *weights = values + kBlock * t.d, *lanes = weights + t.rows * kBlock;
  const Between m{weights, lanes + t.rows * 16, lanes};
  std::memset(state.sum, 0, size_t(t.rows * t.d) * 4);
  std::memset(lanes, 0, size_t(t.rows) * 64);
  for (int64_t r = 0; r < t.rows; ++r) state.max[r] = attention::kNothing;
  switch (t.type) {
    case Type::f16: attend_as<Type::f16>(t, begin, end, keys, values, m, state); break;
    case Type::i8: attend_as<Type::i8>(t, begin, end, keys, values, m, state); break;
    case Type::f32: attend_as<Type::f32>(t, begin, end, keys, values, m, state); break;
  }
  for (int64_t r = 0; r < t.rows; ++r) state.norm[r] = reduce_add_f(load_f32(lanes + r * 16));
}

[[maybe_unused]] void merge(int64_t rows, int64_t d, const State& part, const State& total) {
  for (int64_t r0 = 0; r0 < rows; r0 += 16) {
    const int n = int(rows - r0 < 16 ? rows - r0 : 16);
    const auto load = [&](const float* p) { return load_some<DType::f32>(p + r0, n); };
    const vf before = load(total.max), other = load(part.max), now = max_f(before, other);
    const vf keep = exp2_f(sub_f(before, now)), more = exp2_f(sub_f(other, now));
    store_some<DType::f32>(total.max + r0, n, now);
    store_some<DType::f32>(total.norm + r0, n, mac(load(part.norm), more, mul_f(load(total.norm), keep)));
    alignas(64) float by[2][16];
    store_f32(by[0], keep), store_f32(by[1], more);
    for (int r = 0; r < n; ++r) {
      const vf old_by = set_f(by[0][r]), part_by = set_f(by[1][r]);
      float* sum = total.sum + (r0 + r) * d;
      const float* add = part.sum + (r0 + r) * d;
      for (int64_t i = 0; i < d; i += 16) store_f32(sum + i, mac(load_f32(add + i), part_by, mul_f(load_f32(sum + i), old_by)));
    }
  }
}

[[maybe_unused]] void finish(const float* sum, float norm, int64_t d, float* out) {
  const vf by = set_f(1.0f / norm);
  for (int64_t i = 0; i < d; i += 16) store_f32(out + i, mul_f(load_f32(sum + i), by));
}

}  // namespace
}  // namespace effk::EFFK_TIER

#define EFFK_ATTENTION_KERNEL tier::prepare, tier::append, tier::attend, tier::merge, tier::finish
