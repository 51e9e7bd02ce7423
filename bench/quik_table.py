"""Runs the table of quik_linear: for each size and kind, all backends take turns, are checked, and become rows."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import quik_linear, table
from .baselines import onnxruntime_quik, torch_quik
from .machine import Machine
from .measure import Result, Say, Session
from .quik_problem import BITS, BITS_A, FEW, KINDS, LAYERS, PRODUCT, ROWS, Layer, Made, Problem
from .report import Row
from .table import Cost
from .timing import Timing

OP = "quik_linear"


@dataclass(frozen=True)
class Plan(table.Plan):
    """What to run. Tiers but the first run the fused layer only."""

    layers: tuple[Layer, ...] = LAYERS
    rows: tuple[int, ...] = ROWS
    kinds: tuple[str, ...] = KINDS


@dataclass(frozen=True)
class Entry:
    """A backend: what makes its call, for which bits of the weight, with outliers or not, on which tier of ours."""

    name: str
    version: str
    function: Callable[[Problem, str, int, bool], Made | None]
    bits: int
    outliers: bool
    dtype: str = "bfloat16"
    isa: str = "native"
    settings: str = ""

    def __str__(self) -> str:
        return " ".join((self.name, f"W{self.bits}", "outliers" if self.outliers else "", self.isa))


def entries(plan: Plan) -> list[Entry]:
    """Every backend; those that lack a kind say so when they are built."""
    ours: list[Entry] = []
    for tier in plan.tiers:
        for bits in BITS:
            ours.append(Entry(quik_linear.NAME, quik_linear.VERSION, quik_linear.product, bits, False, "int8", tier))
            for outliers in (True, False):
                how = (quik_linear.VERSION, quik_linear.fused, bits, outliers, "bfloat16", tier)
                ours.append(Entry(quik_linear.NAME, *how))
                if tier == plan.tiers[0]:
                    for name, function in (
                        (quik_linear.PARTS, quik_linear.separate),
                        (quik_linear.WQ, quik_linear.weight_only),
                    ):
                        ours.append(Entry(name, quik_linear.VERSION, function, bits, outliers, "bfloat16", tier))
    t, o = torch_quik, onnxruntime_quik
    theirs = [
        Entry(t.FP32, t.VERSION, t.linear(torch.float32), 32, False, "float32"),
        Entry(t.BF16, t.VERSION, t.linear(torch.bfloat16), 16, False),
        Entry(t.DYNAMIC, t.VERSION, t.dynamic, 8, False, "float32", settings="one scale a tensor"),
        Entry(t.INT_MM, t.VERSION, t.int_mm, 8, False, "int8"),
        Entry(t.QLINEAR, t.VERSION, t.qlinear, 8, False, "int8", settings="weight packed for the batch, result fp32"),
        Entry(t.STEPS, t.VERSION, t.steps, 8, True),
        Entry(o.INTEGER, o.VERSION, o.product, 8, False, "int8", settings="weight packed"),
        Entry(o.DYNAMIC, o.VERSION, o.dynamic, 8, False, "float32", settings="weight packed, one scale a tensor of x"),
    ]
    return ours + theirs * plan.baselines


def least_us(entry: Entry, problem: Problem, kind: str, limits: Machine, dram: float) -> float:
    """Operations over the peak of the instructions that do them, with outliers in bf16; for few rows also the bytes."""
    n, k, m = problem.layer.n, problem.layer.k, problem.m
    tier = entry.isa
    if entry.bits > 8:
        dtype = "fp32" if entry.bits == 32 else "bf16"
        return max(2.0 * m * n * k / limits.peak(dtype, tier) / 1e3, n * k * entry.bits / 8 / dram / 1e3 * (m <= FEW))
    extra = len(problem.outliers) if entry.outliers else 0
    work = 2.0 * m * n * (k - extra) / limits.peak("int8", tier) / 1e3
    if extra:
        work += 2.0 * m * n * extra / (limits.peak("bf16", tier) or limits.peak("fp32", tier)) / 1e3
    nbytes = n * ((k - extra) * entry.bits / 8 + 2 * extra)
    return max(work, nbytes / dram / 1e3 * (m <= FEW))


def bits_a(entry: Entry, kind: str, m: int) -> int:
    """Bits of the activations that are multiplied: for few rows our layers round none."""
    whole = entry.name == quik_linear.WQ or (entry.name == quik_linear.NAME and kind != PRODUCT and m <= FEW)
    return 16 if whole else entry.bits if entry.bits > BITS_A else BITS_A


def block(plan: Plan, session: Session, problem: Problem, kind: str, say: Say) -> None:
    """Checks, then times the backends of one size and kind."""
    layer, m = problem.layer, problem.m

    def rows(entry: Entry, made: Made, match: float, timing: Timing, dram: float) -> list[Row]:
        shape = {
            "M": m,
            "N": layer.n,
            "K": layer.k,
            "bits_w": entry.bits,
            "bits_a": bits_a(entry, kind, m),
            "outliers": len(problem.outliers) if entry.outliers else 0,
        }
        least = least_us(entry, problem, kind, session.result.machine, dram)
        cost = Cost(layer.n * layer.k * entry.bits / 8, 2.0 * m * layer.n * layer.k, least)
        case = table.joined(kind, entry.settings)
        return [table.row(OP, case, shape, entry.dtype, entry, plan.threads, timing, cost, match)]

    table.block(
        session,
        entries(plan),
        f"{layer} M={m} {kind}",
        lambda entry: entry.function(problem, kind, entry.bits, entry.outliers),
        lambda entry, made: made.match(made.read(made.call(0))),
        rows,
        say,
    )


def run(plan: Plan, say: Say) -> Result:
    """Runs the plan; `say` gets one line per block and anything worth knowing."""
    with table.running(plan, torch_quik.FP32) as session:
        for layer in plan.layers:
            for m in plan.rows:
                problem = Problem(layer, m)
                for kind in plan.kinds:
                    if kind != PRODUCT or m > FEW:
                        block(plan, session, problem, kind, say)
                gc.collect()
    return session.result
