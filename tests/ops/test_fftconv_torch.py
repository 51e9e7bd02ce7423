"""fftconv as a citizen of PyTorch: schema, compile, export, gradients, autocast; and bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from effk.ops import fftconv as fc
from fftconv_cases import DTYPES, SCHEMES, check_backward, problem, relative

ops = torch.ops.effk


def leaves(p: Any) -> list[torch.Tensor | None]:
    return [None if t is None else t.clone().requires_grad_() for t in p.tensors]


# ---- schema, shapes, compile, export ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    for parts in ("", "abs"):
        p = problem(20, 13, dtype=dtype, parts=parts)
        torch.library.opcheck(ops.fftconv_prepare.default, (p.k, p.n_fft, p.mode, p.scheme))
        torch.library.opcheck(ops.fftconv.default, p.arguments())
        u, _, pre, post, skip = leaves(p)
        torch.library.opcheck(ops.fftconv.default, (u, p.prepared(), pre, post, skip, *p.arguments()[5:]))
        gy = torch.randn(p.u.shape).to(dtype)
        for mask in ([t is not None for t in p.tensors], [False, True, False, False, False]):
            arguments = (gy, *p.arguments()[:5], p.n_fft, 13, p.mode, p.scheme, mask)
            torch.library.opcheck(ops.fftconv_backward.default, arguments)


def test_compile_whole_graph() -> None:
    p = problem(50, 50, parts="abs")
    compiled = torch.compile(fc.fftconv, fullgraph=True, backend="aot_eager")
    plain, traced = leaves(p), leaves(p)
    y, z = fc.fftconv(*plain), compiled(*traced)
    assert torch.equal(y, z)
    gy = torch.randn_like(y)
    y.backward(gy)
    z.backward(gy)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain, traced, strict=True))
    with torch.no_grad():
        assert torch.equal(compiled(*p.tensors), fc.fftconv(*p.tensors))


def test_compile_with_one_tensor_in_several_places() -> None:
    u, k = torch.randn(2, 3, 20, requires_grad=True), torch.randn(3, 20, requires_grad=True)
    compiled = torch.compile(lambda u, k: fc.fftconv(u, k, u, u), fullgraph=True, backend="aot_eager")
    grads = torch.autograd.grad(compiled(u, k).sum(), (u, k))
    plain = torch.autograd.grad(fc.fftconv(u, k, u, u).sum(), (u, k))
    assert all(
        relative(a, b.double()) < 1e-6 for a, b in zip(grads, plain, strict=True)
    )  # three sums, in another order


def test_compile_with_any_batch_and_length() -> None:
    compiled = torch.compile(
        lambda u, k: fc.fftconv(u, k, n_fft=256), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for batch, length in ((2, 20), (5, 33), (3, 100)):
        u, k = torch.randn(batch, 3, length, requires_grad=True), torch.randn(3, length, requires_grad=True)
        y = compiled(u, k)
        assert torch.equal(y, fc.fftconv(u, k, n_fft=256))
        y.sum().backward()
        assert u.grad.shape == u.shape and k.grad.shape == k.shape


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k = torch.nn.Parameter(torch.randn(3, 20))
        self.skip = torch.nn.Parameter(torch.randn(3))

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        return fc.fftconv(u, self.k, u, None, self.skip, n_fft=64)


def test_export_with_any_batch() -> None:
    layer, batch = Layer(), torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (torch.randn(2, 3, 40),), dynamic_shapes={"u": {0: batch}})
    for rows in (1, 5):
        u = torch.randn(rows, 3, 40)
        assert torch.equal(program.module()(u), layer(u))


def test_meta_device() -> None:
    u = torch.empty(2, 3, 40, device="meta")
    spec = ops.fftconv_prepare(torch.empty(3, 20, device="meta"), 64, "causal", "auto")
    assert spec.shape == ops.fftconv_prepare(torch.zeros(3, 20), 64, "causal", "auto").shape
    assert ops.fftconv(u, spec, None, None, None, 64, "causal", "auto").shape == u.shape


# ---- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", fc.MODES)
@pytest.mark.parametrize("parts", ("", "a", "b", "s", "abs"))
def test_autograd(mode: str, parts: str) -> None:
    length, taps = {"causal": (60, 40), "circular": (64, 64), "bidirectional": (30, 64)}[mode]
    for dtype in DTYPES:
        p = problem(length, taps, mode=mode, parts=parts, dtype=dtype)
        inputs = leaves(p)
        y = fc.fftconv(*inputs, mode=mode)
        gy = torch.randn(y.shape).to(dtype)
        y.backward(gy)
        empty = torch.empty(0)
        check_backward(p, gy, tuple(empty if t is None else t.grad for t in inputs))


def test_autograd_of_the_operation_with_a_constant_filter() -> None:
    p = problem(60, 40, parts="abs")
    u, _, pre, post, skip = leaves(p)
    y = ops.fftconv(u, p.prepared(), pre, post, skip, *p.arguments()[5:])
    gy = torch.randn_like(y)
    y.backward(gy)
    grads = p.backward(gy)
    assert all(map(torch.equal, (u.grad, pre.grad, post.grad, skip.grad), (grads[0], *grads[2:])))
    with torch.inference_mode():
        assert torch.equal(p.run(), y)


def test_only_what_needs_a_gradient_gets_one() -> None:
    p = problem(30, 30, parts="abs")
    for i in range(5):
        inputs = [t.requires_grad_() if j == i else t.detach() for j, t in enumerate(leaves(p))]
        fc.fftconv(*inputs).sum().backward()
        assert [t.grad is not None for t in inputs] == [j == i for j in range(5)]
    assert not fc.fftconv(*p.tensors).requires_grad


def test_second_derivatives_raise() -> None:
    u, k = torch.randn(1, 2, 20, requires_grad=True), torch.randn(2, 20, requires_grad=True)
    for filters in (k, k.detach()):
        grad = torch.autograd.grad(fc.fftconv(u, filters).square().sum(), u, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
            grad.sum().backward()


def test_training_mode_does_not_matter() -> None:
    """What is kept depends on who needs a gradient; a module in eval mode trains as well."""
    layer = Layer().eval()
    layer(torch.randn(2, 3, 40)).sum().backward()
    assert layer.k.grad is not None and layer.skip.grad is not None


def test_checkpoint_and_expanded_gradient() -> None:
    from torch.utils.checkpoint import checkpoint

    layer, u = Layer(), torch.randn(2, 3, 40, requires_grad=True)
    (plain,) = torch.autograd.grad(layer(u).sum(), u)  # the gradient that arrives is expanded from a scalar
    (again,) = torch.autograd.grad(checkpoint(layer, u, use_reentrant=False).sum(), u)
    assert torch.equal(plain, again)


def test_taps_beyond_the_sequence_get_a_zero_gradient() -> None:
    u, k = torch.randn(1, 2, 20), torch.randn(2, 50, requires_grad=True)
    y = fc.fftconv(u, k)
    assert relative(y.detach(), fc.reference(u, k.detach())) < 1e-6
    y.sum().backward()
    assert k.grad.shape == (2, 50) and not k.grad[:, 20:].any() and k.grad[:, :20].all()


# ---- what the user-facing function accepts ----------------------------------------------------------------------------


def test_filters_and_strides_it_accepts() -> None:
    p = problem(40, 30, parts="abs")
    y = fc.fftconv(*p.tensors)
    assert torch.equal(fc.fftconv(p.u, p.k[None], *p.tensors[2:]), y)
    assert torch.equal(fc.fftconv(p.u, p.k.double(), *p.tensors[2:]), y)
    assert torch.equal(fc.fftconv(p.u, p.k.T.contiguous().T, *p.tensors[2:]), y)
    spread = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (p.u, p.pregate, p.postgate)]
    assert torch.equal(fc.fftconv(spread[0], p.k, *spread[1:], p.skip), y)
    k = p.k.double()[None].requires_grad_()
    fc.fftconv(p.u, k).sum().backward()
    assert k.grad.shape == (1, 3, 30) and k.grad.dtype == torch.float64


def test_default_size_is_the_smallest_legal() -> None:
    p = problem(33, 33)
    assert torch.equal(fc.fftconv(p.u, p.k), fc.fftconv(p.u, p.k, n_fft=80))
    assert torch.equal(fc.fftconv(p.u, p.k), fc.fftconv(p.u, torch.nn.functional.pad(p.k, (0, 500))))


def test_autocast_casts_rows_only() -> None:
    p = problem(40, 30, parts="abs")
    low = [t.bfloat16() for t in (p.u, p.pregate, p.postgate)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fc.fftconv(*p.tensors)
        z = ops.fftconv(*p.arguments())
        inputs = leaves(p)
        fc.fftconv(*inputs).sum().backward()
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, fc.fftconv(low[0], p.k, *low[1:], p.skip)) and torch.equal(z, y)
    assert all(t.grad.dtype == torch.float32 for t in inputs)


# ---- bad input: one error that names the op, the argument, what was expected and what came -----------------------------

U, K = torch.randn(2, 3, 20), torch.randn(3, 13)
GOOD = dict(u=U, spec=None, pregate=U, postgate=U, skip=torch.randn(3), n_fft=32, mode="causal", scheme="auto")


def call(**changes: Any) -> torch.Tensor:
    values = GOOD | {"spec": ops.fftconv_prepare(K, 32, "causal", "fft")} | changes
    return ops.fftconv(*values.values())


def spectrum(
    taps: int = 13, n_fft: int = 32, mode: str = "causal", scheme: str = "fft", channels: int = 3
) -> torch.Tensor:
    return ops.fftconv_prepare(torch.randn(channels, taps), n_fft, mode, scheme)


BAD = {
    "u dtype": (lambda: dict(u=U.double()), r"^fftconv: u: expected .*float32.* got .*float64"),
    "u integer": (lambda: dict(u=U.int()), r"^fftconv: u: expected .*float32.* got .*int32"),
    "u dimensions": (lambda: dict(u=U[0]), r"^fftconv: u: expected .* got .*\[3, 20\]"),
    "u strides": (lambda: dict(u=U.transpose(1, 2).contiguous().transpose(1, 2)), r"^fftconv: u: expected .*contiguous.* got"),
    "pregate dtype": (lambda: dict(pregate=U.bfloat16()), r"^fftconv: pregate: expected float32.* got bfloat16"),
    "postgate dtype": (lambda: dict(postgate=U.half()), r"^fftconv: postgate: expected float32.* got float16"),
    "pregate shape": (lambda: dict(pregate=U[:1]), r"^fftconv: pregate: expected .*\[2, 3, 20\].* got .*\[1, 3, 20\]"),
    "postgate shape": (lambda: dict(postgate=U[..., 1:].contiguous()), r"^fftconv: postgate: expected .*\[2, 3, 20\].* got .*\[2, 3, 19\]"),
    "gate strides": (lambda: dict(pregate=U.transpose(1, 2).contiguous().transpose(1, 2)), r"^fftconv: pregate: expected .*contiguous"),
    "skip dtype": (lambda: dict(skip=torch.zeros(3).bfloat16()), r"^fftconv: skip: expected float32.* got bfloat16"),
    "skip shape": (lambda: dict(skip=torch.zeros(4)), r"^fftconv: skip: expected .*\[3\].* got .*\[4\]"),
    "channels": (lambda: dict(spec=spectrum(channels=4)), r"^fftconv: .*expected .*[34].* got"),
    "spec of another size": (lambda: dict(spec=spectrum(n_fft=64)), r"^fftconv: spec: expected .*32.* got .*64"),
    "spec of another mode": (lambda: dict(spec=spectrum(32, 32, "circular")), r"^fftconv: spec: expected .*causal.* got .*circular"),
    "spec of another scheme": (lambda: dict(scheme="direct"), r"^fftconv: spec: expected .*direct.* got .*fft"),
    "spec is something else": (lambda: dict(spec=torch.randn(500)), r"^fftconv: spec: expected"),
    "spec is empty": (lambda: dict(spec=torch.zeros(0)), r"^fftconv: spec: expected"),
    "spec cut short": (lambda: dict(spec=spectrum()[:-1].contiguous()), r"^fftconv: spec: expected"),
    "spec dtype": (lambda: dict(spec=spectrum().double()), r"^fftconv: spec: expected .*float32.* got .*float64"),
    "n_fft too small": (lambda: dict(u=torch.randn(2, 3, 21), pregate=None, postgate=None), r"^fftconv: n_fft: expected at least .*33.* got 32"),
    "n_fft illegal": (lambda: dict(n_fft=33), r"^fftconv: n_fft: expected .* got 33"),
    "mode": (lambda: dict(mode="same"), r"^fftconv: mode: expected .*causal.* got 'same'"),
    "scheme": (lambda: dict(scheme="winograd"), r"^fftconv: scheme: expected .*auto.* got 'winograd'"),
    "circular of another length": (lambda: dict(mode="circular", spec=spectrum(5, 32, "circular")), r"^fftconv: n_fft: expected L = 20 in mode 'circular', got 32"),
    "bidirectional too long": (lambda: dict(mode="bidirectional", spec=spectrum(32, 32, "bidirectional")), r"^fftconv: .*expected .*(40|16).* got"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_argument(case: str) -> None:
    changes, message = BAD[case]
    assert call().shape == U.shape
    with torch.inference_mode(), pytest.raises(RuntimeError, match=message):
        call(**changes())


BAD_FILTERS = {
    "dtype": ((K.double(), 32, "causal", "fft"), r"^fftconv_prepare: k: expected float32.* got float64"),
    "dimensions": ((K[None], 32, "causal", "fft"), r"^fftconv_prepare: k: expected .* got .*\[1, 3, 13\]"),
    "no taps": ((K[:, :0], 32, "causal", "fft"), r"^fftconv_prepare: k: expected .* got .*\[3, 0\]"),
    "strides": ((torch.randn(13, 3).T, 32, "causal", "fft"), r"^fftconv_prepare: k: expected .*contiguous"),
    "size": ((K, 56, "causal", "fft"), r"^fftconv_prepare: n_fft: expected .* got 56"),
    "size negative": ((K, -32, "causal", "fft"), r"^fftconv_prepare: n_fft: expected .* got -32"),
    "size small": ((K, 16, "causal", "fft"), r"^fftconv_prepare: n_fft: expected .* got 16"),
    "size huge": ((K, 1 << 25, "causal", "fft"), r"^fftconv_prepare: n_fft: expected .* got 33554432"),
    "size wraps": ((K, (1 << 32) + 32, "causal", "fft"), r"^fftconv_prepare: n_fft: expected .* got 4294967328"),
    "too many taps": ((torch.randn(3, 33), 32, "causal", "fft"), r"^fftconv_prepare: .*expected .*3[23].* got 3[23]"),
    "too many circular": ((torch.randn(3, 33), 32, "circular", "fft"), r"^fftconv_prepare: .*expected .*3[23].* got 3[23]"),
    "bidirectional": ((K, 32, "bidirectional", "fft"), r"^fftconv_prepare: .*expected .*(32|13).* got (32|13)"),
    "mode": ((K, 32, "full", "fft"), r"^fftconv_prepare: mode: expected .* got 'full'"),
    "scheme": ((K, 32, "causal", "fast"), r"^fftconv_prepare: scheme: expected .* got 'fast'"),
    "scheme of a mode": ((K, 32, "circular", "direct"), r"^fftconv_prepare: scheme: expected .* got 'direct'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILTERS)
def test_bad_filter(case: str) -> None:
    arguments, message = BAD_FILTERS[case]
    with pytest.raises(RuntimeError, match=message):
        ops.fftconv_prepare(*arguments)


def test_wrap_around_is_refused() -> None:
    """A causal n_fft = L + K - 2 would wrap one product round to position 0."""
    for length, taps in ((20, 14), (32, 2), (2, 32)):
        u, k = torch.randn(1, 1, length), torch.randn(1, taps)
        with pytest.raises(RuntimeError, match=r"^fftconv: n_fft: expected at least .*33.* got 32"):
            fc.fftconv(u, k, n_fft=32)
        for scheme in SCHEMES[1:]:
            with pytest.raises(RuntimeError, match=r"^fftconv: n_fft: expected at least .*33.* got 32"):
                fc.fftconv(u, k, n_fft=32, scheme=scheme)


def test_bad_arguments_of_backward() -> None:
    p = problem(20, 13, parts="ab")
    good = [torch.randn_like(p.u), *p.arguments()[:5], p.n_fft, 13, p.mode, p.scheme, [True] * 4 + [False]]
    cases = {
        0: (p.u[:1], r"^fftconv_backward: gy: expected .*\[2, 3, 20\].* got .*\[1, 3, 20\]"),
        1: (p.u.bfloat16(), r"^fftconv_backward: .*expected .* got .*"),
        7: (14, r"^fftconv_backward: k_len: expected 13.* got 14"),
        10: ([True] * 4, r"^fftconv_backward: mask: expected .*5.* got 4"),
    }
    ops.fftconv_backward(*good)
    for place, (value, message) in cases.items():
        with pytest.raises(RuntimeError, match=message):
            ops.fftconv_backward(*good[:place], value, *good[place + 1 :])
    with pytest.raises(RuntimeError, match=r"^fftconv_backward: mask: expected .*pregate"):
        ops.fftconv_backward(*good[:3], None, *good[4:])
