"""The oracle accepts kernels that round as they say and rejects results that are wrong in small ways."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bench.problem import BF16, Problem, Rounding, checked_rows
from bench.shapes import Shape

MS = (1, 5, 40)
EXACT = Rounding()
INT8 = Rounding(act_group=64)


@pytest.fixture(scope="module")
def problem() -> Problem:
    """Every group is full but the last."""
    return Problem(Shape(48, 600, 64), MS)


def weight(problem: Problem) -> Tensor:
    return problem.quantized(4, 64).oracle.weight


def quantize(x: Tensor, group: int) -> Tensor:
    """x rounded to int8 in groups, as the int8 form does."""
    pad = -x.shape[1] % group
    parts = torch.nn.functional.pad(x, (0, pad)).reshape(len(x), -1, group)
    step = parts.abs().amax(-1, keepdim=True) / 127
    return ((parts / step).round() * step).reshape(len(x), -1)[:, : x.shape[1]]


def test_weights_are_what_their_codes_and_scales_say(problem: Problem) -> None:
    for bits, group in ((2, 32), (3, 64), (4, 128), (8, 0)):
        q = problem.quantized(bits, group)
        assert int(q.codes.max()) == (1 << bits) - 1 and q.zero == 1 << (bits - 1)
        for k in (0, 599):
            column = q.scales[:, k // group if group else 0] * (q.codes[:, k].float() - q.zero)
            assert torch.equal(q.oracle.weight[:, k], column)
        assert torch.equal(q.scales.half().float(), q.scales) and torch.equal(q.scales.bfloat16().float(), q.scales)
    assert torch.equal(problem.x.bfloat16().float(), problem.x)


@pytest.mark.parametrize("m", MS)
def test_right_results_match(problem: Problem, m: int) -> None:
    oracle, x, w = problem.quantized(4, 64).oracle, problem.x[:m], weight(problem)
    assert oracle.match(x @ w.T, m, EXACT) <= 1
    assert oracle.match((x @ w.T).bfloat16(), m, Rounding(out=BF16)) <= 1
    assert oracle.match(x @ w.bfloat16().float().T, m, Rounding(weight=BF16)) <= 1
    assert oracle.match(quantize(x, 64) @ w.T, m, INT8) <= 1
    assert oracle.match((x @ w.T).roll(16, 1), m, EXACT, roll=16) <= 1


def test_rounding_that_was_not_declared_does_not_match(problem: Problem) -> None:
    oracle, x, w = problem.quantized(4, 64).oracle, problem.x[:5], weight(problem)
    assert oracle.match((x @ w.T).bfloat16(), 5, EXACT) > 1
    assert oracle.match(quantize(x, 64) @ w.T, 5, EXACT) > 1
    assert oracle.match((quantize(x / 4, 64) * 4).bfloat16().float().mul(8).round().div(8) @ w.T, 5, INT8) > 1


@pytest.mark.parametrize("how", [EXACT, INT8], ids=["exact", "int8"])
def test_wrong_results_do_not_match(problem: Problem, how: Rounding) -> None:
    oracle, x, w = problem.quantized(4, 64).oracle, problem.x[:40], weight(problem)
    y = x @ w.T
    without_last_group = x[:, :576] @ w[:, :576].T
    swapped = y.clone()
    swapped[:, [3, 4]] = y[:, [4, 3]]
    one_row = y.clone()
    one_row[39, 0] = math.nan
    stale = y.roll(1, 0)
    for wrong in (torch.zeros_like(y), without_last_group, swapped, one_row, stale, y.roll(16, 1)):
        assert oracle.match(wrong, 40, how) > 1


def test_edges_of_a_batch_are_checked() -> None:
    assert checked_rows(16) == list(range(16))
    assert checked_rows(128) == [*range(8), *range(120, 128)]
