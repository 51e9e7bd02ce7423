"""Random DYAD and dense layers, and how far a kernel's result may be from float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from effk.ops import dense_linear as dl
from effk.ops import dyad_linear as dy
from effk.ops.activation import ACTS
from wq_cases import SIGNIFICANT_BITS, SMALLEST, gamma

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PAIRS = [(x, w) for x in DTYPES for w in DTYPES]  # dtypes of x and of the weights
FLUSHED = 2.0**-126  # BF16 dot products read subnormal numbers as zero and flush subnormal sums
# Lipschitz constants, and the error of an activation relative to its argument: it is z times a probability in [0, 1]
# (its complement for relu is exact), computed with less than 8 roundings, or by a polynomial that is as good.
STEEPEST = {"none": 1.0, "relu": 1.0, "gelu": 1.13, "gelu_tanh": 1.13, "silu": 1.1}
OWN_ERROR = {"none": 0.0, "relu": 0.0, "gelu": gamma(8), "gelu_tanh": gamma(8), "silu": gamma(8)}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """NaN equals NaN, and -0 differs from 0."""
    as_integers = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[a.element_size()]
    return a.shape == b.shape and torch.equal(a.contiguous().view(as_integers), b.contiguous().view(as_integers))


def stored(expected: Tensor, error: Tensor, dtype: torch.dtype) -> Tensor:
    """``error`` plus what rounding a result that is off by it to ``dtype`` adds."""
    return error + 2.0 ** -SIGNIFICANT_BITS[dtype] * (expected.abs() + error) + SMALLEST[dtype]


def activated(z: Tensor, error: Tensor, act: str) -> Tensor:
    """The error of ``act`` of a sum that is off by ``error`` from ``z``."""
    return STEEPEST[act] * error + OWN_ERROR[act] * (z.abs() + error)


@dataclass
class Dyad:
    """One call of dyad_linear."""

    x: Tensor
    wl: Tensor
    wu: Tensor
    bias: Tensor | None
    variant: str
    layout: str
    act: str

    def __str__(self) -> str:
        n, d_out, d_in = self.wl.shape
        return (
            f"{self.variant} {self.layout} {self.act} n {n} {d_out}x{d_in} x {list(self.x.shape)} {self.x.dtype} "
            f"weights {self.wl.dtype} bias {None if self.bias is None else self.bias.dtype}"
        )

    @property
    def arguments(self) -> tuple:
        return self.x, self.wl, self.wu, self.bias, self.variant, self.layout, self.act

    @property
    def f_out(self) -> int:
        return self.wl.shape[0] * self.wl.shape[1]

    def run(self) -> Tensor:
        return torch.ops.effk.dyad_linear(*self.arguments)

    def packed(self, dtype: torch.dtype | None = None) -> Tensor:
        return dy.pack(self.wl, self.wu, self.variant, dtype)

    def run_packed(self, packed: Tensor | None = None) -> Tensor:
        packed = self.packed() if packed is None else packed
        return torch.ops.effk.dyad_linear_packed(
            self.x, packed, self.f_out, self.bias, self.variant, self.layout, self.act
        )

    def tokens(self, first: int, last: int) -> Dyad:
        x = self.x[first:last] if self.layout == "tokens" else self.x[:, first:last].contiguous()
        return replace(self, x=x)

    def features(self) -> Dyad:
        """The same in the other layout."""
        return replace(self, x=self.x.T.contiguous(), layout="features")

    def reference(self) -> Tensor:
        return dy.reference(*self.arguments)

    def terms(self) -> Tensor:
        """Sum of the magnitudes of what an output adds up, both components for themselves."""
        bias = None if self.bias is None else self.bias.abs()
        return dy.reference(self.x.abs(), self.wl.abs(), self.wu.abs(), bias, self.variant, self.layout)

    def bound(self, expected: Tensor) -> Tensor:
        """Largest |kernel - reference| that fp32 arithmetic in any order allows: 2 d_in products and a bias in a chain."""
        chain = 2 * self.wl.shape[2] + 2
        error = gamma(chain) * self.terms() + chain * FLUSHED
        z = dy.reference(*self.arguments[:-1]) if self.act != "none" else expected
        return stored(expected, activated(z, error, self.act), self.x.dtype)

    def backward(self, gy: Tensor, mask: tuple[bool, ...] = (True,) * 4) -> tuple[Tensor, ...]:
        return torch.ops.effk.dyad_linear_backward(gy, self.x, self.wl, self.wu, self.variant, self.layout, list(mask))

    def reference_backward(self, gy: Tensor) -> tuple[Tensor, ...]:
        return dy.reference_backward(gy, self.x, self.wl, self.wu, self.variant, self.layout)

    def backward_bounds(self, gy: Tensor, expected: tuple[Tensor, ...]) -> list[Tensor]:
        """As ``bound``: 2 d_out products for an entry of gx, one a token for the others, in chains of any order."""
        magnitudes = dy.reference_backward(
            gy.abs(), self.x.abs(), self.wl.abs(), self.wu.abs(), self.variant, self.layout
        )
        tokens = self.x.numel() // (self.wl.shape[0] * self.wl.shape[2])
        chains = (2 * self.wl.shape[1] + 1, tokens + 1, tokens + 1, tokens + 1)
        dtypes = (self.x.dtype, self.wl.dtype, self.wu.dtype, torch.float32)
        return [
            stored(want, gamma(chain) * magnitude + chain * FLUSHED, dtype)
            for want, magnitude, chain, dtype in zip(expected, magnitudes, chains, dtypes, strict=True)
        ]


def feed_forward_bound(one: Dyad, two: Dyad, hidden: Tensor, expected: Tensor) -> Tensor:
    """Of ``two`` over the result of ``one``, exactly ``hidden``: its error, which may include a rounding to the dtype of
    x (BF16 dot products need it), goes through the second layer and adds to that layer's own.
    """
    off = one.bound(hidden)
    chain = 2 * two.wl.shape[2] + 2
    wl, wu, bias = two.wl.abs(), two.wu.abs(), None if two.bias is None else two.bias.abs()
    terms = dy.reference(hidden.abs() + off, wl, wu, bias, two.variant)
    error = dy.reference(off, wl, wu, None, two.variant) + gamma(chain) * terms + chain * FLUSHED
    return stored(expected, error, one.x.dtype)


def dyad(
    n: int,
    d_out: int,
    d_in: int,
    tokens: int,
    variant: str = "it",
    layout: str = "tokens",
    dtype: torch.dtype = torch.float32,
    weights: torch.dtype | None = None,
    bias: torch.dtype | None = torch.float32,
    act: str = "none",
    seed: int = 0,
) -> Dyad:
    """Normal random x, weights that keep its variance, a bias of that size; ``bias`` None for none."""
    rng = torch.Generator().manual_seed(seed * 7919 + n * 1000003 + d_out * 1009 + d_in * 31 + tokens)
    x = torch.randn(tokens, n * d_in, generator=rng).to(dtype)
    weights = dtype if weights is None else weights
    wl, wu = ((torch.randn(n, d_out, d_in, generator=rng) / (2 * d_in) ** 0.5).to(weights) for _ in range(2))
    b = None if bias is None else torch.randn(n * d_out, generator=rng).to(bias)
    return Dyad(x if layout == "tokens" else x.T.contiguous(), wl, wu, b, variant, layout, act)


def integers(n: int, d_out: int, d_in: int, tokens: int, dtype: torch.dtype = torch.float32, **how: object) -> Dyad:
    """A problem of small integers, whose every sum is exact in fp32 in any order: |y| <= 2 d_in 12 + 7 < 2**24."""
    p = dyad(n, d_out, d_in, tokens, dtype=dtype, **how)  # type: ignore[arg-type]
    rng = torch.Generator().manual_seed(n + d_out)

    def draw(t: Tensor | None, most: int) -> Tensor | None:
        return None if t is None else torch.randint(-most, most + 1, t.shape, generator=rng).to(t.dtype)

    return replace(p, x=draw(p.x, 4), wl=draw(p.wl, 3), wu=draw(p.wu, 3), bias=draw(p.bias, 7))


@dataclass
class Dense:
    """One call of dense_linear."""

    x: Tensor
    w: Tensor
    bias: Tensor | None
    act: str

    def __str__(self) -> str:
        return f"{self.act} {list(self.w.shape)} {self.w.dtype} x {list(self.x.shape)} {self.x.dtype}"

    def packed(self, dtype: torch.dtype | None = None) -> Tensor:
        return dl.pack(self.w, dtype)

    def run(self, packed: Tensor | None = None) -> Tensor:
        packed = self.packed() if packed is None else packed
        return torch.ops.effk.dense_linear(self.x, packed, len(self.w), self.bias, self.act)

    def reference(self) -> Tensor:
        return dl.reference(self.x, self.w, self.bias, self.act)

    def bound(self, expected: Tensor) -> Tensor:
        """As ``Dyad.bound``, of f_in products."""
        chain = self.w.shape[1] + 2
        bias = None if self.bias is None else self.bias.abs()
        error = gamma(chain) * dl.reference(self.x.abs(), self.w.abs(), bias) + chain * FLUSHED
        z = dl.reference(self.x, self.w, self.bias) if self.act != "none" else expected
        return stored(expected, activated(z, error, self.act), self.x.dtype)


def dense(
    f_out: int,
    f_in: int,
    tokens: int,
    dtype: torch.dtype = torch.float32,
    weights: torch.dtype | None = None,
    bias: torch.dtype | None = torch.float32,
    act: str = "none",
    seed: int = 0,
) -> Dense:
    """As :func:`dyad`."""
    rng = torch.Generator().manual_seed(seed * 7919 + f_out * 1009 + f_in * 31 + tokens)
    x = torch.randn(tokens, f_in, generator=rng).to(dtype)
    w = (torch.randn(f_out, f_in, generator=rng) / f_in**0.5).to(dtype if weights is None else weights)
    return Dense(x, w, None if bias is None else torch.randn(f_out, generator=rng).to(bias), act)


__all__ = [
    "ACTS",
    "DTYPES",
    "PAIRS",
    "Dense",
    "Dyad",
    "dense",
    "dyad",
    "feed_forward_bound",
    "integers",
    "same_bits",
    "stored",
]
