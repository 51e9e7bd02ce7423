"""depthwise_conv1d against float64, on every tier, and as a citizen of PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from effk import _C, isa
from effk.ops import depthwise_conv1d as dw

ops = torch.ops.effk
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
EPS = 2.0**-24
TAPS = (1, 2, 3, 4, 5, 7, 9, 33)
_OWN = {row["tier"] for row in _C.kernel_table() if row["op"] == "depthwise_conv1d" and row["supported"]}
TIERS = [name for name in isa.supported() if name in _OWN]


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    with isa.use(request.param):
        yield request.param


def case(
    length: int, taps: int, batch: int, channels: int, layout: str, dtype: torch.dtype, w_dtype: torch.dtype, bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    shape = (batch, channels, length) if layout == "bhl" else (batch, length, channels)
    x, w = torch.randn(shape).to(dtype), torch.randn(channels, taps).to(w_dtype)
    return x, w, torch.randn(channels).to(w_dtype) if bias else None


def paddings(taps: int, length: int) -> list[tuple[int, int]]:
    """Causal, none, the two halves, more than the filter; those with a result."""
    some = [(taps - 1, 0), (0, 0), (taps // 2, (taps - 1) // 2), (0, taps - 1), (taps + 3, 1), (1, taps + 20)]
    return [(left, right) for left, right in some if length + left + right >= taps]


def close(y: Tensor, expected: Tensor, allowed: Tensor, what: str) -> None:
    """``allowed`` is for fp32; storing adds half a unit in the last place."""
    assert y.shape == expected.shape and y.is_contiguous(), what
    allowed = allowed + 1.01 * ROUNDING[y.dtype] * expected.abs() + 2.0**-25
    error = (y.double() - expected).abs()
    assert bool((error <= allowed).all()), (
        f"{what}: error up to {float((error / allowed).max()):.3g} of what is allowed"
    )


def forward_bound(x: Tensor, w: Tensor, bias: Tensor | None, how: tuple) -> Tensor:
    """taps products and a bias added in any order; silu, slope at most 1.1, in a few more roundings of its own."""
    left, right, layout, act = how
    sizes = dw.reference(x.abs(), w.abs(), None if bias is None else bias.abs(), left, right, layout)
    return (w.shape[1] + 2 + (16 if act == "silu" else 0)) * EPS * 1.1 * sizes


@pytest.mark.parametrize("layout", dw.LAYOUTS)
@pytest.mark.parametrize("taps", TAPS)
def test_matches_reference(tier: str, taps: int, layout: str) -> None:
    turn = itertools.count(taps)
    for length in (1, 2, 15, 16, 17, 64, 100, 515):
        for left, right in paddings(taps, length):
            i = next(turn)
            dtype = DTYPES[i % 3]
            x, w, bias = case(
                length, taps, 1 + i % 3, (1, 5, 16, 37)[i % 4], layout, dtype, (torch.float32, dtype)[i % 2], i % 5 > 1
            )
            how = (left, right, layout, dw.ACTS[i // 2 % 2])
            y = ops.depthwise_conv1d(x, w, bias, *how)
            assert y.dtype == dtype
            close(
                y,
                dw.reference(x, w, bias, *how),
                forward_bound(x, w, bias, how),
                f"{list(x.shape)} {taps} {how} {dtype}",
            )


@pytest.mark.emulated
def test_small(tier: str) -> None:
    """Quick enough for an emulated CPU."""
    for i, layout in enumerate((*dw.LAYOUTS, *dw.LAYOUTS)):
        x, w, bias = case(37, 4, 1, 19, layout, DTYPES[i % 3], torch.float32, True)
        how = (3, 0, layout, dw.ACTS[i // 2])
        y = ops.depthwise_conv1d(x, w, bias, *how)
        close(y, dw.reference(x, w, bias, *how), forward_bound(x, w, bias, how), f"{how}")
        ops.depthwise_conv1d_backward(y, x, w, bias, *how, [True] * 3)


@pytest.mark.parametrize("taps", (1, 2, 5))
def test_reference_is_conv1d(taps: int) -> None:
    """Against torch, whose taps run the other way."""
    x, w, bias = case(20, taps, 2, 3, "bhl", *[torch.float64] * 2, True)
    y = torch.nn.functional.conv1d(torch.nn.functional.pad(x, (4, 1)), w.flip(1)[:, None], bias, groups=3)
    for layout, t in (("bhl", x), ("blh", x.transpose(1, 2))):
        for act, expected in (("none", y), ("silu", torch.nn.functional.silu(y))):
            got = dw.reference(t, w, bias, 4, 1, layout, act)
            assert torch.allclose(got if layout == "bhl" else got.transpose(1, 2), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("layout", "act"), [*itertools.product(dw.LAYOUTS, dw.ACTS)])
def test_reference_gradients(layout: str, act: str) -> None:
    inputs = [t.double().requires_grad_() for t in case(9, 4, 2, 3, layout, *[torch.float32] * 2, True)]
    assert torch.autograd.gradcheck(lambda *t: dw.reference(*t, 2, 5, layout, act), inputs)
    gy = torch.randn(dw.reference(*inputs, 2, 5, layout, act).shape, dtype=torch.float64)
    automatic = torch.autograd.grad(dw.reference(*inputs, 2, 5, layout, act), inputs, gy)
    exact = dw.reference_backward(gy, *(t.detach() for t in inputs), 2, 5, layout, act)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(automatic, exact, strict=True))


@pytest.mark.parametrize("layout", dw.LAYOUTS)
@pytest.mark.parametrize("taps", TAPS)
def test_backward(tier: str, taps: int, layout: str) -> None:
    """Every padding, not only the one that keeps the length. Sums over batch and time may be in any order."""
    turn = itertools.count(taps)
    for length in (1, 2, 16, 17, 100, 515):
        for left, right in paddings(taps, length):
            i = next(turn)
            dtype = DTYPES[i % 3]
            w_dtype = (torch.float32, dtype)[i // 3 % 2]
            x, w, bias = case(length, taps, 1 + i % 3, (1, 5, 37)[i // 2 % 3], layout, dtype, w_dtype, i % 5 > 1)
            how = (left, right, layout, dw.ACTS[i // 2 % 2])
            gy = torch.randn(dw.reference(x, w, bias, *how).shape).to(dtype)
            grads = ops.depthwise_conv1d_backward(gy, x, w, bias, *how, [True, True, bias is not None])
            expected = dw.reference_backward(gy, x, w, bias, *how)
            sizes = dw.reference_backward(gy.abs(), x.abs(), w.abs(), None, *how[:3])
            before = forward_bound(x, w, bias, (left, right, layout, "silu")) if how[3] == "silu" else None
            if before is not None:  # the slope of silu is between -0.1 and 1.1 and changes by at most 0.5 per unit of s
                wrong = gy.double().abs() * (before + 16 * EPS)
                through = dw.reference_backward(wrong, x.abs(), w.abs(), None, *how[:3])
            else:
                through = [torch.zeros_like(s) for s in sizes]
            terms = (taps, x.shape[0] * length, x.shape[0] * gy.numel())
            what = f"{list(x.shape)} {taps} {how} {dtype}"
            for grad, want, size, extra, count, like in zip(
                grads, expected, sizes, through, terms, (x, w, bias), strict=True
            ):
                if like is None:
                    assert grad.shape == (0,)
                    continue
                assert grad.dtype == like.dtype
                close(grad, want, (count + 4) * EPS * 1.2 * size + extra, what)


@pytest.mark.parametrize("layout", dw.LAYOUTS)
def test_rows_and_threads_do_not_matter(tier: str, layout: str) -> None:
    x, w, bias = case(301, 4, 3, 37, layout, torch.float32, torch.float32, True)
    how = (3, 0, layout, "silu")
    y = ops.depthwise_conv1d(x, w, bias, *how)
    gy = torch.randn_like(y)
    grads = ops.depthwise_conv1d_backward(gy, x, w, bias, *how, [True] * 3)
    assert torch.equal(ops.depthwise_conv1d(x[1:2], w, bias, *how), y[1:2])
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert torch.equal(ops.depthwise_conv1d(x, w, bias, *how), y)
        again = ops.depthwise_conv1d_backward(gy, x, w, bias, *how, [True] * 3)
        assert all(map(torch.equal, again, grads))


def test_layouts_agree() -> None:
    x, w, bias = case(50, 5, 2, 20, "bhl", torch.float32, torch.float32, True)
    y = ops.depthwise_conv1d(x, w, bias, 4, 0, "bhl", "none")
    z = ops.depthwise_conv1d(x.transpose(1, 2).contiguous(), w, bias, 4, 0, "blh", "none")
    assert torch.allclose(y.transpose(1, 2), z, rtol=1e-6, atol=1e-6)


def test_causal_exactly() -> None:
    x, w, _ = case(50, 5, 1, 3, "bhl", torch.float32, torch.float32, False)
    y = dw.depthwise_conv1d(x, w)
    x[..., 20:] = float("nan")
    assert torch.equal(dw.depthwise_conv1d(x, w)[..., :20], y[..., :20])


def test_silu_of_large_values() -> None:
    x = torch.tensor([-1e30, -200.0, -90.0, 90.0, 200.0, 1e30]).view(1, 1, 6)
    y = ops.depthwise_conv1d(x, torch.ones(1, 1), None, 0, 0, "bhl", "silu")
    assert torch.equal(y[0, 0, 3:], x[0, 0, 3:]) and float(y[0, 0, :3].abs().max()) < 1e-30


@pytest.mark.parametrize("layout", dw.LAYOUTS)
def test_opcheck(layout: str) -> None:
    for dtype, bias, act in ((torch.float32, True, "silu"), (torch.bfloat16, False, "none")):
        x, w, b = case(20, 4, 2, 3, layout, dtype, torch.float32, bias)
        torch.library.opcheck(ops.depthwise_conv1d.default, (x, w, b, 3, 1, layout, act))
        inputs = [None if t is None else t.clone().requires_grad_() for t in (x, w, b)]
        torch.library.opcheck(ops.depthwise_conv1d.default, (*inputs, 3, 0, layout, act))
        gy = ops.depthwise_conv1d(x, w, b, 3, 1, layout, act)
        for mask in ([True, True, bias], [False, True, False]):
            torch.library.opcheck(ops.depthwise_conv1d_backward.default, (gy, x, w, b, 3, 1, layout, act, mask))


def test_compile_export_autograd() -> None:
    x, w, bias = (t.requires_grad_() for t in case(20, 4, 2, 3, "bhl", torch.float32, torch.float32, True))
    compiled = torch.compile(dw.depthwise_conv1d, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (20, 31):
        part = torch.randn(2, 3, length, requires_grad=True)
        plain, traced = dw.depthwise_conv1d(part, w, bias), compiled(part, w, bias)
        assert torch.equal(plain, traced)
        gy = torch.randn_like(plain)
        pairs = zip(
            torch.autograd.grad(plain, (part, w, bias), gy),
            torch.autograd.grad(traced, (part, w, bias), gy),
            strict=True,
        )
        assert all(torch.equal(a, b) for a, b in pairs)

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            return dw.depthwise_conv1d(x, w, act="silu")

    batch = torch.export.Dim("batch", min=1, max=99)
    arguments = (x.detach(), w.detach())
    program = torch.export.export(Layer(), arguments, dynamic_shapes={"x": {0: batch}, "w": None})
    more = torch.randn(7, 3, 20)
    assert torch.equal(program.module()(more, arguments[1]), Layer()(more, arguments[1]))


def test_second_derivatives_raise() -> None:
    x, w, _ = (None if t is None else t.requires_grad_() for t in case(20, 4, 1, 3, "bhl", *[torch.float32] * 2, False))
    (grad,) = torch.autograd.grad(dw.depthwise_conv1d(x, w).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        grad.sum().backward()


def test_autocast_casts_x_only() -> None:
    x, w, bias = case(20, 4, 1, 3, "bhl", torch.float32, torch.float32, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = dw.depthwise_conv1d(x, w, bias)
    assert y.dtype == torch.bfloat16 and torch.equal(y, dw.depthwise_conv1d(x.bfloat16(), w, bias))


X, W, BIAS = torch.randn(2, 3, 20), torch.randn(3, 4), torch.randn(3)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "x dtype": (dict(x=X.double()), r"^depthwise_conv1d: x: expected float32.* got float64"),
    "x dimensions": (dict(x=X[0]), r"^depthwise_conv1d: x: expected .* got .*\[3, 20\]"),
    "x strides": (dict(x=X.transpose(1, 2).contiguous().transpose(1, 2)), r"^depthwise_conv1d: x: expected .*contiguous"),
    "w dtype": (dict(w=W.half()), r"^depthwise_conv1d: w: expected float32.* got .*float16"),
    "w shape": (dict(w=W[:2]), r"^depthwise_conv1d: w: expected .*3.* got .*\[2, 4\]"),
    "w dimensions": (dict(w=W[:, None]), r"^depthwise_conv1d: w: expected .* got .*\[3, 1, 4\]"),
    "no taps": (dict(w=W[:, :0]), r"^depthwise_conv1d: w: expected .* got .*\[3, 0\]"),
    "bias shape": (dict(bias=BIAS[:2]), r"^depthwise_conv1d: bias: expected .*\[3\].* got .*\[2\]"),
    "bias dtype": (dict(bias=BIAS.double()), r"^depthwise_conv1d: bias: expected float32.* got .*float64"),
    "pad_left": (dict(pad_left=-1), r"^depthwise_conv1d: pad_left, pad_right: expected 0 or more, got -1, 0"),
    "pad_right": (dict(pad_right=-1), r"^depthwise_conv1d: pad_left, pad_right: expected 0 or more, got 3, -1"),
    "nothing left": (dict(x=X[..., :2].contiguous(), pad_left=0), r"^depthwise_conv1d: .*expected .* got"),
    "layout": (dict(layout="lbh"), r"^depthwise_conv1d: layout: expected .*bhl.*blh.* got 'lbh'"),
    "act": (dict(act="relu"), r"^depthwise_conv1d: act: expected .*none.*silu.* got 'relu'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_argument(name: str) -> None:
    changes, message = BAD[name]
    values = dict(x=X, w=W, bias=BIAS, pad_left=3, pad_right=0, layout="bhl", act="none")
    ops.depthwise_conv1d(*values.values())
    with torch.inference_mode(), pytest.raises(RuntimeError, match=message):
        ops.depthwise_conv1d(*(values | changes).values())
