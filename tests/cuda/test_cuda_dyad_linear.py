"""The CUDA kernels of dense_linear and dyad_linear and their bindings against float64: on a GPU, and emulated on the CPU.

The oracle is the dense matrix, put together from the table of rows and columns in the contract, and autograd in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_backend import ORDERS, Backend, offered
from effk.ops import wq_linear as wq
from wq_cases import random_weight

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
EPSILON = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
VARIANTS, LAYOUTS = ("it", "ot", "dt"), ("tokens", "features")
ACTS = {
    "none": lambda v: v,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    "silu": F.silu,
}
# n, d_out, d_in, tokens; with tokens first the second and the fourth have residues copied in order when they are emulated
SHAPES = [(4, 24, 16, 5), (4, 24, 40, 66), (3, 8, 11, 17), (8, 16, 24, 20), (1, 33, 20, 3), (2, 1, 3, 1)]


@pytest.fixture(params=ORDERS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    yield from offered(request.param, monkeypatch, Backend)


def places(n: int, d_out: int, d_in: int, variant: str) -> list[tuple[Tensor, Tensor]]:
    """Rows and columns of the elements of wl and of wu."""
    d, o, i = torch.meshgrid(torch.arange(n), torch.arange(d_out), torch.arange(d_in), indexing="ij")
    rows = [d * d_out + o, d * d_out + o if variant == "it" else o * n + d]
    columns = [d * d_in + i, d * d_in + i if variant == "ot" else i * n + d]
    return list(zip(rows, columns, strict=True))


def dense(wl: Tensor, wu: Tensor, variant: str) -> Tensor:
    n, d_out, d_in = wl.shape
    w = torch.zeros(n * d_out, n * d_in, dtype=torch.float64)
    for part, place in zip((wl, wu), places(n, d_out, d_in, variant), strict=True):
        w.index_put_(place, part.double(), accumulate=True)
    return w


def check(got: Tensor, expected: Tensor, magnitude: Tensor, terms: int, text: str) -> None:
    """fp32 sums of ``terms`` products in any order, one rounding to the type of the result; slopes of activations are at most 1.13."""
    bound = 1.13 * (terms + 8) * 2.0**-23 * magnitude + EPSILON[got.dtype] * expected.abs()
    bound = bound + (2.0**-24 if got.dtype == torch.float16 else 1e-30)
    assert got.shape == expected.shape, text
    excess = ((got.cpu().double() - expected).abs() / bound).max().item()
    assert excess <= 1.0, f"{text}: {excess:.2f} times the bound"


def problem(seed: int, layout: str, x_dtype: torch.dtype, w_dtype: torch.dtype, shape: tuple[int, int, int, int]):
    n, d_out, d_in, tokens = shape
    g = torch.Generator().manual_seed(seed)
    wl, wu = (torch.randn(n, d_out, d_in, generator=g).to(w_dtype) for _ in range(2))
    x = torch.randn(tokens, n * d_in, generator=g).to(x_dtype)
    gy = torch.randn(tokens, n * d_out, generator=g).to(x_dtype)
    bias = torch.randn(n * d_out, generator=g).to((torch.float32, x_dtype, w_dtype)[seed % 3]) if seed % 4 else None
    turn = (lambda t: t.T.contiguous()) if layout == "features" else (lambda t: t)
    return wl, wu, turn(x), bias, turn(gy)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_dense(backend: Backend, variant: str, layout: str) -> None:
    """Forward, packed and not, and all gradients; types, also mixed ones, and activations in turn."""
    pairs = itertools.cycle(
        [*zip(DTYPES, DTYPES, strict=True), (torch.float32, torch.bfloat16), *zip(DTYPES, DTYPES, strict=True)]
    )
    acts = itertools.cycle(ACTS)
    for seed, shape in enumerate(SHAPES):
        (x_dtype, w_dtype), act, (n, d_out, d_in, tokens) = next(pairs), next(acts), shape
        wl, wu, x, bias, gy = problem(seed, layout, x_dtype, w_dtype, shape)
        text = f"{variant} {layout} {act} {x_dtype} {w_dtype} {shape}"
        w = dense(wl, wu, variant)
        flat = (lambda t: t.T) if layout == "features" else (lambda t: t)
        rows, grads = flat(x).double(), flat(gy).double()
        sums = rows @ w.T if bias is None else rows @ w.T + bias.double()
        magnitude = rows.abs() @ w.abs().T + (0.0 if bias is None else bias.double().abs())
        args = (variant, layout, act)
        x_, wl_, wu_, bias_, gy_ = backend.move(x, wl, wu, bias, gy)
        y = backend.ops.dyad_linear(x_, wl_, wu_, bias_, *args)
        assert y.dtype == x_dtype
        check(flat(y), ACTS[act](sums), magnitude, 2 * d_in + 1, text)
        packed = backend.ops.dyad_pack(wl_, wu_, variant, NAMES[w_dtype])
        assert torch.equal(backend.ops.dyad_linear_packed(x_, packed, n * d_out, bias_, *args), y), text

        gx, gwl, gwu, gb = backend.ops.dyad_linear_backward(gy_, x_, wl_, wu_, variant, layout, [True] * 4)
        check(flat(gx), grads @ w, grads.abs() @ w.abs(), 2 * d_out, f"{text} gx")
        whole, size = grads.T @ rows, grads.abs().T @ rows.abs()
        for got, place, name in zip((gwl, gwu), places(n, d_out, d_in, variant), ("gwl", "gwu"), strict=True):
            assert got.dtype == w_dtype
            check(got, whole[place], size[place], tokens, f"{text} {name}")
        check(gb, grads.sum(0), grads.abs().sum(0), tokens, f"{text} gb")
        some = backend.ops.dyad_linear_backward(gy_, x_, wl_, wu_, variant, layout, [False, False, True, False])
        assert [t.numel() for t in some[:2]] == [0, 0] and some[3].numel() == 0 and torch.equal(some[2], gwu)


@pytest.mark.parametrize("variant", VARIANTS)
def test_to_dense_and_integers(backend: Backend, variant: str) -> None:
    """Small integers: every sum is exact, so that tensor cores, fp32 and the oracle agree to the bit."""
    for n, d_out, d_in in ((4, 8, 12), (3, 5, 7)):
        g = torch.Generator().manual_seed(n)
        wl, wu = (torch.randint(-3, 4, (n, d_out, d_in), generator=g).float() for _ in range(2))
        w = dense(wl, wu, variant)
        assert torch.equal(backend.ops.dyad_to_dense(*backend.move(wl, wu), variant).cpu().double(), w)
        x = torch.randint(-2, 3, (7, n * d_in), generator=g)
        for dtype in DTYPES:
            y = backend.ops.dyad_linear(
                *backend.move(x.to(dtype), wl.to(dtype), wu.to(dtype), None), variant, "tokens", "none"
            )
            assert torch.equal(y.cpu().double(), x.double() @ w.T)


@pytest.mark.parametrize("variant", VARIANTS)
def test_feed_forward_is_two_layers(backend: Backend, variant: str) -> None:
    """Bit for bit, with residues of the hidden features copied (40 tokens, emulated) or gathered."""
    for tokens, dtype in ((40, torch.bfloat16), (3, torch.float16), (4, torch.float32)):
        g = torch.Generator().manual_seed(tokens)
        w1 = [(torch.randn(4, 32, 12, generator=g) / 5).to(dtype) for _ in range(2)]
        w2 = [(torch.randn(2, 20, 64, generator=g) / 11).to(dtype) for _ in range(2)]
        b1, b2, x = (
            torch.randn(128, generator=g),
            torch.randn(40, generator=g),
            torch.randn(2, tokens // 2, 48, generator=g),
        )
        one, two = (backend.ops.dyad_pack(*backend.move(*w), variant, NAMES[dtype]) for w in (w1, w2))
        x, b1, b2 = backend.move(x.to(dtype), b1, b2)
        y = backend.ops.dyad_ff(x, one, b1, two, b2, 128, 40, "gelu", variant)
        hidden = backend.ops.dyad_linear_packed(x, one, 128, b1, variant, "tokens", "gelu")
        assert torch.equal(y, backend.ops.dyad_linear_packed(hidden, two, 40, b2, variant, "tokens", "none"))


def test_dense(backend: Backend) -> None:
    for seed, (f_out, f_in, tokens) in enumerate(((70, 40, 5), (33, 19, 20), (130, 72, 70))):
        for x_dtype, dtype in ((DTYPES[seed], DTYPES[seed]), (torch.float32, torch.bfloat16)):
            g = torch.Generator().manual_seed(seed)
            w, x, bias = (
                torch.randn(f_out, f_in, generator=g),
                torch.randn(tokens, f_in, generator=g).to(x_dtype),
                torch.randn(f_out, generator=g),
            )
            packed = backend.ops.dense_pack(*backend.move(w), NAMES[dtype])
            rounded = backend.ops.dense_unpack(packed, f_out, f_in).cpu()
            assert torch.equal(rounded, w.to(dtype).float())
            y = backend.ops.dense_linear(*backend.move(x), packed, f_out, *backend.move(bias), "silu")
            sums = x.double() @ rounded.double().T + bias.double()
            check(
                y,
                F.silu(sums),
                x.double().abs() @ rounded.double().abs().T + bias.double().abs(),
                f_in + 1,
                f"{f_out} {f_in} {x_dtype} {dtype}",
            )


def test_rows_do_not_meet(backend: Backend) -> None:
    """A row's bits are the same in any batch, whatever tile that takes."""
    for dtype in DTYPES:
        wl, wu, x, bias, _ = problem(1, "tokens", dtype, dtype, (4, 72, 24, 80))
        x_, wl_, wu_, bias_ = backend.move(x, wl, wu, bias)
        whole = backend.ops.dyad_linear(x_, wl_, wu_, bias_, "it", "tokens", "gelu")
        for rows in (1, 16, 17, 70):
            assert torch.equal(
                backend.ops.dyad_linear(x_[:rows], wl_, wu_, bias_, "it", "tokens", "gelu"), whole[:rows]
            )


