"""Runs the attention table: for each shape and context all backends take turns, are checked, and become rows."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import attention, table
from .attention_problem import CONTEXTS, DECODE, PREFILL, PROMPTS, SEQUENCES, SHAPES, Heads, Made, Problem
from .baselines import torch_attention
from .measure import Result, Say, Session
from .report import Row
from .table import Cost
from .timing import Timing

KINDS = (DECODE, PREFILL)


@dataclass(frozen=True)
class Plan(table.Plan):
    """What to run. Tiers but the first run with fp16 caches only."""

    shapes: tuple[Heads, ...] = SHAPES
    kinds: tuple[str, ...] = KINDS
    contexts: tuple[int, ...] = CONTEXTS
    sequences: tuple[int, ...] = SEQUENCES
    prompts: tuple[int, ...] = PROMPTS


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

    def match(entry: Entry, made: Made) -> float:
        return problem.match(made.read(made.call(0)), made, stored[entry])

    def build(entry: Entry) -> Made:
        made, stored[entry] = entry.function(problem, entry.dtype)
        return made

    def rows(entry: Entry, made: Made, match: float, timing: Timing, dram: float) -> list[Row]:
        work, peak = (
            problem.flops(),
            session.result.machine.peak("bf16" if entry.dtype == "bf16" else "fp32", entry.isa),
        )
        least_us = work / peak / 1e3 if peak else 0.0
        if problem.kind == DECODE:
            least_us = max(least_us, made.cache_bytes / dram / 1e3)
        case, cost = f"{problem.kind}, {entry.dtype}", Cost(made.cache_bytes, work, least_us)
        return [table.row("attention", case, problem.keys(), entry.dtype, entry, plan.threads, timing, cost, match)]

    stored: dict[Entry, tuple[Tensor, Tensor]] = {}
    where = f"{problem.heads} {problem.kind} {problem.context} x {problem.sequences}"
    table.block(session, entries(plan), where, build, match, rows, say)


def run(plan: Plan, say: Say) -> Result:
    """Runs the plan; `say` gets one line per block and anything worth knowing."""
    with table.running(plan) as session:
        for arguments in problems(plan):
            with torch.inference_mode():  # as deployed: autograd costs microseconds
                block(plan, session, Problem(*arguments), say)
            gc.collect()
    return session.result
