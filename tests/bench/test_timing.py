"""Contenders take turns; samples are per product; long calls are not repeated without end."""

from __future__ import annotations

import time

import pytest

from bench import timing
from bench.timing import Contender, ForeignCpu, Turn, quiet, summary, take_turns


def test_contenders_alternate_and_are_activated_before_each_turn() -> None:
    log: list[str] = []
    contenders = {
        name: Contender(lambda name=name: log.append(name), 1, lambda name=name: log.append(name.upper()))
        for name in "abc"
    }
    samples = take_turns(contenders, turns=3, seconds=0.0)
    order = [entry for entry in log if entry.isupper()]
    assert order == list("ABCBCACAB")
    assert all(len(turns) == 3 for turns in samples.values())
    assert all(len(turn.samples) == 1 for turns in samples.values() for turn in turns)  # without the warm-up call
    assert all(log.count(name) == 6 for name in "abc")
    assert take_turns({}) == {}


def test_samples_are_microseconds_of_one_product() -> None:
    (turn,) = take_turns({"x": Contender(lambda: time.sleep(0.01), 5)}, turns=1, seconds=0.0)["x"]
    assert turn.samples[0] >= 2000


def test_long_calls_stop_after_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "LONG_CALL_S", 0.001)
    calls: list[int] = []
    turns = take_turns({"x": Contender(lambda: (calls.append(1), time.sleep(0.002)))}, turns=10, seconds=0.0)["x"]
    assert len(turns) == timing.LONG_CALLS
    assert len(calls) == timing.LONG_CALLS + 1  # only the first turn warms up


def test_disturbed_turns_are_left_out_where_others_are_quieter() -> None:
    calm, busy = Turn((1.0, 2.0), 0.0), Turn((9.0,), 0.5)
    assert quiet([busy, calm, busy]) == ([1.0, 2.0], 0.0)
    assert quiet([busy, Turn((8.0,), 0.3)]) == ([8.0], 0.3)  # the quieter half when none is calm
    assert quiet([calm, Turn((3.0,), timing.FOREIGN_LIMIT)])[0] == [1.0, 2.0, 3.0]


def test_summary() -> None:
    result = summary([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (result.us, result.iqr, result.best, result.calls) == (3.0, 2.0, 1.0, 5)
    assert summary([7.0]).us == 7.0 and summary([7.0]).iqr == 0.0


def test_own_work_is_not_foreign() -> None:
    foreign = ForeignCpu()
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    assert foreign._own_time() - foreign._own >= 0.1  # counted as our own ...
    assert foreign.share() >= 0.0  # ... and what is left cannot be negative
