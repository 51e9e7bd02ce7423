"""dyad_linear as a citizen of PyTorch: schema, compile, export, gradients, autocast; packed buffers and bad input."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from dyad_cases import ACTS, DTYPES, PAIRS, Dyad, dyad, same_bits
from effk.ops import activation
from effk.ops import dyad_linear as dy
from wq_cases import check

ops = torch.ops.effk


def leaves(p: Dyad) -> Dyad:
    """The same with tensors that need gradients."""
    names = ("x", "wl", "wu", "bias")
    return replace(p, **{n: None if (t := getattr(p, n)) is None else t.clone().requires_grad_() for n in names})


def tensors(p: Dyad) -> list[torch.Tensor]:
    return [t for t in (p.x, p.wl, p.wu, p.bias) if t is not None]


def feed_forward(dtype: torch.dtype = torch.float32, variant: str = "it", act: str = "gelu", tokens: int = 5) -> tuple:
    one, two = dyad(3, 10, 7, tokens, variant, dtype=dtype), dyad(3, 7, 10, 1, variant, dtype=dtype)
    return one.x, one.packed(), one.bias, two.packed(), two.bias, one.f_out, two.f_out, act, variant


# ---- schema, shapes, compile, export ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", dy.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype, layout: str) -> None:
    for variant, act, bias in zip(dy.VARIANTS, ("none", "relu", "silu"), (None, torch.float32, dtype), strict=True):
        p = dyad(3, 10, 7, 5, variant, layout, dtype, bias=bias, act=act)
        torch.library.opcheck(ops.dyad_linear.default, p.arguments)
        torch.library.opcheck(ops.dyad_linear.default, leaves(p).arguments)
        packed = (p.packed(), p.f_out, p.bias, variant, layout, act)
        torch.library.opcheck(ops.dyad_linear_packed.default, (p.x, *packed))
        torch.library.opcheck(ops.dyad_linear_packed.default, (p.x.clone().requires_grad_(), *packed))
        for mask in ([True] * 4, [False, True, False, True], [False] * 4):
            arguments = (p.run(), p.x, p.wl, p.wu, variant, layout, mask)
            torch.library.opcheck(ops.dyad_linear_backward.default, arguments)


@pytest.mark.parametrize("variant", dy.VARIANTS)
def test_opcheck_others(variant: str) -> None:
    for dtype in DTYPES:
        p = dyad(3, 10, 7, 5, variant, dtype=dtype)
        torch.library.opcheck(ops.dyad_pack.default, (p.wl, p.wu, variant, "bf16"))
        torch.library.opcheck(ops.dyad_to_dense.default, (p.wl, p.wu, variant))
        q = leaves(p)
        torch.library.opcheck(ops.dyad_to_dense.default, (q.wl, q.wu, variant))
        x, *rest = feed_forward(dtype, variant)
        torch.library.opcheck(ops.dyad_ff.default, (x, *rest))
        torch.library.opcheck(ops.dyad_ff.default, (x.clone().requires_grad_(), *rest))


def test_compile_whole_graph() -> None:
    for variant, layout, act in itertools.product(dy.VARIANTS, dy.LAYOUTS, ("none", "gelu")):
        p = dyad(4, 6, 8, 5, variant, layout, act=act)
        compiled = torch.compile(dy.dyad_linear, fullgraph=True, backend="aot_eager")
        plain, traced = leaves(p), leaves(p)
        y, z = dy.dyad_linear(*plain.arguments), compiled(*traced.arguments)
        assert torch.equal(y, z)
        gy = torch.randn_like(y)
        y.backward(gy)
        z.backward(gy)
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(tensors(plain), tensors(traced), strict=True))
        with torch.no_grad():
            assert torch.equal(compiled(*p.arguments), p.run())
        torch._dynamo.reset()


def test_compile_of_the_packed_operations() -> None:
    def function(x: torch.Tensor, wl: torch.Tensor, wu: torch.Tensor) -> torch.Tensor:
        packed = dy.pack(wl, wu, "dt")
        y = ops.dyad_linear_packed(x, packed, 24, None, "dt", "tokens", "relu")
        return y.sum() + ops.dyad_to_dense(wl, wu, "dt").sum()

    p = dyad(4, 6, 8, 5, "dt")
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(p.x, p.wl, p.wu), function(p.x, p.wl, p.wu))
    arguments = feed_forward()
    compiled = torch.compile(lambda *a: ops.dyad_ff(*a), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), ops.dyad_ff(*arguments))


class Layer(torch.nn.Module):
    def __init__(self, p: Dyad) -> None:
        super().__init__()
        self.wl, self.wu, self.bias = (torch.nn.Parameter(t) for t in (p.wl, p.wu, p.bias))
        self.how = (p.variant, p.layout, p.act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dy.dyad_linear(x, self.wl, self.wu, self.bias, *self.how)


def test_compile_with_any_number_of_tokens() -> None:
    layer, frames = Layer(dyad(4, 6, 8, 1, act="silu")), 0

    def count(graph: torch.fx.GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
        nonlocal frames
        frames += 1
        return graph

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=count)
    for tokens in (3, 7, 31):
        x = torch.randn(tokens, 32)
        assert torch.equal(compiled(x), layer(x))
    assert frames == 1


def test_export_with_any_number_of_tokens() -> None:
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    for layout, place in (("tokens", 0), ("features", 1)):
        p = dyad(4, 6, 8, 5, "ot", layout, act="gelu")
        layer = Layer(p)
        program = torch.export.export(layer, (p.x,), dynamic_shapes={"x": {place: tokens}})
        for count in (2, 90):
            x = dyad(4, 6, 8, count, "ot", layout).x
            torch.testing.assert_close(program.module()(x), layer(x), rtol=0, atol=0)


def test_meta_device() -> None:
    p = dyad(4, 6, 8, 5, "ot")
    meta = replace(p, **{n: getattr(p, n).to("meta") for n in ("x", "wl", "wu", "bias")})
    assert meta.run().shape == p.run().shape
    assert meta.packed(torch.bfloat16).shape == p.packed(torch.bfloat16).shape
    assert ops.dyad_to_dense(meta.wl, meta.wu, "ot").shape == (24, 32)
    assert [g.shape for g in meta.backward(meta.run())] == [g.shape for g in p.backward(p.run())]


# ---- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*not a double precision:UserWarning")
@pytest.mark.parametrize("layout", dy.LAYOUTS)
@pytest.mark.parametrize("variant", dy.VARIANTS)
@pytest.mark.parametrize("act", ACTS)
def test_gradcheck(act: str, variant: str, layout: str) -> None:
    """Differences of the operation itself, in fp32.

    Without activation it is linear in each argument, so a difference over a wide step is exact but for rounding: 30 sums
    of size 1 are good to 30 * 2**-24, over twice the step. With one, a step of 2**-6 leaves h^2 / 6 of a third derivative
    below 2 beside rounding over the step; relu is kept away from its kink.
    """
    p = dyad(3, 4, 5, 4, variant, layout, act=act)
    step, atol = (0.5, 1e-5) if act == "none" else (2.0**-6, 5e-4)
    if act == "relu":
        z = replace(p, act="none").reference()
        p = replace(p, bias=p.bias + 2 * float(z.abs().max()) * (-1.0) ** torch.arange(12))
    operation = ops.dyad_linear.default
    arguments = leaves(p).arguments
    assert torch.autograd.gradcheck(operation, arguments, eps=step, atol=atol, rtol=1e-3, nondet_tol=0.0)
    assert torch.autograd.gradcheck(dy.dyad_linear, arguments, eps=step, atol=atol, rtol=1e-3, nondet_tol=0.0)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("variant", dy.VARIANTS)
def test_gradients_of_the_activation(variant: str, act: str) -> None:
    """Kept or computed again, in every pair of dtypes, as the derivative of the float64 formula says."""
    for layout, dtypes, bias in itertools.product(dy.LAYOUTS, PAIRS, (torch.float32, None)):
        p = dyad(3, 10, 7, 6, variant, layout, *dtypes, bias=bias, act=act)
        gy = torch.randn(p.run().shape).to(dtypes[0])
        z = dy.reference(*p.arguments[:-1]).requires_grad_()
        (gz,) = torch.autograd.grad(activation.reference(z, act), z, gy.double())
        expected = p.reference_backward(gz)
        bounds = p.backward_bounds(gz, expected)
        # The derivative is taken at a sum of dtype x and rounded to it: two roundings, the first times |act''| < 1.2.
        off = (
            0.0
            if act in ("none", "relu")
            else {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}[dtypes[0]]
        )
        size = (p.x.abs(), p.wl.abs(), p.wu.abs(), p.variant, p.layout)
        noise = dy.reference_backward(gy.abs() * (1 + z.detach().abs()), *size)
        for function in (ops.dyad_linear, dy.dyad_linear):
            q = leaves(p)
            function(*q.arguments).backward(gy)
            for t, want, allowed, rough in zip((q.x, q.wl, q.wu, q.bias), expected, bounds, noise, strict=True):
                if t is not None:
                    assert t.grad.dtype == t.dtype
                    check(t.grad, want.reshape(t.shape), (allowed + off * rough).reshape(t.shape), str(p))


def test_only_what_needs_a_gradient_gets_one() -> None:
    for act, wanted in itertools.product(("none", "relu", "gelu"), itertools.product((False, True), repeat=4)):
        p = dyad(3, 10, 7, 6, act=act)
        leaf = [t.clone().requires_grad_(w) for t, w in zip(tensors(p), wanted, strict=True)]
        for function in (ops.dyad_linear, dy.dyad_linear):
            y = function(*leaf, "it", "tokens", act)
            assert y.requires_grad == any(wanted)
            if y.requires_grad:
                y.sum().backward()
            assert [t.grad is not None for t in leaf] == list(wanted)


def test_bias_of_another_dtype_gets_its_gradient_in_it() -> None:
    p = leaves(dyad(3, 10, 7, 6, dtype=torch.bfloat16, bias=torch.float32))
    p.run().sum().backward()
    assert p.bias.grad.dtype == torch.float32 and torch.equal(p.bias.grad, torch.full((30,), 6.0))


@pytest.mark.parametrize("layout", dy.LAYOUTS)
@pytest.mark.parametrize("variant", dy.VARIANTS)
def test_gradients_through_frozen_weights(variant: str, layout: str) -> None:
    """Packed forms: x and biases, as the unpacked operation gives them."""
    for act, dtype in itertools.product(ACTS, (torch.float32, torch.bfloat16)):
        p = dyad(3, 10, 7, 6, variant, layout, dtype, act=act)
        gy = torch.randn(p.run().shape).to(dtype)
        q, r = leaves(p), leaves(p)
        q.run().backward(gy)
        r.run_packed(p.packed()).backward(gy)
        close = (
            {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
        )  # bf16: 2**-8 each
        torch.testing.assert_close(r.x.grad, q.x.grad, **close)
        torch.testing.assert_close(r.bias.grad, q.bias.grad, **close)
        assert r.x.grad.dtype == dtype


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("variant", dy.VARIANTS)
def test_gradients_of_the_feed_forward(variant: str, act: str) -> None:
    x, packed1, b1, packed2, b2, *how = feed_forward(variant=variant, act=act)
    leaf = [t.clone().requires_grad_() for t in (x, b1, b2)]
    y = ops.dyad_ff(leaf[0], packed1, leaf[1], packed2, leaf[2], *how)
    gy = torch.randn_like(y)
    one, two = dyad(3, 10, 7, 5, variant, act=act), dyad(3, 7, 10, 1, variant)
    plain = [t.clone().requires_grad_() for t in (x, b1, b2)]
    hidden = ops.dyad_linear(plain[0], one.wl, one.wu, plain[1], variant, "tokens", act)
    z = ops.dyad_linear(hidden, two.wl, two.wu, plain[2], variant, "tokens", "none")
    for a, b in zip(torch.autograd.grad(y, leaf, gy), torch.autograd.grad(z, plain, gy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*not a double precision:UserWarning")
@pytest.mark.parametrize("variant", dy.VARIANTS)
def test_gradient_of_to_dense(variant: str) -> None:
    p = leaves(dyad(3, 4, 5, 1, variant))
    assert torch.autograd.gradcheck(
        ops.dyad_to_dense.default, (p.wl, p.wu, variant), eps=0.5, atol=1e-5, rtol=1e-4, nondet_tol=0.0
    )


def test_second_derivatives_raise() -> None:
    p = leaves(dyad(3, 4, 5, 4))
    (gx,) = torch.autograd.grad(p.run().square().sum(), p.x, create_graph=True)
    with pytest.raises(RuntimeError, match="dyad_linear_backward: second derivatives are not implemented"):
        gx.sum().backward()


def test_checkpoint_and_expanded_gradient() -> None:
    from torch.utils.checkpoint import checkpoint

    for layout in dy.LAYOUTS:
        p = dyad(4, 6, 8, 5, "ot", layout, act="gelu")
        layer, x = Layer(p), p.x.requires_grad_()
        (plain,) = torch.autograd.grad(layer(x).sum(), x)  # the gradient that arrives is expanded from a scalar
        (again,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sum(), x)
        assert torch.equal(plain, again)


# ---- autocast ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast(dtype: torch.dtype) -> None:
    """x and the weights are cast, the bias is not; gradients come back in the dtypes of the parameters."""
    for variant, act in itertools.product(dy.VARIANTS, ("none", "gelu")):
        p = leaves(dyad(4, 6, 8, 5, variant, act=act))
        with torch.autocast("cpu", dtype=dtype):
            y = p.run()
            same = dy.dyad_linear(*p.arguments[:-1], "none")
        cast = replace(p, x=p.x.detach().to(dtype), wl=p.wl.detach().to(dtype), wu=p.wu.detach().to(dtype))
        cast = replace(cast, bias=p.bias.detach())
        assert y.dtype == same.dtype == dtype and same_bits(y, cast.run())
        assert same_bits(same, replace(cast, act="none").run())
        y.sum().backward()
        assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in tensors(p))
    packed = p.packed(dtype)
    with torch.autocast("cpu", dtype=dtype), torch.no_grad():
        assert p.run_packed(packed).dtype == dtype
        assert ops.dyad_ff(*feed_forward()).dtype == dtype
        with pytest.raises(RuntimeError, match="x: expected"):
            replace(p, x=p.x.double()).run()


# ---- packed buffers ---------------------------------------------------------------------------------------------------


def test_packed_weight_is_the_weight(tier: str) -> None:
    """Its product with the identity, fp32, is W rounded to the packed dtype, both components for themselves."""
    for variant, dtype in itertools.product(dy.VARIANTS, DTYPES):
        p = dyad(3, 50, 33, 1, variant)
        y = replace(p, x=torch.eye(99), bias=None).run_packed(p.packed(dtype))
        assert torch.equal(y.T, dy.reference_to_dense(p.wl.to(dtype), p.wu.to(dtype), variant).float())


def test_packed_weight_is_plain_bytes() -> None:
    p = dyad(3, 10, 7, 5)
    packed = p.packed()
    assert packed.dtype == torch.uint8 and packed.dim() == 1
    again = torch.frombuffer(bytearray(packed.numpy().tobytes()), dtype=torch.uint8)
    assert same_bits(p.run_packed(again), p.run())
    assert torch.equal(p.packed(), packed)  # no byte is left as the allocator gave it


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_damaged_header_is_refused(dtype: torch.dtype) -> None:
    """Every byte that means something; sides whose packed forms differ in size between dtypes of different width."""
    p = dyad(3, 10, 20, 5, "ot", dtype=dtype)
    packed = p.packed()
    for i in range(64):
        for change in (0x01, 0x80, 0xFF):
            damaged = packed.clone()
            damaged[i] ^= change
            with pytest.raises(RuntimeError, match=r"^dyad_linear_packed: (packed|x|f_out|variant): expected .* got"):
                p.run_packed(damaged)


def test_foreign_buffers_are_refused() -> None:
    from effk.ops import dense_linear as dl

    p = dyad(3, 10, 7, 5, "ot")
    packed = p.packed()
    square = dyad(2, 8, 8, 4)
    foreign = {
        "another variant": replace(p, variant="it").packed(),
        "a dense weight": dl.pack(torch.randn(30, 21)),
        "other blocks": dyad(3, 10, 8, 5, "ot").packed(),
        "another n": dyad(1, 30, 21, 5, "ot").packed(),
        "noise": torch.randint(0, 255, packed.shape, dtype=torch.uint8),
        "zeros": torch.zeros_like(packed),
        "nothing": packed[:0],
        "only the header": packed[:64],
        "less than the header": packed[:63],
        "cut short": packed[:-1],
        "one byte more": torch.cat([packed, packed[:1]]),
        "another dtype": packed.view(torch.int8),
        "two dimensions": packed[None],
        "every other byte": torch.stack([packed, packed], 1)[:, 0],
    }
    for name, buffer in foreign.items():
        if name == "another n":
            continue  # the sizes of both layers agree, so it is another weight and no error
        with pytest.raises(RuntimeError, match=r"^dyad_linear_packed: (packed|x|f_out|variant): expected .* got"):
            p.run_packed(buffer)
            pytest.fail(name)
    with pytest.raises(RuntimeError, match=r"^dyad_linear_packed: packed: expected .*f_out = 15, got 16"):
        ops.dyad_linear_packed(square.x, square.packed(), 15, None, "it", "tokens", "none")
    for place, name in ((1, "packed1"), (3, "packed2")):
        arguments = list(feed_forward())
        arguments[place] = packed
        with pytest.raises(RuntimeError, match=rf"^dyad_ff: ({name}|x|variant|f_hidden|f_out): expected .* got"):
            ops.dyad_ff(*arguments)


# ---- bad input: one error that names the op, the argument, what was expected and what came ------------------------------

NAMES = ("x", "wl", "wu", "bias", "variant", "layout", "act")
GOOD = dyad(3, 10, 7, 5)


def changed(**changes: Any) -> tuple:
    values = dict(zip(NAMES, GOOD.arguments, strict=True))
    for name, change in changes.items():
        values[name] = change(values[name]) if callable(change) else change
    return tuple(values.values())


BAD = {
    "x dtype": (dict(x=lambda x: x.double()), r"^dyad_linear: x: expected float32.* got .*float64"),
    "x integer": (dict(x=lambda x: x.int()), r"^dyad_linear: x: expected float32.* got .*int32"),
    "x features": (dict(x=lambda x: x[:, 1:].contiguous()), r"^dyad_linear: x: expected .*21.* got .*\[5, 20\]"),
    "x scalar": (dict(x=torch.tensor(1.0)), r"^dyad_linear: x: expected .* got .*\[\]"),
    "x tokens as features": (dict(layout="features"), r"^dyad_linear: x: expected .*21.* got .*\[5, 21\]"),
    "x of three dimensions as features": (dict(layout="features", x=torch.zeros(21, 2, 2)), r"^dyad_linear: x: expected .* got .*\[21, 2, 2\]"),
    "wl dtype": (dict(wl=lambda w: w.double()), r"^dyad_linear: wl: expected float32.* got .*float64"),
    "wl dimensions": (dict(wl=lambda w: w[0]), r"^dyad_linear: wl: expected .* got .*\[10, 7\]"),
    "wl strides": (dict(wl=lambda w: w.transpose(1, 2).contiguous().transpose(1, 2)), r"^dyad_linear: wl: expected .*contiguous.* got"),
    "wu dtype": (dict(wu=lambda w: w.bfloat16()), r"^dyad_linear: wu: expected .*float32.* got .*bfloat16"),
    "wu shape": (dict(wu=lambda w: w[:, 1:].contiguous()), r"^dyad_linear: wu: expected .*\[3, 10, 7\].* got .*\[3, 9, 7\]"),
    "wu transposed": (dict(wu=lambda w: w.transpose(1, 2).contiguous()), r"^dyad_linear: wu: expected .*\[3, 10, 7\].* got .*\[3, 7, 10\]"),
    "wu strides": (dict(wu=lambda w: w.transpose(0, 1).contiguous().transpose(0, 1)), r"^dyad_linear: wu: expected .*contiguous.* got"),
    "blocks of another n": (dict(wl=torch.zeros(2, 10, 7), wu=torch.zeros(2, 10, 7)), r"^dyad_linear: x: expected .*14.* got .*\[5, 21\]"),
    "no blocks": (dict(wl=torch.zeros(0, 10, 7), wu=torch.zeros(0, 10, 7)), r"^dyad_linear: (wl|x): expected .* got"),
    "bias length": (dict(bias=lambda b: b[1:]), r"^dyad_linear: bias: expected .*\[30\].* got .*\[29\]"),
    "bias released": (dict(bias=lambda b: b[:, None]), r"^dyad_linear: bias: expected .*\[30\].* got .*\[30, 1\]"),
    "bias dtype": (dict(bias=lambda b: b.double()), r"^dyad_linear: bias: expected float32.* got .*float64"),
    "bias strides": (dict(bias=lambda b: torch.stack([b, b], 1)[:, 0]), r"^dyad_linear: bias: expected .*contiguous.* got"),
    "variant": (dict(variant="cat"), r"^dyad_linear: variant: expected .*'?it'?.* got 'cat'"),
    "variant in capitals": (dict(variant="IT"), r"^dyad_linear: variant: expected .* got 'IT'"),
    "layout": (dict(layout="bhl"), r"^dyad_linear: layout: expected .*tokens.* got 'bhl'"),
    "act": (dict(act="tanh"), r"^dyad_linear: act: expected .*gelu.* got 'tanh'"),
    "act empty": (dict(act=""), r"^dyad_linear: act: expected .* got ''"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_argument(case: str) -> None:
    changes, message = BAD[case]
    assert ops.dyad_linear(*changed()).shape == (5, 30)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=message):
        ops.dyad_linear(*changed(**changes))


def test_strides_of_x_are_refused_or_right() -> None:
    """Never read wrongly: the operation wants dense x, the function makes it so."""
    x = GOOD.x.T.contiguous().T
    try:
        assert same_bits(ops.dyad_linear(*changed(x=x)), GOOD.run())
    except RuntimeError as error:
        assert "dyad_linear: x: expected" in str(error)
    assert same_bits(dy.dyad_linear(*changed(x=x)), GOOD.run())


BAD_BACKWARD = {
    0: [(lambda g: g[:, 1:].contiguous(), r"gy: expected .*30.* got .*\[5, 29\]"),
        (lambda g: g[1:], r"gy: expected .*5.* got .*\[4, 30\]"),
        (lambda g: g.bfloat16(), r"gy: expected .*float32.* got .*bfloat16")],
    1: [(lambda x: x.int(), r"x: expected float32.* got .*int32"), (lambda x: x[:, 1:].contiguous(), r"x: expected .*21.* got .*\[5, 20\]")],
    2: [(lambda w: w.double(), r"wl: expected float32.* got .*float64"), (lambda w: w[0], r"wl: expected .* got .*\[10, 7\]")],
    3: [(lambda w: w.half(), r"wu: expected .*float32.* got .*float16"), (lambda w: w[1:], r"wu: expected .*\[3, 10, 7\].* got .*\[2, 10, 7\]")],
    4: [(lambda v: "both", r"variant: expected .* got 'both'")],
    5: [(lambda v: "rows", r"layout: expected .* got 'rows'")],
    6: [(lambda m: m[:3], r"mask: expected 4.* got 3"), (lambda m: [*m, True], r"mask: expected 4.* got 5")],
}  # fmt: skip


@pytest.mark.parametrize("place", BAD_BACKWARD)
def test_bad_argument_of_backward(place: int) -> None:
    good = [GOOD.run(), GOOD.x, GOOD.wl, GOOD.wu, "it", "tokens", [True] * 4]
    ops.dyad_linear_backward(*good)
    for change, message in BAD_BACKWARD[place]:
        with pytest.raises(RuntimeError, match=r"^dyad_linear_backward: " + message):
            ops.dyad_linear_backward(*good[:place], change(good[place]), *good[place + 1 :])


def test_bad_argument_of_the_other_ops() -> None:
    wl, wu, x = GOOD.wl, GOOD.wu, GOOD.x
    for op, rest in ((ops.dyad_pack, ("it", "fp32")), (ops.dyad_to_dense, ("it",))):
        name = op.__name__
        for message, arguments in (
            (r"wl: expected float32.* got .*float64", (wl.double(), wu, *rest)),
            (r"wl: expected .* got .*\[10, 7\]", (wl[0], wu[0], *rest)),
            (r"wu: expected .*\[3, 10, 7\].* got .*\[3, 10, 6\]", (wl, wu[..., 1:].contiguous(), *rest)),
            (r"wu: expected .*float32.* got .*float16", (wl, wu.half(), *rest)),
            (r"variant: expected .* got 'ti'", (wl, wu, "ti", *rest[1:])),
        ):
            with pytest.raises(RuntimeError, match=rf"^{name}: {message}"):
                op(*arguments)
    with pytest.raises(RuntimeError, match=r"^dyad_pack: dtype: expected .*fp32.* got 'float32'"):
        ops.dyad_pack(wl, wu, "it", "float32")
    with pytest.raises(ValueError, match=r"^dyad_pack: dtype: expected float32, bfloat16 or float16, got float64"):
        dy.pack(wl, wu, "it", torch.float64)
    packed = GOOD.packed()
    good = (x, packed, 30, GOOD.bias, "it", "tokens", "none")
    for place, value, message in (
        (0, x.double(), r"x: expected float32.* got .*float64"),
        (0, x[:, 1:].contiguous(), r"x: expected .*21.* got .*\[5, 20\]"),
        (2, 31, r"packed: expected .*f_out = 31, got 30"),
        (2, -1, r"(packed|f_out): expected .*-1.*"),
        (3, GOOD.bias[1:], r"bias: expected .*\[30\].* got .*\[29\]"),
        (3, GOOD.bias.double(), r"bias: expected float32.* got .*float64"),
        (4, "ot", r"(variant|packed): expected .* got"),
        (5, "rows", r"layout: expected .* got 'rows'"),
        (6, "tanh", r"act: expected .* got 'tanh'"),
    ):
        with pytest.raises(RuntimeError, match=rf"^dyad_linear_packed: {message}"):
            ops.dyad_linear_packed(*good[:place], value, *good[place + 1 :])
    good = feed_forward()
    for place, value, message in (
        (0, good[0].double(), r"x: expected float32.* got .*float64"),
        (0, good[0][:, 1:].contiguous(), r"x: expected .*21.* got .*\[5, 20\]"),
        (2, good[2][1:], r"b1: expected .*\[30\].* got .*\[29\]"),
        (4, good[4][1:], r"b2: expected .*\[21\].* got .*\[20\]"),
        (5, 29, r"packed1: expected .*f_out = 29, got 30"),
        (6, 29, r"packed2: expected .*f_out = 29, got 21"),
        (7, "tanh", r"act: expected .* got 'tanh'"),
        (8, "ot", r"(variant|packed1): expected .* got"),
        (8, "to", r"variant: expected .* got 'to'"),
    ):
        with pytest.raises(RuntimeError, match=rf"^dyad_ff: {message}"):
            ops.dyad_ff(*good[:place], value, *good[place + 1 :])
