"""Runs the tables of dense_linear and dyad_linear: for each size and kind, all backends take turns, are checked, and
become rows.

Dense competitors are timed once for a size and stand in the table of each n: they are what that DYAD layer replaces.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import dense_linear, dyad_linear, table
from .baselines import onnxruntime_dense, openvino_dense, torch_bmm, torch_dense
from .dyad_problem import BLOCKS, FF, KINDS, LAYERS, TOKENS, TRAINING, Layer, Made, Problem, flops, weight_bytes
from .measure import Result, Say, Session
from .report import Row
from .table import Cost
from .timing import Timing

DENSE, DYAD = "dense_linear", "dyad_linear"
Function = Callable[[Problem, str, int, int], Made | None]


@dataclass(frozen=True)
class Plan(table.Plan):
    """What to run. Tiers but the first run forward only."""

    op: str = DYAD
    layers: tuple[Layer, ...] = LAYERS
    tokens: tuple[int, ...] = TOKENS
    kinds: tuple[str, ...] = KINDS


@dataclass(frozen=True)
class Entry:
    """A backend: what makes its call, for which n (0: dense), on which tier of ours."""

    name: str
    version: str
    function: Function
    n: int
    isa: str = "native"
    settings: str = ""

    def __str__(self) -> str:
        return table.joined(self.name, self.settings, f"n={self.n}" if self.n else "", self.isa, by=" ")


THEIRS = (
    (torch_dense.NAME, torch_dense.VERSION, torch_dense.function, "weight laid out in each call"),
    (torch_dense.PACKED, torch_dense.VERSION, torch_dense.packed, "weight packed"),
    (onnxruntime_dense.NAME, onnxruntime_dense.VERSION, onnxruntime_dense.function, "weight packed"),
    (openvino_dense.NAME, openvino_dense.VERSION, openvino_dense.function, "weight packed"),
)


def entries(plan: Plan, kind: str) -> list[Entry]:
    """Every backend that may have the kind."""
    ours, theirs = [], []
    tiers = plan.tiers[:1] if kind.startswith((TRAINING, FF)) else plan.tiers
    for tier in tiers:
        ours.append(Entry(dense_linear.NAME, dense_linear.VERSION, dense_linear.function, 0, tier))
        if plan.op == DYAD:
            ours += [Entry(dyad_linear.NAME, dyad_linear.VERSION, dyad_linear.function, n, tier) for n in BLOCKS]
    if plan.op == DYAD:
        for n in BLOCKS:
            ours.append(Entry(dyad_linear.NAME, dyad_linear.VERSION, dyad_linear.two_calls, n, tiers[0], "two calls"))
            ours.append(Entry(dyad_linear.GATHERED, dyad_linear.VERSION, dyad_linear.gathered, n, tiers[0]))
            theirs.append(Entry(torch_bmm.NAME, torch_bmm.VERSION, torch_bmm.function, n, settings="features first"))
            theirs.append(Entry(torch_bmm.TOKENS_FIRST, torch_bmm.VERSION, torch_bmm.tokens_first, n))
    theirs += [Entry(name, version, function, 0, settings=how) for name, version, function, how in THEIRS]
    return ours + theirs * plan.baselines


def block(plan: Plan, session: Session, problem: Problem, kind: str, say: Say) -> None:
    """Checks, then times the backends of one size and kind."""
    layer, tokens, dtype = problem.layer, problem.tokens, kind.rpartition(" ")[2]

    def rows(entry: Entry, made: Made, match: float, timing: Timing, dram: float) -> list[Row]:
        """One, or in the table of DYAD layers one for each n that a dense layer is replaced with."""
        work, nbytes = flops(layer, tokens, entry.n, kind), weight_bytes(layer, entry.n, kind)
        peak = session.result.machine.peak(dtype, entry.isa)
        least_us = work / peak / 1e3 if peak else 0.0
        if tokens == 1:
            least_us = max(least_us, nbytes / dram / 1e3)
        owners = (entry.n,) if entry.n else BLOCKS if plan.op == DYAD else (1,)
        case = table.joined(kind, "dense" if plan.op == DYAD and not entry.n else "", entry.settings)
        stored, cost = str(problem.dtype).removeprefix("torch."), Cost(nbytes, work, least_us)
        return [
            table.row(plan.op, case, layer.keys(tokens, n), stored, entry, plan.threads, timing, cost, match)
            for n in owners
        ]

    table.block(
        session,
        entries(plan, kind),
        f"{layer} T={tokens} {kind}",
        lambda entry: entry.function(problem, kind, entry.n, plan.threads),
        lambda entry, made: problem.match(kind, entry.n, made.read(made.call(0)), made.rounds_parts),
        rows,
        say,
        problem.forget,
    )


def run(plan: Plan, say: Say) -> Result:
    """Runs the plan; `say` gets one line per block and anything worth knowing."""
    with table.running(plan, f"{torch_dense.NAME} fp32") as session:
        for layer in plan.layers:
            for tokens in plan.tokens:
                for kind in plan.kinds:
                    if tokens == 1 and kind.startswith(TRAINING):
                        continue
                    with torch.inference_mode(
                        not kind.startswith(TRAINING)
                    ):  # as deployed: autograd costs microseconds
                        block(plan, session, Problem(layer, tokens, kind.rpartition(" ")[2]), kind, say)
                    gc.collect()
    return session.result
