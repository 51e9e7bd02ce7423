"""Fair timing on a shared machine: backends take turns, so that drift hits all; disturbed turns do not count."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import psutil

TURN_S = 0.025  # of one backend; long against a call, short against the drift of a shared host
TURNS = 5
PAUSE_S = 0.004  # before a turn: the worker threads of the backend before it stop spinning
LONG_CALL_S = 0.02  # from here on a call is its own warm-up
LONG_CALLS = 3  # of which this many are enough: each goes over a whole rotation of weights
FOREIGN_LIMIT = (
    0.04  # share of a core; turns with more are left out where others are quieter, blocks with more repeated
)
QUIET_SHARE = 0.06  # of a core, over QUIET_STEP_S, counts as quiet
QUIET_STEP_S = 0.5


Series = Callable[[float, bool], Sequence[float]]  # (seconds, whether to warm up) -> seconds of each call


@dataclass(frozen=True)
class Contender:
    """Something to time."""

    call: Callable[[], None]
    products: int = 1  # done by one call
    activate: Callable[[], None] = lambda: None  # before each turn, not timed
    series: Series | None = None  # takes its own times, in another process, instead of having `call` timed


@dataclass(frozen=True)
class Timing:
    """Microseconds of one product over many calls."""

    us: float  # median
    iqr: float
    best: float
    calls: int


def summary(samples: Sequence[float]) -> Timing:
    """Median, interquartile range and minimum of times in microseconds."""
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    return Timing(middle, high - low, min(samples), len(samples))


@dataclass(frozen=True)
class Turn:
    """One backend's turn: microseconds per product of each call, and the share of a core that others used meanwhile."""

    samples: tuple[float, ...]
    foreign: float


def turn(contender: Contender, seconds: float, long_call: bool, foreign: ForeignCpu) -> Turn:
    """Calls for `seconds`, at least once; one untimed call first unless calls are long."""
    time.sleep(PAUSE_S)
    contender.activate()
    if contender.series is None:
        if not long_call:
            contender.call()
        foreign.restart()
        taken = times(contender.call, seconds)
    else:
        foreign.restart()
        taken = contender.series(seconds, not long_call)
    return Turn(tuple(1e6 * t / contender.products for t in taken), foreign.share())


def times(call: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each of the calls that fit into `seconds`, at least one."""
    taken, now = [], time.perf_counter_ns
    end = now() + int(seconds * 1e9)
    while True:
        start = now()
        call()
        stop = now()
        taken.append((stop - start) / 1e9)
        if stop >= end:
            return taken


def take_turns(
    contenders: Mapping[str, Contender], turns: int = TURNS, seconds: float = TURN_S
) -> dict[str, list[Turn]]:
    """The turns of each contender; every round starts with another one."""
    names, foreign = list(contenders), ForeignCpu()
    done: dict[str, list[Turn]] = {name: [] for name in names}
    for r in range(turns):
        first = r % max(1, len(names))
        for name in names[first:] + names[:first]:
            mine = [us for t in done[name] for us in t.samples]
            long_call = bool(mine) and min(mine) * contenders[name].products > LONG_CALL_S * 1e6
            if not long_call or len(mine) < LONG_CALLS:
                done[name].append(turn(contenders[name], seconds, long_call, foreign))
    return done


def quiet(turns: Sequence[Turn]) -> tuple[list[float], float]:
    """Samples of the turns that others left alone, or else of the quieter half, and their foreign share."""
    shares = sorted(t.foreign for t in turns)
    limit = FOREIGN_LIMIT if shares[0] <= FOREIGN_LIMIT else shares[(len(shares) - 1) // 2]
    kept = [t for t in turns if t.foreign <= limit]
    return [us for t in kept for us in t.samples], statistics.fmean(t.foreign for t in kept)


class ForeignCpu:
    """CPU time that other processes use, as a share of one core; what `OWN` names is not foreign."""

    OWN: ClassVar[set[int]] = {os.getpid()}  # process ids

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Starts counting."""
        self._wall, self._busy, self._own = time.perf_counter(), _busy(), self._own_time()

    def share(self) -> float:
        """Of one core, since the last restart; never negative. The system counts in steps of 10 ms."""
        foreign = _busy() - self._busy - (self._own_time() - self._own)
        return max(0.0, foreign / max(time.perf_counter() - self._wall, 1e-9))

    def wait_for_quiet(self, limit_s: float) -> float:
        """Sleeps until others use less than QUIET_SHARE of a core, at most limit_s; returns the seconds waited."""
        start = time.perf_counter()
        while time.perf_counter() - start < limit_s:
            self.restart()
            time.sleep(QUIET_STEP_S)
            if self.share() < QUIET_SHARE:
                break
        return time.perf_counter() - start

    def _own_time(self) -> float:
        total = 0.0
        for pid in self.OWN:
            spent = psutil.Process(pid).cpu_times()
            total += spent.user + spent.system
        return total


def _busy() -> float:
    """Seconds of CPU time that all cores together have worked, without idling, waiting or being stolen."""
    times = psutil.cpu_times()
    return sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq"))
