// Appends, cuts the queries into tiles and long contexts into pieces, lets the threads take pieces, and puts the pieces together in
// order. Compiled with baseline flags.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>

#include "ops/attention/kernels.h"

namespace effk::attention {

extern const Kernel kScalar;
#ifdef EFFK_X86
extern const Kernel kAvx2, kAvx512, kAvx512Vnni;
#endif
const Kernel* const kKernels[] = {
#ifdef EFFK_X86
    &kAvx512Vnni, &kAvx512, &kAvx2,
#endif
    &kScalar,
};
const int kKernelCount = int(sizeof(kKernels) / sizeof(kKernels[0]));

namespace {

constexpr int64_t kTileRows = 96;              // queries times heads that share what was widened of a block; 16 multiples of 6
constexpr int64_t kWorthThread = 400'000;      // multiply-adds: 4 us of one core
constexpr int64_t kWorthAppending = 64 << 10;  // elements appended, the same
constexpr int64_t kPiecesPerThread = 3;
constexpr float kLog2E = 1.44269504f;

const Kernel& kernel() {
  for (const Kernel* k : kKernels)
    if (k->tier <= isa::active()) return *k;
  return kScalar;
}

// Memory of a call, cut in order.
struct Room {
  char* at;
  template <class T> T* take(int64_t count) {
    T* here = reinterpret_cast<T*>(at);
    at += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return here;
  }
};

// Queries [query, query + queries) of a run for one kv head, over the chunks [first, last).
struct Piece {
  const Run* run;
  int64_t head, query, queries, first, last;
  float* parts;   // states of its chunks, if others have some of the same queries
  bool closes;    // the last of these queries
};

struct Problem {
  const Args& a;
  int64_t group, d, tile_queries, slots;
  explicit Problem(const Args& args, int threads) : a(args), group(args.heads / args.cache.kv_heads), d(args.cache.head_dim) {
    tile_queries = std::max<int64_t>(1, kTileRows / group);
    int64_t work = 0;
    for (int64_t i = 0; i < a.n_runs; ++i) work += a.runs[i].count * (a.runs[i].start + a.runs[i].count);
    slots = std::clamp<int64_t>(work * a.heads * d * 2 / kWorthThread, 1, threads);
  }
  int64_t most_rows() const {
    int64_t most = 1;
    for (int64_t i = 0; i < a.n_runs; ++i) most = std::max(most, std::min(a.runs[i].count, tile_queries));
    return most * group;
  }
  int64_t lowest(const Run& r, int64_t query) const { return a.window ? std::max<int64_t>(0, r.start + query - a.window + 1) : 0; }
  static int64_t state_floats(int64_t rows, int64_t d) { return rows * (d + 2); }

