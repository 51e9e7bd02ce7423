"""Random long-convolution problems and how far a result may be from float64."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from effk import _C, isa
from effk.ops import fftconv as fc

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of one store, relative
SMALLEST = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-25}
if "EFFK_TEST_EMULATED" in os.environ:
    # The kernels run with flush-to-zero and denormals-are-zero. F16C ignores both, but not in qemu 7.2: a factor below
    # 2**-14 becomes zero, and the other factors here are below 8.
    SMALLEST[torch.float16] = 2.0**-11
EPS = 2.0**-24

SCHEMES = ("fft", "overlap_save", "direct")
PARTS = ("", "a", "b", "ab", "s", "as", "bs", "abs")
ALL = os.environ.get("EFFK_TEST_ALL") == "1"

_OWN = {row["tier"] for row in _C.kernel_table() if row["op"] == "fftconv" and row["supported"]}
TIERS = [name for name in isa.supported() if name in _OWN]  # the others run one of these
every_tier = pytest.mark.parametrize("tier", TIERS, indirect=True)


@dataclass
class Problem:
    """One call, with its inputs."""

    u: Tensor
    k: Tensor
    pregate: Tensor | None
    postgate: Tensor | None
    skip: Tensor | None
    n_fft: int
    mode: str = "causal"
    scheme: str = "auto"
    spec: Tensor | None = field(default=None, repr=False)

    def __str__(self) -> str:
        there = [name for name in ("pregate", "postgate", "skip") if getattr(self, name) is not None]
        return (
            f"{self.mode} {self.scheme} n_fft {self.n_fft} u {list(self.u.shape)} {self.u.dtype} taps {self.k.shape[1]} "
            f"{'+'.join(there) or 'plain'}"
        )

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.u, self.k, self.pregate, self.postgate, self.skip

    def prepared(self) -> Tensor:
        if self.spec is None:
            self.spec = torch.ops.effk.fftconv_prepare(self.k, self.n_fft, self.mode, self.scheme)
        return self.spec

    def arguments(self) -> tuple:
        gates = (self.pregate, self.postgate, self.skip)
        return (self.u, self.prepared(), *gates, self.n_fft, self.mode, self.scheme)

    def run(self) -> Tensor:
        return torch.ops.effk.fftconv(*self.arguments())

    def rows(self, b: slice = slice(None), h: slice = slice(None)) -> Problem:
        """The same problem for some sequences and channels."""
        cut = [None if t is None else t[b, h].contiguous() for t in (self.u, self.pregate, self.postgate)]
        skip = None if self.skip is None else self.skip[h].contiguous()
        return replace(self, u=cut[0], k=self.k[h].contiguous(), pregate=cut[1], postgate=cut[2], skip=skip, spec=None)

    def backward(self, gy: Tensor, mask: list[bool] | None = None) -> tuple[Tensor, ...]:
        wanted = [t is not None for t in self.tensors] if mask is None else mask
        args = self.arguments()
        return torch.ops.effk.fftconv_backward(
            gy, *args[:5], self.n_fft, self.k.shape[1], self.mode, self.scheme, wanted
        )


def problem(
    length: int,
    taps: int,
    batch: int = 2,
    channels: int = 3,
    n_fft: int | None = None,
    mode: str = "causal",
    scheme: str = "auto",
    dtype: torch.dtype = torch.float32,
    parts: str = "",
    seed: int = 0,
) -> Problem:
    """Normal random inputs. ``parts`` has "a" for pregate, "b" for postgate, "s" for skip."""
    generator = torch.Generator().manual_seed(seed * 7919 + length * 31 + taps)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    u, k = draw(batch, channels, length).to(dtype), draw(channels, taps) / math.sqrt(taps)
    pregate = draw(batch, channels, length).to(dtype) if "a" in parts else None
    postgate = draw(batch, channels, length).to(dtype) if "b" in parts else None
    skip = draw(channels) if "s" in parts else None
    n_fft = fc.default_n_fft(length, taps, mode) if n_fft is None else n_fft
    return Problem(u, k, pregate, postgate, skip, n_fft, mode, scheme)


def gamma(n_fft: int) -> float:
    """Bound on the rounding of transform, product and inverse, relative to |v| |k| (Euclidean), for every single output.

    By Parseval an output is a sum whose terms' magnitudes sum to at most |v| |k|. Each passes 2 log2(n_fft) butterflies of
    at most 2 roundings and a rounded twiddle each, the product (3), the scaling (1) and the twist in and out (6).
    """
    return (6 * math.log2(n_fft) + 10) * EPS


def root_mean_square_bound(n_fft: int) -> float:
    """Relative rms error on random data, from the specification: 1e-6 to 32K points, twice that for each factor of 32.

    Errors of butterflies are independent there, so they grow with the root of their number: about 0.6 EPS sqrt(2 log2 N),
    a fifth of this.
    """
    return 1e-6 * 2 ** max(0, math.ceil(math.log(n_fft / 32768, 32)))


def norms(t: Tensor) -> Tensor:
    return t.double().norm(dim=-1, keepdim=True)


def relative(y: Tensor, expected: Tensor) -> float:
    """rms of the error over rms of the expected."""
    scale = expected.double().norm()
    return float((y.double() - expected).norm() / scale) if scale > 0 else float(y.double().norm() > 0)


def check(y: Tensor, expected: Tensor, allowed: Tensor, what: str) -> None:
    assert y.shape == expected.shape, f"{what}: shape {list(y.shape)}, expected {list(expected.shape)}"
    assert y.is_contiguous(), what
    error = (y.double() - expected).abs()
    assert bool((error <= allowed).all()), (
        f"{what}: error up to {float((error / allowed).nan_to_num(nan=float('inf')).max()):.3g} of what is allowed, "
        f"relative rms {relative(y, expected):.3g}"
    )


def stored(expected: Tensor, dtype: torch.dtype) -> Tensor:
    """What rounding an output to ``dtype`` may change."""
    return 1.01 * ROUNDING[dtype] * expected.abs() + SMALLEST[dtype]


def check_forward(p: Problem, y: Tensor | None = None, method: str | None = None) -> None:
    """Every output within its bound, and the whole within the specification's, for random inputs."""
    y = p.run() if y is None else y
    assert y.dtype == p.u.dtype
    expected = fc.reference(*p.tensors, p.mode, method)
    v = p.u.double() if p.pregate is None else p.u.double() * p.pregate.double()
    error = gamma(p.n_fft) * norms(v) * norms(p.k)
    if p.skip is not None:
        error = error + 3 * EPS * (p.skip.double()[:, None] * v).abs()
    if p.postgate is not None:
        error = error * p.postgate.double().abs()
    check(y, expected, error + 3 * EPS * expected.abs() + stored(expected, p.u.dtype), str(p))
    if y.numel() >= 64:
        allowed = (
            root_mean_square_bound(p.n_fft) + {torch.float32: 0.0, torch.bfloat16: 3e-3, torch.float16: 4e-4}[y.dtype]
        )
        assert relative(y, expected) <= allowed, f"{p}: relative rms {relative(y, expected):.3g}"


