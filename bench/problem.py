"""The data of one shape, and the float64 oracle with its derived bound that every output is held to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .shapes import Shape

FAILURE = 1e-6  # chance that a right output exceeds the statistical part of its bound anywhere
EDGE = 8  # of a batch, this many first and last rows are checked


def checked_rows(m: int) -> list[int]:
    """Rows of a batch of m that are compared: all up to 2 * EDGE, then the first and last EDGE."""
    return list(range(m)) if m <= 2 * EDGE else [*range(EDGE), *range(m - EDGE, m)]


@dataclass(frozen=True)
class Rounding:
    """How a kernel rounds on its way; what it does beyond fp32 accumulation of exact products.

    act_group: activations are quantised to int8 in groups of this many columns; 0 = whole rows; -1 = whole tensor;
    None = not quantised. act_levels: steps over [-max, max] (254) or over [min, max] (255, affine). act_scale: relative
    rounding of the activation scale. weight: relative rounding of each weight. out: relative rounding of the output.
    """

    act_group: int | None = None
    act_levels: int = 254
    act_scale: float = 0.0
    weight: float = 0.0
    out: float = 0.0


FP32, FP16, BF16 = 2.0**-24, 2.0**-11, 2.0**-8  # largest relative error of rounding to nearest


class Oracle:
    """y = x W^T in float64 for the checked rows of x, and bounds on what a kernel may differ from it.

    A kernel's error has two parts. Accumulating K products in fp32, in any order, costs at most K * 2^-24 * sum |w x|
    (Higham, Accuracy and Stability of Numerical Algorithms, 3.1). Rounding to a grid of step d (activations to int8,
    weights to bf16) makes errors in [-d/2, d/2], independent for data that knows nothing of the grid; by Hoeffding's
    inequality their sum exceeds sqrt(sum d^2 * ln(2/p) / 2) with a chance below p, here FAILURE over all outputs. The
    bound is tight enough that a missing group of columns or a permuted row breaks it.
    """

    def __init__(self, weight: Tensor, x: Tensor, ms: tuple[int, ...]) -> None:
        self.weight, self.x = weight, x  # fp32 [n, k], fp32 [max(ms), k]
        self._rows = sorted({row for m in ms for row in checked_rows(m)})
        self._place = {row: i for i, row in enumerate(self._rows)}
        self._norms: dict[int, Tensor] = {}

    @cached_property
    def exact(self) -> Tensor:
        """x W^T in float64 for every row that some batch checks."""
        return self.x[self._rows].double() @ self.weight.double().T

    @cached_property
    def absolute(self) -> Tensor:
        """sum_k |w x| for the same rows."""
        return (self.x[self._rows].abs() @ self.weight.abs().T).double()

    @cached_property
    def squares(self) -> Tensor:
        """sum_k (w x)^2 for the same rows."""
        return (self.x[self._rows].square() @ self.weight.square().T).double()

    def bound(self, m: int, how: Rounding) -> Tensor:
        """[len(checked_rows(m)), n]: the largest error that a correct kernel which rounds like `how` may make."""
        n, k = self.weight.shape
        here = [self._place[row] for row in checked_rows(m)]
        factor = math.sqrt(math.log(2 * m * n / FAILURE) / 2)
        total = (k * FP32 + how.act_scale) * self.absolute[here] + (how.out + FP32) * self.exact[here].abs()
        if how.weight:
            total += factor * 2 * how.weight * self.squares[here].sqrt()
        if how.act_group is not None:
            total += factor * self._steps(m, how).sqrt()
        return total.clamp_min_(torch.finfo(torch.float32).tiny)

    def _steps(self, m: int, how: Rounding) -> Tensor:
        """sum_k (step of x[m, k] * w[n, k])^2 for the checked rows of a batch of m."""
        k = self.weight.shape[1]
        group = how.act_group if how.act_group > 0 else k
        x = pad(self.x[:m], group).reshape(m, -1, group)
        if how.act_levels == 255:  # affine: the grid spans [min, max] and contains zero
            span = x.amax(-1).clamp_min(0) - x.amin(-1).clamp_max(0)
        else:
            span = 2 * x.abs().amax(-1)
        if how.act_group == -1:
            span = torch.full_like(span, 2 * float(x.abs().max()))
        steps = span[checked_rows(m)].double() / how.act_levels
        return steps.square() @ self._group_norms(group)

    def _group_norms(self, group: int) -> Tensor:
        """sum of w^2 over each group of columns, [groups, n]."""
        if group not in self._norms:
            w = pad(self.weight, group).reshape(len(self.weight), -1, group)
            self._norms[group] = w.square().sum(-1).double().T
        return self._norms[group]

    def match(self, y: Tensor, m: int, how: Rounding, roll: int = 0) -> float:
        """Largest error over its bound among the checked rows of y [m, n]; above 1, or NaN as inf: wrong.

        roll: y belongs to the weight with its rows rolled down by this many.
        """
        rows = checked_rows(m)
        exact = self.exact[[self._place[row] for row in rows]]
        error = (y.reshape(m, -1)[rows].double().roll(-roll, 1) - exact).abs()
        ratio = float((error / self.bound(m, how)).max())
        return ratio if ratio == ratio else math.inf


def pad(t: Tensor, group: int) -> Tensor:
    """t with zero columns up to a multiple of `group`."""
    return torch.nn.functional.pad(t, (0, -t.shape[1] % group))


@dataclass(frozen=True)
class Quantized:
    """A random weight s * (q - 2^(bits-1)) with one scale per `group` columns (0 = per row), exact in fp32."""

    bits: int
    group: int
    codes: Tensor  # uint8 [n, k]
    scales: Tensor  # fp32 [n, groups], 8 significant bits: exact in fp16 and bf16 too
    oracle: Oracle

    @property
    def zero(self) -> int:
        """The code of weight 0."""
        return 1 << (self.bits - 1)


class Problem:
    """What the backends of one shape need: x and, made on demand, weights of a width and group with their oracles."""

    def __init__(self, shape: Shape, ms: tuple[int, ...], seed: int = 0) -> None:
        self.shape, self.ms = shape, ms
        self._generator = torch.Generator().manual_seed(seed)
        # bf16 values, so that fp32 and bf16 backends see the same x
        self.x = torch.randn(max(ms), shape.k, generator=self._generator).bfloat16().float()
        self._weights: dict[tuple[int, int], Quantized] = {}
        self.extras: dict[str, object] = {}  # weights in formats of single backends, by their name

    def quantized(self, bits: int, group: int) -> Quantized:
        """The weight of `bits` with one scale per `group` columns (0 = per row); the same object each time."""
        if (bits, group) not in self._weights:
            n, k = self.shape.n, self.shape.k
            groups = -(-k // group) if group else 1
            codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=self._generator)
            scales = torch.randint(128, 256, (n, groups), generator=self._generator).float() / (256 << bits)
            spread = scales.repeat_interleave(group or k, 1)[:, :k]
            weight = (codes.float() - (1 << (bits - 1))) * spread
            self._weights[bits, group] = Quantized(bits, group, codes, scales, Oracle(weight, self.x, self.ms))
        return self._weights[bits, group]

    def dense(self) -> Quantized:
        """The weight that unquantised backends multiply with: 8 bits, exact in bf16 up to its 8 significant bits."""
        return self.quantized(4, self.shape.group)
