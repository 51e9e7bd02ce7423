"""Second-order rounding and refinement: against the definition, and always better than what they start from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effk.compress.solvers.gptq import factorize, gptq
from effk.compress.solvers.refine import descend, fit_scales, refine
from effk.compress.solvers.rtn import Grid, decode, encode, row_scales, search_grid


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


# Outlier columns


def row_grid(weight: Tensor, bits: int, outliers: Tensor, clip: bool = True) -> Grid:
    base = torch.ones(weight.shape[1], dtype=torch.bool)
    base[outliers] = False
    return Grid(row_scales(weight[:, base], bits, clip=clip).unsqueeze(1), None)


def with_columns(codes: Tensor, grid: Grid, bits: int, outliers: Tensor, values: Tensor) -> Tensor:
    restored = decode(codes, grid, bits, 0)
    restored[:, outliers] = values[:, outliers]
    return restored


@pytest.mark.parametrize("act_order", [True, False])
def test_outlier_columns_come_last_and_are_compensated(act_order: bool) -> None:
    weight, hessian = correlated_problem()
    outliers = torch.tensor([17, 0, 34, 153])
    grid = row_grid(weight, 4, outliers)
    factor = factorize(hessian, act_order=act_order, last=outliers)
    assert torch.equal(factor.order[-4:], outliers) and torch.equal(factor.order.sort().values, torch.arange(160))
    codes, values = gptq(weight, factor, grid, 4, 0)
    assert bool((codes[:, outliers] == 8).all()), "the code of zero"
    moved = (values - weight)[:, outliers].abs().amax(0)
    assert bool((moved > 0).all()), "the stored columns are the updated ones"
    with_compensation = output_error(weight, with_columns(codes, grid, 4, outliers, values), hessian)
    without = output_error(weight, with_columns(codes, grid, 4, outliers, weight), hessian)
    assert with_compensation < without


def test_outlier_columns_follow_the_recursion() -> None:
    """The values of least damped error for the codes that were found: the gradient with respect to them is zero."""
    weight, hessian = correlated_problem(n=8)
    outliers = torch.tensor([3, 51, 119])
    factor = factorize(hessian, last=outliers)
    grid = row_grid(weight, 3, outliers)
    codes, values = gptq(weight, factor, grid, 3, 0)
    damped = hessian.double() + factor.damping * hessian.diagonal().mean().double() * torch.eye(160)
    slope = (with_columns(codes, grid, 3, outliers, values) - weight).double() @ damped
    untouched = (with_columns(codes, grid, 3, outliers, weight) - weight).double() @ damped
    assert float(slope[:, outliers].norm()) < 1e-3 * float(untouched[:, outliers].norm())


def test_a_dead_outlier_column_keeps_its_values() -> None:
    weight, hessian = correlated_problem()
    outliers = torch.tensor([5, 60])
    hessian[5, :], hessian[:, 5] = 0.0, 0.0
    _, values = gptq(weight, factorize(hessian, last=outliers), row_grid(weight, 4, outliers), 4, 0)
    assert torch.equal(values[:, 5], weight[:, 5]), "never zeroed"
    assert not torch.equal(values[:, 60], weight[:, 60])


def test_outlier_columns_lower_the_error_of_large_inputs() -> None:
    """32 of 512 columns scaled by 60, activations rounded to 4 bits a row: below 0.02 with them apart, else above 0.2."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 512, generator=generator)
    outliers = torch.randperm(512, generator=generator)[:32].sort().values
    x[:, outliers] *= 60
    weight = torch.randn(64, 512, generator=generator)
    expected = x @ weight.t()
    found = []
    for last in (outliers, outliers[:0]):
        base = torch.ones(512, dtype=torch.bool)
        base[last] = False
        part = x[:, base]
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        step = (high - low) / 15
        seen = x.clone()
        seen[:, base] = torch.round((part - low) / step) * step + low
        grid = row_grid(weight, 4, last)
        codes, values = gptq(weight, factorize(x.t() @ x, last=last), grid, 4, 0)
        restored = with_columns(codes, grid, 4, last, values)
        found.append(float((seen @ restored.t() - expected).norm() / expected.norm()))
    assert found[0] < 0.02 and found[1] > 0.2


