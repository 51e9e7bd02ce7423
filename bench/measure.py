"""Runs the wq_linear table: for each shape and batch, all backends take turns, are checked, and become rows."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import effk

from . import machine, wq_linear
from .backend import Backend, Runner
from .baselines import competitors
from .problem import Problem
from .report import COLD, WARM, Row, set_vs_best
from .shapes import BITS, FORMS, MS_AVX2, MS_QUICK, MS_WARM, Case, Shape, cases
from .timing import FOREIGN_LIMIT, Contender, ForeignCpu, Timing, quiet, summary, take_turns

OP = "wq_linear"
RETRIES = 1  # of a block with too much foreign CPU
RETRY_BUDGET_S = 30.0  # for all blocks together
QUIET_WAIT_S = 4.0
DENSE_BITS = (16, 32)
PLAUSIBLE = 1.1  # share of the measured bound; above, something is wrong with the row


@dataclass(frozen=True)
class Plan:
    """What to run."""

    shapes: tuple[Shape, ...]
    ms: tuple[int, ...]
    threads: int
    tiers: tuple[str, ...]  # of ours; the first is the headline
    bits: tuple[int, ...] = BITS
    forms: tuple[str, ...] = FORMS
    wait_s: float = QUIET_WAIT_S
    turns: int = 5
    baselines: bool = True


@dataclass
class Result:
    """Everything a run found."""

    machine: machine.Machine
    rows: list[Row] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    foreign: list[float] = field(default_factory=list)  # share of a core, per block
    dram: list[float] = field(default_factory=list)  # GB/s, per block
    retry_s: float = 0.0  # spent on measuring blocks again


def wanted(shape: Shape, m: int, plan: Plan) -> list[Case]:
    """Our cases for a block on the headline tier."""
    return cases(shape, m, plan.bits, plan.forms)


def competes(entry: Backend, m: int, plan: Plan) -> bool:
    """Whether a baseline belongs in a block: its width is measured there; dense and plain int8 linears always."""
    if entry.bits in DENSE_BITS or entry.name.startswith("torch dynamic int8"):
        return True
    return entry.bits in plan.bits and (entry.bits == 4 or m in MS_QUICK)


def run(plan: Plan, say: Callable[[str], None]) -> Result:
    """Runs the plan; `say` gets one line per block and anything worth knowing."""
    result = Result(machine.measure(plan.threads))
    probe, foreign = machine.DramProbe(plan.threads), ForeignCpu()
    for shape in plan.shapes:
        problem = Problem(shape, plan.ms)
        field_ = competitors(shape, plan.threads) if plan.baselines else None
        entries = [e for e in field_.backends if any(competes(e, m, plan) for m in plan.ms)] if field_ else []
        for missing in field_.missing if field_ else ():
            result.missing[f"{missing.name} ({shape})"] = missing.reason
        theirs = build(entries, problem, shape, result, say)
        ours: dict[tuple[Case, str], tuple[Backend, Runner]] = {}
        for m in plan.ms:
            block = [(e, r) for e, r in theirs if competes(e, m, plan)]
            for tier in plan.tiers:
                for case in wanted(shape, m, plan):
                    if tier == plan.tiers[0] or (m in MS_AVX2 and not case.multi and not case.outliers):
                        entry = wq_linear.backend(case, tier)
                        same = replace(case, m=0), tier  # the runner serves every batch
                        if same not in ours:
                            ours[same] = entry, entry.build(problem)
                        block.append((entry, ours[same][1]))
            say(f"{shape} M={m}: {len(block)} backends")
            result.rows += measure_block(block, shape, m, plan, probe, foreign, result, say)
        effk.isa.use(effk.isa.supported()[-1])
        del theirs, ours, block, problem
        gc.collect()
    set_vs_best(result.rows)
    return result


def build(
    entries: Sequence[Backend], problem: Problem, shape: Shape, result: Result, say: Callable[[str], None]
) -> list[tuple[Backend, Runner]]:
    """Builds the runners; a baseline that fails to build is reported as missing with its error."""
    out = []
    for entry in entries:
        try:
            out.append((entry, entry.build(problem)))
        except Exception as error:  # a third-party library may raise anything; the table goes on without it
            result.missing[f"{entry.name} {entry.case} ({shape})"] = f"{type(error).__name__}: {str(error)[:200]}"
            say(f"missing: {entry.name} {entry.case}: {error}")
    return out


def measure_block(
    block: Sequence[tuple[Backend, Runner]],
    shape: Shape,
    m: int,
    plan: Plan,
    probe: machine.DramProbe,
    foreign: ForeignCpu,
    result: Result,
    say: Callable[[str], None],
) -> list[Row]:
    """Checks, then times the backends of one shape and batch; the quietest of its attempts counts."""
    matches = []
    for entry, runner in block:
        runner.bind(m)
        matches.append(max(runner.oracle.match(y, m, entry.rounding, roll) for roll, y in runner.outputs()))
        if not matches[-1] <= 1:
            say(f"wrong: {entry.name} {entry.case} {shape} M={m}: error is {matches[-1]:.3g} of its bound")
    bandwidths: list[float] = []
    cold, warm = {"dram": Contender(lambda: bandwidths.append(probe.read()))}, {}
    for i, (_, runner) in enumerate(block):
        cold[f"{i} {COLD}"] = Contender(runner.call, runner.products, runner.activate)
        if m in MS_WARM and (call := runner.warm()) is not None:
            warm[f"{i} {WARM}"] = Contender(call, 1, runner.activate)
    best: tuple[float, dict[str, list[float]], list[float]] | None = None
    for attempt in range(1 + RETRIES):
        if attempt and result.retry_s > RETRY_BUDGET_S:
            break
        bandwidths.clear()
        start = time.perf_counter()
        foreign.wait_for_quiet(plan.wait_s)
        kept = {name: quiet(turns) for name, turns in (take_turns(cold, plan.turns) | take_turns(warm, 2)).items()}
        share = statistics.fmean(s for _, s in kept.values())
        result.retry_s += (time.perf_counter() - start) * bool(attempt)
        if best is None or share < best[0]:
            best = share, {name: samples for name, (samples, _) in kept.items()}, list(bandwidths)
        if share <= FOREIGN_LIMIT:
            break
    share, samples, bandwidths = best
    dram = statistics.quantiles(bandwidths, n=4)[2]  # upper quartile: what memory gives when left alone
    result.foreign.append(share)
    result.dram.append(dram)
    rows = []
    for i, (entry, runner) in enumerate(block):
        timings = {kind: summary(samples[key]) for kind in (COLD, WARM) if (key := f"{i} {kind}") in samples}
        row = make_row(entry, runner, shape, m, plan.threads, COLD, timings[COLD], dram, result.machine, matches[i])
        rows.append(row)
        if row.roofline > PLAUSIBLE:
            say(f"implausible: {entry.name} {entry.case} {shape} M={m}: {row.roofline:.2f} of the bound; is it cold?")
        if WARM in timings:
            row.warm_us = timings[WARM].us
            rows.append(
                make_row(entry, runner, shape, m, plan.threads, WARM, timings[WARM], None, result.machine, matches[i])
            )
    return rows


def make_row(
    entry: Backend,
    runner: Runner,
    shape: Shape,
    m: int,
    threads: int,
    kind: str,
    timing: Timing,
    dram: float | None,
    limits: machine.Machine,
    match: float,
) -> Row:
    """The row of a timing. Warm rows have no roofline: their weight may sit in a cache."""
    flops = 2.0 * m * shape.n * shape.k
    keys = {"M": m, "N": shape.n, "K": shape.k, "bits": entry.bits, "group": entry.group, "outliers": entry.outliers}
    roofline = None
    if dram is not None:
        peak = limits.peak(unit(entry), entry.isa if entry.isa in machine.TIERS else machine.TIERS[-1])
        least_us = max(runner.nbytes / dram / 1e3, flops / peak / 1e3 if peak else 0.0)
        roofline = least_us / timing.us
    return Row(
        OP,
        f"{entry.case}, {kind}",
        keys,
        entry.dtype,
        entry.isa,
        threads,
        entry.name,
        entry.version,
        timing.us,
        timing.iqr,
        runner.nbytes / timing.us / 1e3,
        flops / timing.us / 1e3,
        roofline,
        None,
        match if math.isfinite(match) else None,
        best_us=timing.best,
    )


def unit(entry: Backend) -> str:
    """Which measured peak bounds a backend: that of its products."""
    if entry.case.startswith("int8"):
        return "int8"
    return "bf16" if entry.dtype == "bfloat16" else "fp32"


def machine_rows(result: Result) -> list[Row]:
    """The measured limits as rows of op "machine", so that a file of rows says what its fractions are of."""
    m, out = result.machine, []

    def add(case: str, isa: str, gbps: float | None, gflops: float | None) -> None:
        out.append(Row("machine", case, {}, "", isa, m.threads, m.cpu, "", None, None, gbps, gflops, None, None, None))

    add("DRAM read, before", "", m.dram_gbps, None)
    add("DRAM read between the rows", "", statistics.median(result.dram), None)
    if result.foreign:
        median, worst = statistics.median(result.foreign), max(result.foreign)
        add(f"foreign CPU: median {median:.1%}, worst block {worst:.1%} of a core", "", None, None)
    for level, gbps in m.cache_gbps.items():
        add(f"{level} read", "", gbps, None)
    for what, by_tier in m.peaks.items():
        for tier, gflops in by_tier.items():
            add(f"{what} peak", tier, None, gflops)
    return out


def missing_rows(result: Result, threads: int) -> list[Row]:
    """Rows without figures for what could not run, with the reason as their case."""
    return [
        Row(OP, f"missing: {reason}", {}, "", "", threads, name, "", *[None] * 7)
        for name, reason in result.missing.items()
    ]
