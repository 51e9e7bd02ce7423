"""Planted bugs in the kernels of attention."""

from __future__ import annotations

from mutant import planter

attention = planter("attention", "ops/attention")

MUTANTS = (
    attention(
        "second channel of a pair turned back",
        "store.h",
        "add_f(mul_f(b, c), mul_f(a, s))",
        "sub_f(mul_f(b, c), mul_f(a, s))",
    ),
    attention(
        "channels that are not turned lost",
        "store.h",
        "for (int64_t i = 2 * t.half; i < d; i += 16) {",
        "for (int64_t i = 2 * t.half + 16; i < d; i += 16) {",
    ),
    attention("low part of the query forgotten", "store.h", "sub_i(code, shift_left<7>(high))", "sub_i(code, code)"),
    attention(
        "offset of the query's low part",
        "store.h",
        "128u * uint32_t(reduce_add_i(sum))",
        "127u * uint32_t(reduce_add_i(sum))",
    ),
    attention(
        "scale of the key for the value",
        "store.h",
        "v_scale[p] = quantise(v, d, 0, value_at);",
        "quantise(v, d, 0, value_at), v_scale[p] = k_scale[p];",
    ),
    attention(
        "tiny heads divided by zero",
        "store.h",
        "return most > kTiny ? range / most : 0.0f;",
        "return range / (most * 0.99f);",
    ),
    attention(
        "key beside its place in a tile",
        "store.h",
        "return scatter<2>(row, d, key_at);",
        "return scatter<2>(row, d - 1, key_at);",
    ),
    attention(
        "high bytes shifted by one bit less",
        "products.h",
        "shift_left<7>(high[r][n]), low[r][n]",
        "shift_left<6>(high[r][n]), low[r][n]",
    ),
    attention(
        "scales of the first keys for all",
        "products.h",
        "const vf by = load_f32(scale + 16 * n);",
        "const vf by = load_f32(scale);",
    ),
    attention(
        "old sums not made smaller",
        "products.h",
        "mul_f(load_f32(sum + r * d + 16 * n), set_f(alpha[r]))",
        "load_f32(sum + r * d + 16 * n)",
    ),
    attention(
        "weights of the first row",
        "products.h",
        "const vf by = set_f(w[r * kBlock + j]);",
        "const vf by = set_f(w[j]);",
    ),
    attention(
        "a token sees the next one",
        "body.h",
        "(p + 1 < b.to ? p + 1 : b.to) - b.begin",
        "(p + 2 < b.to ? p + 2 : b.to) - b.begin",
    ),
    attention(
        "window one too wide", "body.h", "t.window ? p - t.window + 1 : b.from;", "t.window ? p - t.window : b.from;"
    ),
    attention(
        "first lanes of a window not masked",
        "body.h",
        "own.to < 16 * i + 16 || own.from > 16 * i",
        "own.to < 16 * i + 16",
    ),
    attention("maximum of the last block", "body.h", "max[r] = now > before ? now : before;", "max[r] = now;"),
    attention(
        "norm of earlier blocks as it was", "body.h", "mul_f(load_f32(norm), set_f(m.alpha[r0 + r]))", "load_f32(norm)"
    ),
    attention("scales of values forgotten", "body.h", "if (t.v_scale) e = mul_f(e,", "if (false) e = mul_f(e,"),
    attention(
        "a chunk's part counts in full",
        "body.h",
        "mac(load(part.norm), more, mul_f(load(total.norm), keep))",
        "mac(load(part.norm), keep, mul_f(load(total.norm), keep))",
    ),
    attention(
        "sums of rows 16.. by the first factors",
        "body.h",
        "const float* add = part.sum + (r0 + r) * d;",
        "const float* add = part.sum + r * d;",
    ),
    attention(
        "widened values begin late",
        "body.h",
        "widen<T>(v + from * t.d * size, (to - from) * t.d, values + from * t.d,",
        "widen<T>(v + from * t.d * size, (to - from) * t.d, values,",
    ),
    attention("widened keys end early", "body.h", "k1 = (to + 15) / 16 * 16 * t.d;", "k1 = to / 16 * 16 * t.d;"),
    attention(
        "second head reads the first one's keys",
        "driver.cpp",
        "(slot * c.kv_heads + head) * kv::head_bytes",
        "(slot * c.kv_heads) * kv::head_bytes",
    ),
    attention(
        "lowest position of a tile's last query",
        "driver.cpp",
        "r.start + query - a.window + 1",
        "r.start + query - a.window + 2",
    ),
    attention(
        "last token of a tile not appended",
        "driver.cpp",
        "std::min(r.count, position + kv::kTile), h, h + 1",
        "std::min(r.count, position + kv::kTile - 1), h, h + 1",
    ),
    attention(
        "parts of pieces overlap",
        "driver.cpp",
        "if (pieces > 1) used += (last - first) *",
        "if (pieces > 1) used += (last - first - 1) *",
    ),
    attention(
        "a piece's own first chunk twice",
        "driver.cpp",
        "piece.parts + (i - piece.first) *",
        "piece.parts + 0 * (i - piece.first) *",
    ),
    attention(
        "one slot's room for all", "driver.cpp", "Room own{slots + s * slot_bytes};", "Room own{slots + s * 64};"
    ),
    attention(
        "results of a group in the first head",
        "driver.cpp",
        "(piece.head * p.group + g) * p.d);\n    }",
        "(piece.head * p.group) * p.d);\n    }",
    ),
)
