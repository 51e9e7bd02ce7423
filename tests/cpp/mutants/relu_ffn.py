"""Planted bugs in the kernels of relu_ffn."""

from __future__ import annotations

from mutant import planter

relu = planter("relu_ffn", "ops/relu_ffn")
lists = planter("neuron_lists", "ops/neuron_lists")

MUTANTS = (
    relu(
        "up's bias of the place in the list", "driver.cpp", "a.up.bias[list.index ? list.index[i] : i]", "a.up.bias[i]"
    ),
    relu("drelu forgets the second relu", "driver.cpp", "if (a.kind == Gate::drelu && up <= 0.0f) up = 0.0f;", ""),
    relu(
        "lists of blocks lose their last neuron",
        "driver.cpp",
        "const int64_t from = i * kBlock, count = l.counts[i];",
        "const int64_t from = i * kBlock, count = l.counts[i] - (l.counts[i] == kBlock);",
    ),
    relu(
        "bits of a mask in the other order",
        "driver.cpp",
        "row[bit / 8] >> (bit % 8) & 1",
        "row[bit / 8] >> (7 - bit % 8) & 1",
    ),
    relu(
        "every token has the first one's mask",
        "driver.cpp",
        "(a.mask_rows == 1 ? 0 : token) * a.mask_bytes",
        "0 * token * a.mask_bytes",
    ),
    relu(
        "parameters of a mask's neurons by place",
        "driver.cpp",
        "a.param[a.param_each ? j : 0]",
        "a.param[a.param_each ? n : 0]",
    ),
    relu(
        "ties of top_k to the higher index",
        "driver.cpp",
        "size[i] != size[j] ? size[i] > size[j] : i < j",
        "size[i] != size[j] ? size[i] > size[j] : i > j",
    ),
    relu(
        "deviation over f - 1",
        "driver.cpp",
        "std::sqrt(squares / double(a.f))",
        "std::sqrt(squares / double(a.f > 1 ? a.f - 1 : 1))",
    ),
    relu("rest of x lost", "driver.cpp", "std::copy_n(last, width % 16, to", "std::copy_n(last, width % 16 - 1, to"),
    relu("rest of x not cleared", "driver.cpp", "std::fill(to + width, to + l.x_row, 0.0f);", ""),
    relu("columns of a thread keep old sums", "driver.cpp", "std::fill(y + c0, y + c1, 0.0f);", ""),
    relu("h beyond the list not cleared in the dense form", "driver.cpp", "std::fill_n(h, a.f, 0.0f);", ""),
    relu(
        "inactive tokens take their product",
        "driver.cpp",
        "h[i] = h[i] == 0.0f ? 0.0f : h[i] * up;",
        "h[i] = (h[i] == 0.0f ? 1.0f : h[i]) * up;",
    ),
    relu(
        "nnz counted in tokens' union",
        "body.h",
        "nnz[b] += __builtin_popcount(active[b]);",
        "nnz[b] += __builtin_popcount(active[0]);",
    ),
    relu(
        "a gate beyond the last",
        "body.h",
        "const uint32_t inside = (1u << here) - 1;",
        "const uint32_t inside = (2u << here) - 1;",
    ),
    relu(
        "below the threshold of silu",
        "body.h",
        "return (~not_below(p, size) & 0xffffu) | not_below(a, a);",
        "return not_below(size, sub_f(zero, p)) | not_below(a, a);",
    ),
    relu("cut of the first token", "body.h", "cut ? cut[b] : 0.0f", "cut ? cut[0] : 0.0f"),
    relu(
        "one row of four misses its scale",
        "body.h",
        "total * at.scale[r][0] : total",
        "total * at.scale[0][0] : total",
        "avx512.cpp",
    ),
    relu(
        "scales of a later segment",
        "body.h",
        "to[g - g0] = value * scale[g < l.groups ? g : l.groups - 1];",
        "to[g - g0] = value * scale[g - g0 < l.groups ? g - g0 : l.groups - 1];",
    ),
    relu(
        "a unit's groups share a scale",
        "body.h",
        "const int64_t g = (u * K + P * G) / GC;",
        "const int64_t g = u * K / GC;",
    ),
    relu("upper nibbles not moved down", "body.h", "if constexpr (S == 4) raw[r] = shift_right<16>(raw[r]);", ""),
    relu("nibbles of a byte exchanged", "pack.cpp", "int(in / 16 % 2) * 4", "4 - int(in / 16 % 2) * 4"),
    relu(
        "largest magnitude of the first columns",
        "pack.cpp",
        "neuron::quantised(type) && c < c1; ++c",
        "neuron::quantised(type) && c < c1 - 1; ++c",
    ),
    lists(
        "one index too many",
        "driver.cpp",
        "std::fill(index + n, index + a.n, -1);",
        "std::fill(index + n, index + a.n + 1, -1);",
    ),
    lists("values behind a list left", "driver.cpp", "std::fill(value + n, value + a.n, 0.0f);", ""),
    lists(
        "thresholds of inputs by the first",
        "driver.cpp",
        "threshold, a.threshold_each, nullptr",
        "threshold, false, nullptr",
    ),
)
