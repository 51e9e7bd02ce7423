"""Runs the fftconv table: for each shape and kind of call, all backends take turns, are checked, and become rows."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from types import ModuleType

import torch

import effk

from . import fftconv, fftconv_decode, fftconv_memory, machine, table
from .baselines import direct_conv1d, scipy_fft, torch_fft, torch_fftconv
from .fftconv_problem import BACKWARD, FORWARD, KINDS, SHAPES, Problem, Shape, flops, least_bytes
from .measure import Result, Say, Session, try_build
from .report import Row, set_vs_best
from .table import Cost
from .timing import Contender, Timing
from .worker import DEFAULT, TUNED, Worker

OP = "fftconv"
DEFAULT_MALLOC, TUNED_MALLOC = "default malloc", "tuned malloc"
OTHERS = (scipy_fft, torch_fftconv, direct_conv1d)


@dataclass(frozen=True)
class Plan(table.Plan):
    """What to run. Tiers but the first run forward only."""

    shapes: tuple[Shape, ...] = SHAPES
    kinds: tuple[str, ...] = KINDS
    decode: bool = True
    memory: bool = True


@dataclass(frozen=True)
class Entry:
    """A backend: its module, whose `function` makes the call, our tier, and the allocator of its process."""

    module: ModuleType
    isa: str = "native"
    allocator: str = DEFAULT_MALLOC

    @property
    def name(self) -> str:
        """The module's."""
        return self.module.NAME

    @property
    def version(self) -> str:
        """The module's."""
        return self.module.VERSION

    @property
    def settings(self) -> str:
        """What the case says beside the kind."""
        return self.allocator if self.allocator == TUNED_MALLOC or self.module is torch_fft else ""

    def __str__(self) -> str:
        return table.joined(self.name, self.settings, by=" ")


def make(module: str, isa: str, b: int, h: int, length: int, kind: str, threads: int) -> Callable[[], object] | None:
    """For `worker.Worker`: a function that takes the inputs of that shape in turn, the first one first."""
    problem = Problem(Shape(b, h, length))
    if isa != "native":
        effk.isa.use(isa)
    call = importlib.import_module(module).function(problem, kind, threads)
    if call is None:
        return None
    if not (kind == BACKWARD and module == torch_fft.__name__):
        torch.inference_mode().__enter__()  # as deployed, and for good: the process has nothing else to do
    turns = cycle(range(len(problem.inputs)))
    return lambda: call(next(turns))


class Run:
    """The state of one run of the table."""

    def __init__(self, plan: Plan, say: Say) -> None:
        self.plan, self.say = plan, say
        self.session = Session(plan.threads, plan.wait_s, plan.turns)
        self.result = self.session.result
        self.workers: dict[Entry, Worker] = {}
        self.faults: list[str] = []

    def close(self) -> None:
        """Ends the processes and puts the notes in order."""
        for worker in self.workers.values():
            worker.close()
        if self.faults:
            note = f"page faults a call of {torch_fft.NAME} ({DEFAULT_MALLOC} / {TUNED_MALLOC}): "
            self.result.notes.append(note + ", ".join(self.faults))

    def entries(self, kind: str) -> list[Entry]:
        """Every backend that may have the kind."""
        tiers = self.plan.tiers if kind == FORWARD else self.plan.tiers[:1]
        ours = [Entry(fftconv, tier) for tier in tiers] + [Entry(fftconv, tiers[0], TUNED_MALLOC)]
        theirs = [Entry(torch_fft), Entry(torch_fft, allocator=TUNED_MALLOC), *map(Entry, OTHERS)]
        return ours + theirs if self.plan.baselines else ours

    def loaded(self, entry: Entry, shape: Shape, kind: str) -> Worker | None:
        """The backend's process with this call, or None where there is no such call."""
        if entry not in self.workers:
            settings = TUNED if entry.allocator == TUNED_MALLOC else DEFAULT
            self.workers[entry] = Worker(f"{__name__}:make", self.plan.threads, settings)
        worker = self.workers[entry]
        size = shape.b, shape.h, shape.l
        load = partial(worker.load, entry.module.__name__, entry.isa, *size, kind, self.plan.threads)
        return worker if try_build(load, f"{entry} ({shape} {kind})", self.result, self.say) else None

    def block(self, problem: Problem, kind: str) -> None:
        """Checks, then times the backends of one shape and kind."""
        found: list[table.Found] = []
        where = f"{problem.shape} {kind}"
        for entry in self.entries(kind):
            if (worker := self.loaded(entry, problem.shape, kind)) is None:
                continue
            match = problem.match(kind, [torch.from_numpy(array) for array in worker.result()])
            table.said(match, entry, where, self.say)
            timed = Contender(lambda: None, series=worker.series)
            found.append(table.Found(entry, timed, partial(self.rows, entry, problem, kind, match)))
        problem.forget()
        table.take(self.session, found, where, self.say)
        if kind == FORWARD:
            faults = [str(self.workers[f.entry].faults()) for f in found if f.entry.module is torch_fft]
            self.faults += [f"{problem.shape} {' / '.join(faults)}"] * bool(faults)
        for f in found:
            self.workers[f.entry].release()

    def rows(self, entry: Entry, problem: Problem, kind: str, match: float, timing: Timing, dram: float) -> list[Row]:
        """The row of a timing."""
        shape, peak = problem.shape, self.result.machine.peak("fp32", entry.isa)
        work, nbytes = flops(shape, kind), least_bytes(shape, kind)
        least_us = work / peak / 1e3 if peak else 0.0
        if nbytes * len(problem.inputs) > machine.last_level_cache():
            least_us = max(least_us, nbytes / dram / 1e3)
        keys, cost = shape.keys(gated=kind == "gated"), Cost(nbytes, work, least_us)
        case, threads = table.joined(kind, entry.settings), self.plan.threads
        return [table.row(OP, case, keys, "float32", entry, threads, timing, cost, match)]


def run(plan: Plan, say: Say) -> Result:
    """Runs the plan; `say` gets one line per block and anything worth knowing."""
    state = Run(plan, say)
    try:
        for shape in plan.shapes:
            problem = Problem(shape)
            how = fftconv.MODE, fftconv.SCHEME
            say(f"{shape}: {effk.ops.fftconv.plan(shape.l, shape.l, shape.n_fft, *how)}")
            for kind in plan.kinds:
                state.block(problem, kind)
                gc.collect()
    finally:
        state.close()
    if plan.memory:
        state.result.rows += fftconv_memory.rows(plan.threads, say)
    if plan.decode:
        state.result.rows += fftconv_decode.rows(plan.threads, plan.tiers[0], say, fftconv_decode.SHAPE)
    set_vs_best(state.result.rows)
    return state.result
