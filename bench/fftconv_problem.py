"""Long convolutions to measure: shapes, kinds of call, the data of one shape, and the float64 results they are held to.

Everything comes from a seed, so that a competitor in a process of its own has the same data without their being sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

FORWARD, UNCACHED, GATED, BACKWARD = "forward", "forward uncached", "gated", "backward"
KINDS = (FORWARD, UNCACHED, GATED, BACKWARD)
DECODE = "decode"
QUICK_KINDS = (FORWARD, GATED, BACKWARD)

INPUTS = 3  # u is another one from call to call, the same number for every backend
ROTATION_BYTES = 512 << 20  # which that many of the largest inputs would exceed; they get two
BLOCK = 1 << 22  # elements of float64 arithmetic at a time
CHECKED = 1 << 23  # elements that are compared; of larger tensors, channels spread evenly


@dataclass(frozen=True)
class Shape:
    """Rows u [b, h, l], a filter [h, l] for every channel, causal."""

    b: int
    h: int
    l: int  # noqa: E741

    @property
    def n_fft(self) -> int:
        """The transform that a causal convolution of l taps needs."""
        return 2 * self.l

    @property
    def elements(self) -> int:
        """Of u."""
        return self.b * self.h * self.l

    def keys(self, gated: bool = False) -> dict[str, int]:
        """The `shape` of a row."""
        return {"B": self.b, "H": self.h, "L": self.l, "n_fft": self.n_fft, "gated": int(gated)}

    def __str__(self) -> str:
        return f"{self.b}x{self.h}x{self.l}"


LENGTHS = (256, 1024, 4096, 8192)
# Small tensors first: what the allocator of a process has learnt from a large one does not help the small ones.
SHAPES = tuple(
    sorted(
        [Shape(b, h, length) for b, h in ((1, 64), (1, 768), (8, 768)) for length in LENGTHS]
        + [Shape(1, 256, 1 << 14), Shape(1, 64, 1 << 16), Shape(1, 16, 1 << 18), Shape(1, 4, 1 << 20)],
        key=lambda s: (s.elements, s.l),
    )
)
QUICK = (Shape(1, 64, 1024), Shape(1, 768, 4096))


def bound(n_fft: int) -> float:
    """Largest relative rms error of fp32 that passes: 1e-6 up to n_fft = 32K, doubled per further factor of 32.

    A transform has log2 n stages, and each adds roundings of up to 2^-24 relative to the rms of its values, at random:
    1e-6 is 17 of them at once, or 280 in their root sum of squares (plain fp32 code measures 1e-7 to 3e-7). A dropped
    tap, a sample that wrapped around or a stage in half precision is far outside.
    """
    return 1e-6 * 2.0 ** max(0.0, math.log(n_fft / 32768, 32))


class Problem:
    """The tensors of one shape, and the exact results."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        self.shape, self._seed = shape, seed
        self._exact: dict[str, tuple[Tensor, ...]] = {}
        count = min(shape.h, max(1, CHECKED // (shape.b * shape.l)))
        self.channels = torch.linspace(0, shape.h - 1, count).round().long()  # that are compared

    def _normal(self, what: int, *size: int) -> Tensor:
        return torch.randn(*size, generator=torch.Generator().manual_seed(1000 * self._seed + what))

    @cached_property
    def inputs(self) -> list[Tensor]:
        """The u of successive calls."""
        s = self.shape
        count = INPUTS if INPUTS * 4 * s.elements <= ROTATION_BYTES else 2
        return [self._normal(10 + i, s.b, s.h, s.l) for i in range(count)]

    @cached_property
    def k(self) -> Tensor:
        """Filters that decay to e^-4 at their end, of norm about 1."""
        s = self.shape
        decay = torch.exp(-4 * torch.arange(s.l) / s.l)
        return self._normal(1, s.h, s.l) * (decay / decay.norm())

    @cached_property
    def gates(self) -> tuple[Tensor, Tensor]:
        """pregate, postgate."""
        s = self.shape
        return self._normal(2, s.b, s.h, s.l), self._normal(3, s.b, s.h, s.l)

    @cached_property
    def gy(self) -> Tensor:
        """Gradient of y."""
        s = self.shape
        return self._normal(4, s.b, s.h, s.l)

    def exact(self, kind: str) -> tuple[Tensor, ...]:
        """For inputs[0] and `channels`, in float64: y, or the gradients of u and k. Only the latest kind is kept."""
        name = FORWARD if kind == UNCACHED else kind
        if name not in self._exact:
            self._exact.clear()
            parts = [self._exact_part(name, rows) for rows in self._blocks()]
            self._exact[name] = tuple(
                torch.cat(part, 0 if part[0].dim() == 2 else 1) for part in zip(*parts, strict=True)
            )
        return self._exact[name]

    def forget(self) -> None:
        """Frees the exact results."""
        self._exact.clear()

    def _blocks(self) -> tuple[Tensor, ...]:
        return self.channels.split(max(1, BLOCK // (self.shape.b * self.shape.l)))

    def _exact_part(self, kind: str, rows: Tensor) -> tuple[Tensor, ...]:
        n, length = self.shape.n_fft, self.shape.l
        rfft, irfft = torch.fft.rfft, torch.fft.irfft
        u, kf = self.inputs[0][:, rows].double(), rfft(self.k[rows].double(), n)
        if kind == BACKWARD:
            gf = rfft(self.gy[:, rows].double(), n)
            gu = irfft(gf * kf.conj(), n)[..., :length]
            return gu, irfft((gf * rfft(u, n).conj()).sum(0), n)[..., :length]
        if kind == GATED:
            pre, post = (gate[:, rows].double() for gate in self.gates)
            return (irfft(rfft(u * pre, n) * kf, n)[..., :length] * post,)
        return (irfft(rfft(u, n) * kf, n)[..., :length],)

    def match(self, kind: str, got: Sequence[Tensor]) -> float:
        """Error of results for inputs[0], row by row, over its bound; above 1, or NaN as inf: wrong.

        Of each row the rms of the error over that of the row is held to `bound`, and the largest error over the largest
        value to four times that. Gradients may err twice as much: that of k sums rows, and its transforms are two.
        """
        limit, worst = bound(self.shape.n_fft) * (2 if kind == BACKWARD else 1), 0.0
        for exact, y in zip(self.exact(kind), got, strict=True):
            if y.shape[-2:] != (self.shape.h, exact.shape[-1]) or y.dim() != exact.dim():
                return math.inf
            for part in torch.arange(exact.shape[-2]).split(max(1, BLOCK * exact.shape[-2] // exact.numel())):
                want = exact[..., part, :]
                error = y[..., self.channels[part], :].double() - want
                rms = error.square().mean(-1).sqrt() / want.square().mean(-1).sqrt() / limit
                largest = error.abs().amax(-1) / want.abs().amax(-1) / (4 * limit)
                ratio = float(torch.maximum(rms, largest).max())
                worst = max(worst, ratio if ratio == ratio else math.inf)
        return worst


def flops(shape: Shape, kind: str = FORWARD) -> float:
    """Operations of one call by the convention of the tables.

    A row of l points takes M = l complex points: a transform there and one back in split-radix operations (4 M log2 M -
    6 M + 8 each) and a complex product by the spectrum (6 M). A gate is one operation a point. A backward transforms g
    and u there and the gradient of u back, and has two products, of which one is summed (14 M); the gradient of a
    filter takes one transform for all its rows, and so does a filter whose spectrum is not cached.
    """
    m = shape.l
    transform = 4 * m * math.log2(m) - 6 * m + 8
    row = 2 * transform + 6 * m
    rows = shape.b * shape.h
    if kind == BACKWARD:
        return rows * (3 * transform + 14 * m) + shape.h * transform
    if kind == UNCACHED:
        return rows * row + shape.h * transform
    return rows * (row + 2 * m * (kind == GATED))


def least_bytes(shape: Shape, kind: str = FORWARD) -> float:
    """Bytes that a call has to move: its rows in and out, and the filters' spectra (8 bytes a point) or taps, once."""
    rows = {FORWARD: 2, UNCACHED: 2, GATED: 4, BACKWARD: 3}[kind] * 4.0 * shape.elements
    spectra = shape.h * shape.l * {FORWARD: 8.0, UNCACHED: 4.0, GATED: 8.0, BACKWARD: 12.0}[kind]
    return rows + spectra


Call = Callable[[int], "Tensor | tuple[Tensor, ...]"]  # of input i


def as_results(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a call gave, as `Problem.match` takes it."""
    return result if isinstance(result, tuple) else (result,)
