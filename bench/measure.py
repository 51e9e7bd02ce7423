"""Shared by all tables: the machine's limits, the timing of one block of contenders, and rows about both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count

import effk

from . import machine
from .report import Row
from .timing import FOREIGN_LIMIT, Contender, ForeignCpu, quiet, take_turns

RETRIES = 1  # of a block with too much foreign CPU
RETRY_BUDGET_S = 30.0  # for all blocks together
QUIET_WAIT_S = 4.0
FIRST, FOREIGN = "DRAM read, before", "foreign CPU"  # rows about the machine: the first of a run, and what others used
PLAUSIBLE = 1.1  # share of the measured bound; above, something is wrong with the row

Say = Callable[[str], None]


@dataclass
class Result:
    """Everything a run found."""

    machine: machine.Machine
    rows: list[Row] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    foreign: list[float] = field(default_factory=list)  # share of a core, per block
    dram: list[float] = field(default_factory=list)  # GB/s, per block
    notes: list[str] = field(default_factory=list)  # conditions worth keeping beside the figures


@dataclass
class Block:
    """What timing one block gave: microseconds of each contender's calls, and what memory gave meanwhile."""

    samples: Mapping[str, list[float]]
    dram: float  # GB/s, upper quartile: what memory gives when left alone


class Session:
    """One run on `threads` threads: measures the machine first, then block after block."""

    def __init__(self, threads: int, wait_s: float = QUIET_WAIT_S, turns: int = 5) -> None:
        self.threads, self._wait_s, self._turns = threads, wait_s, turns
        self.result = Result(machine.measure(threads))
        self._probe, self._foreign, self._retry_s = machine.DramProbe(threads), ForeignCpu(), 0.0

    def block(self, contenders: Mapping[str, Contender], extra: Mapping[str, Contender] | None = None) -> Block:
        """Times the contenders in turns with readings of memory among them; the quietest of the attempts counts.

        extra: timed afterwards, in turns of their own, two each (calls on warm weights).
        """
        bandwidths: list[float] = []
        together = {"dram": Contender(lambda: bandwidths.append(self._probe.read())), **contenders}
        best: tuple[float, dict[str, list[float]], list[float]] | None = None
        for attempt in range(1 + RETRIES):
            if attempt and self._retry_s > RETRY_BUDGET_S:
                break
            bandwidths.clear()
            start = time.perf_counter()
            self._foreign.wait_for_quiet(self._wait_s)
            taken = take_turns(together, self._turns) | take_turns(extra or {}, 2)
            kept = {name: quiet(turns) for name, turns in taken.items()}
            share = statistics.fmean(s for _, s in kept.values())
            self._retry_s += (time.perf_counter() - start) * bool(attempt)
            if best is None or share < best[0]:
                best = share, {name: samples for name, (samples, _) in kept.items()}, list(bandwidths)
            if share <= FOREIGN_LIMIT:
                break
        share, samples, bandwidths = best
        dram = statistics.quantiles(bandwidths, n=4)[2]
        self.result.foreign.append(share)
        self.result.dram.append(dram)
        return Block(samples, dram)


def in_turn(call: Callable[[int], object], products: int, isa: str) -> Contender:
    """``call(0)``, ``call(1)`` …: inputs and copies of the weight in turn, on the tier ``isa`` unless that is "native"."""
    turns = count()

    def activate() -> None:
        if isa != "native":
            effk.isa.use(isa)

    return Contender(lambda: call(next(turns)), products, activate)


def try_build(build: Callable[[], object], name: str, result: Result, say: Say) -> object | None:
    """What `build` makes; a baseline that fails to build is reported as missing, with its error."""
    try:
        return build()
    except Exception as error:  # a third-party library may raise anything; the table goes on without it
        result.missing[name] = f"{type(error).__name__}: {str(error)[:200]}"
        say(f"missing: {name}: {error}")
        return None


def machine_rows(result: Result) -> list[Row]:
    """The measured limits as rows of op "machine", so that a file of rows says what its fractions are of."""
    m, out = result.machine, []

    def add(case: str, isa: str, gbps: float | None, gflops: float | None) -> None:
        out.append(Row("machine", case, {}, "", isa, m.threads, m.cpu, "", None, None, gbps, gflops, None, None, None))

    add(FIRST, "", m.dram_gbps, None)
    if result.dram:
        add("DRAM read between the rows", "", statistics.median(result.dram), None)
    for note in result.notes:
        add(note, "", None, None)
    if result.foreign:
        median, worst = statistics.median(result.foreign), max(result.foreign)
        add(f"{FOREIGN}: median {median:.1%}, worst block {worst:.1%} of a core", "", None, None)
    for level, gbps in m.cache_gbps.items():
        add(f"{level} read", "", gbps, None)
    for what, by_tier in m.peaks.items():
        for tier, gflops in by_tier.items():
            add(f"{what} peak", tier, None, gflops)
    return out


def missing_rows(result: Result, op: str) -> list[Row]:
    """Rows without figures for what could not run, with the reason as their case."""
    return [
        Row(op, f"missing: {reason}", {}, "", "", result.machine.threads, name, "", *[None] * 7)
        for name, reason in result.missing.items()
    ]
