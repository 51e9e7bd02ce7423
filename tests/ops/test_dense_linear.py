"""dense_linear against the float64 reference, on every tier, and what it promises besides."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from dyad_cases import ACTS, DTYPES, PAIRS, dense, same_bits
from effk import isa
from effk.ops import dense_linear as dl
from wq_cases import check

ops = torch.ops.effk
SIDES = ((1, 1), (1, 67), (67, 1), (16, 16), (33, 65), (48, 300), (100, 37), (257, 129), (130, 515))
TOKENS = (0, 1, 2, 3, 5, 6, 7, 8, 13, 14, 15, 64, 129)
LONG = ((40, 4100, 17), (1030, 70, 33), (97, 2049, 5), (515, 1025, 150))  # beyond any block of the packed operand


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_matches_reference(tier: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    for seed, (f_out, f_in) in enumerate(SIDES):
        bias = (None, torch.float32, *dtypes)[seed % 4]
        whole = dense(f_out, f_in, max(TOKENS), *dtypes, bias, seed=seed)
        expected, packed = whole.reference(), whole.packed()
        allowed = whole.bound(expected)
        for tokens in (0, 1, 5, 8) if tier == "scalar" else TOKENS:
            y = replace(whole, x=whole.x[:tokens]).run(packed)
            assert y.dtype == dtypes[0]
            check(y, expected[:tokens], allowed[:tokens], f"{whole} tokens {tokens}")


@pytest.mark.parametrize("shape", LONG, ids=str)
def test_long_sums_and_many_outputs(tier: str, shape: tuple[int, int, int]) -> None:
    for dtypes in (PAIRS[0], PAIRS[1], PAIRS[4], PAIRS[8]):
        p = dense(*shape[:2], min(shape[2], 5) if tier == "scalar" else shape[2], *dtypes)
        expected = p.reference()
        check(p.run(), expected, p.bound(expected), str(p))


@pytest.mark.emulated
def test_small_integers_are_exact(tier: str) -> None:
    """Every sum is exact in fp32: the same bits on every tier, for every number of tokens."""
    rng = torch.Generator().manual_seed(1)
    for (f_out, f_in), dtypes in itertools.product(((33, 65), (70, 130)), PAIRS):
        p = dense(f_out, f_in, 21, *dtypes)
        p = replace(p, x=torch.randint(-4, 5, p.x.shape, generator=rng).to(dtypes[0]))
        p = replace(p, w=torch.randint(-3, 4, p.w.shape, generator=rng).to(dtypes[1]))
        p = replace(p, bias=torch.randint(-7, 8, p.bias.shape, generator=rng).float())
        expected = p.reference().to(dtypes[0])
        for tokens in (1, 4, 21):
            assert torch.equal(replace(p, x=p.x[:tokens]).run(), expected[:tokens]), str(p)


@pytest.mark.emulated
@pytest.mark.parametrize("act", ACTS)
def test_activations(tier: str, act: str) -> None:
    for dtypes in PAIRS:
        p = dense(50, 37, 19, *dtypes, act=act)
        expected = p.reference()
        check(p.run(), expected, p.bound(expected), str(p))


def test_token_does_not_depend_on_its_batch(tier: str) -> None:
    for dtype in DTYPES:
        p = dense(130, 515, 77, dtype)
        packed = p.packed()
        whole = p.run(packed)
        for tokens in (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 14, 16, 17, 31):
            for first in (0, 7, 77 - tokens):
                part = replace(p, x=p.x[first : first + tokens])
                assert same_bits(part.run(packed), whole[first : first + tokens]), (dtype, tokens, first)


def test_result_does_not_depend_on_threads() -> None:
    for (f_out, f_in, tokens), dtype in itertools.product(((1030, 515, 150), (700, 2050, 1), (130, 70, 1000)), DTYPES):
        p = dense(f_out, f_in, tokens, dtype)
        packed = p.packed()
        torch.set_num_threads(1)
        alone = p.run(packed)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert same_bits(p.run(packed), alone), (f_out, f_in, tokens, dtype, threads)


@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
def test_non_finite_token_stays_alone(tier: str, bad: float) -> None:
    for dtype, tokens in itertools.product(DTYPES, (3, 13)):
        p = dense(40, 50, tokens, dtype)
        clean, x = p.run(), p.x.clone()
        x[2, 49] = bad
        y = replace(p, x=x).run()
        keep = torch.arange(tokens) != 2
        assert same_bits(y[keep], clean[keep]) and not y[2].isfinite().any()


def shifted(t: torch.Tensor) -> torch.Tensor:
    room = torch.empty(t.numel() + 1, dtype=t.dtype)
    room[1:] = t.flatten()
    return room[1:].view(t.shape)


def test_misaligned_buffers(tier: str) -> None:
    for dtypes in PAIRS:
        p = dense(50, 33, 9, *dtypes)
        odd = replace(p, x=shifted(p.x), w=shifted(p.w), bias=shifted(p.bias))
        assert same_bits(odd.run(shifted(p.packed())), p.run()), str(p)
        assert torch.equal(odd.packed(), p.packed())


def test_shapes_of_x() -> None:
    p = dense(24, 32, 30)
    whole, packed = p.run(), p.packed()
    for shape in ((2, 3, 5, 32), (30, 1, 32), (1, 30, 32)):
        assert same_bits(replace(p, x=p.x.reshape(shape)).run(packed), whole.reshape(*shape[:-1], 24))
    assert same_bits(replace(p, x=p.x[4]).run(packed), whole[4])
    assert same_bits(dl.dense_linear(p.x[::3], packed, 24, p.bias), whole[::3])
    assert same_bits(dl.dense_linear(p.x.T.contiguous().T, packed, 24, p.bias), whole)
    for shape in ((0, 32), (2, 0, 32)):
        y = replace(p, x=torch.empty(shape, dtype=torch.bfloat16)).run(packed)
        assert y.shape == (*shape[:-1], 24) and y.dtype == torch.bfloat16


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_unpack_inverts_pack(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    given, kept = dtypes
    for f_out, f_in in SIDES:
        p = dense(f_out, f_in, 1, weights=given)
        assert torch.equal(ops.dense_unpack(p.packed(kept), f_out, f_in), p.w.to(kept).float())


def test_packed_bytes_do_not_depend_on_the_tier() -> None:
    for dtype in DTYPES:
        p = dense(50, 33, 1, dtype)
        packed = p.packed()
        assert packed.dtype == torch.uint8 and packed.dim() == 1
        for name in isa.supported():
            with isa.use(name):
                assert torch.equal(p.packed(), packed)


# ---- as a citizen of PyTorch ------------------------------------------------------------------------------------------


def test_opcheck() -> None:
    for dtype, act in zip(DTYPES, ("none", "relu", "gelu"), strict=True):
        p = dense(10, 7, 5, dtype, act=act)
        packed = p.packed()
        torch.library.opcheck(ops.dense_pack.default, (p.w, "bf16"))
        torch.library.opcheck(ops.dense_unpack.default, (packed, 10, 7))
        for x in (p.x, p.x.clone().requires_grad_()):
            torch.library.opcheck(ops.dense_linear.default, (x, packed, 10, p.bias, act))


@pytest.mark.parametrize("act", ACTS)
def test_gradients(act: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        p = dense(30, 21, 6, dtype, act=act)
        x, bias = p.x.clone().requires_grad_(), p.bias.clone().requires_grad_()
        y = dl.dense_linear(x, p.packed(), 30, bias, act)
        gy = torch.randn(y.shape).to(dtype)
        y.backward(gy)
        exact = p.x.double().requires_grad_(), p.bias.double().requires_grad_()
        grads = torch.autograd.grad(dl.reference(exact[0], p.w, exact[1], act), exact, gy.double())
        # fp32: 30 sums of size 1. bf16: the derivative at a rounded sum, a rounded product, a rounded result.
        close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3 * 2**-8, "atol": 6 * 3 * 2**-8}
        torch.testing.assert_close(x.grad.double(), grads[0], **close)
        torch.testing.assert_close(bias.grad.double(), grads[1], **close)
        assert x.grad.dtype == dtype and bias.grad.dtype == torch.float32


def test_compile_export_autocast_and_meta() -> None:
    p = dense(30, 21, 6)
    packed = p.packed()

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return dl.dense_linear(x, packed, 30, p.bias, "gelu")

    layer, tokens = Layer(), torch.export.Dim("tokens", min=2, max=512)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    program = torch.export.export(layer, (p.x,), dynamic_shapes={"x": {0: tokens}})
    for count in (2, 9):
        x = torch.randn(count, 21)
        assert torch.equal(compiled(x), layer(x)) and torch.equal(program.module()(x), layer(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(p.x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, layer(p.x.bfloat16()))
    meta = ops.dense_pack(p.w.to("meta"), "fp32")
    assert meta.shape == packed.shape
    assert ops.dense_linear(p.x.to("meta"), meta, 30, None, "none").shape == (6, 30)


def test_damaged_and_foreign_buffers_are_refused() -> None:
    from effk.ops import dyad_linear as dy

    p = dense(30, 21, 5)
    packed = p.packed()
    buffers = [
        packed[:0],
        packed[:63],
        packed[:64],
        packed[:-1],
        torch.cat([packed, packed[:1]]),
        packed.view(torch.int8),
    ]
    buffers += [torch.zeros_like(packed), packed[None], dense(30, 22, 1).packed(), dense(31, 21, 1).packed()]
    buffers += [dy.pack(torch.randn(1, 30, 21), torch.randn(1, 30, 21))]
    for i, change in itertools.product(range(64), (0x01, 0x80, 0xFF)):
        damaged = packed.clone()
        damaged[i] ^= change
        buffers.append(damaged)
    for i, buffer in enumerate(buffers):
        with pytest.raises(RuntimeError, match=r"^dense_linear: (packed|x|f_out): expected .* got"):
            p.run(buffer)
            pytest.fail(f"buffer {i}")
        with pytest.raises(RuntimeError, match=r"^dense_unpack: (packed|f_in|f_out): expected .* got"):
            ops.dense_unpack(buffer, 30, 21)
            pytest.fail(f"buffer {i}")


GOOD = dense(30, 21, 5)
BAD = {
    "x dtype": (0, GOOD.x.double(), r"x: expected float32.* got .*float64"),
    "x features": (0, GOOD.x[:, 1:].contiguous(), r"x: expected .*21.* got .*\[5, 20\]"),
    "x scalar": (0, torch.tensor(1.0), r"x: expected .* got .*\[\]"),
    "f_out": (2, 31, r"packed: expected .*f_out = 31, got 30"),
    "f_out negative": (2, -1, r"(packed|f_out): expected .*-1.*"),
    "bias length": (3, GOOD.bias[1:], r"bias: expected .*\[30\].* got .*\[29\]"),
    "bias dtype": (3, GOOD.bias.double(), r"bias: expected float32.* got .*float64"),
    "act": (4, "tanh", r"act: expected .*gelu.* got 'tanh'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_argument(case: str) -> None:
    place, value, message = BAD[case]
    good = (GOOD.x, GOOD.packed(), 30, GOOD.bias, "none")
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"^dense_linear: " + message):
        ops.dense_linear(*good[:place], value, *good[place + 1 :])


def test_bad_argument_of_pack() -> None:
    w = torch.randn(30, 21)
    for arguments, message in (
        ((w.double(), "fp32"), r"w: expected float32.* got .*float64"),
        ((w[0], "fp32"), r"w: expected .* got .*\[21\]"),
        ((w.T, "fp32"), r"w: expected .*contiguous"),
        ((w, "float32"), r"dtype: expected .*fp32.* got 'float32'"),
        ((w, "int8"), r"dtype: expected .*fp32.* got 'int8'"),
    ):
        with pytest.raises(RuntimeError, match=rf"^dense_pack: {message}"):
            ops.dense_pack(*arguments)
    with pytest.raises(ValueError, match=r"^dense_pack: dtype: expected float32, bfloat16 or float16, got float64"):
        dl.pack(w, torch.float64)


def test_bound_is_tight_enough_to_fail() -> None:
    """One wrong weight among 300 is seen."""
    p = dense(48, 300, 64)
    expected, w = p.reference(), p.w.clone()
    w[7, 11] += 0.01
    error = (replace(p, w=w).run() - expected).abs()
    assert (error > 10 * p.bound(expected)).any(dim=0).nonzero().flatten().tolist() == [7]
