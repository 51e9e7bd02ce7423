"""Dense and DYAD layers to measure: sizes, kinds of call, the data of one size, its results in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from effk.ops import dyad_linear as dy

from . import machine

FORWARD, TRAINING, FF = "forward", "training", "feed-forward"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KINDS = tuple(f"{what} {dtype}" for what in (FORWARD, TRAINING, FF) for dtype in DTYPES)
DENSE_KINDS = KINDS[:2]
BLOCKS = (4, 8)
TOKENS = (1, 512, 2048)
VARIANT, ACT = "it", "relu"  # relu: OPT's, the cheapest for everybody

INPUTS = 3  # x is another one from call to call
EDGE = 8  # of a batch, this many first and last tokens are checked
ROWS = 16  # of a weight's gradient
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}  # largest relative error of rounding to nearest
FAILURE = 1e-6  # chance that a right result exceeds the statistical part of its bound anywhere


@dataclass(frozen=True)
class Layer:
    """f_in inputs, f_out outputs."""

    f_in: int
    f_out: int

    def __str__(self) -> str:
        return f"{self.f_in}x{self.f_out}"

    def keys(self, tokens: int, n: int) -> dict[str, int]:
        """The `shape` of a row: sides of a block, the whole layer with n = 1."""
        return {"T": tokens, "d_in": self.f_in // n, "d_out": self.f_out // n, "n": n}


SIZES = ((768, 3072), (1024, 4096), (2048, 8192))
LAYERS = tuple(Layer(*sides) for small, large in SIZES for sides in ((small, large), (large, small)))
QUICK = (Layer(768, 3072), Layer(3072, 768))


class Exact(NamedTuple):
    """A part of a result in float64: how to cut it out, what it is, and how far off a right one may be."""

    cut: Callable[[Tensor], Tensor]
    value: Tensor
    bound: Tensor
    parts: Tensor | float = 0.0  # magnitudes of what is added up, where the two components are stored by themselves


class Problem:
    """The tensors of one size and dtype, and the exact results. No biases: not all competitors have them for free.

    What belongs to n blocks is looked up by n; 0 stands for the dense layer.
    """

    def __init__(self, layer: Layer, tokens: int, dtype: str = "fp32", seed: int = 0) -> None:
        self.layer, self.tokens, self.dtype, self._seed = layer, tokens, DTYPES[dtype], seed
        self._weights: dict[tuple, tuple[Tensor, ...]] = {}
        self._exact: dict[tuple[str, int], list[Exact]] = {}

    def _normal(self, what: int, *size: int) -> Tensor:
        rng = torch.Generator().manual_seed(1000 * self._seed + what)
        return torch.randn(*size, generator=rng).to(self.dtype)

    @cached_property
    def inputs(self) -> list[Tensor]:
        """The x of successive calls."""
        return [self._normal(10 + i, self.tokens, self.layer.f_in) for i in range(INPUTS if self.tokens > 1 else 1)]

    @cached_property
    def gy(self) -> Tensor:
        """Gradient of y."""
        return self._normal(4, self.tokens, self.layer.f_out)

    def weights(self, n: int, second: bool = False) -> tuple[Tensor, ...]:
        """(W,) or (wl, wu), entries of a variance that keeps that of x; `second`: of the way back in a feed-forward."""
        if (n, second) not in self._weights:
            f_out, f_in = (self.layer.f_in, self.layer.f_out) if second else (self.layer.f_out, self.layer.f_in)
            shape, fan = ((f_out, f_in), f_in) if n == 0 else ((n, f_out // n, f_in // n), 2 * f_in // n)
            what = 20 + 4 * n + 2 * second
            made = (self._normal(what + i, *shape).float() / math.sqrt(fan) for i in range(1 if n == 0 else 2))
            self._weights[n, second] = tuple(w.to(self.dtype) for w in made)
        return self._weights[n, second]

    def rotation(self, nbytes: int) -> int:
        """How many copies of a weight make it cold: one token reads it once a call, for many it stays in cache."""
        return machine.copies(nbytes) if self.tokens == 1 else 1

    @cached_property
    def checked(self) -> Tensor:
        """Tokens that are compared."""
        t = self.tokens
        return torch.tensor(range(t) if t <= 2 * EDGE else [*range(EDGE), *range(t - EDGE, t)])

    @cached_property
    def rows(self) -> Tensor:
        """Outputs whose part of a weight's gradient is compared."""
        return torch.linspace(0, self.layer.f_out - 1, min(ROWS, self.layer.f_out)).round().long()

    def forget(self) -> None:
        """Frees the exact results."""
        self._exact.clear()

    def match(self, kind: str, n: int, got: Sequence[Tensor], rounds_parts: bool = False) -> float:
        """Largest error of the results for inputs[0] over its bound; above 1, or NaN as inf: wrong.

        rounds_parts: the results are sums of two stored ones, in which case each of those may be off by its rounding.
        """
        what = kind.partition(" ")[0]
        if (what, n) not in self._exact:
            compute = {FORWARD: self._forward, TRAINING: self._training, FF: self._feed_forward}[what]
            self._exact[what, n] = compute(n)
        worst = 0.0
        for part, y in zip(self._exact[what, n], got, strict=True):
            try:
                cut = part.cut(y.reshape(-1, y.shape[-1]) if y.dim() < 3 else y).double()
                bound = part.bound + (2 * UNIT[self.dtype] * part.parts if rounds_parts else 0.0)
                ratio = float(((cut - part.value).abs() / bound).max())
            except (IndexError, RuntimeError):
                return math.inf
            worst = max(worst, ratio if ratio == ratio else math.inf)
        return worst

    def _dense(self, n: int, second: bool = False, absolute: bool = False) -> Tensor:
        """The whole matrix in float64; `absolute`: sums of magnitudes."""
        parts = [w.abs() if absolute else w for w in self.weights(n, second)]
        return parts[0].double() if n == 0 else dy.reference_to_dense(*parts, VARIANT)

    def _components(self, n: int) -> list[Tensor]:
        """The two matrices that a DYAD layer adds up, in float64; the one of a dense layer."""
        if n == 0:
            return [self._dense(0)]
        wl, wu = self.weights(n)
        zero = torch.zeros_like(wl)
        return [dy.reference_to_dense(wl, zero, VARIANT), dy.reference_to_dense(zero, wu, VARIANT)]

    def _stored(self, value: Tensor, error: Tensor) -> Tensor:
        return error + UNIT[self.dtype] * (value.abs() + error) + 1e-30

    def _forward(self, n: int) -> list[Exact]:
        """A chain of f_in (or 2 f_in / n) fp32 roundings (Higham, Accuracy and Stability, 3.1), and the store."""
        x, tokens = self.inputs[0][self.checked].double(), self.checked
        y = x @ self._dense(n).T
        chain = 2 * self.layer.f_in // n if n else self.layer.f_in
        error = chain * UNIT[torch.float32] * (x.abs() @ self._dense(n, absolute=True).T)
        parts = sum((x @ w.T).abs() for w in self._components(n))
        return [Exact(lambda t: t[tokens], y, self._stored(y, error), parts)]

    def _training(self, n: int) -> list[Exact]:
        """Gradients of x (some tokens) and of the weights (some outputs)."""
        tokens, rows = self.checked, self.rows
        g, x = self.gy.double(), self.inputs[0].double()
        gx = g[tokens] @ self._dense(n)
        chain = 2 * self.layer.f_out // n if n else self.layer.f_out
        off = chain * UNIT[torch.float32] * (g[tokens].abs() @ self._dense(n, absolute=True))
        gw = g[:, rows].T @ x
        gw_off = self.tokens * UNIT[torch.float32] * (g[:, rows].abs().T @ x.abs())
        magnitudes = sum((g[tokens] @ w).abs() for w in self._components(n))
        parts = [Exact(lambda t: t[tokens], gx, self._stored(gx, off), magnitudes)]
        if n == 0:
            return [*parts, Exact(lambda t: t[rows], gw, self._stored(gw, gw_off))]
        d_out, d_in = self.layer.f_out // n, self.layer.f_in // n
        block, o = rows // d_out, rows % d_out
        contiguous = block[:, None] * d_in + torch.arange(d_in)
        for columns in (contiguous, torch.arange(d_in) * n + block[:, None]):
            value = gw.gather(1, columns)
            bound = self._stored(value, gw_off.gather(1, columns))
            parts.append(Exact(lambda t: t[block, o], value, bound))
        return parts

    def _feed_forward(self, n: int) -> list[Exact]:
        """Hidden features may be rounded to the dtype: by Hoeffding's inequality the sum of such errors, each within
        u |w h| and independent, exceeds sqrt(2 ln(2/p) sum (u w h)^2) with a chance below p.
        """
        x, tokens = self.inputs[0][self.checked].double(), self.checked
        h = (x @ self._dense(n).T).relu()
        y = h @ self._dense(n, True).T
        one, two = ((2 * side // n if n else side) for side in (self.layer.f_in, self.layer.f_out))
        through = self._dense(n, True, True).T
        off = one * UNIT[torch.float32] * (x.abs() @ self._dense(n, absolute=True).T) @ through
        error = off + two * UNIT[torch.float32] * (h @ through)
        spread = (h.square() @ through.square()).sqrt() * UNIT[self.dtype]
        error += math.sqrt(2 * math.log(2 * y.numel() / FAILURE)) * spread
        return [Exact(lambda t: t[tokens], y, self._stored(y, error))]


def flops(layer: Layer, tokens: int, n: int, kind: str) -> float:
    """Multiply-adds count two; n = 0: dense. A training step has three products, a feed-forward two."""
    once = 2.0 * tokens * layer.f_in * layer.f_out * (2 / n if n else 1)
    return once * {FORWARD: 1, TRAINING: 3, FF: 2}[kind.partition(" ")[0]]


def weight_bytes(layer: Layer, n: int, kind: str) -> float:
    """Bytes of the weights that a forward call has to read."""
    size = DTYPES[kind.rpartition(" ")[2]].itemsize * layer.f_in * layer.f_out * (2 / n if n else 1)
    return size * (2 if kind.startswith(FF) else 1)


class Made(NamedTuple):
    """What a backend makes of a problem."""

    call: Callable[[int], object]  # the work for inputs[i], with copy i of the weight; this is timed
    products: int = 1  # done by one call
    read: Callable[[object], tuple[Tensor, ...]] = lambda result: result  # results as `Problem.match` takes them
    rounds_parts: bool = False  # stores what the two components give before adding it up


def as_training(problem: Problem, function: Callable[..., Tensor], weights: Sequence[Tensor]) -> Made:
    """A training step of a layer: forward, and the gradients of x and of the weights."""
    xs = [x.clone().requires_grad_() for x in problem.inputs]
    leaves = [w.clone().requires_grad_() for w in weights]
    gy = problem.gy

    def call(i: int) -> tuple[Tensor, ...]:
        x = xs[i % len(xs)]
        return torch.autograd.grad(function(x, *leaves), (x, *leaves), gy)

    return Made(call)


def rotating(problem: Problem, copies: Sequence[object], function: Callable[[Tensor, object], Tensor]) -> Made:
    """One product per call, over copies of the weight in turn."""
    xs = problem.inputs
    return Made(lambda i: (function(xs[i % len(xs)], copies[i % len(copies)]),))
