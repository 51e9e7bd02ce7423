// Random calls of wq_grouped_linear on every tier, in guarded memory: every row has the bits that wq_linear gives it with the weight of
// its expert, packed by itself.
//   fuzz_wq_grouped [calls [first seed]]
#include <algorithm>
#include <vector>

#include "fuzz.h"
#include "ops/wq_grouped_linear/wq_grouped_linear.h"
#include "wq_rows.h"

namespace {

using namespace effk;
using namespace effk::test;

struct Memory {
  static constexpr size_t kRoom = size_t(2) << 20;
  Guarded x{kRoom}, y{kRoom}, offsets{kRoom}, packed{kRoom}, scales{kRoom}, zeros{kRoom}, bias{kRoom}, workspace{size_t(16) << 20};
};

// An expert with memory of its own.
struct Expert {
  std::vector<uint8_t> packed, scales, zeros, bias;
  WqWeight w;
};

// Rows of each expert: none, few, all, or more than a kernel takes at once.
std::vector<int32_t> random_offsets(Random& r, int64_t experts) {
  std::vector<int32_t> offsets{0};
  const int64_t one = r.chance(10) ? r.below(experts) : -1;  // has every row
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t rows = one >= 0 ? (e == one ? 1 + r.below(150) : 0) : r.chance(40) ? 0 : r.chance(60) ? 1 : 1 + r.below(r.chance(90) ? 12 : 100);
    offsets.push_back(int32_t(offsets.back() + rows));
  }
  return offsets;
}

void one_call(Random& r, Memory& m) {
  random_tier(r);
  const int bit_choices[] = {2, 3, 4, 8}, groups[] = {0, 32, 64, 128, 256};
  const int bits = bit_choices[r.below(4)];
  const int64_t group = groups[r.below(5)], experts = 1 + r.below(r.chance(80) ? 5 : 12);
  const int64_t n = r.chance(2) ? 0 : 1 + r.below(r.chance(85) ? 40 : 200), k = 1 + r.below(r.chance(85) ? 150 : 500);
  const bool scales_f32 = r.chance(30), zeros = r.chance(50), biased = r.chance(50);
  const DType bias_dtype = DType(r.below(3));
  const std::vector<int32_t> offsets = random_offsets(r, experts);

  std::vector<Expert> alone(static_cast<size_t>(experts));
  for (Expert& e : alone) {
    const WqRows rows = random_wq_rows(r, n, k, bits, group, scales_f32, zeros);
    e.packed.resize(rows.packed_bytes()), e.scales.resize(rows.packed_groups() * size_t(rows.scale_bytes()));
    if (zeros) e.zeros.resize(rows.packed_groups());
    e.w = rows.pack(e.packed.data(), e.scales.data(), zeros ? e.zeros.data() : nullptr);
    if (biased) {
      e.bias.resize(size_t(n) * width(bias_dtype));
      for (int64_t i = 0; i < n; ++i) store(e.bias.data(), bias_dtype, i, r.normal());
      e.w.bias = e.bias.data(), e.w.bias_dtype = bias_dtype;
    }
  }
  const auto stack = [&](Guarded& memory, std::vector<uint8_t> Expert::*part) {  // all experts', one behind the other
    const size_t each = (alone[0].*part).size();
    uint8_t* at = memory.place(each * alone.size(), r.chance(70));
    for (size_t e = 0; each && e < alone.size(); ++e) std::memcpy(at + e * each, (alone[e].*part).data(), each);
    return at;
  };
  WqGroupedArgs a{};
  a.first = alone[0].w;
  a.first.packed = stack(m.packed, &Expert::packed), a.first.scales = stack(m.scales, &Expert::scales);
  if (zeros) a.first.zeros = stack(m.zeros, &Expert::zeros);
  if (biased) a.first.bias = stack(m.bias, &Expert::bias);
  int32_t* at = place<int32_t>(r, m.offsets, experts + 1);
  std::copy(offsets.begin(), offsets.end(), at);
  a.x_dtype = DType(r.below(3)), a.m = offsets.back(), a.k = k, a.offsets = at, a.experts = experts, a.compute = Compute(r.below(2));
  const Values x = random_values(r, m.x, a.x_dtype, a.m * k);
  a.x = x.at;
  const int64_t in = k * int64_t(width(a.x_dtype)), out = n * int64_t(width(a.x_dtype));
  a.y = m.y.place(size_t(a.m * out), r.chance(70));
  wq_grouped_linear(a, room(m.workspace, wq_grouped_linear_workspace(a)), random_pool(r));
  expect_intact("written outside", {&m.x, &m.y, &m.workspace});
  const std::vector<uint8_t> got = bytes_at(a.y, size_t(a.m * out));

  for (int64_t e = 0; e < experts; ++e) {
    const int64_t first = offsets[size_t(e)], rows = offsets[size_t(e) + 1] - first;
    void* y = m.y.place(size_t(rows * out), true);
    WqLinearArgs call{x.at + first * in, a.x_dtype, rows, k, &alone[size_t(e)].w, &y, 1, a.compute};
    wq_linear(call, room(m.workspace, wq_linear_workspace(call)), random_pool(r));
    expect_equal("rows of an expert", y, {got.begin() + first * out, got.begin() + (first + rows) * out});
  }
}

}  // namespace

int main(int argc, char** argv) {
  static Memory memory;
  return run_calls(argc, argv, [&](Random& r) { one_call(r, memory); });
}
