"""quik_linear on the results page: one line per kind, size and width of the weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .baselines import onnxruntime_quik, torch_quik
from .dyad_page import least
from .quik_bars import OP
from .quik_linear import NAME, PARTS, WQ
from .quik_problem import LAYER, PRODUCT
from .report import Row, figure, time_of

HEADERS = {
    PRODUCT: ("n x k", "M", "weight", "effk us", "GFLOP/s", "% roof", "fastest competitor us", "x fastest", "match"),
    LAYER: (
        "n x k", "M", "weight", "outliers", "tier", "effk us", "GFLOP/s", "% roof", "separate us", "wq_linear us",
        "torch bf16 us", "torch fp32 us", "dynamic int8 us", "x torch bf16", "x torch fp32", "match",
    ),
}  # fmt: skip


def sections(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Kinds that the rows have, and titles of their tables."""
    titles = {PRODUCT: "Integer products", LAYER: "Quantised layers"}
    for kind, title in titles.items():
        if any(r.op == OP and r.kind == kind for r in rows):
            yield kind, title


def notes(rows: Sequence[Row]) -> Iterator[str]:
    """What the columns mean."""
    yield "x in bf16 where a column does not say otherwise; dynamic int8 takes x in fp32. Weights cold for M <= 8."
    yield ""


def lines(rows: Sequence[Row], kind: str) -> Iterator[tuple[str, ...]]:
    """Ours beside what others take for the same size."""
    here = [r for r in rows if r.op == OP and r.kind == kind and r.us]
    mine = [r for r in here if r.backend == NAME]
    mine.sort(
        key=lambda r: (
            r.shape["N"] * r.shape["K"],
            r.shape["K"],
            r.shape["M"],
            -r.shape["bits_w"],
            -r.shape["outliers"],
        )
    )
    for row in mine:
        same = [r for r in here if r.valid and all(r.shape[k] == row.shape[k] for k in "MNK")]

        def us(*names: str) -> float | None:
            found = (r for r in same if r.backend in names)  # noqa: B023
            ours = lambda r: all(r.shape[k] == row.shape[k] for k in ("bits_w", "outliers")) and r.isa == row.isa  # noqa: B023, E731
            return least(r.us for r in found if not r.ours or ours(r))

        size = f"{row.shape['N']} x {row.shape['K']}", str(row.shape["M"]), f"{row.shape['bits_w']} bits"
        own = time_of(row), figure(row.gflops, 4), figure(100 * row.roofline)
        if kind == PRODUCT:
            best = min((r for r in same if not r.ours), key=lambda r: r.us, default=None)
            other = "-" if best is None else f"{figure(best.us, 4)} ({best.backend})"
            yield *size, *own, other, figure(best and best.us / row.us), figure(row.match, 2)
            continue
        bf16, fp32 = us(torch_quik.BF16), us(torch_quik.FP32)
        times = us(PARTS), us(WQ), bf16, fp32, us(torch_quik.DYNAMIC, onnxruntime_quik.DYNAMIC)
        ratios = figure(bf16 and bf16 / row.us), figure(fp32 and fp32 / row.us)
        yield (
            *size,
            str(row.shape["outliers"]),
            row.isa,
            *own,
            *(figure(t, 4) for t in times),
            *ratios,
            figure(row.match, 2),
        )
