"""Second-order rounding and refinement: against the definition, and always better than what they start from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effk.compress.solvers.gptq import factorize, gptq
from effk.compress.solvers.refine import descend, fit_scales, refine
from effk.compress.solvers.rtn import Grid, decode, encode, search_grid


def correlated_problem(n: int = 48, k: int = 160, tokens: int = 600, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of correlated inputs with a few large channels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=generator) @ (torch.randn(k, k, generator=generator) * 0.2 + torch.eye(k))
    x[:, ::17] *= 6
    return torch.randn(n, k, generator=generator) * 0.05, x.t() @ x


def output_error(weight: Tensor, restored: Tensor, hessian: Tensor) -> float:
    change = (restored - weight).double()
    return float(((change @ hessian.double()) * change).sum())


def plain_gptq(
    weight: Tensor, hessian: Tensor, grid: Grid, bits: int, group: int, damping: float, order: Tensor
) -> Tensor:
    """The recursion as in the paper, one column at a time with an explicit inverse that shrinks, in float64."""
    n, k = weight.shape
    h = hessian.double() + damping * hessian.diagonal().mean().double() * torch.eye(k, dtype=torch.float64)
    inverse = torch.linalg.inv(h[order][:, order])
    w = weight.double()[:, order].clone()
    codes = torch.zeros(n, k, dtype=torch.uint8)
    zero = 2 ** (bits - 1)
    for j in range(k):
        column = int(order[j])
        scale = grid.scales[:, column // group].double()
        code = (torch.round(w[:, j] / scale) + zero).clamp(0, 2**bits - 1)
        codes[:, column] = code.to(torch.uint8)
        error = (w[:, j] - scale * (code - zero)) / inverse[j, j]
        w[:, j:] -= error[:, None] * inverse[j, j:]
        inverse = inverse - inverse[:, j : j + 1] @ inverse[j : j + 1] / inverse[j, j]
    return codes


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_follows_the_recursion_of_the_paper(act_order: bool, bits: int) -> None:
    weight, hessian = correlated_problem()
    grid = search_grid(weight, bits, 32, "mse", importance=hessian.diagonal())
    factor = factorize(hessian, 0.01, act_order=act_order)
    codes, _ = gptq(weight, factor, grid, bits, 32)
    expected = plain_gptq(weight, hessian, grid, bits, 32, factor.damping, factor.order)
    # fp32 against float64: a code differs where a column lands within rounding of a tie, and then later ones may.
    assert float((codes != expected).float().mean()) < 0.02
    got, wanted = (output_error(weight, decode(c, grid, bits, 32), hessian) for c in (codes, expected))
    assert got == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("group_size", [0, 32, 64])
def test_each_step_lowers_the_output_error(group_size: int) -> None:
    weight, hessian = correlated_problem()
    factor = factorize(hessian)
    damped = hessian + factor.damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    for bits in (2, 3, 4):
        grid = search_grid(weight, bits, group_size, "mse", importance=hessian.diagonal())
        nearest = output_error(weight, decode(encode(weight, grid, bits, group_size), grid, bits, group_size), hessian)
        codes, _ = gptq(weight, factor, grid, bits, group_size)
        rounded = output_error(weight, decode(codes, grid, bits, group_size), hessian)
        codes, grid = refine(weight, damped, codes, grid, bits, group_size, sweeps=2)
        refined = output_error(weight, decode(codes, grid, bits, group_size), hessian)
        assert refined < rounded < nearest


def test_refinement_steps_never_raise_the_damped_error() -> None:
    weight, hessian = correlated_problem(seed=3)
    hessian.diagonal().add_(hessian.diagonal().mean() * 0.01)
    grid = search_grid(weight, 3, 32, "sym_clip")
    codes = encode(weight, grid, 3, 32)
    error = output_error(weight, decode(codes, grid, 3, 32), hessian)
    for _ in range(3):
        grid = fit_scales(weight, hessian, codes, grid, 3, 32)
        fitted = output_error(weight, decode(codes, grid, 3, 32), hessian)
        assert fitted <= error * (1 + 1e-3), "only the rounding of scales to fp16 may cost"
        codes = descend(weight, hessian, codes, grid, 3, 32)
        error = output_error(weight, decode(codes, grid, 3, 32), hessian)
        assert error <= fitted * (1 + 1e-5)


def test_fitted_scales_are_stationary() -> None:
    """The derivative of the error with respect to each scale is zero (up to fp16 storage and the small ridge)."""
    weight, hessian = correlated_problem(n=8, k=96)
    grid = search_grid(weight, 4, 32, "mse")
    codes = encode(weight, grid, 4, 32)
    scales = fit_scales(weight, hessian, codes, grid, 4, 32).scales.float().requires_grad_()
    levels = (codes.float() - 8).reshape(8, 3, 32)
    change = (levels * scales[..., None]).reshape(8, 96) - weight
    error = ((change @ hessian) * change).sum()
    slope, start = torch.autograd.grad(error, scales)[0], search_grid(weight, 4, 32, "mse").scales.float()
    at_start = start.clone().requires_grad_()
    before = (levels * at_start[..., None]).reshape(8, 96) - weight
    slope_before = torch.autograd.grad(((before @ hessian) * before).sum(), at_start)[0]
    assert float(slope.norm()) < 0.05 * float(slope_before.norm())


def test_diagonal_hessian_is_round_to_nearest() -> None:
    weight, _ = correlated_problem()
    hessian = torch.diag(torch.rand(160) + 0.5)
    grid = search_grid(weight, 3, 32, "mse")
    codes, _ = gptq(weight, factorize(hessian), grid, 3, 32)
    assert torch.equal(codes, encode(weight, grid, 3, 32))


def test_outliers_are_exact_and_take_up_error() -> None:
    weight, hessian = correlated_problem()
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask[:, 5:160:40] = True
    grid = search_grid(weight, 2, 32, "mse", mask=mask)
    codes, visited = gptq(weight, factorize(hessian), grid, 2, 32, mask=mask)
    assert bool((codes[mask] == 2).all()), "the code of zero under an outlier"
    assert not torch.equal(visited[mask], weight[mask]), "outliers compensate for the columns before them"
    dense = decode(codes, grid, 2, 32)
    compensated = output_error(weight, torch.where(mask, visited.half().float(), dense), hessian)
    original = output_error(weight, torch.where(mask, weight, dense), hessian)
    assert compensated < original


def test_dead_columns_are_rounded_to_nearest() -> None:
    weight, hessian = correlated_problem()
    dead = torch.zeros(160, dtype=torch.bool)
    dead[[3, 77, 159]] = True
    hessian[dead, :], hessian[:, dead] = 0.0, 0.0
    grid = search_grid(weight, 3, 32, "mse")
    codes, _ = gptq(weight, factorize(hessian), grid, 3, 32)
    assert torch.equal(codes[:, dead], encode(weight, grid, 3, 32)[:, dead])


def test_no_live_column() -> None:
    weight, _ = correlated_problem()
    grid = search_grid(weight, 3, 32, "mse")
    codes, _ = gptq(weight, factorize(torch.zeros(160, 160)), grid, 3, 32)
    assert torch.equal(codes, encode(weight, grid, 3, 32))


def test_damping_grows_until_the_hessian_factorises() -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    singular = x.t() @ x - 1e-3 * torch.eye(64) * float(x.square().mean())
    assert factorize(singular, damping=1e-9).damping > 1e-9
    assert factorize(torch.eye(64)).damping == 0.01


def test_inverse_factor() -> None:
    _, hessian = correlated_problem()
    factor = factorize(hessian, 0.01)
    ordered = hessian.double()[factor.order][:, factor.order]
    ordered.diagonal().add_(0.01 * hessian.diagonal().mean().double())
    product = factor.upper.double().t() @ factor.upper.double() @ ordered
    condition = float(torch.linalg.cond(ordered))
    assert float((product - torch.eye(160)).abs().max()) < 160 * 2**-24 * condition
    assert bool((factor.upper.tril(-1) == 0).all())
    assert bool((hessian.diagonal()[factor.order].diff() <= 0).all())


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (torch.zeros(3, 4), r"expected \[K, K\], got \[3, 4\]"),
        (torch.full((3, 3), torch.inf), "finite"),
        (-torch.eye(3), "non-negative diagonal"),
        (torch.tensor([[1.0, 9.0], [9.0, 1.0]]), "indefinite"),
    ],
)
def test_bad_hessians(hessian: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        factorize(hessian)


def test_shapes_must_fit() -> None:
    weight, hessian = correlated_problem()
    grid = search_grid(weight, 3, 32, "mse")
    with pytest.raises(ValueError, match="expected a Hessian of 96 columns"):
        gptq(weight[:, :96], factorize(hessian), grid, 3, 32)
