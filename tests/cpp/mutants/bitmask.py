"""Planted bugs in the kernels of bitmask_linear."""

from __future__ import annotations

from mutant import planter

bitmask = planter("bitmask_linear", "ops/bitmask_linear")

MUTANTS = (
    bitmask("last panels lost", "driver.cpp", "first_panel(a.w, s + 1, slots)", "first_panel(a.w, s + 1, slots + 1)"),
    bitmask(
        "second tile of tokens from the first",
        "driver.cpp",
        "static_cast<const char*>(a.x) + t0 * a.w.k * in_bytes",
        "static_cast<const char*>(a.x)",
    ),
    bitmask(
        "room of one thread for two",
        "driver.cpp",
        "size_t(p.x_bytes + p.sx_bytes + p.slots * p.room)",
        "size_t(p.x_bytes + p.sx_bytes + p.room)",
    ),
    bitmask("zeros that are kept dropped", "pack.cpp", "a.keep || v != 0.0f", "v != 0.0f"),
    bitmask(
        "codes of 0 stored", "pack.cpp", "std::nearbyint(v / by)))), out->b != 0;", "std::nearbyint(v / by)))), true;"
    ),
    bitmask("scale of what is not kept", "pack.cpp", "if (!a.keep || a.keep[row * a.k + c]) most", "most"),
    bitmask(
        "scale of an empty group",
        "pack.cpp",
        "scale[row * scales + g] = s == 0.0f ? 1.0f : s;",
        "scale[row * scales + g] = s;",
    ),
    bitmask(
        "sum of codes in the next group",
        "pack.cpp",
        "row_sum[row * scales + c / span] += value.b;",
        "row_sum[row * scales + (c + 1) / span % scales] += value.b;",
    ),
    bitmask(
        "bits beyond the last column pass", "pack.cpp", "b == width - 1 && (mask & ~last)", "false && (mask & ~last)"
    ),
    bitmask(
        "a panel with other counts passes",
        "pack.cpp",
        "w.ptr[p + 1] - w.ptr[p] != kept",
        "false && w.ptr[p + 1] - w.ptr[p] != kept",
    ),
    bitmask("unpacked with the first scale", "pack.cpp", "w.scale[row * scales + c / span];", "w.scale[row * scales];"),
    bitmask(
        "correction by another row",
        "body.h",
        "p.w.row_sum[(p.row0 + r) * groups + g]",
        "p.w.row_sum[p.row0 * groups + g]",
    ),
    bitmask(
        "infinity not looked for",
        "body.h",
        "const bool finite = bits < 0x7f800000;",
        "const bool finite = bits <= 0x7f800000;",
    ),
    bitmask(
        "codes not limited",
        "body.h",
        "const vf by = set_f(scale), limit = set_f(127.0f)",
        "const vf by = set_f(scale), limit = set_f(126.0f)",
    ),
    bitmask("sums of a group kept for the next", "body.h", "std::memset(sums, 0, size_t(t.count * kRows) * 4);", ""),
    bitmask(
        "pieces go past their group", "body.h", "end = group_end < p.blocks ? group_end : p.blocks;", "end = p.blocks;"
    ),
    bitmask("row scale forgotten", "body.h", "if (a.w.scale && !a.w.group) {", "if (false) {"),
    bitmask(
        "scale of the panel's first row",
        "body.h",
        "p.w.scale[(p.row0 + r) * bitmask::groups(p.w.k, p.w.group) + b",
        "p.w.scale[p.row0 * bitmask::groups(p.w.k, p.w.group) + b",
    ),
    bitmask(
        "bias of the panel's first row", "body.h", "rows[r] + bias_of(a, p.row0 + r)", "rows[r] + bias_of(a, p.row0)"
    ),
    bitmask(
        "rows beyond the last written",
        "body.h",
        "if (p.rows == kRows) return store_eight",
        "if (p.rows >= kRows - 1) return store_eight",
    ),
    bitmask("a token's scale for all", "body.h", "set_f(t.sx[n])), y, n);", "set_f(t.sx[0])), y, n);"),
    bitmask(
        "a byte behind the tail read",
        "avx2.cpp",
        "const __m128i a = _mm_shuffle_epi8(load8(at), load8(kShuffles.of[low]));",
        "const __m128i a = _mm_shuffle_epi8(load8(at), load8(kShuffles.of[low])); (void)*(volatile const uint8_t*)(at + 64);",
    ),
)
