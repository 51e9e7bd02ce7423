"""Runs the table of bitmask_linear: for each size all backends take turns, are checked, and become rows."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

import effk

from . import bitmask_linear as ours
from . import machine
from .bitmask_linear import BITS, COLD_ROWS, LAYERS, ROWS, SPARSITIES, Layer, Made, Problem
from .measure import PLAUSIBLE, QUIET_WAIT_S, Result, Say, Session, in_turn, try_build
from .report import Row, set_vs_best
from .timing import summary

OP = "bitmask_linear"
KINDS = ("int8", "float")


@dataclass(frozen=True)
class Plan:
    """What to run."""

    layers: tuple[Layer, ...] = LAYERS
    threads: int = 1
    tiers: tuple[str, ...] = ()  # of ours; the first is the headline, the others run the sparse layers only
    rows: tuple[int, ...] = ROWS
    kinds: tuple[str, ...] = KINDS
    wait_s: float = QUIET_WAIT_S
    turns: int = 5
    baselines: bool = True


@dataclass(frozen=True)
class Entry:
    """A backend of one kind of call."""

    name: str
    version: str
    function: Callable[[Problem], Made]
    kind: str  # how activations meet the weight
    dtype: str  # of stored values
    sparsity: float
    isa: str = "native"
    settings: str = ""

    def __str__(self) -> str:
        return " ".join((self.name, self.kind, self.dtype, f"{self.sparsity:.0%}", self.settings, self.isa))


def entries(plan: Plan) -> list[Entry]:
    """Every backend."""
    found: list[Entry] = []
    for tier in plan.tiers:
        for s in SPARSITIES:
            found.append(Entry(ours.NAME, ours.VERSION, ours.sparse("int8", s, "int8"), "int8", "int8", s, tier))
            for values in ("int8", "bf16", "fp32"):
                make = ours.sparse(values, s, "float")
                found.append(Entry(ours.NAME, ours.VERSION, make, "float", values, s, tier))
    head = plan.tiers[0] if plan.tiers else effk.isa.active()
    for bits in (4, 8):
        for group in (0, 128):
            how = f"{'groups of 128' if group else 'one scale a row'}"
            make = ours.low_bit(bits, group)
            found.append(Entry(ours.WQ, ours.VERSION, make, "int8", f"int{bits}", 0.0, head, how))
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        found.append(Entry(ours.DENSE, ours.VERSION, ours.dense(dtype, True), "float", name, 0.0, head))
        if plan.baselines:
            found.append(Entry(ours.TORCH, torch.__version__, ours.dense(dtype, False), "float", name, 0.0))
    return [entry for entry in found if entry.kind in plan.kinds]


def least_us(entry: Entry, made: Made, p: Problem, limits: machine.Machine, dram: float) -> float:
    """Operations over the peak of the instructions that do them, or for few rows the bytes over the bandwidth."""
    tier = entry.isa if entry.isa in machine.TIERS else machine.TIERS[-1]
    wide = "bf16" if entry.name != ours.NAME and entry.dtype == "bf16" else "fp32"
    peak = limits.peak("int8" if entry.kind == "int8" else wide, tier) or limits.peak("fp32", tier)
    work = 2.0 * p.m * p.layer.n * p.layer.k / peak / 1e3
    return max(work, made.nbytes / dram / 1e3 * (p.m <= COLD_ROWS))


def block(plan: Plan, session: Session, p: Problem, kind: str, say: Say) -> None:
    """Checks, then times the backends of one size and kind."""
    found: list[tuple[Entry, Made, float]] = []
    result = session.result
    for entry in entries(plan):
        if entry.kind != kind:
            continue
        if entry.isa != "native":
            effk.isa.use(entry.isa)
        made = try_build(partial(entry.function, p), f"{entry} ({p.layer})", result, say)
        if made is None:
            continue
        match = made.match(made.call(0))
        if not match <= 1:
            say(f"wrong: {entry} {p.layer} M={p.m}: error is {match:.3g} of its bound")
        found.append((entry, made, match))
    say(f"{p.layer} M={p.m} {kind}: {len(found)} backends")
    timed = session.block({str(i): in_turn(made.call, 1, entry.isa) for i, (entry, made, _) in enumerate(found)})
    for i, (entry, made, match) in enumerate(found):
        timing = summary(timed.samples[str(i)])
        share = least_us(entry, made, p, result.machine, timed.dram) / timing.us
        shape = {"M": p.m, "N": p.layer.n, "K": p.layer.k, "bits": BITS[entry.dtype], "sparsity": entry.sparsity}
        result.rows.append(
            Row(
                OP,
                ", ".join(filter(None, (kind, entry.settings))),
                shape,
                entry.dtype,
                entry.isa,
                plan.threads,
                entry.name,
                entry.version,
                timing.us,
                timing.iqr,
                made.nbytes / timing.us / 1e3,
                2.0 * p.m * p.layer.n * p.layer.k / timing.us / 1e3,
                share,
                None,
                match,
                best_us=timing.best,
            )  # fmt: skip
        )
        if share > PLAUSIBLE:
            say(f"implausible: {entry} {p.layer}: {share:.2f} of the bound")


def run(plan: Plan, say: Say) -> Result:
    """Runs the plan; `say` gets one line per block and anything worth knowing."""
    session = Session(plan.threads, plan.wait_s, plan.turns)
    before = effk.isa.active()
    try:
        for layer in plan.layers:
            for m in plan.rows:
                problem = Problem(layer, m)
                for kind in plan.kinds:
                    block(plan, session, problem, kind, say)
                    gc.collect()
    finally:
        effk.isa.use(before)
    set_vs_best(session.result.rows)
    return session.result
