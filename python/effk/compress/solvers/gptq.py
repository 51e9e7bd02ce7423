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
* Outlier columns (``last``) are visited after all others and never rounded: they end as the original plus what the
  errors before them ask for (Ashkboos et al., "QUIK", 2023, section 3.2). They are never zeroed, dead or not.
* A ``pattern`` of zeros is chosen on the way, in units of 4 or 8 neighbouring columns: those with the least
  ``w^2 / U_jj^2`` go when their unit is reached, and the errors of leaving out and of rounding spread together (Frantar,
  Alistarh, "SparseGPT", 2023). "2:4" keeps 2 columns of 4; "pair4:8" 2 aligned pairs of the 4 in 8 columns, what 4-bit
  sparse tensor cores read. Units stay together in the order of visiting and are those of the columns without ``last``.
* A ``sparsity`` is chosen in the same way a block of 128 columns at a time, over all rows together: the least
  ``int(share * block)`` go, so that every block has the share and rows differ (SparseGPT, section 3.3). Without a
  ``grid`` nothing is rounded and the errors are those of leaving out alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .rtn import Grid

PATTERNS = {"2:4": (4, 1), "pair4:8": (8, 2)}  # columns in a unit, and those that stay or go together; half stay

_BLOCK = 128  # columns whose updates are gathered into one matrix product; a multiple of every unit
_MAX_DAMPING = 1.0


@dataclass(frozen=True, eq=False)
class Factor:
    """What :func:`gptq` needs of a Hessian; one serves all layers with the same input and all bit-widths.

    Attributes:
        order: int64 ``[K]``, the columns in the order of visiting.
        upper: fp32 ``[K, K]``, upper Cholesky factor of the damped inverse in that order.
        damping: the fraction of the mean diagonal that was added to make the Hessian positive definite.
        last: how many columns at the end of ``order`` are outliers, never rounded.
        unit: neighbouring columns that ``order`` keeps together.
    """

    order: Tensor
    upper: Tensor
    damping: float
    last: int = 0
    unit: int = 1


def factorize(
    hessian: Tensor,
    damping: float = 0.01,
    *,
    act_order: bool = True,
    last: Tensor | None = None,
    pattern: str | None = None,
) -> Factor:
    """Prepare a Hessian ``[K, K]`` (any positive multiple of ``X^T X``).

    ``damping`` times the mean of the non-zero diagonal is added, ten times more after each failed factorisation.

    Args:
        act_order: visit columns, or the units of ``pattern``, by falling diagonal instead of from left to right.
        last: int64 ``[outliers]``, the outlier columns, in the order in which they are stored.
        pattern: one of :data:`PATTERNS`, if :func:`gptq` is to prune.

    Raises:
        ValueError: not a finite square matrix with non-negative diagonal, or indefinite even with a damping of 1;
            ``last`` is not distinct columns; the other columns are no whole number of units.
    """
    k = hessian.shape[0] if hessian.dim() == 2 else -1
    if tuple(hessian.shape) != (k, k):
        raise ValueError(f"factorize: hessian: expected [K, K], got {list(hessian.shape)}")
    diagonal = hessian.diagonal()
    if not bool(hessian.isfinite().all()) or bool((diagonal < 0).any()):
        raise ValueError("factorize: hessian: expected finite values and a non-negative diagonal, got others")
    alive = diagonal > 0
    mean = diagonal[alive].mean().item() if bool(alive.any()) else 1.0
    order, unit = _visits(diagonal, act_order, last, pattern)
    ordered = hessian.float()[order][:, order]
    dead = (~alive)[order]
    ordered[dead, :], ordered[:, dead] = 0.0, 0.0
    ordered.diagonal()[dead] = mean
    while damping <= _MAX_DAMPING:
        upper = _inverse_factor(ordered, damping * mean)
        if upper is not None:
            return Factor(order, upper, damping, 0 if last is None else len(last), unit)
        damping = max(10 * damping, 1e-4)
    raise ValueError("factorize: hessian: expected a positive semi-definite matrix, got an indefinite one")