def test_no_column_to_round() -> None:
    weight, hessian = correlated_problem(n=4, k=8)
    codes, values = gptq(weight, factorize(hessian, last=torch.arange(8)), row_grid(weight, 4, torch.arange(8)), 4, 0)
    assert torch.equal(values, weight) and bool((codes == 8).all())


@pytest.mark.parametrize(
    ("last", "message"),
    [([3, 3], "expected 2 distinct columns, got 1"), ([160], r"in \[0, 160\), got 160..160"), ([-1], "got -1..-1")],
)
def test_bad_outlier_columns(last: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        factorize(correlated_problem()[1], last=torch.tensor(last))


# Eight bits and the clipping search


def test_eight_bits_are_no_worse_than_round_to_nearest() -> None:
    weight, hessian = correlated_problem()
    none = torch.empty(0, dtype=torch.int64)
    grid = row_grid(weight, 8, none, clip=False)
    nearest = output_error(weight, decode(encode(weight, grid, 8, 0), grid, 8, 0), hessian)
    codes, _ = gptq(weight, factorize(hessian, last=none), grid, 8, 0)
    assert output_error(weight, decode(codes, grid, 8, 0), hessian) < nearest


@pytest.mark.parametrize("bits", [4, 8])
def test_clipping_search(bits: int) -> None:
    """The definition in float64: 80 factors, exponent 2.4, ties to the larger; and never worse than no clipping."""
    weight = torch.randn(40, 300, generator=torch.Generator().manual_seed(1))
    weight[0] = 0.0
    weight[1, 5] = 40.0  # an extreme that is worth clipping at 4 bits
    weight[2] = torch.tensor([7.0, -7.0, 1.0, 0.0]).repeat(75)  # exact at p = 1: nothing smaller may win
    weight[3] = 1e-30 * torch.rand(300)  # errors to the power of 2.4 are all zero: a tie
    most = 2.0 ** (bits - 1) - 1
    rows, amax = weight.double(), weight.double().abs().amax(1)

    def objective(scale: Tensor) -> Tensor:
        step = torch.where(scale == 0, 1.0, scale)[:, None]
        return (((rows / step).round().clamp(-most - 1, most) * step - rows).abs() ** 2.4).sum(1)

    errors = torch.stack([objective((1 - i / 100) * amax / most) for i in range(80)])
    found, plain = row_scales(weight, bits), row_scales(weight, bits, clip=False)
    assert torch.allclose(plain[1:].double(), amax[1:] / most, rtol=2**-22) and float(plain[0]) == 1.0
    assert bool((objective(found.double()) <= objective(plain.double()) * (1 + 1e-5)).all())
    # fp32 may prefer a neighbour whose error is the same to rounding: sums of 300 terms, each to a few 2^-24.
    assert torch.allclose(objective(found.double())[1:], errors.amin(0)[1:], rtol=300 * 2**-22, atol=1e-9)
    assert bits == 8 or float(found[2]) == float(plain[2])
    assert float(found[3]) == float(plain[3]), "the larger of equals"
    assert bits == 8 or float(found[1]) < float(plain[1])


# Joint pruning


def units(codes: Tensor, outliers: Tensor, bits: int, unit: int) -> Tensor:
    base = torch.ones(codes.shape[1], dtype=torch.bool)
    base[outliers] = False
    return (codes[:, base] != 2 ** (bits - 1)).reshape(len(codes), -1, unit)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("pattern", "unit"), [("2:4", 4), ("pair4:8", 8)])
def test_pruned_weights_keep_the_pattern(pattern: str, unit: int, act_order: bool) -> None:
    weight, hessian = correlated_problem(k=168)
    outliers = torch.tensor([2, 17, 34, 51, 68, 85, 100, 167])
    factor = factorize(hessian, act_order=act_order, last=outliers, pattern=pattern)
    codes, values = gptq(weight, factor, row_grid(weight, 4, outliers), 4, 0, pattern=pattern)
    there = units(codes, outliers, 4, unit)
    if pattern == "pair4:8":
        there = there.reshape(*there.shape[:2], 4, 2).any(-1)
    assert int(there.sum(-1).max()) == 2 and float(there.float().mean()) > 0.4, "half stays, and half is used"
    assert not torch.equal(values[:, outliers], weight[:, outliers])


