"""Filters of long convolutions as modules, so that a compressed one can take the place of another.

A block with a long convolution keeps its filter as a child module of this kind and asks it for taps in every forward
pass::

    k = self.filter(length)                 # (channels, K), fp32, K <= length, k[:, 0] multiplies the current sample
    y = self.conv(v, k, ...)                # effk.nn.FFTConv chooses sizes by K

Nothing else is needed for :func:`effk.compress` to shorten or band-limit it: the recipes read the taps, decide, and put
an :class:`ExplicitFilter` or a :class:`BandLimitedFilter` in its place.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LongFilter(nn.Module):
    """Base of all filters: ``forward(length)`` gives the causal taps for sequences of that length."""

    def forward(self, length: int) -> Tensor:
        """``(channels, K)``, fp32, ``K <= length``; the same taps for every length, only cut."""
        raise NotImplementedError


class ExplicitFilter(LongFilter):
    """Stored taps ``(channels, K)``: a parameter, frozen unless ``trainable``. Memory: 4 bytes a tap."""

    def __init__(self, taps: Tensor, trainable: bool = False) -> None:
        """
        Raises:
            ValueError: ``taps`` is not a matrix of at least one tap.
        """
        super().__init__()
        if taps.dim() != 2 or 0 in taps.shape:
            raise ValueError(f"ExplicitFilter: taps: expected (channels, K), got {list(taps.shape)}")
        self.taps = nn.Parameter(taps.detach().float().contiguous().clone(), requires_grad=trainable)

    def forward(self, length: int) -> Tensor:
        return self.taps if length >= self.taps.shape[1] else self.taps[:, :length].contiguous()

    def extra_repr(self) -> str:
        return f"channels={self.taps.shape[0]}, taps={self.taps.shape[1]}"


class BandLimitedFilter(LongFilter):
    """The lowest ``F`` frequencies of filters up to ``length`` taps: 8 bytes each, instead of 4 bytes a tap.

    With N = 2 length, taps t = 0 .. length - 1 are::

        k[h, t] = irfft(bins[h] with zeros up to N / 2 + 1, N)[t]

    so of ``rfft(k, N)`` only the bins f < F are kept; a real transform holds f and N - f together, hence the mask is
    symmetric. What the inverse transform has at positions from ``length`` on belongs to negative lags. A causal
    convolution has no such taps, and dropping them here is what keeps a language model from seeing the future; it also
    makes the result only nearly band-limited.
    """

    def __init__(self, bins: Tensor, length: int, trainable: bool = False) -> None:
        """
        Args:
            bins: complex64 ``(channels, F)``, 1 <= F <= length + 1.
            length: of the longest sequence.

        Raises:
            ValueError: other shapes.
        """
        super().__init__()
        if bins.dim() != 2 or not bins.is_complex() or 0 in bins.shape or bins.shape[1] > length + 1:
            raise ValueError(
                f"BandLimitedFilter: bins: expected complex (channels, F) with 1 <= F <= {length + 1}, "
                f"got {bins.dtype} {list(bins.shape)}"
            )
        self.length = length
        pairs = torch.view_as_real(bins.detach().to(torch.complex64).resolve_conj()).contiguous().clone()
        self.bins = nn.Parameter(pairs, requires_grad=trainable)
        self._kept: tuple[tuple[int, int], Tensor] | None = None

    def forward(self, length: int) -> Tensor:
        if length > self.length:
            raise ValueError(f"BandLimitedFilter: length: expected at most {self.length}, got {length}")
        if torch.is_grad_enabled() and self.bins.requires_grad:
            return self._taps()[:, :length].contiguous()
        key = (length, self.bins._version)
        if self._kept is None or self._kept[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                self._kept = (key, self._taps()[:, :length].contiguous())
        return self._kept[1]

    def _taps(self) -> Tensor:
        return torch.fft.irfft(torch.view_as_complex(self.bins), 2 * self.length)[:, : self.length]

    def extra_repr(self) -> str:
        return f"channels={self.bins.shape[0]}, bins={self.bins.shape[1]} of {self.length + 1}"


def low_pass(taps: Tensor, keep: int, length: int | None = None) -> Tensor:
    """The lowest ``keep`` bins of ``rfft(taps, 2 length)``, complex64; taps ``(channels, K)``, length from K on."""
    return torch.fft.rfft(taps.double(), 2 * (length or taps.shape[1]))[:, :keep].to(torch.complex64)
