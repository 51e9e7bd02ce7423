"""The cases of `python -m bench --op wq_linear` as pytest-benchmark tests: `pytest bench/`, with storage and compare.

Cold weights, one product per round, each rotation starting where the one before stopped. Outputs are checked first.
"""

from __future__ import annotations

import pytest
import torch

import effk
from bench import baselines, wq_linear
from bench.backend import Backend
from bench.problem import Problem
from bench.shapes import LINEAR_QUICK, MS_QUICK, Case, Shape, cases

ROUNDS = 200
OURS = [case for shape in LINEAR_QUICK for m in MS_QUICK for case in cases(shape, m)]
THEIRS = [
    (shape, m, entry)
    for shape in LINEAR_QUICK
    for m in MS_QUICK
    for entry in baselines.competitors(shape, torch.get_num_threads()).backends
]
_problems: dict[Shape, Problem] = {}


def problem(shape: Shape) -> Problem:
    """One problem per shape; of the shapes only the latest is kept."""
    if shape not in _problems:
        _problems.clear()
        _problems[shape] = Problem(shape, MS_QUICK)
    return _problems[shape]


@torch.inference_mode()
def measure(benchmark: object, entry: Backend, shape: Shape, m: int) -> None:
    """Checks one backend, then times it."""
    data = problem(shape)
    runner = entry.build(data)
    runner.bind(m)
    match = max(runner.oracle.match(y, m, entry.rounding, roll) for roll, y in runner.outputs())
    assert match <= 1, f"{entry.name} {entry.case}: error is {match:.3g} of its bound"
    benchmark.group = f"{shape} M={m} {entry.bits}b"
    benchmark.extra_info.update(version=entry.version, products=runner.products, nbytes=runner.nbytes, match=match)
    runner.activate()
    benchmark.pedantic(runner.call, rounds=max(3, ROUNDS // runner.products), warmup_rounds=1)


@pytest.mark.parametrize("case", OURS, ids=lambda c: f"{c.shape}-M{c.m}-{c.bits}b-{c.label()}")
def test_effk(benchmark: object, case: Case) -> None:
    """Ours, on the active tier."""
    measure(benchmark, wq_linear.backend(case, effk.isa.active()), case.shape, case.m)


@pytest.mark.parametrize(
    ("shape", "m", "entry"), THEIRS, ids=lambda v: getattr(v, "case", None) and f"{v.name}-{v.case}"
)
def test_baseline(benchmark: object, shape: Shape, m: int, entry: Backend) -> None:
    """A competitor."""
    measure(benchmark, entry, shape, m)
