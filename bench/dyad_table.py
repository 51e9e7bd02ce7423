"""Runs the tables of dense_linear and dyad_linear: for each size and kind, all backends take turns, are checked, and
become rows.

Dense competitors are timed once for a size and stand in the table of each n: they are what that DYAD layer replaces.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

import effk

from . import dense_linear, dyad_linear, machine
from .baselines import onnxruntime_dense, openvino_dense, torch_bmm, torch_dense
from .dyad_problem import BLOCKS, FF, KINDS, TOKENS, TRAINING, Layer, Made, Problem, flops, weight_bytes
from .measure import PLAUSIBLE, QUIET_WAIT_S, Block, Result, Say, Session, in_turn, try_build
from .report import Row, set_vs_best
from .timing import summary

DENSE, DYAD = "dense_linear", "dyad_linear"
Function = Callable[[Problem, str, int, int], Made | None]


@dataclass(frozen=True)
class Plan:
    """What to run."""

    op: str
    layers: tuple[Layer, ...]
    threads: int
    tiers: tuple[str, ...]  # of ours; the first is the headline, the others run forward only
    tokens: tuple[int, ...] = TOKENS
    kinds: tuple[str, ...] = KINDS
    wait_s: float = QUIET_WAIT_S
    turns: int = 5
    baselines: bool = True


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
        return " ".join(filter(None, (self.name, self.settings, f"n={self.n}" if self.n else "", self.isa)))


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


def rows_of(
    plan: Plan,
    entry: Entry,
    problem: Problem,
    kind: str,
    timed: Block,
    samples: Sequence[float],
    match: float,
    limits: machine.Machine,
) -> list[Row]:
    """The rows of a timing: one, or in the table of DYAD layers one for each n that a dense layer is replaced with."""
    timing, layer, tokens = summary(samples), problem.layer, problem.tokens
    work, nbytes = flops(layer, tokens, entry.n, kind), weight_bytes(layer, entry.n, kind)
    dtype = kind.rpartition(" ")[2]
    peak = limits.peak(dtype, entry.isa if entry.isa in machine.TIERS else machine.TIERS[-1])
    least_us = work / peak / 1e3 if peak else 0.0
    if tokens == 1:
        least_us = max(least_us, nbytes / timed.dram / 1e3)
    owners = (entry.n,) if entry.n else BLOCKS if plan.op == DYAD else (1,)
    dense = "dense" if plan.op == DYAD and not entry.n else ""
    case = ", ".join(filter(None, (kind, dense, entry.settings)))
    return [
        Row(
            plan.op,
            case,
            layer.keys(tokens, n),
            str(problem.dtype).removeprefix("torch."),
            entry.isa,
            plan.threads,
            entry.name,
            entry.version,
            timing.us,
            timing.iqr,
            nbytes / timing.us / 1e3,
            work / timing.us / 1e3,
            least_us / timing.us,
            None,
            match if math.isfinite(match) else None,
            best_us=timing.best,
        )
        for n in owners
    ]


def block(plan: Plan, session: Session, problem: Problem, kind: str, say: Say) -> None:
    """Checks, then times the backends of one size and kind."""
    found: list[tuple[Entry, Made, float]] = []
    result = session.result
    for entry in entries(plan, kind):
        if entry.isa != "native":
            effk.isa.use(entry.isa)
        build = partial(entry.function, problem, kind, entry.n, plan.threads)
        if not entry.version:
            result.missing[entry.name] = "not installed"
            continue
        if (made := try_build(build, f"{entry} ({problem.layer} {kind})", result, say)) is None:
            continue
        match = problem.match(kind, entry.n, made.read(made.call(0)), made.rounds_parts)
        if not match <= 1:
            say(f"wrong: {entry} {problem.layer} T={problem.tokens} {kind}: error is {match:.3g} of its bound")
        found.append((entry, made, match))
    problem.forget()
    say(f"{problem.layer} T={problem.tokens} {kind}: {len(found)} backends")
    timed = session.block(
        {str(i): in_turn(made.call, made.products, entry.isa) for i, (entry, made, _) in enumerate(found)}
    )
    for i, (entry, _, match) in enumerate(found):
        rows = rows_of(plan, entry, problem, kind, timed, timed.samples[str(i)], match, result.machine)
        result.rows += rows
        if rows[0].roofline > PLAUSIBLE:
            say(f"implausible: {entry} {problem.layer} {kind}: {rows[0].roofline:.2f} of the bound")


def run(plan: Plan, say: Say) -> Result:
    """Runs the plan; `say` gets one line per block and anything worth knowing."""
    session = Session(plan.threads, plan.wait_s, plan.turns)
    before = effk.isa.active()
    try:
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
    finally:
        effk.isa.use(before)
    if torch_dense.avoids_avx512():
        session.result.notes.append(f"{torch_dense.NAME} fp32: {torch_dense.AVOIDS}")
    set_vs_best(session.result.rows)
    return session.result
