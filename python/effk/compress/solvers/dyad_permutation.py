"""The order of the hidden units of a feed-forward network, chosen so that DYAD matrices lose little.

Permuting hidden units (rows of the first matrices, columns of the second) changes nothing but which entries fall on
the support. Hidden position p has a contiguous block ``a = p // (H / n)`` and a residue ``c = p mod n``; these decide
which inputs its row in the first matrix may read and which outputs its column in the second may write. Every unit has
a score for each of the n^2 classes (a, c), classes have room for about H / n^2 units, and the best total is an
assignment problem.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .dyad import columns_of, rows_of

LARGEST = 4096  # units assigned at once: their matrix takes 134 MB, the exact solver about a second


def classes(hidden: int, n: int) -> Tensor:
    """Class ``a n + c`` of every hidden position."""
    p = torch.arange(hidden)
    return p // (hidden // n) * n + p % n


def explained(w: Tensor, c: Tensor, n: int, variant: str) -> Tensor:
    """``[H, n^2]``: variance of each row's output that the columns of each class can reproduce.

    ``w_u C[:, S] C[S, S]^-1 C[S, :] w_u^T`` for the columns S of a class; ``c`` positive definite.
    """
    hidden, f_in = w.shape
    product, kinds = w.double() @ c, classes(hidden, n)
    out = torch.zeros(hidden, n * n, dtype=torch.float64, device=w.device)
    if variant == "it":  # a row's support follows from its contiguous block alone
        kinds = kinds // n
    width = n if variant == "it" else 1
    for kind in kinds.unique().tolist():
        columns = columns_of(int((kinds == kind).nonzero()[0]), hidden, f_in, n, variant)
        factor = torch.linalg.cholesky(c[columns[:, None], columns])
        solved = torch.linalg.solve_triangular(factor, product[:, columns].t(), upper=False)
        out[:, kind * width : (kind + 1) * width] = solved.square().sum(0)[:, None]
    return out


def kept(w: Tensor, n: int, variant: str) -> Tensor:
    """``[H, n^2]``: squared entries of each column of the second matrix ``[N, H]`` on the rows of each class."""
    f_out, hidden = w.shape
    squares, kinds = w.double().square(), classes(hidden, n)
    out = torch.zeros(hidden, n * n, dtype=torch.float64, device=w.device)
    for kind in kinds.unique().tolist():
        rows = rows_of(int((kinds == kind).nonzero()[0]), f_out, hidden, n, variant)
        out[:, kind] = squares[rows].sum(0)
    return out


def assign(scores: Tensor, n: int) -> Tensor:
    """The unit for every hidden position, of the largest sum of ``scores`` ``[H, n^2]``; exact up to 4096 units.

    More units are dealt into parts, each with its share of the places of every class, and each part is exact.
    """
    hidden = len(scores)
    places = classes(hidden, n).sort(stable=True).indices
    parts = -(-hidden // LARGEST)
    order = torch.empty(hidden, dtype=torch.int64)
    for part in range(parts):
        units, own = torch.arange(part, hidden, parts), places[part::parts]
        cost = scores.cpu()[units][:, classes(hidden, n)[own]]
        row, column = linear_sum_assignment(cost.numpy(), maximize=True)
        order[own[torch.from_numpy(column)]] = units[torch.from_numpy(row)]
    return order
