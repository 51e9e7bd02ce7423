"""relu_ffn on the results page: one line per kind, size and density."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .baselines import torch_relu_ffn as theirs
from .dyad_page import least
from .relu_bars import OP, cost
from .relu_ffn import DENSE, LINEAR, NAME
from .relu_problem import BATCH, DOWN, LAYER, PROMPT
from .report import Row, figure, time_of

TITLES = {
    LAYER: "Feed-forward layers that skip",
    DOWN: "Rows of down alone",
    BATCH: "Feed-forward layers that skip, 8 tokens",
    PROMPT: "Feed-forward layers of prompts",
}
HEADER = (
    "d x f", "M", "rows", "density", "tier", "effk us", "GB/s", "% roof", "reading all us", "% roof", "x reading all",
    "model / time", "torch dense us", "torch by index us", "dense_linear us", "match",
)  # fmt: skip


def sections(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Kinds that the rows have, and titles of their tables."""
    for kind, title in TITLES.items():
        if any(r.op == OP and r.kind.startswith(kind) for r in rows):
            yield kind, title


def lines(rows: Sequence[Row], kind: str) -> Iterator[tuple[str, ...]]:
    """Ours beside what reading all, and others, take for the same."""
    here = [r for r in rows if r.op == OP and r.kind.startswith(kind) and r.us]
    mine = [r for r in here if r.backend == NAME]
    order = ("fp32", "bf16", "int8", "int4")
    mine.sort(key=lambda r: (-r.shape["d"] * r.shape["f"], order.index(r.dtype), r.isa, r.shape["density"]))
    for row in mine:
        same = [r for r in here if r.valid and r.kind == row.kind and r.shape == row.shape]

        def us(*names: str) -> float | None:
            return least(r.us for r in same if r.backend in names and (not r.ours or r.isa == row.isa))  # noqa: B023

        dense = next((r for r in same if r.backend == DENSE and r.isa == row.isa), None)
        gain = dense and dense.us / row.us
        expected = gain and gain * cost(row) if kind in (LAYER, BATCH) else None
        shape = f"{row.shape['d']} x {row.shape['f']}{' gated' * row.shape['gated']}"
        yield (
            shape, str(row.shape["M"]), row.dtype, str(row.shape["density"]), row.isa,
            time_of(row), figure(row.gbps), figure(100 * row.roofline),
            figure(dense and dense.us, 4), figure(dense and 100 * dense.roofline), figure(gain), figure(expected),
            figure(us(theirs.BF16, theirs.FP32, theirs.INT8, theirs.INT4), 4),
            figure(us(theirs.PICKED, theirs.BAG, theirs.BYTES), 4), figure(us(LINEAR), 4), figure(row.match, 2),
        )  # fmt: skip
