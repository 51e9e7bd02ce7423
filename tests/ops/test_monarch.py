"""The dense Monarch form: its permuted order, its mirror, sparse spectra, and that it is the convolution."""

from __future__ import annotations

import math

import pytest
import torch

from effk.ops import monarch

FACTORS = {
    "8": (8,), "4x8": (4, 8), "2x3x4": (2, 3, 4), "5x2x2x3": (5, 2, 2, 3), "16x16": (16, 16), "16x16x16": (16, 16, 16),
    "32x16x16": (32, 16, 16), "16x32x32": (16, 32, 32),
}  # fmt: skip
KINDS = pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS)


def relative(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y - expected).abs().max() / expected.abs().max())


@KINDS
def test_forward_is_the_dft_at_permuted_positions(factors: tuple[int, ...]) -> None:
    x = torch.randn(2, math.prod(factors), dtype=torch.complex128)
    spectrum = monarch.monarch_forward(x, factors)
    assert relative(spectrum, torch.fft.fft(x)[:, monarch.frequencies(factors)]) < 1e-13
    assert relative(monarch.monarch_inverse(spectrum, factors), x) < 1e-13


@KINDS
def test_a_tone_peaks_at_the_position_of_its_digits(factors: tuple[int, ...]) -> None:
    """Digits of f with k_1 the least significant: position k_1 * (N / N_1) + k_2 * (N / (N_1 N_2)) + ..."""
    size = math.prod(factors)
    for f in {0, 1, 2, factors[0] - 1, size // 2, size // 3, size - 1}:
        position, rest, block = 0, f, size
        for factor in factors:
            block //= factor
            position, rest = position + rest % factor * block, rest // factor
        n = torch.arange(size)
        tone = torch.exp(2j * math.pi * ((n * f) % size).double() / size)
        spectrum = monarch.monarch_forward(tone, factors).abs()
        assert int(spectrum.argmax()) == position
        assert abs(float(spectrum[position]) - size) < 1e-9 * size
        spectrum[position] = 0
        assert float(spectrum.max()) < 1e-9 * size


@pytest.mark.parametrize(
    "factors", [(16, 16), (16, 16, 16), (32, 16, 16), (16, 32, 32), (16, 16, 16, 16), (32, 16, 16, 8)], ids=str
)
def test_permutation_is_a_gather(factors: tuple[int, ...]) -> None:
    """256 to 64K points, against the frequency of every position computed digit by digit."""
    size = math.prod(factors)
    brute = torch.empty(size, dtype=torch.long)
    for position in range(size):
        f, stride, block, rest = 0, 1, size, position
        for factor in factors:
            block //= factor
            digit, rest = divmod(rest, block)
            f, stride = f + digit * stride, stride * factor
        brute[position] = f
    assert torch.equal(monarch.frequencies(factors), brute)
    spectrum = torch.randn(2, size)
    assert torch.equal(monarch.permute_spectrum(spectrum, factors), spectrum[:, brute])


@KINDS
def test_mirror_negates_the_frequency(factors: tuple[int, ...]) -> None:
    f = monarch.frequencies(factors)
    assert torch.equal(f[monarch.mirror(factors)], -f % math.prod(factors))


@KINDS
def test_digit_box_of_real_rows_zeroes_f_and_minus_f(factors: tuple[int, ...]) -> None:
    """The real part of a cut spectrum is the spectrum times symmetric weights; frequencies with both f and -f cut are gone."""
    size = math.prod(factors)
    u, k = torch.randn(1, 2, size, dtype=torch.float64), torch.randn(2, size, dtype=torch.float64)
    box = monarch.digit_box(factors, [max(1, factor // 2) for factor in factors])
    f = monarch.frequencies(factors)
    kept = torch.zeros(size)
    kept[f[box]] = 1
    weights = (kept + kept[-torch.arange(size) % size]) / 2
    both = torch.fft.ifft(torch.fft.fft(u) * torch.fft.fft(k) * weights).real
    cut = torch.fft.ifft(torch.fft.fft(u) * torch.fft.fft(k) * kept).real
    y = monarch.monarch_reference(u, k, factors, box=box)
    assert relative(y, both) < 1e-12
    assert relative(y, cut) < 1e-12
    assert float((torch.fft.fft(y).abs() * (weights == 0)).max()) < 1e-9 * size


@pytest.mark.parametrize("factors", [(16, 16), (8, 4, 8), (32, 8)], ids=str)
def test_bands_of_the_last_digit_are_a_low_pass(factors: tuple[int, ...]) -> None:
    size, last = math.prod(factors), factors[-1]
    u, k = torch.randn(1, 2, size // 2, dtype=torch.float64), torch.randn(2, size // 2, dtype=torch.float64)
    for bands in (1, 2, last // 2):
        kept = size // last * bands
        box = monarch.digit_box(factors, [*[None] * (len(factors) - 1), [*range(bands), *range(last - bands, last)]])
        f = monarch.frequencies(factors)
        assert set(f[box].tolist()) == {*range(kept), *range(size - kept, size)}
        cut = torch.fft.rfft(k, size)
        cut[:, kept + 1 :] = 0  # bin F itself has its mirror N - F in the box: half of it stays
        cut[:, kept] /= 2 if kept < size // 2 else 1
        expected = torch.fft.irfft(torch.fft.rfft(u, size) * cut, size)[..., : size // 2]
        assert relative(monarch.monarch_reference(u, k, factors, box=box), expected) < 1e-12


def test_dft_matrix_is_exact_where_the_product_of_indices_is_large() -> None:
    size = 1024
    row = monarch.dft_matrix(size)[size - 1]  # exponent (size - 1) n, reduced: n -> -n
    assert relative(row, monarch.dft_matrix(size)[1].conj()) < 1e-15
