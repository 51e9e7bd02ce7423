"""The cases of `python -m bench --op fftconv` as pytest-benchmark tests: `pytest bench/`, with storage and compare.

Outputs are checked first. torch.fft runs in this process, with the allocator as the process has it.
"""

from __future__ import annotations

import pytest
import torch

import effk
from bench import fftconv
from bench.baselines import direct_conv1d, scipy_fft, torch_fft, torch_fftconv
from bench.fftconv_problem import KINDS, QUICK, Call, Problem, Shape, as_results

CASES = [(shape, kind) for shape in QUICK for kind in KINDS]
THEIRS = {module.NAME: module for module in (scipy_fft, torch_fftconv, direct_conv1d)}
_problems: dict[Shape, Problem] = {}


def problem(shape: Shape) -> Problem:
    """One problem per shape; of the shapes only the latest is kept."""
    if shape not in _problems:
        _problems.clear()
        _problems[shape] = Problem(shape)
    return _problems[shape]


def measure(benchmark: object, call: Call, shape: Shape, kind: str) -> None:
    """Checks one backend, then times it; the inputs take turns."""
    data = problem(shape)
    match = data.match(kind, as_results(call(0)))
    assert match <= 1, f"error is {match:.3g} of its bound"
    benchmark.group = f"{shape} {kind}"
    benchmark.extra_info.update(match=match)
    turns = iter(range(1 << 62))
    benchmark(lambda: call(next(turns) % len(data.inputs)))


@pytest.mark.parametrize(("shape", "kind"), CASES, ids=str)
def test_effk(benchmark: object, shape: Shape, kind: str) -> None:
    """Ours, on the active tier."""
    benchmark.extra_info.update(version=effk.__version__, isa=effk.isa.active())
    with torch.inference_mode():
        measure(benchmark, fftconv.function(problem(shape), kind, torch.get_num_threads()), shape, kind)


@pytest.mark.parametrize(("shape", "kind"), CASES, ids=str)
def test_torch_fft(benchmark: object, shape: Shape, kind: str) -> None:
    """torch.fft."""
    benchmark.extra_info.update(version=torch.__version__)
    measure(benchmark, torch_fft.function(problem(shape), kind, torch.get_num_threads()), shape, kind)


@pytest.mark.parametrize(("shape", "kind"), CASES, ids=str)
@pytest.mark.parametrize("name", THEIRS)
def test_baseline(benchmark: object, shape: Shape, kind: str, name: str) -> None:
    """A competitor, where it has the kind."""
    try:
        call = THEIRS[name].function(problem(shape), kind, torch.get_num_threads())
    except ImportError as error:
        pytest.skip(str(error))
    if call is None:
        pytest.skip("no such call")
    benchmark.extra_info.update(version=THEIRS[name].VERSION)
    with torch.inference_mode():
        measure(benchmark, call, shape, kind)