@pytest.mark.parametrize("variant", VARIANTS)
def test_quantised_blocks(backend: Backend, variant: str) -> None:
    """The product with the weight written out in the type of x."""
    n, d_out, d_in = 2, 32, 48
    rows, columns = (n * d_out, 2 * d_in) if variant == "it" else (2 * n * d_out, d_in)
    for bits, dtype, kind in (
        (4, torch.float16, "asymmetric"),
        (8, torch.bfloat16, "symmetric"),
        (3, torch.float32, "table"),
    ):
        weight = random_weight(rows, columns, bits, 32, kind, seed=bits)
        packed = [None if t is None else t.to(backend.device) for t in wq.pack(weight).tensors[:4]]
        values = (wq.dense_values(weight) * wq.expand_groups(weight.scales.double(), weight)).float().to(dtype)
        if variant == "it":
            wl, wu = (part.reshape(n, d_out, d_in).contiguous() for part in (values[:, :d_in], values[:, d_in:]))
        else:
            wl, wu = values.reshape(2, n, d_out, d_in)
        x, bias = (
            torch.randn(5, n * d_in, generator=torch.Generator().manual_seed(bits)).to(dtype),
            torch.randn(n * d_out),
        )
        x_, bias_ = backend.move(x, bias)
        y = backend.ops.dyad_wq_linear(x_, *packed, bias_, n, n * d_out, n * d_in, bits, 32, variant, "float")
        w = dense(wl, wu, variant)
        check(
            y,
            x.double() @ w.T + bias.double(),
            x.double().abs() @ w.abs().T + bias.abs(),
            2 * d_in + 1,
            f"{variant} {bits}",
        )
    with pytest.raises(RuntimeError, match="dyad_wq_linear: compute: expected 'float' for CUDA"):
        backend.ops.dyad_wq_linear(x_, *packed, bias_, n, n * d_out, n * d_in, bits, 32, variant, "int8")


