"""Planted bugs in the kernels of the decoder."""

from __future__ import annotations

from mutant import planter

decoder = planter("decoder", "ops/decoder")

MUTANTS = (
    decoder("lanes beyond the row count in the variance", "body.h", "if (n.centred && count < 16) {", "if (false) {"),
    decoder("epsilon forgotten", "body.h", "squares / float(d) + n.eps", "squares / float(d)"),
    decoder("norm's bias forgotten", "body.h", "if (n.bias) v = add_f", "if (false) v = add_f"),
    decoder(
        "mean of another length",
        "body.h",
        "return add_f(acc, v); }) / float(d);",
        "return add_f(acc, v); }) / float((d + 15) / 16 * 16);",
    ),
    decoder(
        "gate of another activation",
        "body.h",
        "case Activation::gelu: return gate_as<Activation::gelu>",
        "case Activation::gelu: return gate_as<Activation::gelu_tanh>",
    ),
    decoder(
        "sums one value too many",
        "body.h",
        "store_some<DType::f32>(x + i, int(count - i < 16 ? count - i : 16), add_f",
        "store_some<DType::f32>(x + i, 16, add_f",
    ),
    decoder(
        "cache of the first layer for all",
        "driver.cpp",
        "static_cast<char*>(s.cache.k) + layer * s.k_layer",
        "static_cast<char*>(s.cache.k)",
    ),
    decoder(
        "scales of the first layer for all",
        "driver.cpp",
        "a.cache.v_scale += layer * s.scale_layer;",
        "a.cache.v_scale += 0;",
    ),
    decoder("joined values read as keys", "driver.cpp", "*v = joined ? k + kv_width :", "*v = joined ? k :"),
    decoder(
        "stride of joined keys",
        "driver.cpp",
        "joined ? all : kv_width, attended",
        "joined ? q_width : kv_width, attended",
    ),
    decoder(
        "second place's outputs in the first",
        "driver.cpp",
        "void* const* to = out + part.first;",
        "void* const* to = out;",
    ),
    decoder("narrow results overlap", "driver.cpp", "narrow_y += count * p.width[i];", "narrow_y += count;"),
    decoder(
        "rest of narrow results lost",
        "driver.cpp",
        "for (int64_t j = b + whole; j < e; ++j) y[i][j] =",
        "for (int64_t j = b + whole + 1; j < e; ++j) y[i][j] =",
    ),
    decoder(
        "logits of a run's first row",
        "driver.cpp",
        "(s.runs[r].row + s.runs[r].count - 1) * m.width, size_t",
        "s.runs[r].row * m.width, size_t",
    ),
    decoder("positions from the beginning", "driver.cpp", "e.positions + s.runs[r].start * m.width", "e.positions"),
    decoder(
        "row of codes of the next token",
        "driver.cpp",
        "row = token % t16::kTileRows, groups",
        "row = (token + 1) % t16::kTileRows, groups",
    ),
    decoder(
        "scale of the first group of codes",
        "driver.cpp",
        "(tile * groups + k / width) * t16::kTileRows",
        "(tile * groups) * t16::kTileRows",
    ),
    decoder("gate without its factor", "driver.cpp", "m.gated ? up + s.rows * f + b : nullptr", "nullptr"),
    decoder(
        "second residual forgotten",
        "driver.cpp",
        "feed_forward(l, x, sum);\n    add(sum, h);",
        "feed_forward(l, x, sum);",
    ),
    decoder(
        "room for the head forgotten", "driver.cpp", "size_t(logit_rows(s)) * size_t(head_out)) * 2", "size_t(0)) * 2"
    ),
    decoder(
        "counts of sparse layers in their room",
        "driver.cpp",
        "base + room.kernel + aligned(size_t(s.rows) * 4)",
        "base + room.kernel + 64 * (s.rows > 16)",
    ),
)
