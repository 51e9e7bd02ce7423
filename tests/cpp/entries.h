// Sparse entries of a low-bit weight, from row order to that of kernels.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace effk::test {

// `entries` of rows [ptr[n], ptr[n + 1]) rank by rank in each tile of 16 rows. By sorting, unlike what it checks.
template <class T> std::vector<T> rank_by_rank(const std::vector<int32_t>& ptr, const std::vector<T>& entries) {
  struct Key { int64_t tile, rank, row, at; };
  std::vector<Key> keys;
  for (int64_t row = 0; row + 1 < int64_t(ptr.size()); ++row)
    for (int32_t j = ptr[size_t(row)]; j < ptr[size_t(row) + 1]; ++j) keys.push_back({row / 16, j - ptr[size_t(row)], row, j});
  std::sort(keys.begin(), keys.end(), [](const Key& a, const Key& b) {
    return a.tile != b.tile ? a.tile < b.tile : a.rank != b.rank ? a.rank < b.rank : a.row < b.row;
  });
  std::vector<T> out;
  for (const Key& key : keys) out.push_back(entries[size_t(key.at)]);
  return out;
}

}  // namespace effk::test
