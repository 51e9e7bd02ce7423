"""Planted bugs in the kernels of wq_grouped_linear."""

from __future__ import annotations

from mutant import planter

grouped = planter("wq_grouped_linear", "ops/wq_grouped_linear")

MUTANTS = (
    grouped(
        "bias of the first expert",
        "driver.cpp",
        "static_cast<const char*>(first.bias) + expert * first.n *",
        "static_cast<const char*>(first.bias) + 0 * expert * first.n *",
    ),
    grouped(
        "weights of the neighbour",
        "driver.cpp",
        "wq_cut(w, expert * tiles, (expert + 1) * tiles)",
        "wq_cut(w, expert / 2 * tiles, (expert / 2 + 1) * tiles)",
    ),
    grouped("prepared rows overlap", "driver.cpp", "l.data + row * r.kpad", "l.data + row / 2 * r.kpad"),
    grouped(
        "scales of rows overlap", "driver.cpp", "base + l.scale) + row * r.spans", "base + l.scale) + row / 2 * r.spans"
    ),
    grouped("sums of rows overlap", "driver.cpp", "base + l.sum) + row * r.spans", "base + l.sum) + row / 2 * r.spans"),
    grouped(
        "blocks prepared as those before",
        "driver.cpp",
        "int(b - (o->end_block - o->rows.blocks))",
        "int(b - (o->end_block - o->rows.blocks)) / 2",
    ),
    grouped(
        "an expert's last block is the next one's",
        "driver.cpp",
        "while (b >= o->end_block) ++o;",
        "while (b > o->end_block) ++o;",
    ),
    grouped(
        "last units of a part lost",
        "driver.cpp",
        "to >= p.end_cost ? p.units :",
        "to >= p.end_cost ? p.units - (p.units > 1) :",
    ),
    grouped(
        "a share begins one unit late",
        "driver.cpp",
        "from <= start ? 0 : t16::ceil_div(from - start, p.unit_cost)",
        "from < start ? 0 : t16::ceil_div(from - start + 1, p.unit_cost)",
    ),
    grouped("later blocks of an expert as the first", "driver.cpp", "t.block = part.block;", "t.block = 0;"),
    grouped("tiles beyond the last", "driver.cpp", "(end < tiles ? end : tiles) - t.tile", "end - t.tile"),
    grouped(
        "workspace for half the rows",
        "driver.cpp",
        "l.data + aligned(size_t(a.m * r.kpad)",
        "l.data + aligned(size_t(a.m / 2 * r.kpad)",
    ),
    grouped(
        "room for one part too few",
        "driver.cpp",
        "aligned(size_t(l.parts) * sizeof(Part))",
        "aligned(size_t(l.parts - 1) * sizeof(Part))",
    ),
)
