"""The Monarch form of a long convolution, in plain torch: the readable reference, and what a matrix unit would run.

An FFT of ``N = N_1 N_2 ... N_p`` points is p products with small dense DFT matrices and twiddle factors between them.
With ``M = N / N_1`` and x viewed as N_1 rows of M columns::

    forward:  Y = (F_{N_1} X) * T,  T[k, j] = exp(-2 pi i k j / N);  then each row of Y by the other factors
    inverse:  the exact mirror, with conjugates, divided by N

Nothing is ever put in order: position ``(k_1, ..., k_p)``, row-major, holds frequency
``f = k_1 + N_1 k_2 + N_1 N_2 k_3 + ...`` (:func:`frequencies`), and the filter's spectrum is stored at the same
positions (:func:`permute_spectrum`). Cost per complex point and transform: ``8 sum(N_i) + 6 (p - 1)`` flops, against
``4 log2 N - 6`` of a split-radix FFT, so that this form pays only on units which multiply matrices 4 to 10 times
faster than vectors.

Source: FlashFFTConv (Fu, Kumbong, Nguyen, Ré, 2023, arXiv:2311.05908), section 3.1; the rule for the real part of
sparse spectra and the carry of :func:`mirror` are derived here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def frequencies(factors: Sequence[int]) -> Tensor:
    """The frequency that each position of a permuted spectrum holds, ``[N]``."""
    table, stride = torch.zeros(1, dtype=torch.long), 1
    for factor in factors:
        table = (table[:, None] + stride * torch.arange(factor)).flatten()
        stride *= factor
    return table


def mirror(factors: Sequence[int]) -> Tensor:
    """The position of frequency -f for the position of each f: digits negated, k_1 least significant, with the carry.

    The carry into the next digit is 1 only while all digits so far are 0: block k_1 pairs with block N_1 - k_1.
    """
    position, carry = torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.long)
    for factor in factors:
        negated = (
            factor - 1 - torch.arange(factor) + carry[:, None]
        )  # factor when the carry runs on: digit 0 and carry 1
        carry = (negated // factor).flatten()
        position = (position[:, None] * factor + negated % factor).flatten()
    return position


def permute_spectrum(spectrum: Tensor, factors: Sequence[int]) -> Tensor:
    """A natural-order spectrum ``[..., N]`` in permuted order: transposes only."""
    if len(factors) == 1:
        return spectrum
    first, rest = factors[0], factors[1:]
    rows = spectrum.unflatten(-1, (-1, first)).transpose(-1, -2)
    return permute_spectrum(rows, rest).flatten(-2)


def dft_matrix(size: int, dtype: torch.dtype = torch.complex128) -> Tensor:
    """``F[k, n] = exp(-2 pi i k n / size)``; the exponent is reduced first, so that large products lose nothing."""
    n = torch.arange(size)
    return _roots(torch.outer(n, n), size, dtype)


def _roots(exponent: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    angle = (exponent % size).double() * (-2 * math.pi / size)
    return torch.polar(torch.ones_like(angle), angle).to(dtype)


def _twiddles(first: int, columns: int, dtype: torch.dtype) -> Tensor:
    return _roots(torch.outer(torch.arange(first), torch.arange(columns)), first * columns, dtype)


def monarch_forward(x: Tensor, factors: Sequence[int]) -> Tensor:
    """DFT of complex ``[..., N]``: natural order in, permuted order out."""
    first, rest = factors[0], factors[1:]
    if not rest:
        return x @ dft_matrix(first, x.dtype)
    rows = x.unflatten(-1, (first, -1))
    rows = (dft_matrix(first, x.dtype) @ rows) * _twiddles(first, rows.shape[-1], x.dtype)
    return monarch_forward(rows, rest).flatten(-2)


def monarch_inverse(spectrum: Tensor, factors: Sequence[int]) -> Tensor:
    """Inverse DFT of complex ``[..., N]``, divided by N: permuted order in, natural order out."""
    first, rest = factors[0], factors[1:]
    if not rest:
        return spectrum @ dft_matrix(first, spectrum.dtype).conj() / first
    rows = monarch_inverse(spectrum.unflatten(-1, (first, -1)), rest)
    rows = rows * _twiddles(first, rows.shape[-1], rows.dtype).conj()
    return (dft_matrix(first, rows.dtype).conj() @ rows / first).flatten(-2)


def digit_box(factors: Sequence[int], kept: Sequence[int | Iterable[int] | None]) -> Tensor:
    """Which positions of a permuted spectrum a digit box keeps, bool ``[N]``: digit i below ``kept[i]``, or among them.

    A forward transform restricted to a box costs its stage i only ``prod_{j <= i} a_j / N_j`` of the dense stage.
    Keeping few k_1 leaves a comb (``f mod N_1``) and saves most; keeping few k_p leaves bands: a low pass of
    F = a N / N_p frequencies is ``k_p`` in ``[0, a)`` or ``[N_p - a, N_p)`` and all of the other digits.
    """
    box = torch.ones(1, dtype=torch.bool)
    for factor, digits in zip(factors, kept, strict=True):
        keep = torch.zeros(factor, dtype=torch.bool)
        keep[list(range(factor) if digits is None else range(digits) if isinstance(digits, int) else digits)] = True
        box = (box[:, None] & keep).flatten()
    return box


def real_weights(box: Tensor, factors: Sequence[int]) -> Tensor:
    """What a digit box does to real rows: a factor 1, 1/2 (one of f, -f kept) or 0 at each position, float64 ``[N]``.

    A box is not conjugate symmetric. The real part of a result whose spectrum was cut to the box is the result for the
    spectrum times these weights, which are symmetric; two real rows in one complex transform would mix without them.
    """
    return (box.double() + box[mirror(factors)].double()) / 2


def monarch_reference(
    u: Tensor,
    k: Tensor,
    factors: Sequence[int],
    pregate: Tensor | None = None,
    postgate: Tensor | None = None,
    skip: Tensor | None = None,
    box: Tensor | None = None,
) -> Tensor:
    """The convolution of :mod:`effk.ops.fftconv` with ``n_fft = prod(factors)``, by dense matrices, complex128.

    One formula for all modes: a circular convolution of n_fft points of which the first L are returned. It is the
    causal one when n_fft >= L + K - 1, the circular one when n_fft = L, the bidirectional one when n_fft = K >= 2 L.

    Args:
        box: which positions of the spectrum are kept (:func:`digit_box`), with the meaning of :func:`real_weights`.

    Returns:
        float64 ``(B, H, L)``.
    """
    size, length = math.prod(factors), u.shape[-1]
    v = u.double() if pregate is None else u.double() * pregate.double()
    spectrum = permute_spectrum(torch.fft.fft(k.double(), size), factors)
    if box is not None:
        spectrum = spectrum * real_weights(box, factors)
    padded = torch.nn.functional.pad(v, (0, size - length)).to(torch.complex128)
    y = monarch_inverse(monarch_forward(padded, factors) * spectrum, factors).real[..., :length]
    if skip is not None:
        y = y + skip.double()[:, None] * v
    return y if postgate is None else y * postgate.double()
