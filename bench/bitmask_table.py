"""Runs the table of bitmask_linear: for each size all backends take turns, are checked, and become rows."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch

import effk

from . import bitmask_linear as ours
from . import table
from .bitmask_linear import BITS, COLD_ROWS, LAYERS, ROWS, SPARSITIES, Layer, Made, Problem
from .machine import Machine
from .measure import Result, Say, Session
from .report import Row
from .table import Cost
from .timing import Timing

OP = "bitmask_linear"
KINDS = ("int8", "float")
MOST_WORK = 512 * 4096 * 4096  # rows times weights: more would take minutes and say nothing new


@dataclass(frozen=True)
class Plan(table.Plan):
    """What to run. Tiers but the first run the sparse layers only, and few rows; many rows stop at MOST_WORK."""

    layers: tuple[Layer, ...] = LAYERS
    rows: tuple[int, ...] = ROWS
    kinds: tuple[str, ...] = KINDS


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
    for name in ("fp32", "bf16"):
        found.append(Entry(ours.DENSE, ours.VERSION, ours.dense(name, True), "float", name, 0.0, head))
        if plan.baselines:
            found.append(Entry(ours.TORCH, torch.__version__, ours.dense(name, False), "float", name, 0.0))
    for s in SPARSITIES if plan.baselines else ():
        found.append(Entry(ours.CSR, torch.__version__, ours.csr(s), "float", "fp32", s))
    return [entry for entry in found if entry.kind in plan.kinds]


def least_us(entry: Entry, made: Made, p: Problem, limits: Machine, dram: float) -> float:
    """Operations over the peak of the instructions that do them, or for few rows the bytes over the bandwidth."""
    wide = "bf16" if entry.name != ours.NAME and entry.dtype == "bf16" else "fp32"
    peak = limits.peak("int8" if entry.kind == "int8" else wide, entry.isa) or limits.peak("fp32", entry.isa)
    work = 2.0 * p.m * p.layer.n * p.layer.k / peak / 1e3
    return max(work, made.nbytes / dram / 1e3 * (p.m <= COLD_ROWS))


def block(plan: Plan, session: Session, p: Problem, kind: str, say: Say) -> None:
    """Checks, then times the backends of one size and kind."""

    def rows(entry: Entry, made: Made, match: float, timing: Timing, dram: float) -> list[Row]:
        shape = {"M": p.m, "N": p.layer.n, "K": p.layer.k, "bits": BITS[entry.dtype], "sparsity": entry.sparsity}
        least = least_us(entry, made, p, session.result.machine, dram)
        cost, case = Cost(made.nbytes, 2.0 * p.m * p.layer.n * p.layer.k, least), table.joined(kind, entry.settings)
        return [table.row(OP, case, shape, entry.dtype, entry, plan.threads, timing, cost, match)]

    table.block(
        session,
        (
            e
            for e in entries(plan)
            if e.kind == kind and (p.m <= COLD_ROWS or e.name != ours.NAME or e.isa == plan.tiers[0])
        ),
        f"{p.layer} M={p.m} {kind}",
        lambda entry: entry.function(p),
        lambda entry, made: made.match(made.call(0)),
        rows,
        say,
    )


def run(plan: Plan, say: Say) -> Result:
    """Runs the plan; `say` gets one line per block and anything worth knowing."""
    with table.running(plan) as session:
        for layer in plan.layers:
            problem: Problem | None = None
            for m in plan.rows:
                if m * layer.n * layer.k > MOST_WORK:
                    continue
                problem = Problem(layer, m, problem)
                for kind in plan.kinds:
                    block(plan, session, problem, kind, say)
            del problem
            gc.collect()
    return session.result
