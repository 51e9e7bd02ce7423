"""Pruning of one layer: shares, patterns, dead columns, and what second order gains over magnitudes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effk.compress.solvers import prune
from effk.compress.solvers.gptq import factorize, gptq
from effk.compress.solvers.rtn import search_grid


def problem(n: int = 48, k: int = 300, tokens: int = 900) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, inputs with correlated columns of very different sizes, and their Hessian."""
    mix = torch.randn(k, k) / k**0.5 + torch.eye(k)
    x = torch.randn(tokens, k) @ mix * torch.rand(k).mul(3).exp()
    return torch.randn(n, k), x, x.t() @ x


def error(x: Tensor, w: Tensor, pruned: Tensor) -> float:
    return float((x @ (w - pruned).t()).norm() / (x @ w.t()).norm())


def test_second_order_beats_wanda_beats_magnitude() -> None:
    w, x, hessian = problem()
    for sparsity, pattern in ((0.5, None), (0.75, None), (0.5, "2:4")):
        small = error(x, w, prune.magnitude(w, sparsity, pattern))
        weighed = error(x, w, prune.wanda(w, x.square().mean(0), sparsity, pattern))
        second = error(x, w, prune.sparsegpt(w, hessian, sparsity, pattern)[0])
        assert second < 0.95 * weighed and weighed < 0.9 * small, (sparsity, pattern, second, weighed, small)


def test_shares() -> None:
    """Each block of 128 columns has the share of zeros, each row of the others has it."""
    w, x, hessian = problem()
    for sparsity in (0.0, 0.3, 0.5, 0.9):
        pruned, codes = prune.sparsegpt(w, hessian, sparsity)
        assert codes is None
        for block in pruned.split(128, 1):
            assert int((block == 0).sum()) == int(sparsity * block.numel())
        for other in (prune.magnitude(w, sparsity), prune.wanda(w, x.square().mean(0), sparsity)):
            assert bool(((other == 0).sum(1) == int(300 * sparsity)).all())
    assert torch.equal(prune.sparsegpt(w, hessian, 0.0)[0], w)


def test_patterns() -> None:
    w, x, hessian = problem()
    for pruned in (prune.sparsegpt(w, hessian, 0.5, "2:4")[0], prune.wanda(w, x.square().mean(0), 0.5, "2:4")):
        assert bool(((pruned.view(48, -1, 4) != 0).sum(2) == 2).all())
    assert bool(((prune.magnitude(w, 0.5, "1:5").view(48, -1, 5) != 0).sum(2) == 1).all())


def test_first_columns_by_brute_force() -> None:
    """Two columns, one of which goes: the other becomes the least-squares solution."""
    x = torch.randn(50, 2) @ torch.tensor([[1.0, 0.8], [0.0, 0.6]])
    hessian = x.t() @ x
    w = torch.tensor([[0.1, 2.0]])
    pruned = prune.sparsegpt(w, hessian, 0.5, damping=1e-6)[0]
    assert pruned[0, 0] == 0
    best = torch.linalg.lstsq(x[:, 1:].double(), x.double() @ w.double().t()).solution
    assert torch.allclose(pruned[0, 1].double(), best[0, 0], rtol=1e-4)


def test_dead_columns_become_zero() -> None:
    w, x, _ = problem()
    x[:, [3, 200]] = 0
    pruned = prune.sparsegpt(w, x.t() @ x, 0.5)[0]
    assert not pruned[:, [3, 200]].any() and pruned.isfinite().all()
    assert all(int((block == 0).sum()) == block.numel() // 2 for block in pruned.split(128, 1)), "they count as zeros"
    x[:, 40:43] = 0  # three of four: one is left, and the pattern holds all the same
    pruned = prune.sparsegpt(w, x.t() @ x, 0.5, "2:4")[0]
    kept = (pruned.view(48, -1, 4) != 0).sum(2)
    assert bool((kept[:, 10] == 1).all()) and int(kept.max()) == 2 and pruned.isfinite().all()


@pytest.mark.parametrize("group", (0, 64))
def test_codes_in_the_same_sweep(group: int) -> None:
    """Rounding and leaving out together beat rounding what was pruned, and zeros stay zeros."""
    w, x, hessian = problem()
    grid = search_grid(w, 8, group, "sym_narrow")
    joint, codes = prune.sparsegpt(w, hessian, 0.5, grid=grid, group_size=group)
    assert codes.dtype == torch.int8 and torch.equal(codes == 0, joint == 0)
    assert 0.5 <= float((codes == 0).float().mean()) < 0.53
    assert error(x, w, joint) < 1.05 * error(x, w, prune.sparsegpt(w, hessian, 0.5)[0])


def test_bad_arguments() -> None:
    w, x, hessian = problem()
    with pytest.raises(ValueError, match="sparsity: expected a share in"):
        prune.magnitude(w, 1.0)
    with pytest.raises(ValueError, match="pattern: expected 'n:m' with 0 < n < m, got '4:2'"):
        prune.magnitude(w, 0.5, "4:2")
    with pytest.raises(ValueError, match="expected a multiple of 7 columns, got 300"):
        prune.magnitude(w, 0.5, "2:7")
    with pytest.raises(ValueError, match="gptq: sparsity: expected 0 with a pattern"):
        gptq(w, factorize(hessian, pattern="2:4"), None, 8, 0, pattern="2:4", sparsity=0.5)
