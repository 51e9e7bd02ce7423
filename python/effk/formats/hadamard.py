"""An orthogonal rotation of any width, dense enough to spread single large entries over many, and fast to apply.

``R = I_blocks (x) S_sylvester (x) B_base / sqrt(sylvester * base)`` with ``width = blocks * sylvester * base``: S is
Sylvester's Hadamard matrix of a power of two, B one of Paley's. A row vector x becomes ``x R``; a weight whose inputs are
rotated ``W R``, because ``x W^T = (x R) (W R)^T``. R costs ``base`` multiplications an entry, and 64 for every factor of 64 in
the power of two, instead of ``width``.

True Hadamard matrices (one block) exist here for every ``2^a m`` for which some ``2^t m <= 512``, ``2 <= t <= a``, is p + 1
with a prime ``p = 3 mod 4``, or 2 (p + 1) with a prime ``p = 1 mod 4`` (Paley, 1933): 576 = 16 * 36, 1536 = 128 * 12,
384 = 32 * 12, 14336 = 512 * 28. Elsewhere the rotation is the largest such matrix, block by block: 11008 = 43 * 256. An odd
width has no such factor and stays as it is.

Source of the use: Ashkboos et al., "QuaRot", 2024.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

_LARGEST_BASE = 512
_LARGEST_STEP = 64  # of the Sylvester part: a larger power of two is applied in several steps


@functools.cache
def factors(width: int) -> tuple[int, int, int]:
    """``(blocks, sylvester, base)`` of the rotation of ``width``; ValueError unless that is positive."""
    if width < 1:
        raise ValueError(f"factors: width: expected at least 1, got {width}")
    power = (width & -width).bit_length() - 1
    odd = width >> power
    for part in sorted((d for d in range(1, odd + 1) if odd % d == 0), reverse=True):
        if part == 1:
            return odd, 1 << power, 1
        for shift in range(2, power + 1):
            base = part << shift
            if base <= _LARGEST_BASE and _paley_prime(base):
                return odd // part, 1 << (power - shift), base
    raise AssertionError("the divisor 1 always serves")


@functools.cache
def base_matrix(order: int) -> Tensor:
    """int8 ``[order, order]`` of +1 and -1 with orthogonal rows: 1, or a Paley order; ValueError for others."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.int8)
    prime = _paley_prime(order)
    if not prime:
        raise ValueError(f"base_matrix: order: expected 1, p + 1 or 2 (p + 1) with a suitable prime p, got {order}")
    squares = {i * i % prime for i in range(1, prime)}
    residue = torch.tensor([0] + [1 if i in squares else -1 for i in range(1, prime)], dtype=torch.int8)
    index = torch.arange(prime)
    conference = torch.ones(prime + 1, prime + 1, dtype=torch.int8)
    conference[0, 0] = 0
    conference[1:, 1:] = residue[(index[:, None] - index[None, :]) % prime]
    if order == prime + 1:  # p = 3 mod 4: the residues are antisymmetric
        conference[1:, 0] = -1
        return conference + torch.eye(order, dtype=torch.int8)
    plus, minus = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8), torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(conference, plus) + torch.kron(torch.eye(prime + 1, dtype=torch.int8), minus)


@functools.cache
def sylvester(order: int) -> Tensor:
    """int8 ``[order, order]`` of +1 and -1, symmetric, for a power of two."""
    index = torch.arange(order)
    both = index[:, None] & index[None, :]
    ones = torch.zeros_like(both)
    while int(both.max()):
        ones, both = ones ^ (both & 1), both >> 1
    return (1 - 2 * ones).to(torch.int8)


def rotate(x: Tensor, *, inverse: bool = False) -> Tensor:
    """``x R``, or ``x R^T`` if ``inverse``, of ``x`` floating ``[..., width]``; computed in fp32, or in fp64 for such x."""
    width = x.shape[-1]
    _, power, base = factors(width)
    matrix = base_matrix(base).to(x.device)
    step = sylvester(min(power, _LARGEST_STEP)).to(x.device)
    return apply(x, matrix.t() if inverse else matrix, step, power)


def apply(x: Tensor, base: Tensor, step: Tensor, power: int) -> Tensor:
    """:func:`rotate` with the matrices given: ``base`` from the right, and Sylvester's of ``power`` in steps of ``step``.

    ``step`` is :func:`sylvester` of ``min(power, 64)``; its upper left corners are those of smaller orders.
    """
    work = x if x.dtype == torch.float64 else x.float()
    order = base.shape[0]
    y = work.reshape(-1, order)
    if order > 1:
        y = y @ base.to(y.dtype)
    left, inner = power, order  # the Sylvester part acts on an index that lies above ``inner`` entries
    while left > 1:
        now = min(left, step.shape[0])
        y = step[:now, :now].to(y.dtype) @ y.reshape(-1, now, inner)
        left, inner = left // now, inner * now
    return (y.reshape(x.shape) * (1 / math.sqrt(power * order))).to(x.dtype)


def _paley_prime(order: int) -> int:
    """The prime from which Paley makes a matrix of ``order``, or 0."""
    if _is_prime(order - 1) and (order - 1) % 4 == 3:
        return order - 1
    half = order // 2 - 1
    return half if order % 2 == 0 and half % 4 == 1 and _is_prime(half) else 0


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))