def check_backward(p: Problem, gy: Tensor, grads: tuple[Tensor, ...] | None = None, method: str | None = None) -> None:
    grads = p.backward(gy) if grads is None else grads
    expected = fc.reference_backward(gy, *p.tensors, p.mode, method)
    dtype = p.u.dtype
    v = p.u.double() if p.pregate is None else p.u.double() * p.pregate.double()
    g = gy.double() if p.postgate is None else gy.double() * p.postgate.double()
    skip = torch.zeros(1, 1, dtype=torch.float64) if p.skip is None else p.skip.double()[:, None]
    unit = gamma(p.n_fft)
    gv = unit * norms(g) * norms(p.k) + 3 * EPS * (skip * g).abs()
    c = unit * norms(v) * norms(p.k) + 3 * EPS * (skip * v).abs()
    batch, _, length = p.u.shape
    allowed = {
        "gu": gv if p.pregate is None else gv * p.pregate.double().abs(),
        "gk": ((unit + batch * EPS) * norms(g) * norms(v)).sum(0).expand(-1, p.k.shape[1]),
        "gpre": gv * p.u.double().abs(),
        "gpost": c * gy.double().abs(),
        "gskip": (length + batch) * EPS * (g * v).abs().sum(dim=(0, 2)),
    }
    stores = (dtype, torch.float32, dtype, dtype, torch.float32)
    for (name, bound), grad, want, store in zip(allowed.items(), grads, expected, stores, strict=True):
        if want is None:
            assert grad.shape == (0,), name
            continue
        assert grad.dtype == store, name
        check(grad, want, bound + 4 * EPS * want.abs() + stored(want, store), f"{name} of {p}")
