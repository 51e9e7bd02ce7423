"""Runs the table of relu_ffn: for each size, kind and density all backends take turns, are checked, and become rows."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import relu_ffn, table
from .baselines import torch_relu_ffn as theirs
from .measure import Result, Say, Session
from .relu_problem import (
    BATCH,
    BATCH_TOKENS,
    DENSITIES,
    DOWN,
    KINDS,
    LAYERS,
    PROMPT,
    PROMPT_TOKENS,
    UNION,
    Layer,
    Made,
    Problem,
    Weights,
)
from .report import Row
from .table import Cost
from .timing import Timing

OP = "relu_ffn"
TOKENS = {BATCH: BATCH_TOKENS, PROMPT: PROMPT_TOKENS}  # 1 elsewhere
BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.625}  # a weight, with scales in groups of 32 for int4


@dataclass(frozen=True)
class Plan(table.Plan):
    """What to run."""

    layers: tuple[Layer, ...] = LAYERS
    kinds: tuple[str, ...] = KINDS
    densities: tuple[float, ...] = DENSITIES


@dataclass(frozen=True)
class Entry:
    """A backend: what makes its call, its rows, and the share of neurons that it reads (None: the density)."""

    name: str
    version: str
    function: Callable[[Problem, str], Made | None]
    rows: str
    reads: float | None = None
    isa: str = "native"

    def __str__(self) -> str:
        return " ".join((self.name, self.rows, self.isa))


def entries(plan: Plan, kind: str) -> list[Entry]:
    """Every backend; those that lack a kind say so when they are built."""
    rows = kind.partition(" ")[2]
    found = []
    for tier in plan.tiers[: None if kind == f"layer {rows}" else 1]:
        found.append(Entry(relu_ffn.NAME, relu_ffn.VERSION, relu_ffn.ours, rows, None, tier))
        found.append(Entry(relu_ffn.DENSE, relu_ffn.VERSION, relu_ffn.dense, rows, 1.0, tier))
    found.append(Entry(relu_ffn.LISTED, relu_ffn.VERSION, relu_ffn.listed, rows, None, plan.tiers[0]))
    found.append(Entry(relu_ffn.LINEAR, relu_ffn.VERSION, relu_ffn.linear, "bf16", 1.0, plan.tiers[0]))
    if plan.baselines:
        t = theirs
        if rows in ("fp32", "bf16"):
            found.append(Entry(t.FP32, t.VERSION, t.dense(torch.float32), "fp32", 1.0))
        if rows == "bf16":
            found.append(Entry(t.BF16, t.VERSION, t.dense(torch.bfloat16), "bf16", 1.0))
            found.append(Entry(t.PICKED, t.VERSION, t.picked, "bf16"))
        if rows == "int8":
            found.append(Entry(t.INT8, t.VERSION, t.int8, "int8", 1.0))
        if rows == "int4":
            found.append(Entry(t.INT4, t.VERSION, t.int4, "int4", 1.0))
        found.append(Entry(t.BAG, t.VERSION, t.embedding_bag, rows))
        found.append(Entry(t.BYTES, t.VERSION, t.quantized_bag, rows))
    return found


def nbytes(layer: Layer, kind: str, rows: str, share: float) -> float:
    """Bytes that a call has to read when it reads that share of the neurons that may be skipped."""
    skipped, whole = (1, 0) if kind.startswith(DOWN) else (2, 1) if layer.gated else (1, 1)
    return (whole + skipped * share) * layer.d * layer.f * BYTES[rows]


def block(plan: Plan, session: Session, weights: Weights, kind: str, density: float, say: Say) -> None:
    """Checks, then times the backends of one size, kind and density."""
    what, layer = kind.partition(" ")[0], weights.layer
    problem = Problem(weights, TOKENS.get(what, 1), density)

    def rows(entry: Entry, made: Made, match: float, timing: Timing, dram: float) -> list[Row]:
        share = density if entry.reads is None else entry.reads
        read, work = (
            nbytes(layer, kind, entry.rows, share),
            2.0 * problem.tokens * nbytes(layer, kind, "fp32", share) / 4,
        )
        least_us = read / dram / 1e3
        if what == PROMPT:
            peak = session.result.machine.peak("bf16" if entry.rows == "bf16" else "fp32", "avx512vnni")
            least_us = max(least_us, work / peak / 1e3)
        shape = {"M": problem.tokens, "d": layer.d, "f": layer.f, "density": density, "gated": int(layer.gated)}
        cost = Cost(read, work, least_us)
        return [table.row(OP, kind, shape, entry.rows, entry, plan.threads, timing, cost, match)]

    table.block(
        session,
        entries(plan, kind),
        f"{layer} {kind}, density {density}",
        lambda entry: entry.function(problem, kind),
        lambda entry, made: made.match(made.call(0)),
        rows,
        say,
    )


def run(plan: Plan, say: Say) -> Result:
    """Runs the plan; `say` gets one line per block and anything worth knowing."""
    with table.running(plan, theirs.FP32) as session:
        for layer in plan.layers:
            for kind in plan.kinds:
                what, _, rows = kind.partition(" ")
                weights = Weights(layer, rows, what == DOWN)
                for density in (UNION,) if what in TOKENS else plan.densities:
                    block(plan, session, weights, kind, density, say)
                del weights
                gc.collect()
    return session.result
