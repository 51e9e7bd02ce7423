"""Improve rounded weights under a full Hessian: alternate exact scale fits and coordinate descent over the codes.

The objective is the output error ``trace(D H D^T)``, ``D = W - W_hat``, that :mod:`.gptq` minimises greedily.

* ``fit_scales``: for fixed codes it is quadratic in a row's scales. With ``L[n, k] = code - zero`` the normal equations of
  row n are ``A s = b``, ``A[g, h] = L_g H_gh L_h^T``, ``b[g] = L_g H_g: w^T``: one small system per row.
* ``descend``: for fixed scales, one column at a time gets the best code given all others (cyclic coordinate descent, as
  Behdin et al., "QuantEase", 2023); a sweep never raises the error.

Zero points stay. Masked weights (sparse outliers) keep their values and take part in everyone else's error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rtn import Grid, decode, spread, stored_scales

_BLOCK = 64  # columns whose effect on the later columns' gradients is gathered into one matrix product
_SCALE_RIDGE = 1e-4  # of the mean diagonal of A, towards the present scale: a group of zero codes keeps its scale


def refine(
    weight: Tensor,
    hessian: Tensor,
    codes: Tensor,
    grid: Grid,
    bits: int,
    group_size: int,
    *,
    sweeps: int = 2,
    mask: Tensor | None = None,
    kept: Tensor | None = None,
) -> tuple[Tensor, Grid]:
    """Codes uint8 ``[N, K]`` and grid after ``sweeps`` rounds of scale fit and descent.

    Args:
        weight: fp32 ``[N, K]``, the target.
        hessian: fp32 ``[K, K]``, positive definite (damped).
        codes, grid: where to start, for example from :func:`effk.compress.solvers.gptq.gptq`.
        mask, kept: bool and fp32 ``[N, K]``: where weights are stored exactly, and as what.
    """
    for _ in range(sweeps):
        grid = fit_scales(weight, hessian, codes, grid, bits, group_size, mask=mask, kept=kept)
        codes = descend(weight, hessian, codes, grid, bits, group_size, mask=mask, kept=kept)
    return codes, grid


def fit_scales(
    weight: Tensor,
    hessian: Tensor,
    codes: Tensor,
    grid: Grid,
    bits: int,
    group_size: int,
    *,
    mask: Tensor | None = None,
    kept: Tensor | None = None,
) -> Grid:
    """``grid`` with the scales of least output error for fixed codes; arguments as :func:`refine`."""
    n, k = weight.shape
    width, groups = group_size or k, grid.scales.shape[1]
    level = codes.float() - _zero_of(grid, bits, k, group_size)
    target = weight if mask is None else torch.where(mask, weight - kept, weight)

    def per_group(t: Tensor) -> Tensor:
        return torch.nn.functional.pad(t, (0, groups * width - k)).reshape(n, groups, width).sum(-1)

    right = per_group(level * (target @ hessian))
    normal = torch.stack(
        [
            per_group((level[:, g * width : (g + 1) * width] @ hessian[g * width : (g + 1) * width]) * level)
            for g in range(groups)
        ],
        dim=1,
    )
    ridge = _SCALE_RIDGE * normal.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + 1e-12
    normal.diagonal(dim1=1, dim2=2).add_(ridge)
    old = grid.scales.float()
    fitted = torch.linalg.solve(normal, (right + ridge * old).unsqueeze(-1)).squeeze(-1)
    usable = fitted.isfinite() & (fitted.abs() > old.abs() / 16) & (fitted.abs() < old.abs() * 16)
    return Grid(stored_scales(torch.where(usable, fitted, old)), grid.zeros)


def descend(
    weight: Tensor,
    hessian: Tensor,
    codes: Tensor,
    grid: Grid,
    bits: int,
    group_size: int,
    *,
    mask: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """Codes after one sweep of coordinate descent over all columns; arguments as :func:`refine`.

    Transposed, with the gradient ``R = H D``, the best level of column j is ``level_j + R_j / (H_jj scale_j)``, rounded.
    """
    k, top = weight.shape[1], 2.0**bits - 1
    restored = decode(codes, grid, bits, group_size)
    if mask is not None:
        restored = torch.where(mask, kept, restored)
    gradient = hessian @ (weight - restored).t()
    zero = _zero_of(grid, bits, k, group_size).t().contiguous()
    level = codes.t().float() - zero
    low, high = -zero, top - zero
    step = spread(grid.scales.float(), k, group_size).t().contiguous()
    gain = 1 / (hessian.diagonal().unsqueeze(1) * step)
    fixed = None if mask is None else mask.t().contiguous()
    for start in range(0, k, _BLOCK):
        stop = min(k, start + _BLOCK)
        inside = hessian[start:stop, start:stop].contiguous()
        change = torch.zeros((stop - start, len(weight)))  # of D
        for j in range(stop - start):
            column = start + j
            slope = gradient[column]
            if j:
                slope += inside[j, :j] @ change[:j]
            best = slope.mul_(gain[column]).add_(level[column]).round_()
            torch.clamp(best, low[column], high[column], out=best)
            if fixed is not None:
                best = torch.where(fixed[column], level[column], best)
            torch.sub(level[column], best, out=change[j]).mul_(step[column])
            level[column] = best
        if stop < k:
            gradient[stop:].addmm_(hessian[stop:, start:stop], change)
    return (level + zero).t().to(torch.uint8).contiguous()


def _zero_of(grid: Grid, bits: int, k: int, group_size: int) -> Tensor:
    zeros = torch.full_like(grid.scales, 2.0 ** (bits - 1)) if grid.zeros is None else grid.zeros
    return spread(zeros.float(), k, group_size)
