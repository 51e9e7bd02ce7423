"""The speed bars of dense_linear and dyad_linear: both sides in one dtype, and the figures that belong beside them.

Dense competitors are what a layer replaces; "strongest dense" is the fastest of them in that dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from .baselines import torch_bmm, torch_dense
from .dense_linear import NAME as OUR_DENSE
from .dyad_linear import GATHERED
from .dyad_linear import NAME as OUR_DYAD
from .dyad_problem import FF, FORWARD, TRAINING
from .fftconv_bars import TIERS, fma_peak
from .report import Row, shape_name
from .verdict import Finding, Verdict

DENSE_OP, OP = "dense_linear", "dyad_linear"
MANY = 512  # tokens from which products, not weights, are the time
PEAK = {"fp32": 0.80, "bf16": 0.85}
TORCH = {(4, "fp32"): 3.5, (8, "fp32"): 6.5, (4, "bf16"): 1.75, (8, "bf16"): 3.2}
STRONGEST = {4: 1.65, 8: 3.1}  # fp32
BMM = {"fp32": 1.8, "bf16": 1.25}  # n = 4
STEP = {"fp32": 3.0, "bf16": 1.5}  # n = 4
ONE_TOKEN, MANY_TOKENS = 1.2, 1.15  # times (2/n) of our own dense layer
TAKING_APART = 0.05  # of the time
MKL = "MKL without AVX-512 on this vendor"

Value = Callable[[Row], float | None]


def judge(rows: Sequence[Row], threads: int) -> Iterator[Verdict]:
    """Every bar; nothing where the rows hold neither op."""
    here = [r for r in rows if r.op in (DENSE_OP, OP) and r.threads == threads and r.valid]
    if not here:
        return
    limits = [r for r in rows if r.op == "machine" and r.threads == threads]
    tier = max((r.isa for r in here if r.ours), key=TIERS.index, default="")
    mine = [r for r in here if r.ours and r.isa == tier]
    avoids = any(torch_dense.AVOIDS in r.case for r in limits)
    torch_names = {"fp32": torch_dense.NAME + f" ({MKL})" * avoids, "bf16": torch_dense.NAME}

    def verdict(
        name: str, least: float, rows: Sequence[Row], value: Value, op: str, information: bool = False
    ) -> Verdict:
        found = [(value(r), shape_name(r)) for r in rows]
        findings = tuple(Finding(v, where) for v, where in found if v is not None)
        return Verdict(name + " (information)" * information, threads, least, findings, op, information)

    def ours(kind: str, n: int, few: bool = False, settings: str = "") -> list[Row]:
        """Our DYAD layers of a kind, for one token or for many."""
        case = ", ".join(filter(None, (kind, settings)))
        found = [r for r in mine if r.op == OP and r.backend == OUR_DYAD and r.case == case and r.shape["n"] == n]
        return [r for r in found if (r.shape["T"] == 1) == few and (few or r.shape["T"] >= MANY)]

    def against(wanted: Callable[[Row], bool]) -> Value:
        """Time of the fastest such row of the same kind and shape, over a row's time."""

        def ratio(row: Row) -> float | None:
            times = [r.us for r in here if r.kind == row.kind and r.shape == row.shape and r.op == row.op and wanted(r)]
            return min(times) / row.us if times else None

        return ratio

    def named(name: str) -> Value:
        return against(lambda r: r.backend == name and (not r.ours or r.isa == tier))

    strongest = against(lambda r: not r.ours and not r.backend.startswith(torch_bmm.NAME))
    ideal = named(OUR_DENSE)

    def of_ideal(row: Row) -> float | None:
        """(2/n) of our dense layer's time over a row's time."""
        ratio = ideal(row)
        return None if ratio is None else ratio * 2 / row.shape["n"]

    if any(r.op == DENSE_OP for r in here):
        own = [r for r in mine if r.op == DENSE_OP and r.shape["T"] >= MANY]
        for dtype, least in PEAK.items():
            torch_name = torch_names[dtype]
            peak = fma_peak(limits, threads, tier, f"{dtype} peak")
            found = [r for r in own if r.kind == f"{FORWARD} {dtype}"]
            share = of_peak(peak)
            yield verdict(f"dense {dtype}: share of the measured peak", least, found, share, DENSE_OP)
            torch_rows = [r for r in here if r.backend == torch_dense.NAME and r.kind == f"{FORWARD} {dtype}"]
            torch_rows = [r for r in torch_rows if r.op == DENSE_OP and r.shape["T"] >= MANY]
            yield verdict(f"{torch_name} {dtype}: share of the measured peak", 0.0, torch_rows, share, DENSE_OP, True)
            yield verdict(f"dense {dtype}: x {torch_name}", 1.0, found, named(torch_dense.NAME), DENSE_OP, True)
            yield verdict(f"dense {dtype}: x strongest dense", 1.0, found, strongest, DENSE_OP, True)
    if not any(r.op == OP for r in here):
        return
    for dtype, torch_name in torch_names.items():
        forward, training, ff = (f"{what} {dtype}" for what in (FORWARD, TRAINING, FF))
        for n in (4, 8):
            found = ours(forward, n)
            yield verdict(f"n={n} {dtype}: x {torch_name}", TORCH[n, dtype], found, named(torch_dense.NAME), OP)
            least = STRONGEST[n] if dtype == "fp32" else 1.0
            yield verdict(f"n={n} {dtype}: x strongest dense", least, found, strongest, OP, dtype != "fp32")
            yield verdict(f"n={n} {dtype}: (2/n) of our dense time / time", 1 / MANY_TOKENS, found, of_ideal, OP, True)
        yield verdict(f"n=4 {dtype}: x {torch_bmm.NAME}", BMM[dtype], ours(forward, 4), named(torch_bmm.NAME), OP)
        name = f"n=4 {dtype}: x {torch_bmm.TOKENS_FIRST}"
        yield verdict(name, BMM[dtype], ours(forward, 4), named(torch_bmm.TOKENS_FIRST), OP, True)
        name = f"n=4, 8 {dtype}: time of the products of gathered blocks / time"
        yield verdict(name, 1 - TAKING_APART, ours(forward, 4) + ours(forward, 8), named(GATHERED), OP)
        found = ours(training, 4)
        yield verdict(f"n=4 {dtype} training step: x {torch_name}", STEP[dtype], found, named(torch_dense.NAME), OP)
        found = ours(training, 8)
        yield verdict(f"n=8 {dtype} training step: x {torch_name}", 1.0, found, named(torch_dense.NAME), OP, True)
        for n in (4, 8):
            found = ours(forward, n, few=True)
            yield verdict(f"n={n} {dtype} T=1: (2/n) of our dense time / time", 1 / ONE_TOKEN, found, of_ideal, OP)
            found = ours(ff, n)
            yield verdict(f"n={n} {dtype} feed-forward: x {torch_name}", 1.0, found, named(torch_dense.NAME), OP, True)
            two = against(lambda r: r.backend == OUR_DYAD and r.isa == tier and r.case.endswith("two calls"))
            yield verdict(f"n={n} {dtype} feed-forward: time of two calls / time", 1.0, found, two, OP, True)


def of_peak(peak: float | None) -> Value:
    """Operation rate over the peak."""
    return lambda row: row.gflops / peak if peak else None
