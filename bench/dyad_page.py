"""Dense and DYAD layers on the results page: one line per kind, layer and number of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .baselines import torch_bmm, torch_dense
from .dense_linear import NAME as OUR_DENSE
from .dyad_bars import DENSE_OP, MKL, OP
from .dyad_linear import NAME as OUR_DYAD
from .dyad_problem import BLOCKS, KINDS
from .report import Row, figure, layer_sides, time_of

HEADER = (
    "kind",
    "inputs x outputs",
    "tokens",
    "n",
    "effk us",
    "GFLOP/s",
    "% roof",
    "effk dense us",
    "torch F.linear us",
    "x torch",
    "strongest dense us",
    "x strongest",
    "two bmm us",
    "match",
)


def lines(rows: Sequence[Row], op: str) -> Iterator[tuple[str, ...]]:
    """Our headline tier against the dense layers that it replaces, in the same dtype."""
    here = [r for r in rows if r.op == op and r.us]
    tiers = list(dict.fromkeys(r.isa for r in here if r.ours))
    name, blocks = (OUR_DENSE, (1,)) if op == DENSE_OP else (OUR_DYAD, BLOCKS)
    mine = [r for r in here if r.backend == name and r.isa == tiers[0] and "two calls" not in r.case]
    order = {kind: i for i, kind in enumerate(KINDS)}
    mine.sort(key=lambda r: (order[r.kind], layer_sides(r), r.shape["T"], blocks.index(r.shape["n"])))
    for row in mine:
        same = [r for r in here if r.kind == row.kind and r.shape == row.shape and r.valid]
        dense = [r for r in same if not r.ours and not r.backend.startswith(torch_bmm.NAME)]
        torch_us = least(r.us for r in dense if r.backend == torch_dense.NAME)
        best = min(dense, key=lambda r: r.us, default=None)
        f_in, f_out = layer_sides(row)
        yield (
            row.kind,
            f"{f_in} x {f_out}",
            str(row.shape["T"]),
            str(row.shape["n"]),
            time_of(row),
            figure(row.gflops, 4),
            figure(100 * row.roofline),
            figure(least(r.us for r in same if r.backend == OUR_DENSE and r.isa == row.isa), 4),
            figure(torch_us, 4),
            figure(torch_us and torch_us / row.us),
            "-" if best is None else f"{figure(best.us, 4)} ({best.backend})",
            figure(best and best.us / row.us),
            figure(least(r.us for r in same if r.backend == torch_bmm.NAME), 4),
            figure(row.match, 2),
        )


def least(values: Iterator[float]) -> float | None:
    """The smallest, or None."""
    return min(values, default=None)


def notes(rows: Sequence[Row]) -> Iterator[str]:
    """What has to be said beside ratios to torch in fp32."""
    if any(torch_dense.AVOIDS in r.case for r in rows):
        yield f"torch F.linear in fp32 is {MKL}: read the ratio to the strongest dense layer beside it."
        yield ""


def sections(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Titles of the tables that the rows have, and their op."""
    for op, title in ((DENSE_OP, "Dense layers"), (OP, "DYAD layers")):
        if any(r.op == op for r in rows):
            yield op, title
