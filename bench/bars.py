"""The speed bars of the project, judged on the rows of finished runs: what was asked, what came, whether it holds.

A bar holds if it holds at every shape; its figure is the worst one. A bar whose rows are not in the files is said to
be open, never passed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from . import bitmask_bars, dyad_bars, fftconv_bars, quik_bars, relu_bars, runtime_bars
from .report import COLD, Row, figure, read_jsonl, set_vs_best
from .verdict import Finding, Verdict

INT8, FLOAT = f"int8, {COLD}", f"float, {COLD}"
BANDWIDTH = {
    1: {8: 0.85, 4: 0.85, 3: 0.80, 2: 0.75},
    2: {8: 0.90, 4: 0.90, 3: 0.90, 2: 0.90},
}  # threads -> bits -> least
AGAINST_BEST = {4: 1.15, 3: 2.0, 2: 1.3}  # M = 1, 1 thread
AGAINST_BEST_4BIT = {4: 1.3, 8: 1.3, 16: 1.3, 32: 1.3, 128: 1.1}  # M -> least
PEAK, PEAK_FROM_M = 0.70, 32
OUTLIER_COST = 1.15


class Rows:
    """The valid rows of a run, found by what they are."""

    def __init__(self, rows: Sequence[Row], threads: int) -> None:
        self.all = [r for r in rows if r.threads == threads and (r.valid or r.op == "machine")]
        self.threads = threads
        self.tier = headline(self.all)

    def ours(self, case: str, **shape: float) -> list[Row]:
        """Our rows of that case on the headline tier whose `shape` has these values."""
        return [r for r in self.all if r.ours and r.case == case and r.isa == self.tier and has(r, shape)]

    def theirs(self, name: str, like: Row) -> list[Row]:
        """Cold rows of a competitor by the start of its name, of the same M, N and K."""
        same = {key: like.shape[key] for key in ("M", "N", "K")}
        return [r for r in self.all if r.backend.startswith(name) and r.case.endswith(COLD) and has(r, same)]


def headline(rows: Sequence[Row]) -> str:
    """The highest tier among our rows."""
    order = ("scalar", "avx2", "avx512", "avx512vnni")
    return max((r.isa for r in rows if r.ours and r.isa in order), key=order.index, default="")


def has(row: Row, values: dict[str, float]) -> bool:
    """Whether the row's shape has these values; without outliers unless asked for."""
    return all(row.shape.get(k) == v for k, v in {"outliers": 0.0, **values}.items())


def where(row: Row) -> str:
    """Short name of a row's shape."""
    s = row.shape
    return f"{s['N']}x{s['K']} M={s['M']} {s['bits']}b"


def judge(rows: Sequence[Row]) -> list[Verdict]:
    """Every bar for every thread count found in the rows."""
    set_vs_best(rows)
    verdicts = []
    for threads in sorted({r.threads for r in rows}):
        verdicts += linear_bars(Rows(rows, threads))
        verdicts += runtime_bars.judge(rows, threads)
        verdicts += fftconv_bars.judge(rows, threads)
        verdicts += dyad_bars.judge(rows, threads)
        verdicts += quik_bars.judge(rows, threads)
        verdicts += relu_bars.judge(rows, threads)
        verdicts += bitmask_bars.judge(rows, threads)
    return verdicts


