"""What the tables of all ops share: who takes part, checking and timing the backends of one block, and their rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import effk

from .baselines import torch_dense
from .measure import PLAUSIBLE, QUIET_WAIT_S, Say, Session, in_turn, try_build
from .report import Row, set_vs_best
from .timing import Contender, Timing, summary


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to run; each op adds what."""

    threads: int = 1
    tiers: tuple[str, ...] = ()  # of ours; the first is the headline
    wait_s: float = QUIET_WAIT_S
    turns: int = 5
    baselines: bool = True


class Cost(NamedTuple):
    """Of one call: bytes that it reads, operations, and the microseconds that the machine needs at least."""

    nbytes: float
    flops: float
    least_us: float


class Found(NamedTuple):
    """A backend that is there, checked: what it is timed as, and its rows for a timing beside a bandwidth in GB/s."""

    entry: object
    contender: Contender
    rows: Callable[[Timing, float], Sequence[Row]]


def joined(*parts: str, by: str = ", ") -> str:
    """Those that say something."""
    return by.join(filter(None, parts))


def row(
    op: str, case: str, shape: dict, dtype: str, entry: Any, threads: int, timing: Timing, cost: Cost, match: float
) -> Row:
    """The row of a timing; ``entry`` has name, version and isa."""
    return Row(
        op, case, shape, dtype, entry.isa, threads, entry.name, entry.version, timing.us, timing.iqr,
        cost.nbytes / timing.us / 1e3, cost.flops / timing.us / 1e3, cost.least_us / timing.us, None,
        match if math.isfinite(match) else None, best_us=timing.best,
    )  # fmt: skip


def said(match: float, entry: object, where: str, say: Say) -> float:
    """The match; one above 1 is told."""
    if not match <= 1:
        say(f"wrong: {entry} {where}: error is {match:.3g} of its bound")
    return match


def block(
    session: Session,
    entries: Iterable[Any],
    where: str,
    build: Callable[[Any], Any],
    match: Callable[[Any, Any], float],
    rows: Callable[[Any, Any, float, Timing, float], Sequence[Row]],
    say: Say,
    checked: Callable[[], None] = lambda: None,
) -> None:
    """Checks, then times the backends of one size and kind of call.

    build(entry): what has ``call``, and maybe ``products`` of it; None: there is no such call. match(entry, made): its error over
    the bound. rows(entry, made, match, timing, GB/s): a row, or several. checked: called before anything is timed.
    """
    found = []
    for entry in entries:
        if not entry.version:
            session.result.missing[entry.name] = "not installed"
            continue
        if entry.isa != "native":
            effk.isa.use(entry.isa)
        if (made := try_build(partial(build, entry), f"{entry} ({where})", session.result, say)) is None:
            continue
        error = said(match(entry, made), entry, where, say)
        contender = in_turn(made.call, getattr(made, "products", 1), entry.isa)
        found.append(Found(entry, contender, partial(rows, entry, made, error)))
    checked()
    take(session, found, where, say)


def take(session: Session, found: Sequence[Found], where: str, say: Say) -> None:
    """Times the backends in turns and appends their rows; what is faster than the machine allows is told."""
    if not found:
        return
    say(f"{where}: {len(found)} backends")
    timed = session.block({str(i): f.contender for i, f in enumerate(found)})
    for i, f in enumerate(found):
        rows = f.rows(summary(timed.samples[str(i)]), timed.dram)
        session.result.rows += rows
        if rows[0].roofline > PLAUSIBLE:
            say(f"implausible: {f.entry} {where}: {rows[0].roofline:.2f} of the bound")


@contextmanager
def running(plan: Plan, fp32: str = "") -> Iterator[Session]:
    """A session whose rows are compared at its end. fp32: the competitor whose products torch hands to MKL."""
    session = Session(plan.threads, plan.wait_s, plan.turns)
    before = effk.isa.active()
    try:
        yield session
    finally:
        effk.isa.use(before)
    if fp32 and torch_dense.avoids_avx512():
        session.result.notes.append(f"{fp32}: {torch_dense.AVOIDS}")
    set_vs_best(session.result.rows)


def repeat(benchmark: Any, entry: Any, group: str, call: Callable[[int], object], match: float) -> None:
    """As a test of pytest-benchmark: the error first, then the time, inputs and copies of the weight in turn."""
    assert match <= 1, f"error is {match:.3g} of its bound"
    benchmark.group = group
    benchmark.extra_info.update(match=match, version=entry.version, isa=entry.isa)
    turns = count()
    benchmark(lambda: call(next(turns)))
