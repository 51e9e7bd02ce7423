"""Runs the wq_linear table: for each shape and batch, all backends take turns, are checked, and become rows."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import effk

from . import machine, table, wq_linear
from .backend import Backend, Runner
from .baselines import competitors
from .measure import PLAUSIBLE, Result, Say, Session, try_build
from .problem import Problem
from .report import COLD, WARM, Row, set_vs_best
from .shapes import BITS, FORMS, LINEAR, MS, MS_AVX2, MS_QUICK, MS_WARM, Case, Shape, cases
from .timing import Contender, Timing, summary

OP = "wq_linear"
DENSE_BITS = (16, 32)


@dataclass(frozen=True)
class Plan(table.Plan):
    """What to run."""

    shapes: tuple[Shape, ...] = LINEAR
    ms: tuple[int, ...] = MS
    bits: tuple[int, ...] = BITS
    forms: tuple[str, ...] = FORMS


def wanted(shape: Shape, m: int, plan: Plan) -> list[Case]:
    """Our cases for a block on the headline tier."""
    return cases(shape, m, plan.bits, plan.forms)


def competes(entry: Backend, m: int, plan: Plan) -> bool:
    """Whether a baseline belongs in a block: its width is measured there; dense and plain int8 linears always."""
    if entry.bits in DENSE_BITS or entry.name.startswith("torch dynamic int8"):
        return True
    return entry.bits in plan.bits and (entry.bits == 4 or m in MS_QUICK)


def run(plan: Plan, say: Say) -> Result:
    """Runs the plan; `say` gets one line per block and anything worth knowing."""
    session = Session(plan.threads, plan.wait_s, plan.turns)
    result = session.result
    for shape in plan.shapes:
        problem = Problem(shape, plan.ms)
        field_ = competitors(shape, plan.threads) if plan.baselines else None
        entries = [e for e in field_.backends if any(competes(e, m, plan) for m in plan.ms)] if field_ else []
        for missing in field_.missing if field_ else ():
            result.missing[f"{missing.name} ({shape})"] = missing.reason
        theirs = []
        for entry in entries:
            runner = try_build(partial(entry.build, problem), f"{entry.name} {entry.case} ({shape})", result, say)
            theirs += [(entry, runner)] * (runner is not None)
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
            result.rows += measure_block(block, shape, m, session, say)
        effk.isa.use(effk.isa.supported()[-1])
        del theirs, ours, block, problem
        gc.collect()
    set_vs_best(result.rows)
    return result


def measure_block(
    block: Sequence[tuple[Backend, Runner]], shape: Shape, m: int, session: Session, say: Say
) -> list[Row]:
    """Checks, then times the backends of one shape and batch."""
    matches = []
    for entry, runner in block:
        runner.bind(m)
        matches.append(max(runner.oracle.match(y, m, entry.rounding, roll) for roll, y in runner.outputs()))
        table.said(matches[-1], f"{entry.name} {entry.case}", f"{shape} M={m}", say)
    cold, warm = {}, {}
    for i, (_, runner) in enumerate(block):
        cold[f"{i} {COLD}"] = Contender(runner.call, runner.products, runner.activate)
        if m in MS_WARM and (call := runner.warm()) is not None:
            warm[f"{i} {WARM}"] = Contender(call, 1, runner.activate)
    timed, threads, limits = session.block(cold, warm), session.threads, session.result.machine
    rows = []
    for i, (entry, runner) in enumerate(block):
        samples = {kind: timed.samples.get(f"{i} {kind}") for kind in (COLD, WARM)}
        timings = {kind: summary(taken) for kind, taken in samples.items() if taken}
        row = make_row(entry, runner, shape, m, threads, COLD, timings[COLD], timed.dram, limits, matches[i])
        rows.append(row)
        if row.roofline > PLAUSIBLE:
            say(f"implausible: {entry.name} {entry.case} {shape} M={m}: {row.roofline:.2f} of the bound; is it cold?")
        if WARM in timings:
            row.warm_us = timings[WARM].us
            rows.append(make_row(entry, runner, shape, m, threads, WARM, timings[WARM], None, limits, matches[i]))
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
    peak = limits.peak(unit(entry), entry.isa)
    least_us = max(runner.nbytes / dram / 1e3 if dram else 0.0, flops / peak / 1e3 if peak else 0.0)
    cost = table.Cost(runner.nbytes, flops, least_us)
    row = table.row(OP, f"{entry.case}, {kind}", keys, entry.dtype, entry, threads, timing, cost, match)
    if dram is None:
        row.roofline = None
    return row


def unit(entry: Backend) -> str:
    """Which measured peak bounds a backend: that of its products."""
    if entry.case.startswith("int8"):
        return "int8"
    return "bf16" if entry.dtype == "bfloat16" else "fp32"
