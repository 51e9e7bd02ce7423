"""Runs the table of quik_linear: for each size and kind, all backends take turns, are checked, and become rows."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

import effk

from . import machine, quik_linear
from .baselines import onnxruntime_quik, torch_quik
from .baselines.torch_dense import AVOIDS, avoids_avx512
from .measure import PLAUSIBLE, QUIET_WAIT_S, Result, Say, Session, in_turn, try_build
from .quik_problem import BITS, BITS_A, FEW, KINDS, LAYERS, PRODUCT, ROWS, Layer, Made, Problem
from .report import Row, set_vs_best
from .timing import summary

OP = "quik_linear"


@dataclass(frozen=True)
class Plan:
    """What to run."""

    layers: tuple[Layer, ...] = LAYERS
    threads: int = 1
    tiers: tuple[str, ...] = ()  # of ours; the first is the headline, the others run the fused layer only
    rows: tuple[int, ...] = ROWS
    kinds: tuple[str, ...] = KINDS
    wait_s: float = QUIET_WAIT_S
    turns: int = 5
    baselines: bool = True


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


def least_us(entry: Entry, problem: Problem, kind: str, limits: machine.Machine, dram: float) -> float:
    """Operations over the peak of the instructions that do them, with outliers in bf16; for few rows also the bytes."""
    n, k, m = problem.layer.n, problem.layer.k, problem.m
    tier = entry.isa if entry.isa in machine.TIERS else machine.TIERS[-1]
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
    found: list[tuple[Entry, Made, float]] = []
    result = session.result
    for entry in entries(plan):
        if entry.isa != "native":
            effk.isa.use(entry.isa)
        if not entry.version:
            result.missing[entry.name] = "not installed"
            continue
        build = partial(entry.function, problem, kind, entry.bits, entry.outliers)
        if (made := try_build(build, f"{entry} ({problem.layer} {kind})", result, say)) is None:
            continue
        match = made.match(made.read(made.call(0)))
        if not match <= 1:
            say(f"wrong: {entry} {problem.layer} M={problem.m} {kind}: error is {match:.3g} of its bound")
        found.append((entry, made, match))
    if not found:
        return
    say(f"{problem.layer} M={problem.m} {kind}: {len(found)} backends")
    timed = session.block(
        {str(i): in_turn(made.call, made.products, entry.isa) for i, (entry, made, _) in enumerate(found)}
    )
    for i, (entry, _, match) in enumerate(found):
        timing = summary(timed.samples[str(i)])
        layer, m = problem.layer, problem.m
        outliers = len(problem.outliers) if entry.outliers else 0
        share = least_us(entry, problem, kind, result.machine, timed.dram) / timing.us
        shape = {
            "M": m,
            "N": layer.n,
            "K": layer.k,
            "bits_w": entry.bits,
            "bits_a": bits_a(entry, kind, m),
            "outliers": outliers,
        }
        work, nbytes = 2.0 * m * layer.n * layer.k, layer.n * layer.k * entry.bits / 8
        case = ", ".join(filter(None, (kind, entry.settings)))
        row = Row(
            OP, case, shape, entry.dtype, entry.isa, plan.threads, entry.name, entry.version,
            timing.us, timing.iqr, nbytes / timing.us / 1e3, work / timing.us / 1e3, share, None,
            match if math.isfinite(match) else None, best_us=timing.best,
        )  # fmt: skip
        result.rows.append(row)
        if share > PLAUSIBLE:
            say(f"implausible: {entry} {layer} {kind}: {share:.2f} of the bound")


def run(plan: Plan, say: Say) -> Result:
    """Runs the plan; `say` gets one line per block and anything worth knowing."""
    session = Session(plan.threads, plan.wait_s, plan.turns)
    before = effk.isa.active()
    try:
        for layer in plan.layers:
            for m in plan.rows:
                problem = Problem(layer, m)
                for kind in plan.kinds:
                    if kind != PRODUCT or m > FEW:
                        block(plan, session, problem, kind, say)
                gc.collect()
    finally:
        effk.isa.use(before)
    if avoids_avx512():
        session.result.notes.append(f"{torch_quik.FP32}: {AVOIDS}")
    set_vs_best(session.result.rows)
    return session.result
