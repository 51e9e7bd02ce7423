"""The CUDA kernels of depthwise_conv1d and their binding against the float64 reference: on a GPU, and emulated on the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from cuda_backend import ORDERS, Backend, offered
from effk.ops import depthwise_conv1d as dw

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
EPSILON = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
# L, K, pad_left, pad_right, B, H; every second one with an even number of channels, which layout blh takes in pairs
SHAPES = [
    (50, 4, 3, 0, 2, 4),
    (33, 1, 0, 0, 1, 3),
    (40, 7, 3, 3, 3, 6),
    (17, 5, 9, 2, 2, 5),
    (2100, 3, 2, 0, 1, 2),
    (300, 260, 259, 0, 1, 3),
    (64, 9, 0, 0, 2, 36),
]


@pytest.fixture(params=ORDERS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    yield from offered(request.param, monkeypatch, Backend)


def check(got: Tensor, expected: Tensor, magnitude: Tensor, terms: int, text: str) -> None:
    """fp32 sums of ``terms`` products and one rounding to the type of the result; silu and its slope keep errors small."""
    bound = (
        (terms + 8) * 2.0**-23 * magnitude
        + EPSILON[got.dtype] * expected.abs()
        + (2.0**-24 if got.dtype == torch.float16 else 1e-30)
    )
    excess = ((got.double() - expected).abs() / bound).max().item()
    assert excess <= 1.0, f"{text}: {excess:.2f} times the bound"


@pytest.mark.parametrize("layout", dw.LAYOUTS)
def test_matches_reference(backend: Backend, layout: str) -> None:
    types = itertools.cycle(DTYPES)
    for seed, (length, taps, left, right, batch, channels) in enumerate(SHAPES):
        for act in dw.ACTS:
            dtype, g = next(types), torch.Generator().manual_seed(seed)
            x = torch.randn(
                (batch, channels, length) if layout == "bhl" else (batch, length, channels), generator=g
            ).to(dtype)
            w = torch.randn(channels, taps, generator=g).to(dtype if seed % 2 else torch.float32)
            bias = torch.randn(channels, generator=g).to(w.dtype) if seed % 3 else None
            text = f"{layout} {act} {dtype} L {length} K {taps} pad {left} {right} B {batch} H {channels}"
            how = (left, right, layout, act)
            y = backend.ops.depthwise_conv1d(*backend.move(x, w, bias), *how).cpu()
            expected = dw.reference(x, w, bias, *how)
            sizes = (x.abs(), w.abs(), None if bias is None else bias.abs())
            magnitude = dw.reference(*sizes, left, right, layout)
            assert y.dtype == dtype and y.shape == expected.shape
            check(y, expected, magnitude, taps, text)

            gy = torch.randn(y.shape, generator=g).to(dtype)
            mask = [True, True, bias is not None]
            grads = backend.ops.depthwise_conv1d_backward(*backend.move(gy, x, w, bias), *how, mask)
            wanted = dw.reference_backward(gy, x, w, bias, *how)
            # The slope of silu is at most 1.1, and moves by less than the sum it is taken at.
            gsize = gy.abs() * (1.2 + (magnitude if act == "silu" else 0.0))
            magnitudes = dw.reference_backward(gsize.double(), *sizes, left, right, layout)
            terms = (taps, batch * y.numel() // (batch * channels), batch * y.numel() // (batch * channels))
            for name, got, want, size, n in zip("xwb", grads, wanted, magnitudes, terms, strict=True):
                if name == "b" and bias is None:
                    assert got.numel() == 0
                    continue
                assert got.shape == want.shape
                check(got.cpu(), want, size, n + taps, f"{text} g{name}")


def test_pointwise_is_exact(backend: Backend) -> None:
    """Small integers: every sum is exact, in every order; rows do not meet."""
    for layout in dw.LAYOUTS:
        x = torch.randint(-3, 4, (2, 6, 6), generator=torch.Generator().manual_seed(1)).half()
        w = torch.randint(-2, 3, (6, 3), generator=torch.Generator().manual_seed(2)).float()
        y = backend.ops.depthwise_conv1d(*backend.move(x, w, None), 2, 0, layout, "none").cpu()
        assert torch.equal(y.double(), dw.reference(x, w, None, 2, 0, layout))


def test_infinity_stays_where_it_is(backend: Backend) -> None:
    """It reaches the K outputs that meet it, and no other."""
    for layout, taps in itertools.product(dw.LAYOUTS, (3, 8, 9)):
        x = torch.ones(1, 2, 40)
        x[0, 0, 20] = float("inf")
        x = x if layout == "bhl" else x.transpose(1, 2).contiguous()
        y = backend.ops.depthwise_conv1d(*backend.move(x, torch.ones(2, taps), None), taps - 1, 0, layout, "none").cpu()
        y = y if layout == "bhl" else y.transpose(1, 2)
        assert torch.isinf(y[0, 0]).nonzero().flatten().tolist() == list(range(20, min(20 + taps, 40)))
        assert torch.isfinite(y[0, 1]).all()


def test_errors(backend: Backend) -> None:
    x, w = backend.move(torch.randn(1, 2, 10), torch.randn(2, 3))
    for message, args in {
        "depthwise_conv1d: layout: expected": (x, w, None, 2, 0, "lbh", "none"),
        "depthwise_conv1d: act: expected": (x, w, None, 2, 0, "bhl", "relu"),
        "depthwise_conv1d: w: expected": (x, w[:1], None, 2, 0, "bhl", "none"),
        "depthwise_conv1d: x: expected": (x[0], w, None, 2, 0, "bhl", "none"),
        "depthwise_conv1d: pad_left": (x, w, None, -1, 0, "bhl", "none"),
        "depthwise_conv1d: w: expected at most": (x[..., :2].contiguous(), w, None, 0, 0, "bhl", "none"),
        "depthwise_conv1d: bias: expected": (x, w, w, 0, 0, "bhl", "none"),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            backend.ops.depthwise_conv1d(*args)
