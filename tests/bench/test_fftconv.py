"""The long-convolution benchmark: its oracle, its backends on small shapes, its processes, counts and bars."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
from torch import Tensor

import effk
from bench import fftconv, fftconv_bars, fftconv_decode, fftconv_memory, fftconv_problem, fftconv_table, worker
from bench.baselines import direct_conv1d, scipy_fft, torch_fft, torch_fftconv
from bench.fftconv_problem import BACKWARD, FORWARD, GATED, KINDS, Problem, Shape, as_results, flops
from bench.report import Row, set_vs_best
from bench.verdict import Verdict

SHAPE = Shape(2, 3, 192)
MODULES = (fftconv, torch_fft, scipy_fft, torch_fftconv, direct_conv1d)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem(SHAPE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.NAME)
def test_every_backend_gives_the_exact_results(module: object, kind: str, problem: Problem) -> None:
    if module is torch_fftconv and not torch_fftconv.VERSION:
        pytest.skip("torch-fftconv is not installed")
    call = module.function(problem, kind, 1)
    if call is None:
        assert module not in (fftconv, torch_fft)
        return
    assert problem.match(kind, as_results(call(0))) <= 1
    assert problem.match(kind, as_results(call(1))) > 1  # of another input


def direct(u: Tensor, k: Tensor) -> Tensor:
    y = torch.zeros_like(u)
    for j in range(k.shape[-1]):
        y[..., j:] += k[:, j, None] * u[..., : u.shape[-1] - j]
    return y


def test_the_oracle_is_the_sum_and_its_derivatives(problem: Problem) -> None:
    u, k = problem.inputs[0].double().requires_grad_(), problem.k.double().requires_grad_()
    y = direct(u, k)
    torch.testing.assert_close(problem.exact(FORWARD)[0], y)
    gradients = torch.autograd.grad(y, (u, k), problem.gy.double())
    for exact, gradient in zip(problem.exact(BACKWARD), gradients, strict=True):
        torch.testing.assert_close(exact, gradient)
    pre, post = (gate.double() for gate in problem.gates)
    torch.testing.assert_close(problem.exact(GATED)[0], direct(u * pre, k) * post)


def test_small_mistakes_do_not_match(problem: Problem) -> None:
    (y,) = problem.exact(FORWARD)
    y = y.float()
    assert problem.match(FORWARD, [y]) <= 1
    one_value = y.clone()
    one_value[1, 2, 7] += 1e-4
    one_row = y.clone()
    one_row[0, 1] = y[0, 2]
    not_finite = y.clone()
    not_finite[0, 0, 0] = math.nan
    for wrong in (one_value, one_row, not_finite, y.bfloat16().float(), torch.zeros_like(y), y[..., :-1]):
        assert problem.match(FORWARD, [wrong]) > 1


def test_a_smaller_block_of_float64_changes_nothing(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fftconv_problem, "BLOCK", 2 * SHAPE.l)
    for kind in (FORWARD, BACKWARD):
        for whole, parts in zip(problem.exact(kind), Problem(SHAPE).exact(kind), strict=True):
            torch.testing.assert_close(whole, parts)


def test_of_large_tensors_some_channels_are_compared(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fftconv_problem, "CHECKED", 2 * SHAPE.b * SHAPE.l)
    fewer = Problem(SHAPE)
    assert fewer.channels.tolist() == [0, 2]
    for kind in (FORWARD, BACKWARD):
        got = [t.float() for t in problem.exact(kind)]
        assert fewer.match(kind, got) <= 1
        got[-1][..., 2, 5] += 1
        assert fewer.match(kind, got) > 1


def test_counts() -> None:
    assert flops(Shape(1, 1, 1024)) == 2 * (4 * 1024 * 10 - 6 * 1024 + 8) + 6 * 1024
    assert flops(Shape(3, 5, 256)) == 15 * flops(Shape(1, 1, 256))
    assert flops(Shape(1, 1, 256), GATED) == flops(Shape(1, 1, 256)) + 512
    # By hand: s = 1, 2, 3 close tiles of 1, 2, 1; the tile of 2 writes two outputs.
    assert fftconv_decode.operations(4) == 2 * 4 + 2 * 1 + 2 * 4 + 2 * 1
    assert fftconv_decode.operations(2) == 2 * 2 + 2
    assert 8192 * 8193 / fftconv_decode.operations(8192) > 20


def test_a_worker_runs_each_function_in_a_fresh_process() -> None:
    w = worker.Worker("bench.fftconv_table:make", 1, worker.TUNED)
    try:
        assert w.load("bench.baselines.torch_fft", "native", 2, 3, 192, FORWARD, 1)
        (y,) = w.result()
        assert isinstance(y, np.ndarray) and Problem(SHAPE).match(FORWARD, [torch.from_numpy(y)]) <= 1
        first = w._child
        taken = w.series(0.01, True)
        assert len(taken) >= 2 and min(taken) > 0 and w.faults() >= 0
        assert not w.load("bench.baselines.scipy_fft", "native", 2, 3, 192, BACKWARD, 1)
        assert w._child != first
        with pytest.raises(RuntimeError, match="ModuleNotFoundError"):
            w.load("bench.baselines.nothing", "native", 2, 3, 192, FORWARD, 1)
        assert w.load("bench.fftconv", "scalar", 2, 3, 192, FORWARD, 1)
        assert Problem(SHAPE).match(FORWARD, [torch.from_numpy(a) for a in w.result()]) <= 1
    finally:
        w.close()


def test_the_allocator_settings_of_a_worker_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    with worker.only(worker.TUNED):
        assert os.environ["MALLOC_MMAP_MAX_"] == "0" and "MALLOC_ARENA_MAX" not in os.environ
    assert os.environ["MALLOC_ARENA_MAX"] == "1" and "MALLOC_MMAP_MAX_" not in os.environ


def row(
    backend: str, us: float, case: str = FORWARD, shape: Shape = SHAPE, gated: bool = False, gf: float = 1.0
) -> Row:
    isa = "avx512" if backend == "effk" else "native"
    keys = shape.keys(gated)
    return Row("fftconv", case, keys, "float32", isa, 1, backend, "1", us, 0.0, 1.0, gf, 0.5, None, 0.5)


def find(rows: list[Row], part: str) -> Verdict:
    set_vs_best(rows)
    (verdict,) = [v for v in fftconv_bars.judge(rows, 1) if part in v.name]
    return verdict


def test_bars_against_competitors() -> None:
    small, large = Shape(1, 1, 256), Shape(1, 1, 4096)
    rows = [row("effk", 10.0, shape=s) for s in (small, large)]
    rows += [row("effk", 5.0, "forward, tuned malloc", s) for s in (small, large)]
    rows += [row("torch.fft", us, "forward, default malloc", s) for s, us in ((small, 50.0), (large, 100.0))]
    rows += [row("torch.fft", us, "forward, tuned malloc", s) for s, us in ((small, 40.0), (large, 15.0))]
    rows += [row("scipy.fft", us, FORWARD, s) for s, us in ((small, 60.0), (large, 30.0))]
    rows += [row("effk", 1.0, "forward uncached", small), row("scipy.fft", 1.0, "forward uncached", small)]
    assert find(rows, "x torch.fft as installed").worst.value == pytest.approx(math.sqrt(5 * 10))
    assert find(rows, "competitor as installed, geometric").worst.value == pytest.approx(math.sqrt(5 * 3))
    every = find(rows, "competitor as installed, every case")
    assert (every.worst.value, every.worst.where, every.outcome) == (3.0, "1x1x4096", "pass")
    assert find(rows, "tuned for both, geometric").worst.value == pytest.approx(math.sqrt(8 * 3))
    assert find(rows, "tuned for it alone").worst.value == pytest.approx(math.sqrt(4 * 1.5))
    assert find(rows, "forward: x fastest of all").worst.value == pytest.approx(math.sqrt(4 * 1.5))


def test_bars_of_our_own_figures() -> None:
    peak = Row("machine", "fp32 peak", {}, "", "avx512", 1, "cpu", "", None, None, None, 100.0, None, None, None)
    rows = [
        peak,
        row("effk", 10.0, gf=35.0, shape=Shape(1, 1, 4096)),
        row("effk", 10.0, gf=1.0, shape=Shape(1, 1, 256)),
    ]
    assert find(rows, "1K <= n_fft <= 32K").outcome == "pass"
    assert find(rows, "other n_fft").worst.value == pytest.approx(0.01)
    rows = [row("effk", 10.0), row("effk", 11.2, GATED, gated=True), row("effk", 23.0, BACKWARD)]
    assert find(rows, "gated: time of forward").outcome == "fail"
    assert find(rows, "backward (du, dk)").outcome == "pass"
    rows = [row("effk", 1.0, f"backward memory, {v} copies of u") for v in ("0.031", "1.200")]
    verdict = find(rows, "peak extra memory")
    assert verdict.outcome == "fail" and verdict.worst.value == pytest.approx(1 / 1.2)
    shape = Shape(1, 1, 8192)
    rows = [row("effk", 5.0, "decode, 22.9 times fewer operations than the sum", shape)]
    rows += [row("torch direct sum", 4.0, "decode", shape)]
    assert find(rows, "times fewer operations").worst.value == 22.9
    assert find(rows, "from 256 tokens on").outcome == "fail"
    assert find([row("effk", 1.0)], "decode: times fewer").outcome == "open"
    assert list(fftconv_bars.judge([peak], 1)) == []


@pytest.mark.slow
def test_a_whole_run_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the competitors, on one small shape: processes, checks, rows, notes."""
    monkeypatch.setattr(fftconv_decode, "SHAPE", Shape(1, 2, 256))
    monkeypatch.setattr(fftconv_memory, "SHAPES", (Shape(1, 4, 256),))
    lines: list[str] = []
    tier = effk.isa.supported()[-1]
    plan = fftconv_table.Plan(
        shapes=(SHAPE,), tiers=(tier,), kinds=(FORWARD, BACKWARD), wait_s=0.1, turns=1, baselines=False
    )
    result = fftconv_table.run(plan, lines.append)
    assert any(line.startswith("2x3x192: ") for line in lines) and not any("wrong" in line for line in lines)
    kinds = [row.kind for row in result.rows]
    assert kinds[:4] == [FORWARD, FORWARD, BACKWARD, BACKWARD] and "decode" in kinds and "backward memory" in kinds
    assert all(row.valid for row in result.rows)