def plain_sparsegpt(weight: Tensor, hessian: Tensor, scale: Tensor, factor_order: Tensor, damping: float) -> Tensor:
    """2:4 with the shrinking explicit inverse in float64: the mask of a unit is chosen when it is reached."""
    h = hessian.double() + damping * hessian.diagonal().mean().double() * torch.eye(len(hessian), dtype=torch.float64)
    inverse = torch.linalg.inv(h[factor_order][:, factor_order])
    w, out = weight.double()[:, factor_order].clone(), torch.zeros_like(weight, dtype=torch.float64)
    for j in range(w.shape[1]):
        if j % 4 == 0:
            # U_ii^2 of the unit's columns: the i-th pivot of the inverse that is left once those before it are gone.
            pivots, left = [], inverse.clone()
            for i in range(j, j + 4):
                pivots.append(left[i, i].clone())
                left = left - left[:, i : i + 1] @ left[i : i + 1] / left[i, i]
            gone = torch.zeros(len(w), 4, dtype=torch.bool)
            score = w[:, j : j + 4] ** 2 / torch.stack(pivots)
            gone.scatter_(1, score.argsort(1)[:, :2], True)
        value = (w[:, j] / scale).round().clamp(-8, 7) * scale
        value = torch.where(gone[:, j % 4], 0.0, value)
        out[:, factor_order[j]] = value
        w[:, j:] -= ((w[:, j] - value) / inverse[j, j])[:, None] * inverse[j, j:]
        inverse = inverse - inverse[:, j : j + 1] @ inverse[j : j + 1] / inverse[j, j]
    return out


def test_pruning_follows_the_recursion() -> None:
    weight, hessian = correlated_problem(n=32, k=136)
    factor = factorize(hessian, pattern="2:4")
    grid = row_grid(weight, 4, torch.empty(0, dtype=torch.int64))
    codes, _ = gptq(weight, factor, grid, 4, 0, pattern="2:4")
    expected = plain_sparsegpt(weight, hessian, grid.scales[:, 0].double(), factor.order, factor.damping)
    got = decode(codes, grid, 4, 0).double()
    # As above: fp32 against float64 decides single ties differently, and what follows them.
    assert float(((got == 0) != (expected == 0)).double().mean()) < 0.02
    assert output_error(weight, got, hessian) == pytest.approx(output_error(weight, expected, hessian), rel=0.02)


def test_joint_pruning_beats_pruning_what_is_quantised() -> None:
    weight, hessian = correlated_problem()
    grid = row_grid(weight, 4, torch.empty(0, dtype=torch.int64))
    joint, _ = gptq(weight, factorize(hessian, pattern="2:4"), grid, 4, 0, pattern="2:4")
    dense = decode(gptq(weight, factorize(hessian), grid, 4, 0)[0], grid, 4, 0)
    least = dense.abs().reshape(48, -1, 4).argsort(-1)[..., :2]
    later = dense.reshape(48, -1, 4).scatter(-1, least, 0.0).reshape(48, 160)
    errors = [output_error(weight, w, hessian) for w in (decode(joint, grid, 4, 0), later)]
    assert errors[0] < 0.7 * errors[1]


def test_patterns_need_their_factor_and_whole_units() -> None:
    weight, hessian = correlated_problem()
    with pytest.raises(ValueError, match="pattern: expected a factor for units of 4 columns, got one for 1"):
        gptq(weight, factorize(hessian), search_grid(weight, 4, 0, "clip"), 4, 0, pattern="2:4")
    with pytest.raises(ValueError, match="multiple of 8 columns to round, got 157"):
        factorize(hessian, last=torch.tensor([1, 2, 3]), pattern="pair4:8")
    with pytest.raises(ValueError, match="expected None or one of"):
        factorize(hessian, pattern="1:2")
