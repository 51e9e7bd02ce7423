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

_BLOCK = 64  # columns whose effect on the other columns' gradients is gathered into one matrix product
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

    With the gradient ``R = H D`` (all transposed, ``[K, N]``) the best value of ``D_j`` is ``D_j - R_j / H_jj``.
    """
    k, top = weight.shape[1], 2.0**bits - 1
    restored = decode(codes, grid, bits, group_size)
    if mask is not None:
        restored = torch.where(mask, kept, restored)
    target = weight.t().contiguous()
    gap = target - restored.t()
    gradient = hessian @ gap
    code = codes.t().float().contiguous()
    step = spread(grid.scales.float(), k, group_size).t().contiguous()
    zero = _zero_of(grid, bits, k, group_size).t().contiguous()
    fixed = None if mask is None else mask.t().contiguous()
    diagonal = hessian.diagonal().tolist()
    for start in range(0, k, _BLOCK):
        stop = min(k, start + _BLOCK)
        local, before = gradient[start:stop], gap[start:stop].clone()
        inside = hessian[start:stop, start:stop].contiguous()
        for j in range(start, stop):
            wanted = target[j] - gap[j] + local[j - start] / diagonal[j]
            best = (wanted / step[j]).round_().add_(zero[j]).clamp_(0, top)
            if fixed is not None:
                best = torch.where(fixed[j], code[j], best)
            change = (code[j] - best).mul_(step[j])
            local.addr_(inside[j - start], change)
            gap[j] += change
            code[j] = best
        moved = gap[start:stop] - before
        gradient[:start].addmm_(hessian[:start, start:stop], moved)
        gradient[stop:].addmm_(hessian[stop:, start:stop], moved)
    return code.t().to(torch.uint8).contiguous()


def _zero_of(grid: Grid, bits: int, k: int, group_size: int) -> Tensor:
    zeros = torch.full_like(grid.scales, 2.0 ** (bits - 1)) if grid.zeros is None else grid.zeros
    return spread(zeros.float(), k, group_size)