def linear_bars(rows: Rows) -> Iterator[Verdict]:
    """The bars of wq_linear."""

    def verdict(name: str, least: float, found: Sequence[Row], value: Callable[[Row], float | None]) -> Verdict:
        values = [(value(r), where(r)) for r in found]
        findings = tuple(Finding(v, w) for v, w in values if v is not None)
        return Verdict(name, rows.threads, least, findings, information="(information)" in name)

    for bits, least in BANDWIDTH.get(rows.threads, {}).items():
        found = rows.ours(INT8, M=1, bits=bits)
        yield verdict(f"M=1 int8 {bits}-bit: share of the DRAM bandwidth", least, found, lambda r: r.roofline)
        graph = rows.ours(f"int8, one call over all copies, {COLD}", M=1, bits=bits)
        yield verdict("  the same, all copies in one call (information)", least, graph, lambda r: r.roofline)
    if rows.threads == 1:
        for bits, least in AGAINST_BEST.items():
            yield verdict(f"M=1 int8 {bits}-bit: x fastest competitor", least, rows.ours(INT8, M=1, bits=bits), vs_best)
    yield verdict("M=1 int8: never slower than a competitor of the same bits", 1.0, rows.ours(INT8, M=1), vs_best)
    for m, least in ((1, 1.0), (32, 2.0)):
        found = rows.ours(FLOAT, M=m, bits=4)
        yield verdict(
            f"M={m} float 4-bit: x torch int4pack bf16", least, found, lambda r: against(rows, r, "torch int4pack")
        )
    for m, least in AGAINST_BEST_4BIT.items():
        found = rows.ours(INT8, M=m, bits=4)
        yield verdict(f"M={m} int8 4-bit: x fastest 4-bit competitor", least, found, vs_best)
    several = [r for m in AGAINST_BEST_4BIT for r in rows.ours(INT8, M=m, bits=4)]
    yield verdict(
        "M=4-128 int8 4-bit: x plain int8 linear", 1.0, several, lambda r: against(rows, r, "torch dynamic int8")
    )
    large = [r for r in several if r.shape["M"] >= PEAK_FROM_M]
    yield verdict(f"M>={PEAK_FROM_M} int8 4-bit: share of the int8 peak", PEAK, large, lambda r: share_of_peak(rows, r))
    dense = {(r.shape["N"], r.shape["K"], r.shape["bits"]): r for r in rows.ours(INT8, M=1)}
    sparse = rows.ours(f"int8, 0.5% outliers, {COLD}", M=1, outliers=0.005)
    yield verdict("M=1 int8: time without / with 0.5 % outliers", 1 / OUTLIER_COST, sparse, lambda r: without(dense, r))
    pairs = [
        (dense[n, k, bits], dense[n, k, more])
        for n, k, bits in dense
        for more in (next_width(bits),)
        if (n, k, more) in dense
    ]
    yield Verdict(
        "M=1 int8: time of the next width / time, at each width",
        rows.threads,
        1.0,
        tuple(Finding(wide.us / narrow.us, where(narrow)) for narrow, wide in pairs),
    )
    avx2 = [r for r in rows.all if r.ours and r.isa == "avx2" and r.case == INT8]
    yield verdict("AVX2 tier reported (share of its roofline)", 0.0, avx2, lambda r: r.roofline)


def vs_best(row: Row) -> float | None:
    """x fastest competitor of the same bits."""
    return row.vs_best


def against(rows: Rows, row: Row, name: str) -> float | None:
    """Time of the fastest competitor of that name over ours."""
    times = [r.us for r in rows.theirs(name, row)]
    return min(times) / row.us if times else None


def share_of_peak(rows: Rows, row: Row) -> float | None:
    """Our operation rate over the measured int8 peak of our tier."""
    peaks = [r.gflops for r in rows.all if r.op == "machine" and r.case == "int8 peak" and r.isa == row.isa]
    return row.gflops / statistics.median(peaks) if peaks else None


def without(dense: dict[tuple, Row], row: Row) -> float | None:
    """Time of the same weight without outliers over that with them."""
    plain = dense.get((row.shape["N"], row.shape["K"], row.shape["bits"]))
    return plain.us / row.us if plain else None


def next_width(bits: int) -> int:
    """The next wider weight."""
    return {2: 3, 3: 4, 4: 8}.get(bits, 0)


def report(paths: Sequence[Path], console: Console) -> int:
    """Prints bar, figure and outcome for the rows of all files; returns 1 when a bar fails, else 0."""
    rows = [row for path in paths for row in read_jsonl(path)]
    table = Table(title="Speed bars", title_justify="left")
    for name in ("threads", "bar", "asked", "worst", "at", "best", "outcome"):
        table.add_column(name, justify="right" if name in ("threads", "asked", "worst", "best") else "left")
    there = {row.op for row in rows}
    verdicts = [v for v in judge(rows) if v.findings or v.op in there]
    for v in verdicts:
        worst = v.worst
        best = max((f.value for f in v.findings), default=None)
        at = "" if worst is None else worst.where
        table.add_row(
            str(v.threads),
            v.name,
            figure(v.least),
            figure(worst and worst.value),
            at,
            figure(best),
            v.outcome,
            style={"pass": "green", "fail": "red"}.get(v.outcome),
        )
    console.print(table)
    counted = [v for v in verdicts if not v.information]
    passed = sum(v.outcome == "pass" for v in counted)
    failed = sum(v.outcome == "fail" for v in counted)
    console.print(f"{passed} of {len(counted)} bars hold, {failed} fail, {len(counted) - passed - failed} open")
    return int(failed > 0)
