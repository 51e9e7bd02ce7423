"""Partial convolution: only the first taps of a long filter are kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...nn import ExplicitFilter, LongFilter
from ..filters import FilterHandler, FilterRecipe
from ..registry import register

_BLOCKS = tuple(1 << a for a in range(8, 16))  # transforms of overlap-save
_DIRECT = 64  # taps up to which the direct sum is taken


@dataclass(frozen=True, kw_only=True)
class Partial(FilterRecipe):
    """Cut every filter to its first taps, which are stored explicitly.

    ``size`` counts taps. Source: partial convolutions of FlashFFTConv (Fu et al., 2023, arXiv:2311.05908); there the
    length is given, here it may follow from a budget, filter by filter.
    """

    name: ClassVar[str] = "partial"
    version: ClassVar[int] = 1


@register(Partial)
class PartialHandler(FilterHandler):
    unit = "taps"

    def sizes(self, length: int) -> list[int]:
        """Powers of two, their 1.5-fold, and everything: between them a convolution costs about the same."""
        steps = {size for a in range(length.bit_length()) for size in (1 << a, 3 << a >> 1) if 0 < size < length}
        return [*sorted(steps), length]

    def build(self, taps: Tensor, size: int) -> LongFilter:
        return ExplicitFilter(taps[:, :size])

    def operations(self, length: int, size: int) -> float:
        return operations(length, size)


def operations(length: int, taps: int) -> float:
    """Per output of a causal convolution: a direct sum up to 64 taps, else one transform or the best of overlap-save.

    A transform of n real points is two of n / 2 complex ones in split-radix operations (4 M log2 M - 6 M + 8), with a
    product of 6 M between them.
    """
    if taps <= _DIRECT:
        return 2.0 * taps

    def transform(n: int) -> float:
        m = n / 2
        return 2 * (4 * m * math.log2(m) - 6 * m + 8) + 6 * m

    whole = 1 << (length + taps - 2).bit_length()
    cut = [transform(n) / (n - taps + 1) for n in _BLOCKS if n >= 2 * taps and n < whole]
    return min([transform(whole) / length, *cut])
