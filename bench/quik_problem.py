"""Layers of quik_linear to measure: sizes, kinds of call, the data of one size, its results in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from effk.formats.wq import WqWeight
from effk.ops import quik_linear as ql

from . import machine

PRODUCT, LAYER = "product", "layer"  # int8 codes to int32 sums; x to y with everything in between
KINDS = (PRODUCT, LAYER)
BITS = (8, 4)  # of weights; activations have 8
BITS_A = 8
OUTLIERS = 256
ROWS = (1, 2, 4, 8, 128, 512, 2048)
FEW = ql.FEW_ROWS

CHECKED = 8  # first and last rows of a result
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}  # of the largest result of a row: the specification's


@dataclass(frozen=True)
class Layer:
    """n outputs, k inputs."""

    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.n}x{self.k}"


LAYERS = (Layer(4096, 4096), Layer(11008, 4096), Layer(4096, 11008))


class Made(NamedTuple):
    """What a backend makes of a problem."""

    call: Callable[[int], object]  # with copy i of the weight; this is timed
    match: Callable[[Tensor], float]  # error of a result over its bound
    products: int = 1  # done by one call
    read: Callable[[object], Tensor] = lambda result: result


class Base(NamedTuple):
    """A weight of `bits` bits with so many outlier columns."""

    weight: WqWeight
    packed: ql.PackedQuik
    int_idx: Tensor | None
    fp_idx: Tensor | None
    w_out: Tensor | None


class Problem:
    """The tensors of one size. No biases: not all competitors have them for free."""

    def __init__(self, layer: Layer, m: int, seed: int = 0) -> None:
        self.layer, self.m, self._rng = layer, m, torch.Generator().manual_seed(seed)
        self._bases: dict[tuple[int, int], Base] = {}
        self.w = torch.randn(layer.n, layer.k, generator=self._rng) / math.sqrt(layer.k)
        self.x = torch.randn(m, layer.k, generator=self._rng)
        count = min(OUTLIERS, layer.k // 4)
        self.outliers = torch.randperm(layer.k, generator=self._rng)[:count].sort().values
        self.x[:, self.outliers] *= 10
        self.x = self.x.bfloat16().float()  # the same values in either dtype
        self.w = self.w.bfloat16().float()

    @cached_property
    def checked(self) -> Tensor:
        """Rows that are compared."""
        m = self.m
        return torch.tensor(range(m) if m <= 2 * CHECKED else [*range(CHECKED), *range(m - CHECKED, m)])

    @cached_property
    def codes(self) -> Tensor:
        """int8 activations of the bare product."""
        return torch.randint(-128, 128, (self.m, self.layer.k), generator=self._rng, dtype=torch.int8)

    def int_weight(self, bits: int) -> Tensor:
        """int8 [n, k] with values of `bits` bits."""
        half = 1 << (bits - 1)
        rng = torch.Generator().manual_seed(bits)
        return torch.randint(-half, half, self.w.shape, generator=rng, dtype=torch.int8)

    def base(self, bits: int, outliers: bool) -> Base:
        """The layer's weight in codes, rounded to nearest, and its outlier columns in bf16."""
        if (bits, outliers) not in self._bases:
            mask = torch.ones(self.layer.k, dtype=torch.bool)
            if outliers:
                mask[self.outliers] = False
            w = self.w[:, mask]
            scales = w.abs().amax(1) / ((1 << (bits - 1)) - 1)
            half = 1 << (bits - 1)
            codes = ((w / scales[:, None]).round().clamp(-half, half - 1) + half).to(torch.uint8)
            weight = WqWeight.from_codes(codes, scales[:, None], bits=bits, group_size=0)
            w_out = self.w[:, self.outliers].bfloat16() if outliers else None
            index = (mask.nonzero()[:, 0].int(), self.outliers.int()) if outliers else (None, None)
            self._bases[bits, outliers] = Base(weight, ql.pack(weight, w_out), *index, w_out)
        return self._bases[bits, outliers]

    def rotation(self, nbytes: int) -> int:
        """How many copies of a weight make it cold: few rows read it once a call, for many it stays in cache."""
        return machine.copies(nbytes) if self.m <= FEW else 1

    # ---- errors over their bounds, of the checked rows

    def match_product(self, bits: int) -> Callable[[Tensor], float]:
        """Exact, or to fp32's rounding where a competitor returns floats."""
        exact = self.codes[self.checked].double() @ self.int_weight(bits).double().T

        def match(y: Tensor) -> float:
            off = (y[self.checked].double() - exact).abs()
            if not y.is_floating_point():
                return 0.0 if not off.any() else math.inf
            return worst(off, 2.0**-22 * exact.abs() + 2.0**-22 * 128 * self.layer.k)

        return match

    def match_quik(self, base: Base, dtype: torch.dtype, weight_only: bool) -> Callable[[Tensor], float]:
        """Against float64 from the same codes, as the specification has it."""
        x = self.x[self.checked].to(dtype)
        quantized = None
        if not weight_only:
            qx, s, z, _ = torch.ops.effk.quik_quantize(x, base.int_idx, base.fp_idx, base.weight.k, 8, "kernel")
            quantized = qx, s, z
        exact = ql.reference(
            x, base.weight, base.w_out, None, base.int_idx, base.fp_idx, 16 if weight_only else 8, "kernel", quantized
        )
        return lambda y: worst((y[self.checked].double() - exact).abs(), TOLERANCE[dtype] * row_top(exact))

    def match_dense(self, dtype: torch.dtype, steps: float = 0.0) -> Callable[[Tensor], float]:
        """Against the float layer. steps: levels that the largest magnitude of x and of W is cut into, 0 for none.

        Rounding x to s and W to t moves a result by at most s/2 sum |W| + t/2 sum |x| + K s t / 4.
        """
        x, w = self.x[self.checked].double(), self.w.double()
        exact = x @ w.T
        bound = max(TOLERANCE[dtype], self.layer.k * 2.0**-24) * row_top(exact)
        if steps:
            s, t = 2 * float(self.x.abs().max()) / steps, 2 * float(w.abs().max()) / steps
            bound = bound + s / 2 * w.abs().sum(1) + t / 2 * x.abs().sum(1, keepdim=True) + self.layer.k * s * t / 4
        return lambda y: worst((y[self.checked].double() - exact).abs(), bound)


def row_top(y: Tensor) -> Tensor:
    """The largest magnitude of each row."""
    return y.abs().amax(1, keepdim=True).expand_as(y)


def worst(off: Tensor, bound: Tensor) -> float:
    """The largest ratio; NaN as infinity."""
    ratio = float((off / bound).max()) if off.numel() else 0.0
    return ratio if ratio == ratio else math.inf


def rotating(copies: Sequence[object], function: Callable[[object], object]) -> Callable[[int], object]:
    """Copies of the weight in turn."""
    return lambda i: function(copies[i % len(copies)])