  // Calls f(piece) for all; returns the floats of the parts, which begin at `parts`. Costly pieces come first.
  template <class F> int64_t cut(float* parts, const F& f) const {
    int64_t total = 0, used = 0;
    for (int64_t i = 0; i < a.n_runs; ++i) {
      const Run& r = a.runs[i];
      for (int64_t q = 0; q < r.count; q += tile_queries) {
        const int64_t n = std::min(tile_queries, r.count - q);
        total += n * (r.start + q + n - lowest(r, q)) * a.cache.kv_heads;
      }
    }
    const int64_t fair = total / (slots * kPiecesPerThread) + 1;
    for (int64_t i = 0; i < a.n_runs; ++i) {
      const Run& r = a.runs[i];
      for (int64_t tile = (r.count - 1) / tile_queries; tile >= 0; --tile) {
        const int64_t q = tile * tile_queries, n = std::min(tile_queries, r.count - q), end = r.start + q + n;
        const int64_t c0 = lowest(r, q) / kChunk, c1 = (end + kChunk - 1) / kChunk;
        const int64_t pieces = slots == 1 ? 1 : std::clamp<int64_t>(n * (end - lowest(r, q)) / fair, 1, c1 - c0);
        for (int64_t h = 0; h < a.cache.kv_heads; ++h)
          for (int64_t p = 0; p < pieces; ++p) {
            const int64_t first = c0 + (c1 - c0) * p / pieces, last = c0 + (c1 - c0) * (p + 1) / pieces;
            f(Piece{&r, h, q, n, first, last, pieces > 1 ? parts + used : nullptr, p == pieces - 1});
            if (pieces > 1) used += (last - first) * state_floats(n * group, d);
          }
      }
    }
    return used;
  }
};

State state_at(float* at, int64_t rows, int64_t d) { return {at, at + rows * d, at + rows * d + rows}; }
void clear(const State& s, int64_t rows, int64_t d) {
  std::fill(s.sum, s.sum + rows * d, 0.0f);
  std::fill(s.max, s.max + rows, kNothing);
  std::fill(s.norm, s.norm + rows, 0.0f);
}

// What one thread needs.
struct Slot {
  float *queries, *part, *total, *scratch;
  Slot(Room& room, int64_t rows, int64_t d)
      : queries(room.take<float>(rows * d)), part(room.take<float>(Problem::state_floats(rows, d))),
        total(room.take<float>(Problem::state_floats(rows, d))), scratch(room.take<float>(scratch_floats(rows, d))) {}
  static int64_t bytes(int64_t rows, int64_t d) {
    Room room{nullptr};
    Slot(room, rows, d);
    return reinterpret_cast<intptr_t>(room.at);
  }
};

Turn turn_at(const Args& a, int64_t position) {
  const int64_t half = a.cosine ? a.rotary / 2 : 0;
  return {a.cosine + position * half, a.sine + position * half, half};
}

void append(const Kernel& k, const Args& a, const Run& r, int64_t t0, int64_t t1, int64_t h0, int64_t h1) {
  const Cache& c = a.cache;
  const int64_t bytes = kv::head_bytes(c.type, c.capacity, c.head_dim), positions = kv::padded(c.capacity);
  for (int64_t h = h0; h < h1; ++h) {
    const int64_t at = r.slot * c.kv_heads + h;
    for (int64_t t = t0; t < t1; ++t)
      k.append(a.k + (r.row + t) * a.k_stride + h * c.head_dim, a.v + (r.row + t) * a.v_stride + h * c.head_dim, c.head_dim,
               turn_at(a, r.start + t), c.type, r.start + t, static_cast<uint8_t*>(c.k) + at * bytes, static_cast<uint8_t*>(c.v) + at * bytes,
               c.k_scale ? c.k_scale + at * positions : nullptr, c.v_scale ? c.v_scale + at * positions : nullptr);
  }
}

void write(const Kernel& k, const Problem& p, const Piece& piece, const State& total) {
  for (int64_t q = 0; q < piece.queries; ++q)
    for (int64_t g = 0; g < p.group; ++g) {
      const int64_t row = q * p.group + g;
      k.finish(total.sum + row * p.d, total.norm[row], p.d,
               p.a.out + (piece.run->row + piece.query + q) * p.a.out_stride + (piece.head * p.group + g) * p.d);
    }
}

const uint8_t* head_of(const void* cache, const Cache& c, int64_t slot, int64_t head) {
  return static_cast<const uint8_t*>(cache) + (slot * c.kv_heads + head) * kv::head_bytes(c.type, c.capacity, c.head_dim);
}
// Where a piece begins to read.
const uint8_t* start_of(const void* cache, const Problem& p, const Piece& piece) {
  const int64_t first = std::max(p.lowest(*piece.run, piece.query), piece.first * kChunk) / kBlock * kBlock;
  return head_of(cache, p.a.cache, piece.run->slot, piece.head) + kv::value_byte(p.a.cache.type, p.d, first, 0);  // so do keys at whole tiles
}

// next: what this thread probably does then, or null.
void attend(const Kernel& k, const Problem& p, const Piece& piece, const Piece* next, const Slot& slot) {
  const Args& a = p.a;
  const Run& r = *piece.run;
  const Cache& c = a.cache;
  const int64_t rows = piece.queries * p.group, at = r.slot * c.kv_heads + piece.head, start = r.start + piece.query;
  for (int64_t q = 0; q < piece.queries; ++q)
    for (int64_t g = 0; g < p.group; ++g)
      k.prepare(a.q + (r.row + piece.query + q) * a.q_stride + (piece.head * p.group + g) * p.d, p.d, turn_at(a, start + q), a.scale * kLog2E,
                c.type, slot.queries + (q * p.group + g) * p.d);
  const int64_t low = p.lowest(r, piece.query), high = start + piece.queries, positions = kv::padded(c.capacity);
  const Tile tile{c.type, p.d, head_of(c.k, c, r.slot, piece.head), head_of(c.v, c, r.slot, piece.head),
                  c.k_scale ? c.k_scale + at * positions : nullptr, c.v_scale ? c.v_scale + at * positions : nullptr,
                  slot.queries, rows, p.group, start, a.window, std::min(high, piece.last * kChunk),
                  next ? start_of(c.k, p, *next) : nullptr, next ? start_of(c.v, p, *next) : nullptr};
  const State total = state_at(slot.total, rows, p.d);
  const bool whole = !piece.parts, one = whole && piece.last - piece.first == 1;
  if (whole && !one) clear(total, rows, p.d);
  for (int64_t i = piece.first; i < piece.last; ++i) {
    const State part = whole ? one ? total : state_at(slot.part, rows, p.d)
                             : state_at(piece.parts + (i - piece.first) * Problem::state_floats(rows, p.d), rows, p.d);
    k.attend(tile, std::max(low, i * kChunk), std::min(high, (i + 1) * kChunk), slot.scratch, part);
    if (whole && !one) k.merge(rows, p.d, part, total);
  }
  if (whole) write(k, p, piece, total);
}

// The queries of the pieces up to `last`, one that closes: their chunks in order.
void put_together(const Kernel& k, const Problem& p, const Piece* first, const Piece* last, const Slot& slot) {
  const int64_t rows = last->queries * p.group;
  const State total = state_at(slot.total, rows, p.d);
  clear(total, rows, p.d);
  for (const Piece* piece = first; piece <= last; ++piece)
    for (int64_t i = 0; i < piece->last - piece->first; ++i)
      k.merge(rows, p.d, state_at(piece->parts + i * Problem::state_floats(rows, p.d), rows, p.d), total);
  write(k, p, *last, total);
}

// The first block of a piece: it arrives while the new tokens are appended.
void fetch_block(const void* cache, const Problem& p, const Piece& piece) {
  const uint8_t* at = start_of(cache, p, piece);
  for (int64_t i = 0; i < kBlock * p.d * kv::element_bytes(p.a.cache.type); i += 64) __builtin_prefetch(at + i);
}

struct Size { int64_t pieces, parts; };
Size size_of(const Problem& p) {
  Size s{0, 0};
  s.parts = p.cut(nullptr, [&](const Piece&) { ++s.pieces; });
  return s;
}

}  // namespace

size_t workspace(const Args& a, int threads) {
  const Problem p(a, threads);
  const Size s = size_of(p);
  return size_t(64 + (s.pieces * int64_t(sizeof(Piece)) + 63) / 64 * 64 + (s.parts * 4 + 63) / 64 * 64 + p.slots * Slot::bytes(p.most_rows(), p.d));
}

void run(const Args& a, void* workspace, const ParallelFor& pf) {
  if (!a.n_runs) return;
  const Kernel& k = kernel();
  const Problem p(a, pf.threads);
  const Size size = size_of(p);

  Room room{static_cast<char*>(workspace)};
  auto* next = room.take<std::atomic<int64_t>>(1);
  new (next) std::atomic<int64_t>(0);
  Piece* pieces = room.take<Piece>(size.pieces);
  float* parts = room.take<float>(size.parts);
  char* slots = room.at;
  const int64_t slot_bytes = Slot::bytes(p.most_rows(), p.d);
  const auto slot_at = [&](int64_t s) {
    Room own{slots + s * slot_bytes};
    return Slot(own, p.most_rows(), p.d);
  };
  Piece* fill = pieces;
  p.cut(parts, [&](const Piece& piece) { *fill++ = piece; });

  fetch_block(a.cache.k, p, *pieces);
  fetch_block(a.cache.v, p, *pieces);

  // Tiles of keys and not tokens are what threads share: two of them must not write to one line.
  for (int64_t i = 0; i < a.n_runs; ++i) {
    const Run& r = a.runs[i];
    const int64_t t0 = r.start / kv::kTile, tiles = (r.start + r.count - 1) / kv::kTile + 1 - t0;
    const int64_t grain = std::max<int64_t>(1, kWorthAppending / (2 * kv::kTile * p.d));
    parallel_for(pf, tiles * a.cache.kv_heads, grain, [&](int64_t b, int64_t e) {
      for (int64_t n = b; n < e; ++n) {
        const int64_t h = n / tiles, position = (t0 + n % tiles) * kv::kTile - r.start;
        append(k, a, r, std::max<int64_t>(0, position), std::min(r.count, position + kv::kTile), h, h + 1);
      }
    });
  }

  parallel_for(pf, p.slots, 1, [&](int64_t s0, int64_t s1) {
    for (int64_t s = s0; s < s1; ++s) {
      const Slot slot = slot_at(s);
      for (int64_t n; (n = next->fetch_add(1, std::memory_order_relaxed)) < size.pieces;)
        attend(k, p, pieces[n], n + p.slots < size.pieces ? pieces + n + p.slots : nullptr, slot);
    }
  });
  if (!size.parts) return;
  parallel_for(pf, p.slots, 1, [&](int64_t s0, int64_t s1) {
    for (int64_t s = s0; s < s1; ++s) {
      const Slot slot = slot_at(s);
      int64_t first = 0, tiles = 0;
      for (int64_t n = 0; n < size.pieces; ++n) {
        if (!pieces[n].closes) continue;
        if (pieces[n].parts && tiles++ % p.slots == s) put_together(k, p, pieces + first, pieces + n, slot);
        first = n + 1;
      }
    }
  });
}

const char* kernel_name() { return kernel().name; }

}  // namespace effk::attention
