"""Frequency-sparse convolution: only the low frequencies of a long filter are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...nn import BandLimitedFilter, LongFilter
from ...nn.long_filter import low_pass
from ..filters import FilterHandler, FilterRecipe
from ..registry import register
from .partial import operations

_STEPS = 4  # sizes per doubling


@dataclass(frozen=True, kw_only=True)
class FrequencySparse(FilterRecipe):
    """Keep the lowest frequencies of every filter, stored as complex numbers; the taps are made from them when loaded.

    ``size`` counts bins of ``rfft(k, 2 length)``, of which there are ``length + 1``. What becomes smaller is what is
    stored: the kernels for the CPU multiply all frequencies, also those that are zero, so the convolution takes as long
    as before. The taps are cut to the causal ones (:class:`effk.nn.BandLimitedFilter` says why).

    Source: frequency-sparse convolutions of FlashFFTConv (Fu et al., 2023, arXiv:2311.05908), which let the part at
    negative lags act.
    """

    name: ClassVar[str] = "frequency-sparse"
    version: ClassVar[int] = 1


@register(FrequencySparse)
class FrequencySparseHandler(FilterHandler):
    unit = "bins"

    def sizes(self, length: int) -> list[int]:
        """Four sizes per doubling; everything at the end."""
        steps = {round(2 ** (i / _STEPS)) for i in range(_STEPS * length.bit_length())}
        return [*sorted(size for size in steps if size < length + 1), length + 1]

    def build(self, taps: Tensor, size: int) -> LongFilter:
        return BandLimitedFilter(low_pass(taps, size), taps.shape[1])

    def operations(self, length: int, size: int) -> float:
        return operations(length, length)
