"""Second-order rounding: codes that minimise the layer's output error, one column at a time (GPTQ).

For inputs ``X[T, K]`` and ``H = X^T X`` the output error of a row is ``(w - w_hat) H (w - w_hat)^T``. Columns are rounded
in order; the error of each is spread over the columns still to come, which is optimal for fixed earlier codes
(Frantar et al., "GPTQ", 2023; the recursion is Optimal Brain Surgeon's). With ``U`` the upper Cholesky factor of
``(H + damping)^-1``::

    e_j = (w_j - w_hat_j) / U[j, j];     w[j+1:] -= e_j * U[j, j+1:]

* The grid is fixed beforehand ("static groups"), so that visiting columns by falling ``H_kk`` ("act order") changes the
  codes and nothing else: no permutation is left for the kernel.
* A masked weight (sparse outlier) is kept as fp16 of its value *when visited*: it makes no error of its own and takes
  part of the others', which is better than the original value.
* A column that no calibration input reached (``H_kk = 0``) is rounded to nearest and neither gives nor takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .rtn import Grid

_BLOCK = 128  # columns whose updates are gathered into one matrix product
_MAX_DAMPING = 1.0


@dataclass(frozen=True, eq=False)
class Factor:
    """What :func:`gptq` needs of a Hessian; one serves all layers with the same input and all bit-widths.

    Attributes:
        order: int64 ``[K]``, the columns in the order of visiting.
        upper: fp32 ``[K, K]``, upper Cholesky factor of the damped inverse in that order.
        damping: the fraction of the mean diagonal that was added to make the Hessian positive definite.
    """

    order: Tensor
    upper: Tensor
    damping: float


def factorize(hessian: Tensor, damping: float = 0.01, *, act_order: bool = True) -> Factor:
    """Prepare a Hessian ``[K, K]`` (any positive multiple of ``X^T X``).

    ``damping`` times the mean of the non-zero diagonal is added, ten times more after each failed factorisation.

    Raises:
        ValueError: not a finite square matrix with non-negative diagonal, or indefinite even with a damping of 1.
    """
    k = hessian.shape[0] if hessian.dim() == 2 else -1
    if tuple(hessian.shape) != (k, k):
        raise ValueError(f"factorize: hessian: expected [K, K], got {list(hessian.shape)}")
    diagonal = hessian.diagonal()
    if not bool(hessian.isfinite().all()) or bool((diagonal < 0).any()):
        raise ValueError("factorize: hessian: expected finite values and a non-negative diagonal, got others")
    alive = diagonal > 0
    mean = diagonal[alive].mean().item() if bool(alive.any()) else 1.0
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(k)
    ordered = hessian.float()[order][:, order]
    dead = (~alive)[order]
    ordered[dead, :], ordered[:, dead] = 0.0, 0.0
    ordered.diagonal()[dead] = mean
    while damping <= _MAX_DAMPING:
        upper = _inverse_factor(ordered, damping * mean)
        if upper is not None:
            return Factor(order, upper, damping)
        damping = max(10 * damping, 1e-4)
    raise ValueError("factorize: hessian: expected a positive semi-definite matrix, got an indefinite one")


def gptq(
    weight: Tensor, factor: Factor, grid: Grid, bits: int, group_size: int, *, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes uint8 ``[N, K]`` on ``grid`` and the weight fp32 ``[N, K]`` as each column was when visited.

    The second result holds the outliers' compensated values under ``mask`` (bool ``[N, K]``); masked weights get the
    code of zero. ``weight`` is fp32 ``[N, K]``.

    Raises:
        ValueError: shapes do not fit each other.
    """
    n, k = weight.shape
    width = group_size or k
    if factor.order.numel() != k or tuple(grid.scales.shape) != (n, -(-k // width)):
        raise ValueError(
            f"gptq: expected a Hessian of {k} columns and scales {[n, -(-k // width)]}, got {factor.order.numel()} and "
            f"{list(grid.scales.shape)}"
        )
    # Everything is held transposed, [columns, rows]: a step then touches contiguous memory.
    order, top = factor.order, 2.0**bits - 1
    w = weight.float().t()[order].contiguous()
    step = grid.scales.float().t().contiguous()
    zero = None if grid.zeros is None else grid.zeros.float().t().contiguous()
    middle = torch.full((n,), 2.0 ** (bits - 1))
    kept = None if mask is None else mask.t()[order].contiguous()
    codes = torch.empty((k, n), dtype=torch.uint8)
    group_of = (order // width).tolist()
    for start in range(0, k, _BLOCK):
        stop = min(k, start + _BLOCK)
        upper = factor.upper[start:stop, start:stop]
        errors = torch.zeros((stop - start, n))
        for j in range(stop - start):
            column = w[start + j]
            if j:
                column.sub_(upper[:j, j] @ errors[:j])
            s = step[group_of[start + j]]
            z = middle if zero is None else zero[group_of[start + j]]
            code = torch.round(column / s).add_(z).clamp_(0, top)
            rounded = (code - z).mul_(s)
            if kept is not None:
                code = torch.where(kept[start + j], z, code)
                rounded = torch.where(kept[start + j], column.half().float(), rounded)
            codes[start + j] = code
            torch.sub(column, rounded, out=errors[j]).div_(upper[j, j])
        if stop < k:
            w[stop:].addmm_(factor.upper[start:stop, stop:].t(), errors, alpha=-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(k)
    return codes[back].t().contiguous(), w[back].t().contiguous()


def _inverse_factor(hessian: Tensor, ridge: float) -> Tensor | None:
    """Upper Cholesky factor of ``(hessian + ridge)^-1``, or None when that is not positive definite.

    With J the reversal of rows and columns, ``J H J = L L^T`` gives ``H^-1 = U^T U`` for ``U = (J L J)^-1``; so one
    factorisation and one triangular inverse suffice, and the inverse itself is never formed.
    """
    damped = hessian.clone()
    damped.diagonal().add_(ridge)
    lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if int(info):
        return None
    reversed_lower = lower.flip(0, 1).contiguous()  # upper triangular R with H = R R^T
    identity = torch.eye(len(hessian))
    upper = torch.linalg.solve_triangular(reversed_lower, identity, upper=True)
    return upper if bool(upper.isfinite().all()) else None
