"""Fitting DYAD matrices: masking against its analytic error, least squares against a solver, remainders, permutations."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from effk.compress.solvers import dyad
from effk.compress.solvers.dyad import Moments, damped, fit, mask, relative_error, solve
from effk.compress.solvers.dyad_permutation import assign, classes, explained, kept
from effk.ops.dyad_linear import VARIANTS, from_dense

CASES = [(n, variant) for n in (1, 2, 4) for variant in VARIANTS]
SIDES = (24, 32)  # outputs, inputs: n divides the blocks too for 1, 2, 4 (24 / 4 = 6 is not divisible by 4)


def support(f_out: int, f_in: int, n: int, variant: str) -> Tensor:
    """Which entries may be non-zero, from the table of the published definition, entry by entry."""
    d_out, d_in = f_out // n, f_in // n
    allowed = torch.zeros(f_out, f_in, dtype=torch.bool)
    for d, o, i in itertools.product(range(n), range(d_out), range(d_in)):
        allowed[d * d_out + o, d * d_in + i] = True
        row = d * d_out + o if variant == "it" else o * n + d
        allowed[row, d * d_in + i if variant == "ot" else i * n + d] = True
    return allowed


def joined(wl: Tensor, wu: Tensor, variant: str) -> Tensor:
    """The dense matrix of two components, entry by entry."""
    n, d_out, d_in = wl.shape
    w = torch.zeros(n * d_out, n * d_in, dtype=wl.dtype)
    for d, o, i in itertools.product(range(n), range(d_out), range(d_in)):
        w[d * d_out + o, d * d_in + i] += wl[d, o, i]
        row = d * d_out + o if variant == "it" else o * n + d
        w[row, d * d_in + i if variant == "ot" else i * n + d] += wu[d, o, i]
    return w


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments_of(x: Tensor, wanted: Tensor | None = None) -> Moments:
    moments = Moments()
    for start in range(0, len(x), 100):
        moments.update(x[start : start + 100], None if wanted is None else wanted[start : start + 100])
    return moments


def coloured(rows: int, k: int, seed: int = 1) -> Tensor:
    """Inputs with a spectrum like that of activations, a mean, and one large direction; float32."""
    basis = torch.linalg.qr(random(k, k, seed=seed)).Q
    scale = 1 / torch.arange(1, k + 1, dtype=torch.float64)
    return (random(rows, k, seed=seed + 1) * scale @ basis + 2 * random(k, seed=seed + 2)).float()


@pytest.mark.parametrize(("n", "variant"), CASES)
def test_masking_keeps_the_support_and_errs_by_the_rest(n: int, variant: str) -> None:
    w, allowed = random(*SIDES), support(*SIDES, n, variant)
    kept = mask(w, n, variant)
    assert torch.equal(kept, w * allowed)
    assert torch.equal(joined(*from_dense(kept, n, variant), variant), kept), (
        "nothing is doubled where components overlap"
    )
    assert torch.equal(joined(*from_dense(w, n, variant), variant), kept), "entries outside are dropped"
    first, second = from_dense(w, n, variant)
    assert first.shape == second.shape == (n, SIDES[0] // n, SIDES[1] // n)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("n", "expected"), [(4, 0.750), (8, 0.875)])
def test_masking_error_of_independent_entries(n: int, expected: float, variant: str) -> None:
    """``sqrt(1 - (2/n - 1/n^2))``; its spread over 512 x 512 entries is about 1 / 512."""
    w = random(512, 512)
    error = float((w - mask(w, n, variant)).norm() / w.norm())
    assert error == pytest.approx(math.sqrt(1 - (2 / n - 1 / n**2)), abs=0.006) and error == pytest.approx(
        expected, abs=0.006
    )


@pytest.mark.parametrize(("n", "variant"), CASES)
def test_least_squares_row_by_row(n: int, variant: str) -> None:
    """Every row equals what a general least-squares solver finds for it alone, and beats masking."""
    w, x = random(*SIDES), coloured(300, SIDES[1])
    allowed, fitted = support(*SIDES, n, variant), fit(w, torch.cov(x.double().t(), correction=0), n, variant)
    centred = x.double() - x.double().mean(0)
    for row in range(SIDES[0]):
        columns = allowed[row].nonzero().flatten()
        best = torch.linalg.lstsq(centred[:, columns], (centred @ w[row])[:, None]).solution.flatten()
        torch.testing.assert_close(fitted[row, columns], best, rtol=1e-8, atol=1e-8)  # condition 1e3
    assert not fitted[~allowed].any()


@pytest.mark.parametrize("ridge", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize(("n", "variant"), CASES)
def test_calibration_never_loses_to_masking_in_any_row(n: int, variant: str, ridge: float) -> None:
    w, moments = random(*SIDES), moments_of(coloured(300, SIDES[1]))
    solution = solve(w, None, n, variant, moments, ridge=ridge)
    fitted, masked = (relative_error(w, m, moments.covariance) for m in (solution.w, mask(w, n, variant)))
    assert bool((fitted <= masked * (1 + 1e-9) + 1e-6).all())  # n = 1: both are zero up to the covariance's rounding
    if n == 4 and ridge < 1:
        assert float(fitted.mean()) < 0.8 * float(masked.mean())


@pytest.mark.parametrize(("n", "variant"), CASES)
def test_white_inputs_give_masking_and_dyad_matrices_come_back(n: int, variant: str) -> None:
    w = random(*SIDES)
    white = Moments(rows=1, shift=torch.zeros(32), total=torch.zeros(32).double(), squares=3.0 * torch.eye(32).double())
    torch.testing.assert_close(solve(w, None, n, variant, white).w, mask(w, n, variant), rtol=1e-12, atol=1e-12)
    already = mask(w, n, variant)
    again = solve(already, None, n, variant, moments_of(coloured(300, 32)))
    torch.testing.assert_close(again.w, already, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_mean_output_is_exact(variant: str, rank: int) -> None:
    w, bias, x = random(*SIDES), random(SIDES[0], seed=5), coloured(300, SIDES[1]).double()
    solution = solve(w, bias, 4, variant, moments_of(x.float()), rank=rank)
    got, expected = x @ solution.dense.t() + solution.bias, x @ w.t() + bias
    torch.testing.assert_close(got.mean(0), expected.mean(0), rtol=1e-5, atol=1e-5)  # x is rounded to fp32, means of 2
    plain = x @ solution.dense.t() + bias
    assert float((plain.mean(0) - expected.mean(0)).abs().max()) > 0.1, "without the correction it is not"


def test_dead_inputs_and_few_tokens_are_no_trouble() -> None:
    w = random(*SIDES)
    x = coloured(5, SIDES[1])
    x[:, :7] = 0
    for case in (x, torch.zeros_like(x)):
        solution = solve(w, None, 4, "it", moments_of(case))
        assert bool(solution.w.isfinite().all())
        expected = case.double() @ w.t()
        got = case.double() @ solution.dense.t() + solution.bias
        assert float((got.mean(0) - expected.mean(0)).abs().max()) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_remainder_of_low_rank_helps_and_is_optimal_for_its_rank(variant: str) -> None:
    w, moments = random(*SIDES), moments_of(coloured(300, SIDES[1]))
    c = damped(moments.covariance, 1e-2)

    def error(m: Tensor) -> float:
        difference = w - m
        return float((difference @ c * difference).sum())

    errors = [error(solve(w, None, 4, variant, moments, rank=rank).dense) for rank in (0, 2, 6, 24)]
    assert errors[0] > errors[1] > errors[2] > errors[3] and errors[3] < 1e-9 * errors[0]
    turns = [error(solve(w, None, 4, variant, moments, rank=3, rounds=rounds).dense) for rounds in (1, 2, 4)]
    assert turns[0] >= turns[1] >= turns[2]
    a, b = dyad.low_rank(w, c, 3)
    left = torch.linalg.svdvals(w @ torch.linalg.cholesky(c))[3:].square().sum()
    assert error(a @ b) == pytest.approx(float(left), rel=1e-9), "Eckart and Young"


def test_a_remainder_recovers_a_matrix_that_is_dyad_plus_low_rank() -> None:
    w = mask(random(*SIDES), 4, "it") + random(24, 2, seed=3) @ random(2, 32, seed=4)
    moments = moments_of(torch.eye(32).repeat(3, 1) * 3)
    errors = [float((w - solve(w, None, 4, "it", moments, rank=2, rounds=r).dense).norm() / w.norm()) for r in (1, 100)]
    assert errors[1] < 0.5 * errors[0]


def test_wanted_inputs_are_made_up_for() -> None:
    """Inputs that an earlier layer spoiled: fitting for the wanted outputs beats fitting the same outputs of bad inputs."""
    w, wanted = random(*SIDES), coloured(2000, SIDES[1])
    spoiled = (wanted.double() @ (torch.eye(32).double() + 0.2 * random(32, 32, seed=9))).float() + 1
    target = wanted.double() @ w.t()
    errors = []
    for moments in (moments_of(spoiled), moments_of(spoiled, wanted)):
        solution = solve(w, None, 4, "it", moments)
        got = spoiled.double() @ solution.dense.t() + solution.bias
        errors.append(float((got - target).norm() / (target - target.mean(0)).norm()))
    assert errors[1] < 0.8 * errors[0]
    exact = solve(w, None, 1, "it", moments_of(spoiled, wanted), ridge=1e-9)
    got = spoiled.double() @ exact.dense.t() + exact.bias
    assert float((got - target).norm() / target.norm()) < 1e-3, "a full matrix can undo it"


def test_moments_are_those_of_all_rows() -> None:
    x, wanted = coloured(777, 16) + 100, coloured(777, 16, seed=8)
    moments = moments_of(x, wanted)
    both = torch.cov(torch.cat([wanted, x], 1).double().t(), correction=0)
    torch.testing.assert_close(moments.mean, x.double().mean(0), rtol=1e-7, atol=0.0)
    torch.testing.assert_close(moments.covariance, both[16:, 16:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moments.cross, both[:16, 16:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moments.wanted_mean, wanted.double().mean(0), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, "it", 0), "n: expected a divisor of both 24 outputs and 32 inputs, got 5"),
        ((0, "it", 0), "n: expected a divisor"),
        ((4, "ti", 0), "variant: expected one of"),
        ((4, "it", 25), r"rank: expected 0\.\.24, got 25"),
    ],
)
def test_refusals(arguments: tuple[int, str, int], message: str) -> None:
    n, variant, rank = arguments
    with pytest.raises(ValueError, match=message):
        solve(random(*SIDES), None, n, variant, rank=rank)


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_of_the_hidden_order_are_what_the_class_keeps(variant: str) -> None:
    """Scores of a unit equal what its row and column keep when it is put there."""
    hidden, n = 16, 2
    first, second = random(hidden, 12), random(20, hidden, seed=1)
    c = damped(moments_of(coloured(200, 12)).covariance, 1e-2)
    reading, writing = explained(first, c, n, variant), kept(second, n, variant)
    kinds = classes(hidden, n)
    for shift in (0, 3, 8):
        order = torch.arange(hidden).roll(shift)
        fitted = fit(first[order], c, n, variant)
        energy = (fitted @ c * fitted).sum(1)  # of a least-squares fit: what it explains
        torch.testing.assert_close(energy, reading[order, kinds], rtol=1e-9, atol=1e-9)
        columns = (second[:, order] * support(20, hidden, n, variant)).square().sum(0)
        torch.testing.assert_close(columns, writing[order, kinds], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("hidden", "n"), [(6, 2), (8, 2), (4, 4)])
def test_the_best_order_is_found(hidden: int, n: int) -> None:
    scores = random(hidden, n * n).abs()
    kinds = classes(hidden, n)
    order = assign(scores, n)
    assert sorted(order.tolist()) == list(range(hidden))
    best = max(
        sum(float(scores[u, k]) for u, k in zip(p, kinds.tolist(), strict=True))
        for p in itertools.permutations(range(hidden))
    )
    assert float(scores[order, kinds].sum()) == pytest.approx(best)


def test_many_units_are_dealt_into_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from effk.compress.solvers import dyad_permutation

    scores, kinds = random(96, 16).abs(), classes(96, 4)
    whole = float(scores[assign(scores, 4), kinds].sum())
    monkeypatch.setattr(dyad_permutation, "LARGEST", 40)
    order = assign(scores, 4)
    assert sorted(order.tolist()) == list(range(96))
    assert float(scores.sum(0)[kinds].sum() / 96) < float(scores[order, kinds].sum()) <= whole
    assert float(scores[order, kinds].sum()) > 0.95 * whole
