"""Runs the attention table: for each shape and context all backends take turns, are checked, and become rows."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import effk

from . import attention, machine
from .attention_problem import CONTEXTS, DECODE, PREFILL, PROMPTS, SEQUENCES, SHAPES, Heads, Made, Problem
from .baselines import torch_attention
from .measure import PLAUSIBLE, QUIET_WAIT_S, Result, Say, Session, in_turn
from .report import Row, set_vs_best
from .timing import summary

KINDS = (DECODE, PREFILL)


@dataclass(frozen=True)
class Plan:
    """What to run."""

    shapes: tuple[Heads, ...] = SHAPES
    threads: int = 1
    tiers: tuple[str, ...] = ()  # of ours; the first is the headline, the others run with fp16 caches only
    kinds: tuple[str, ...] = KINDS
    contexts: tuple[int, ...] = CONTEXTS
    sequences: tuple[int, ...] = SEQUENCES
    prompts: tuple[int, ...] = PROMPTS
    wait_s: float = QUIET_WAIT_S
    turns: int = 5
    baselines: bool = True


@dataclass(frozen=True)
class Entry:
    """A backend: what makes its call, the type of its cache, on which tier of ours."""

    name: str
    version: str
    function: Callable[[Problem, str], tuple[Made, tuple[Tensor, Tensor]]]
    dtype: str
    isa: str = "native"

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {self.isa}"


def entries(plan: Plan) -> list[Entry]:
    """Every backend."""
    ours = [
        Entry(attention.NAME, attention.VERSION, attention.function, dtype, tier)
        for tier in plan.tiers
        for dtype in attention.QUERY_ERROR
        if tier == plan.tiers[0] or dtype == "fp16"
    ]
    theirs = [
        Entry(torch_attention.NAME, torch_attention.VERSION, torch_attention.function, dtype)
        for dtype in torch_attention.DTYPES
    ]
    return ours + theirs * plan.baselines


def problems(plan: Plan) -> list[tuple[Heads, int, int, str]]:
    """The arguments of every Problem."""
    out = []
    for heads in plan.shapes:
        if DECODE in plan.kinds:
            out += [(heads, context, n, DECODE) for n in plan.sequences for context in plan.contexts]
        if PREFILL in plan.kinds:
            out += [(heads, prompt, 1, PREFILL) for prompt in plan.prompts]
    return out


def block(plan: Plan, session: Session, problem: Problem, say: Say) -> None:
    """Checks, then times the backends of one call."""
    found: list[tuple[Entry, Made, float]] = []
    result = session.result
    for entry in entries(plan):
        if entry.isa != "native":
            effk.isa.use(entry.isa)
        made, stored = entry.function(problem, entry.dtype)
        match = problem.match(made.read(made.call(0)), made, stored)
        if not match <= 1:
            say(f"wrong: {entry} {problem.heads} {problem.context} {problem.kind}: error is {match:.3g} of its bound")
        found.append((entry, made, match))
    say(f"{problem.heads} {problem.kind} {problem.context} x {problem.sequences}: {len(found)} backends")
    timed = session.block({str(i): in_turn(made.call, 1, entry.isa) for i, (entry, made, _) in enumerate(found)})
    for i, (entry, made, match) in enumerate(found):
        timing, work = summary(timed.samples[str(i)]), problem.flops()
        what = "bf16" if entry.dtype == "bf16" else "fp32"
        peak = result.machine.peak(what, entry.isa if entry.isa in machine.TIERS else machine.TIERS[-1])
        least_us = work / peak / 1e3 if peak else 0.0
        if problem.kind == DECODE:
            least_us = max(least_us, made.cache_bytes / timed.dram / 1e3)
        row = Row(
            "attention",
            f"{problem.kind}, {entry.dtype}",
            problem.keys(),
            entry.dtype,
            entry.isa,
            plan.threads,
            entry.name,
            entry.version,
            timing.us,
            timing.iqr,
            made.cache_bytes / timing.us / 1e3,
            work / timing.us / 1e3,
            least_us / timing.us,
            None,
            match if math.isfinite(match) else None,
            best_us=timing.best,
        )
        result.rows.append(row)
        if row.roofline > PLAUSIBLE:
            say(f"implausible: {entry} {problem.heads} {problem.context}: {row.roofline:.2f} of the bound")


def run(plan: Plan, say: Say) -> Result:
    """Runs the plan; `say` gets one line per block and anything worth knowing."""
    session = Session(plan.threads, plan.wait_s, plan.turns)
    before = effk.isa.active()
    try:
        for arguments in problems(plan):
            with torch.inference_mode():  # as deployed: autograd costs microseconds
                block(plan, session, Problem(*arguments), say)
            gc.collect()
    finally:
        effk.isa.use(before)
    set_vs_best(session.result.rows)
    return session.result