def test_no_tokens(backend: Backend) -> None:
    wl, wu, x, bias, gy = backend.move(*problem(1, "tokens", torch.float16, torch.float16, (4, 8, 8, 0)))
    assert backend.ops.dyad_linear(x.reshape(2, 0, 32), wl, wu, bias, "it", "tokens", "none").shape == (2, 0, 32)
    assert backend.ops.dyad_linear(x.T.contiguous(), wl, wu, bias, "dt", "features", "none").shape == (32, 0)
    gx, gwl, gwu, gb = backend.ops.dyad_linear_backward(gy, x, wl, wu, "ot", "tokens", [True] * 4)
    assert gx.shape == x.shape and gwl.abs().sum() == 0 and gwu.abs().sum() == 0 and gb.abs().sum() == 0


def test_errors(backend: Backend) -> None:
    wl, wu, x, bias, gy = backend.move(*problem(1, "tokens", torch.float16, torch.float16, (4, 8, 12, 3)))
    ops = backend.ops
    packed = ops.dyad_pack(wl, wu, "it", "fp16")
    weight = ops.dense_pack(wl[0], "bf16")
    how = ("it", "tokens", "none")
    for message, call in {
        "dyad_linear: variant: expected": lambda: ops.dyad_linear(x, wl, wu, bias, "ti", "tokens", "none"),
        "dyad_linear: layout: expected": lambda: ops.dyad_linear(x, wl, wu, bias, "it", "token", "none"),
        "dyad_linear: act: expected": lambda: ops.dyad_linear(x, wl, wu, bias, "it", "tokens", "tanh"),
        "dyad_linear: x: expected": lambda: ops.dyad_linear(x[:, :40], wl, wu, bias, *how),
        "dyad_linear: wu: expected": lambda: ops.dyad_linear(x, wl, wu.float(), bias, *how),
        "dyad_linear: bias: expected": lambda: ops.dyad_linear(x, wl, wu, bias[:4], *how),
        "dyad_linear_backward: gy: expected": lambda: ops.dyad_linear_backward(
            gy.float(), x, wl, wu, "it", "tokens", [True] * 4
        ),
        "dyad_linear_backward: mask: expected 4": lambda: ops.dyad_linear_backward(
            gy, x, wl, wu, "it", "tokens", [True]
        ),
        "dyad_linear_packed: packed: expected .* got variant 'it'": lambda: ops.dyad_linear_packed(
            x, packed, 32, bias, "ot", "tokens", "none"
        ),
        "dyad_linear_packed: packed: expected one of dyad_pack, called on CUDA": lambda: ops.dyad_linear_packed(
            x, packed, 2048, None, *how
        ),
        "another: .* bytes": lambda: ops.dyad_linear_packed(x, packed[:-100], 32, bias, *how),
        "dense_linear: packed: expected one of dense_pack": lambda: ops.dense_linear(
            x[:, :12], packed, 8, None, "none"
        ),
        "dense_unpack: packed: expected": lambda: ops.dense_unpack(weight, 8, 2000),
        "dense_pack: dtype: expected": lambda: ops.dense_pack(wl[0], "int8"),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()
    # A header that does not say what the size says, or a difference that the size does not show: NaN, as the header cannot be looked at
    # without waiting for the device.
    assert (
        ops.dyad_linear_packed(x, packed, 64, None, *how).isnan().all()
        and ops.dense_unpack(weight, 8, 13).isnan().all()
    )
    spoilt = packed.clone()
    spoilt[0] ^= 1
    assert ops.dyad_linear_packed(x, spoilt, 32, bias, *how).isnan().all()
    spoilt = weight.clone()
    spoilt[20] ^= 1
    assert ops.dense_unpack(spoilt, 8, 12).isnan().all()
