"""Every backend that exists here, ours and competitors, gives the oracle's results on a small shape, cold and warm."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import effk
from bench import baselines, machine, wq_linear
from bench.backend import Backend, Missing, checkable, distinct
from bench.problem import Problem
from bench.shapes import FORMS, OUTLIERS, Case, Shape

SHAPE = Shape(48, 512, 64)
MS = (1, 3, 33)


@pytest.fixture(autouse=True)
def small_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five copies of a small weight instead of hundreds."""
    monkeypatch.setattr(machine, "copies", lambda nbytes: 5)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem(SHAPE, MS)


def check(entry: Backend, problem: Problem) -> None:
    runner = entry.build(problem)
    assert runner.nbytes >= SHAPE.n * SHAPE.k * entry.bits // 8
    assert 1 <= runner.products <= 5
    for m in MS:
        runner.bind(m)
        runner.activate()
        for _ in range(6):
            runner.call()
        warm = runner.warm()
        if warm is not None:
            warm()
        outputs = runner.outputs()
        assert len(outputs) == 2
        for roll, y in outputs:
            assert y.numel() == m * SHAPE.n
            assert runner.oracle.match(y, m, entry.rounding, roll) <= 1


@pytest.mark.parametrize("entry", baselines.competitors(SHAPE, 2).backends, ids=lambda e: f"{e.name}, {e.case}")
def test_competitor(entry: Backend, problem: Problem) -> None:
    with torch.no_grad():
        check(entry, problem)


@pytest.mark.parametrize("compute", FORMS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("extra", [{}, {"outliers": OUTLIERS}, {"multi": True}], ids=["plain", "outliers", "multi"])
def test_ours(bits: int, compute: str, extra: dict, problem: Problem) -> None:
    case = Case(SHAPE, 1, bits, compute, **extra)
    before = effk.isa.active()
    with effk.isa.use(before), torch.no_grad():
        for tier in ("scalar", before):
            check(wq_linear.backend(case, tier), problem)


def test_a_missing_competitor_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    baselines.ggml.library.cache_clear()
    (entry,) = baselines.ggml.backends(SHAPE, 1)
    baselines.ggml.library.cache_clear()
    assert isinstance(entry, Missing) and "gguf" in entry.reason


def test_groups_that_do_not_divide_k_are_named() -> None:
    missing = baselines.competitors(Shape(64, 576, 128), 1).missing
    assert any("576 is no multiple of 128" in entry.reason for entry in missing)


def test_copies_in_one_graph_differ_and_the_checkable_ones_are_rolled() -> None:
    rows = np.arange(12, dtype=np.uint8).reshape(6, 2)
    copies = [distinct(rows, i).tobytes() for i in range(20)]
    assert len(set(copies)) == 20
    first, last = checkable(6, 20)
    assert (first, last) == (0, 5) and checkable(6, 3) == (0, 2)
    assert copies[last] == np.roll(rows, last, 0).tobytes()
