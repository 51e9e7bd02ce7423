"""Filters as modules: stored taps, and stored low frequencies whose taps stay causal."""

from __future__ import annotations

import pytest
import torch

from effk.nn import BandLimitedFilter, ExplicitFilter, LongFilter
from effk.nn.long_filter import low_pass

L = 48


def taps(channels: int = 3, length: int = L) -> torch.Tensor:
    return torch.randn(channels, length, generator=torch.Generator().manual_seed(0))


def test_explicit_taps_are_cut_to_the_length() -> None:
    filter_ = ExplicitFilter(taps())
    assert torch.equal(filter_(L), taps()) and torch.equal(filter_(1000), taps())
    assert torch.equal(filter_(5), taps()[:, :5]) and filter_(5).is_contiguous()
    assert isinstance(filter_, LongFilter) and not filter_.taps.requires_grad
    assert ExplicitFilter(taps(), trainable=True)(7).requires_grad
    assert list(filter_.state_dict()) == ["taps"]


def test_all_frequencies_give_the_taps_back() -> None:
    filter_ = BandLimitedFilter(low_pass(taps(), L + 1), L)
    torch.testing.assert_close(filter_(L), taps(), rtol=0, atol=2e-6)
    torch.testing.assert_close(filter_(9), taps()[:, :9], rtol=0, atol=2e-6)


@pytest.mark.parametrize("keep", [1, 2, 17, L])
def test_low_frequencies_are_those_of_the_real_transform_cut_to_causal_lags(keep: int) -> None:
    spectrum = torch.fft.fft(taps().double(), 2 * L)
    spectrum[:, keep : 2 * L - keep + 1] = 0  # f and N - f together: the mask is symmetric
    whole = torch.fft.ifft(spectrum)
    assert float(whole.imag.abs().max()) < 1e-12
    got = BandLimitedFilter(low_pass(taps(), keep), L)(L)
    torch.testing.assert_close(got.double(), whole.real[:, :L], rtol=0, atol=2e-6)


def test_shorter_filters_are_transformed_at_the_length_of_the_sequences() -> None:
    bins = low_pass(taps(length=10), L + 1, L)
    torch.testing.assert_close(BandLimitedFilter(bins, L)(L)[:, :10], taps(length=10), rtol=0, atol=2e-6)


def test_taps_are_made_once_until_the_bins_change() -> None:
    filter_ = BandLimitedFilter(low_pass(taps(), 9), L)
    first = filter_(L)
    assert filter_(L) is first
    with torch.no_grad():
        filter_.bins.mul_(2)
    torch.testing.assert_close(filter_(L), 2 * first)
    loaded = BandLimitedFilter(torch.zeros(3, 9, dtype=torch.complex64), L)
    loaded.load_state_dict(filter_.state_dict())
    assert torch.equal(loaded(L), filter_(L))


def test_bins_can_be_trained() -> None:
    filter_ = BandLimitedFilter(low_pass(taps(), 9), L, trainable=True)
    filter_(20).square().sum().backward()
    assert float(filter_.bins.grad.abs().sum()) > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExplicitFilter(torch.zeros(3)), r"taps: expected \(channels, K\), got \[3\]"),
        (lambda: ExplicitFilter(torch.zeros(3, 0)), r"got \[3, 0\]"),
        (lambda: BandLimitedFilter(torch.zeros(3, 4), 8), "bins: expected complex"),
        (lambda: BandLimitedFilter(torch.zeros(3, 10, dtype=torch.complex64), 8), "1 <= F <= 9"),
        (
            lambda: BandLimitedFilter(torch.zeros(3, 4, dtype=torch.complex64), 8)(9),
            "length: expected at most 8, got 9",
        ),
    ],
)
def test_bad_input_is_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