def gptq(
    weight: Tensor,
    factor: Factor,
    grid: Grid | None,
    bits: int,
    group_size: int,
    *,
    mask: Tensor | None = None,
    pattern: str | None = None,
    sparsity: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Codes uint8 ``[N, K]`` on ``grid`` and the weight fp32 ``[N, K]`` as each column was when visited.

    The second result holds the outliers' compensated values, of single ones under ``mask`` (bool ``[N, K]``) and of
    the factor's outlier columns; both get the code of zero, as do the weights that ``pattern`` leaves out. ``weight``
    is fp32 ``[N, K]``. Weights left out for ``sparsity`` or ``pattern`` are zero in the second result too. ``grid``
    None: codes are all those of zero.

    Raises:
        ValueError: shapes do not fit each other, or the factor was not made for ``pattern``.
    """
    n, k = weight.shape
    width = group_size or k
    scales = [n, -(-k // width)] if grid is None else list(grid.scales.shape)
    if factor.order.numel() != k or scales != [n, -(-k // width)]:
        raise ValueError(
            f"gptq: expected a Hessian of {k} columns and scales {[n, -(-k // width)]}, got {factor.order.numel()} and "
            f"{scales}"
        )
    if not 0 <= sparsity < 1 or (sparsity and pattern is not None):
        raise ValueError(f"gptq: sparsity: expected 0 with a pattern, else a share below 1, got {sparsity}")
    unit, together = PATTERNS[pattern] if pattern is not None else (1, 1)
    if factor.unit != unit:
        raise ValueError(f"gptq: pattern: expected a factor for units of {unit} columns, got one for {factor.unit}")
    # Everything is held transposed, [columns, rows]: a step then touches contiguous memory.
    order, top = factor.order, 2.0**bits - 1
    w = weight.float().t()[order].contiguous()
    step = None if grid is None else grid.scales.float().t().contiguous()
    zero = None if grid is None or grid.zeros is None else grid.zeros.float().t().contiguous()
    middle = torch.full((n,), 2.0 ** (bits - 1))
    kept = None if mask is None else mask.t()[order].contiguous()
    codes = torch.full((k, n), 2 ** (bits - 1), dtype=torch.uint8)
    group_of, rounded_columns = (order // width).tolist(), k - factor.last
    if zero is not None:
        codes[rounded_columns:] = zero[[group_of[j] for j in range(rounded_columns, k)]].to(torch.uint8)
    for start in range(0, rounded_columns, _BLOCK):
        stop = min(rounded_columns, start + _BLOCK)
        upper = factor.upper[start:stop, start:stop]
        errors = torch.zeros((stop - start, n))
        dropped = _least(w[start:stop] / upper.diagonal()[:, None], sparsity) if sparsity else None
        for j in range(stop - start):
            if pattern is not None and j % unit == 0:
                ahead = w[start + j : start + j + unit] - upper[:j, j : j + unit].t() @ errors[:j]
                gone = _left_out(ahead / upper.diagonal()[j : j + unit, None], together)
            column = w[start + j]
            if j:
                column.sub_(upper[:j, j] @ errors[:j])
            z = middle if zero is None else zero[group_of[start + j]]
            if step is None:
                code, rounded = z, column.clone()
            else:
                s = step[group_of[start + j]]
                code = torch.round(column / s).add_(z).clamp_(0, top)
                rounded = (code - z).mul_(s)
            if kept is not None:
                code = torch.where(kept[start + j], z, code)
                rounded = torch.where(kept[start + j], column.half().float(), rounded)
            out = dropped[j] if dropped is not None else gone[j % unit] if pattern is not None else None
            if out is not None:
                code = torch.where(out, z, code)
                rounded = rounded.masked_fill_(out, 0.0)
            codes[start + j] = code
            torch.sub(column, rounded, out=errors[j]).div_(upper[j, j])
            if out is not None:
                column.masked_fill_(out, 0.0)
        if stop < k:
            w[stop:].addmm_(factor.upper[start:stop, stop:].t(), errors, alpha=-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(k)
    return codes[back].t().contiguous(), w[back].t().contiguous()


def _visits(diagonal: Tensor, act_order: bool, last: Tensor | None, pattern: str | None) -> tuple[Tensor, int]:
    """The order of the columns, and how many stay together in it."""
    k = len(diagonal)
    if pattern is not None and pattern not in PATTERNS:
        raise ValueError(f"factorize: pattern: expected None or one of {tuple(PATTERNS)}, got {pattern!r}")
    unit = 1 if pattern is None else PATTERNS[pattern][0]
    base = torch.ones(k, dtype=torch.bool)
    if last is not None:
        if last.numel() and not (0 <= int(last.min()) and int(last.max()) < k):
            raise ValueError(f"factorize: last: expected columns in [0, {k}), got {int(last.min())}..{int(last.max())}")
        base[last] = False
        if int((~base).sum()) != len(last):
            raise ValueError(f"factorize: last: expected {len(last)} distinct columns, got {int((~base).sum())}")
    columns = base.nonzero().flatten()
    if len(columns) % unit:
        raise ValueError(f"factorize: pattern: expected a multiple of {unit} columns to round, got {len(columns)}")
    if act_order:
        units = columns.reshape(-1, unit)
        columns = units[torch.argsort(diagonal[units].sum(1), descending=True, stable=True)].flatten()
    return (columns if last is None else torch.cat((columns, last.long()))), unit


def _left_out(saliency: Tensor, together: int) -> Tensor:
    """Which columns of a unit go: bool like ``saliency`` ``[unit, N]``, the half with the least squares in each row."""
    score = saliency.square().reshape(-1, together, saliency.shape[1]).sum(1)
    least = score.argsort(dim=0, stable=True)[: len(score) // 2]
    gone = torch.zeros(score.shape, dtype=torch.bool).scatter_(0, least, True)
    return gone.repeat_interleave(together, 0)


def _least(saliency: Tensor, share: float) -> Tensor:
    """Where ``saliency`` is among the ``int(share * numel)`` smallest magnitudes; of equals the first."""
    least = saliency.abs().flatten().argsort(stable=True)[: int(share * saliency.numel())]
    return torch.zeros(saliency.numel(), dtype=torch.bool).scatter_(0, least, True).view(saliency.shape)


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
