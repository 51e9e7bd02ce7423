"""Fitting a DYAD matrix, the sum of two block-diagonal matrices up to a stride permutation, to a dense one.

A DYAD matrix of ``n`` blocks per component has a fixed support (:mod:`effk.ops.dyad_linear`): row r may use
the columns of one contiguous block and of one residue class modulo n. Everything here is float64 on dense ``[N, K]``
matrices that are zero outside the support; :func:`effk.ops.dyad_linear.from_dense` makes the two components.

The error that counts is that of the outputs, ``tr((W - W') C (W - W')^T)`` with C the covariance of the inputs. Rows
with the same support are solved together: n classes for "it", up to n^2 for "ot" and "dt". The part of C that text
does not determine is filled by ``ridge``: C + lambda I, lambda = ridge mean(diag C). Because W - W' is damped, not W',
three things hold for every ridge: the error never exceeds that of masking, white inputs give masking, and a matrix
that is DYAD already comes back as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops.dyad_linear import VARIANTS

_ROWS = 1024  # of x multiplied at once in fp32; the products are added up in float64


@dataclass
class Moments:
    """Mean and covariance of the inputs x of a layer, and the cross-covariance of what x should have been with x.

    Sums are of ``x - shift`` with the mean of the first batch as shift, so that a large mean costs no digits.
    """

    rows: int = 0
    shift: Tensor | None = None
    total: Tensor | None = None
    squares: Tensor | None = None
    wanted_shift: Tensor | None = None
    wanted_total: Tensor | None = None
    crossed: Tensor | None = None

    def update(self, x: Tensor, wanted: Tensor | None = None) -> None:
        """Add inputs ``[rows, K]``; ``wanted`` of the same shape are the inputs of the unconverted model."""
        for start in range(0, len(x), _ROWS):
            part = x[start : start + _ROWS].float()
            self._add(part, None if wanted is None else wanted[start : start + _ROWS].float())

    def _add(self, x: Tensor, wanted: Tensor | None) -> None:
        if self.shift is None:
            k = x.shape[1]
            self.shift, self.total = x.mean(0), x.new_zeros(k, dtype=torch.float64)
            self.squares = x.new_zeros(k, k, dtype=torch.float64)
            if wanted is not None:
                self.wanted_shift, self.wanted_total = wanted.mean(0), torch.zeros_like(self.total)
                self.crossed = torch.zeros_like(self.squares)
        self.rows += len(x)
        x = x - self.shift
        self.total += x.sum(0, dtype=torch.float64)
        self.squares += x.t() @ x
        if wanted is not None:
            wanted = wanted - self.wanted_shift
            self.wanted_total += wanted.sum(0, dtype=torch.float64)
            self.crossed += wanted.t() @ x

    @property
    def mean(self) -> Tensor:
        """``[K]``."""
        return self.shift.double() + self.total / self.rows

    @property
    def covariance(self) -> Tensor:
        """``[K, K]``."""
        mean = self.total / self.rows
        return self.squares / self.rows - torch.outer(mean, mean)

    @property
    def wanted_mean(self) -> Tensor:
        """``[K]``; the mean itself where no other inputs were given."""
        return self.mean if self.crossed is None else self.wanted_shift.double() + self.wanted_total / self.rows

    @property
    def cross(self) -> Tensor:
        """``[K, K]``: covariance of the wanted inputs (rows) with the real ones (columns)."""
        if self.crossed is None:
            return self.covariance
        return self.crossed / self.rows - torch.outer(self.wanted_total, self.total) / self.rows**2


def check_geometry(f_out: int, f_in: int, n: int, variant: str) -> None:
    """Raise ``ValueError`` unless ``n`` divides both sides and the variant exists."""
    if variant not in VARIANTS:
        raise ValueError(f"dyad: variant: expected one of {VARIANTS}, got {variant!r}")
    if n < 1 or f_out % n or f_in % n:
        raise ValueError(f"dyad: n: expected a divisor of both {f_out} outputs and {f_in} inputs, got {n}")


def row_classes(f_out: int, n: int, variant: str) -> list[Tensor]:
    """Rows with equal support, per class: its contiguous block, and for "ot" and "dt" its residue too."""
    rows = torch.arange(f_out)
    block, residue = rows // (f_out // n), rows % n
    key = block if variant == "it" else block * n + residue
    return [members for c in range(int(key.max()) + 1) if (members := (key == c).nonzero().flatten()).numel()]


def columns_of(row: int, f_out: int, f_in: int, n: int, variant: str) -> Tensor:
    """The columns that ``row`` may use, sorted."""
    block, residue = row // (f_out // n), row % n
    columns = torch.arange(f_in)
    contiguous, stride = columns // (f_in // n), columns % n
    second = {"it": stride == block, "ot": contiguous == residue, "dt": stride == residue}[variant]
    return ((contiguous == block) | second).nonzero().flatten()


def rows_of(column: int, f_out: int, f_in: int, n: int, variant: str) -> Tensor:
    """The rows that may use ``column``, sorted."""
    block, residue = column // (f_in // n), column % n
    rows = torch.arange(f_out)
    contiguous, stride = rows // (f_out // n), rows % n
    second = {"it": contiguous == residue, "ot": stride == block, "dt": stride == residue}[variant]
    return ((contiguous == block) | second).nonzero().flatten()


def mask(w: Tensor, n: int, variant: str) -> Tensor:
    """The DYAD matrix nearest to ``w`` in Frobenius norm: its entries on the support."""
    check_geometry(*w.shape, n, variant)
    kept = torch.zeros_like(w)
    for rows in row_classes(w.shape[0], n, variant):
        columns = columns_of(int(rows[0]), *w.shape, n, variant)
        kept[rows[:, None], columns] = w[rows[:, None], columns]
    return kept


def damped(covariance: Tensor, ridge: float) -> Tensor:
    """``C + ridge mean(diag C) I`` in float64; with dead inputs only, the identity."""
    covariance = covariance.double()
    level = float(covariance.diagonal().mean())
    return covariance + torch.eye(len(covariance), dtype=torch.float64, device=covariance.device) * (
        ridge * level if level > 0 else 1.0
    )


def fit(w: Tensor, c: Tensor, n: int, variant: str) -> Tensor:
    """The DYAD matrix W' of least ``tr((W - W') C (W - W')^T)``; ``c`` positive definite (see :func:`damped`).

    One Cholesky factorisation of at most 2 K / n columns per class of rows.
    """
    check_geometry(*w.shape, n, variant)
    w = w.double()
    product, fitted = w @ c, torch.zeros_like(w)
    for rows in row_classes(w.shape[0], n, variant):
        columns = columns_of(int(rows[0]), *w.shape, n, variant)
        factor = torch.linalg.cholesky(c[columns[:, None], columns])
        fitted[rows[:, None], columns] = torch.cholesky_solve(product[rows[:, None], columns].t(), factor).t()
    return fitted


def low_rank(w: Tensor, c: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``A [N, r]``, ``B [r, K]`` of least ``tr((W - A B) C (W - A B)^T)``: truncated SVD of ``W Q``, ``C = Q Q^T``."""
    factor = torch.linalg.cholesky(c)
    u, s, v = torch.linalg.svd(w.double() @ factor, full_matrices=False)
    root = s[:rank].sqrt()
    b = torch.linalg.solve_triangular(factor, root[:, None] * v[:rank], upper=False, left=False)
    return u[:, :rank] * root, b


def retarget(w: Tensor, moments: Moments, ridge: float) -> Tensor:
    """The matrix that makes the best of inputs x̃ where x was wanted: ``W (E[x x̃^T] + λ I)(E[x̃ x̃^T] + λ I)^-1``.

    Moving to this target first loses nothing: the error of any W' is its own plus ``tr((W~ - W') C (W~ - W')^T)``.
    """
    if moments.crossed is None:
        return w.double()
    c = damped(moments.covariance, ridge)
    cross = moments.cross + (c - moments.covariance)
    return torch.cholesky_solve((w.double() @ cross).t(), torch.linalg.cholesky(c)).t()


@dataclass(frozen=True)
class Solution:
    """A converted layer: ``y = W' x + A B x + bias``; float64.

    Attributes:
        w: ``[N, K]``, zero outside the support.
        bias: ``[N]``; makes the mean output exact.
        a, b: ``[N, r]`` and ``[r, K]``, or None.
    """

    w: Tensor
    bias: Tensor
    a: Tensor | None = None
    b: Tensor | None = None

    @property
    def dense(self) -> Tensor:
        """Everything that x is multiplied with."""
        return self.w if self.a is None else self.w + self.a @ self.b


def solve(
    w: Tensor,
    bias: Tensor | None,
    n: int,
    variant: str,
    moments: Moments | None = None,
    *,
    ridge: float = 1e-2,
    rank: int = 0,
    rounds: int = 3,
) -> Solution:
    """Convert ``y = W x + bias``.

    Args:
        w: ``[N, K]``.
        bias: ``[N]`` or None.
        moments: of the inputs; None is masking (white inputs without a mean).
        ridge: relative to the mean variance of the inputs.
        rank: of the remainder ``A B``; the two parts are fitted in turns, ``rounds`` times.

    Raises:
        ValueError: sides that n does not divide, unknown variant, rank out of range.
    """
    check_geometry(*w.shape, n, variant)
    if not 0 <= rank <= min(w.shape):
        raise ValueError(f"dyad: rank: expected 0..{min(w.shape)}, got {rank}")
    f_out, f_in = w.shape
    old = torch.zeros(f_out, dtype=torch.float64) if bias is None else bias.double()
    if moments is None:
        c, target = torch.eye(f_in, dtype=torch.float64), w.double()
    else:
        c, target = damped(moments.covariance, ridge), retarget(w, moments, ridge)
    a = b = None
    fitted = fit(target, c, n, variant) if moments is not None else mask(target, n, variant)
    for _ in range(rounds if rank else 0):
        a, b = low_rank(target - fitted, c, rank)
        fitted = fit(target - a @ b, c, n, variant)
    if moments is None:
        return Solution(fitted, old, a, b)
    found = Solution(fitted, old, a, b)
    return Solution(fitted, old + w.double() @ moments.wanted_mean - found.dense @ moments.mean, a, b)


def relative_error(w: Tensor, fitted: Tensor, covariance: Tensor) -> Tensor:
    """Per row: error of the output over the output's own variation, ``sqrt(e C e^T / w C w^T)``."""
    difference = w.double() - fitted.double()
    wrong, whole = ((m @ covariance * m).sum(1).clamp_min(0) for m in (difference, w.double()))
    return (wrong / whole.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
