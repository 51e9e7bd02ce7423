"""The speed bars of fftconv: fp32, causal, spectrum of the filter cached on both sides unless a bar says otherwise."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from .fftconv_memory import CASE as MEMORY
from .fftconv_problem import BACKWARD, DECODE, FORWARD, GATED, UNCACHED
from .report import Row, geomean, shape_name
from .verdict import Finding, Verdict

OP = "fftconv"
AS_INSTALLED, FASTEST, EVERY_CASE, TUNED = 6.5, 4.0, 2.0, 3.0
PEAK, PEAK_SIZES = 0.35, (1024, 32768)
GATES_COST, BACKWARD_COST = 1.10, 2.4
FEWER_OPERATIONS, FEWER_AT, FASTER_FROM = 20.0, 8192, 256
TIERS = ("scalar", "avx2", "avx512", "avx512vnni")


def judge(rows: Sequence[Row], threads: int) -> Iterator[Verdict]:
    """Every bar; nothing where the rows hold no fftconv."""
    here = [r for r in rows if r.op == OP and r.threads == threads and r.valid]
    if not here:
        return
    tier = max((r.isa for r in here if r.ours), key=TIERS.index, default="")
    mine = [r for r in here if r.ours and r.isa == tier]
    ours = {kind: [r for r in mine if r.kind == kind and not tuned(r)] for kind in {r.kind for r in here}}
    ours_tuned = [r for r in mine if r.kind == FORWARD and tuned(r)]

    def verdict(name: str, least: float, findings: Sequence[Finding], information: bool = False) -> Verdict:
        return Verdict(name, threads, least, tuple(findings), OP, information)

    def each(kind: str, value: Callable[[Row], float | None], rows: Sequence[Row] | None = None) -> list[Finding]:
        found = [(value(r), shape_name(r)) for r in (ours.get(kind, ()) if rows is None else rows)]
        return [Finding(v, w) for v, w in found if v is not None]

    def mean(kind: str, value: Callable[[Row], float | None], rows: Sequence[Row] | None = None) -> list[Finding]:
        found = each(kind, value, rows)
        if not found:
            return []
        worst = min(found, key=lambda f: f.value)
        text = f"{len(found)} cases, worst {worst.value:.3g} at {worst.where}"
        return [Finding(geomean([f.value for f in found]), text)]

    def against(wanted: Callable[[Row], bool]) -> Callable[[Row], float | None]:
        def ratio(row: Row) -> float | None:
            times = [r.us for r in here if not r.ours and r.us and same(r, row) and wanted(r)]
            return min(times) / row.us if times else None

        return ratio

    installed = against(lambda r: not tuned(r))
    torch_fft = against(lambda r: r.backend == "torch.fft" and not tuned(r))
    torch_tuned = against(lambda r: r.backend == "torch.fft" and tuned(r))
    anything = against(lambda r: True)
    yield verdict("forward: x torch.fft as installed, geometric mean", AS_INSTALLED, mean(FORWARD, torch_fft))
    yield verdict("forward: x fastest competitor as installed, geometric mean", FASTEST, mean(FORWARD, installed))
    yield verdict("forward: x fastest competitor as installed, every case", EVERY_CASE, each(FORWARD, installed))
    name = "forward: x torch.fft, allocator tuned for both"
    yield verdict(f"{name}, geometric mean", TUNED, mean(FORWARD, torch_tuned, ours_tuned))
    yield verdict(f"{name}, every case", TUNED, each(FORWARD, torch_tuned, ours_tuned))
    name = "forward: x torch.fft, allocator tuned for it alone, geometric mean (information)"
    yield verdict(name, TUNED, mean(FORWARD, torch_tuned), True)
    for kind in (FORWARD, UNCACHED, GATED, BACKWARD):
        name = f"{kind}: x fastest of all, tuned allocator included, geometric mean (information)"
        yield verdict(name, 1.0, mean(kind, anything), True)
    low, high = PEAK_SIZES
    peak = fma_peak(rows, threads, tier)
    inside = [f for r, f in of_peak(ours.get(FORWARD, ()), peak) if low <= r.shape["n_fft"] <= high]
    outside = [f for r, f in of_peak(ours.get(FORWARD, ()), peak) if not low <= r.shape["n_fft"] <= high]
    yield verdict("forward, 1K <= n_fft <= 32K: share of the FMA peak", PEAK, inside)
    yield verdict("forward, other n_fft: share of the FMA peak (information)", PEAK, outside, True)
    yield verdict("gated: time of forward / time", 1 / GATES_COST, each(GATED, over(ours.get(FORWARD, ()))))
    yield verdict(
        "backward (du, dk): time of forward / time", 1 / BACKWARD_COST, each(BACKWARD, over(ours.get(FORWARD, ())))
    )
    memory = [(r, number(r.case)) for r in ours.get(MEMORY, ())]
    yield verdict(
        "backward: copies of u / peak extra memory", 1.0, [Finding(1 / max(v, 1e-3), shape_name(r)) for r, v in memory]
    )
    decode = ours.get(DECODE, ())
    fewer = [Finding(number(r.case), shape_name(r)) for r in decode if r.shape["L"] == FEWER_AT]
    yield verdict("decode: times fewer operations than the direct sum", FEWER_OPERATIONS, fewer)
    late = [(anything(r), shape_name(r)) for r in decode if r.shape["L"] >= FASTER_FROM]
    yield verdict("decode, from 256 tokens on: x direct sum", 1.0, [Finding(v, w) for v, w in late if v is not None])


def tuned(row: Row) -> bool:
    """Whether its process had other settings of the allocator than a user gets."""
    return row.case.endswith("tuned malloc")


def same(row: Row, other: Row) -> bool:
    """Whether two rows do the same."""
    return row.kind == other.kind and row.shape == other.shape


def number(case: str) -> float:
    """The figure in a case such as "backward memory, 0.250 copies of u"."""
    return float(re.search(r", (\d+(\.\d+)?) ", case)[1])


def over(rows: Sequence[Row]) -> Callable[[Row], float | None]:
    """Time of the ungated row of the same size over a row's time."""
    times = {(r.shape["B"], r.shape["H"], r.shape["L"]): r.us for r in rows}

    def ratio(row: Row) -> float | None:
        base = times.get((row.shape["B"], row.shape["H"], row.shape["L"]))
        return base / row.us if base else None

    return ratio


def fma_peak(rows: Sequence[Row], threads: int, tier: str, case: str = "fp32 peak") -> float | None:
    """The highest peak measured for the tier or one below it, GFLOP/s; runs of some shapes each have one."""
    below = TIERS[: TIERS.index(tier) + 1] if tier else ()
    return max(
        (
            r.gflops
            for r in rows
            if r.op == "machine" and r.threads == threads and r.case == case and r.isa in below and r.gflops
        ),
        default=None,
    )


def of_peak(rows: Sequence[Row], peak: float | None) -> list[tuple[Row, Finding]]:
    """Operation rates over the peak."""
    return [(r, Finding(r.gflops / peak, shape_name(r))) for r in rows if peak]
