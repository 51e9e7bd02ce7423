"""The CUDA kernels of bitmask_linear and their binding against float64 and the CPU: on a GPU, and emulated."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from cuda_backend import ORDERS, Backend, offered
from dyad_cases import same_bits
from effk.ops import bitmask_linear as bm

OPS = torch.ops.effk
EPS = 2.0**-24
STORE = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Rows and columns, sparsity, tokens, group: panels, blocks and warps that are full, short and empty.
CASES = (
    (1, 1, 0.0, 1, 0),
    (9, 63, 0.5, 2, 0),
    (17, 65, 0.75, 5, 64),
    (40, 200, 1.0, 3, 128),
    (8, 1100, 0.5, 9, 0),
    (70, 2100, 0.9, 4, 64),
    (20, 5000, 0.7, 1, 1024),
)


class Bitmasks(Backend):
    def linear(self, x: Tensor, w: bm.BitmaskWeight, bias: Tensor | None, compute: str = "float") -> Tensor:
        tensors = self.move(x, *w[:5], bias)
        return self.ops.bitmask_linear(*tensors, w.n, w.k, compute).cpu()


@pytest.fixture(params=ORDERS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bitmasks]:
    yield from offered(request.param, monkeypatch, Bitmasks)


def weight(n: int, k: int, s: float, values: str, group: int) -> bm.BitmaskWeight:
    rng = torch.Generator().manual_seed(n + k)
    w = torch.randn(n, k, generator=rng).where(torch.rand(n, k, generator=rng) >= s, torch.zeros(()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bm.pack(w, values=values, group=group if values == "int8" else 0)


@pytest.mark.parametrize("values", bm.VALUES)
def test_float_product(backend: Bitmasks, values: str) -> None:
    """fp32 sums: a lane has k / 256 columns of a warp's share and at most 128 more, then five, seven and three additions."""
    for (n, k, s, m, group), dtype in itertools.product(CASES, STORE):
        w = weight(n, k, s, values, group)
        dense, bias, x = bm.unpack(w).double(), torch.randn(n), torch.randn(m, k).to(dtype)
        expected = bm.reference(x, dense, bias)
        size = x.double().abs() @ dense.abs().T + bias.abs()
        y = backend.linear(x, w, bias)
        bound = (k / 256 + 150) * EPS * size + STORE[dtype] * (expected.abs() + 1e-3 * size) + 6e-8
        assert y.dtype == dtype and bool(((y - expected).abs() <= bound).all()), (n, k, m, dtype)


def test_integer_product_equals_the_cpu(backend: Bitmasks) -> None:
    for i, (n, k, s, m, group) in enumerate(CASES):
        w = weight(n, k, s, "int8", group)
        x = torch.randn(m, k).to(tuple(STORE)[i % 3])
        x[0] *= 0 if i % 4 == 1 else 1
        if m > 2:
            x[1, k // 2] = torch.nan if i % 2 else torch.inf
        bias = torch.randn(n) if i % 2 else None
        y, want = backend.linear(x, w, bias, "int8"), bm.linear(x, w, bias, "int8")
        assert torch.equal(y.isnan(), want.isnan()) and same_bits(y.nan_to_num(), want.nan_to_num()), (n, k, m)


def test_one_row_of_many(backend: Bitmasks) -> None:
    """The bits of a token alone, whatever its place in a set and the number of sets."""
    for values, compute in (("fp32", "float"), ("bf16", "float"), ("int8", "float"), ("int8", "int8")):
        w = weight(20, 300, 0.6, values, 64)
        x = torch.randn(11, 300)
        whole = backend.linear(x, w, None, compute)
        assert same_bits(whole, backend.linear(x, w, None, compute))
        for first, last in ((0, 1), (5, 6), (2, 5), (3, 11)):
            assert same_bits(backend.linear(x[first:last].contiguous(), w, None, compute), whole[first:last])


def test_many_rows_are_written_out(backend: Bitmasks) -> None:
    """Above 64 rows the weight is rounded to the type of x, and the library multiplies."""
    for values, dtype in itertools.product(bm.VALUES, STORE):
        w = weight(20, 200, 0.5, values, 64)
        x, bias = torch.randn(65, 200).to(dtype), torch.randn(20).to(dtype)
        dense = bm.unpack(w).double()
        expected, size = bm.reference(x, dense, bias.double()), x.double().abs() @ dense.abs().T + bias.double().abs()
        y = backend.linear(x, w, bias)
        bound = (200 * EPS + 2 * STORE[dtype]) * size + 1e-6
        assert y.dtype == dtype and bool(((y - expected).abs() <= bound).all()), (values, dtype)


@pytest.mark.parametrize("values", bm.VALUES)
def test_unpacking(backend: Bitmasks, values: str) -> None:
    for n, k, s, _, group in CASES:
        w = weight(n, k, s, values, group)
        arrays = backend.move(*w[:3])
        assert same_bits(backend.ops.bitmask_unpack(*arrays, None, n, k).cpu(), OPS.bitmask_unpack(*w[:3], None, n, k))
        if w.scale is not None:
            (scale,) = backend.move(w.scale)
            assert same_bits(backend.ops.bitmask_unpack(*arrays, scale, n, k).cpu(), bm.unpack(w))


def test_damaged_weights_are_not_followed(backend: Bitmasks) -> None:
    """More bits than values, and a panel that begins outside: NaN in their rows, and nothing is read there."""
    w = weight(24, 130, 0.6, "fp32", 0)
    x = torch.randn(2, 130)
    whole = backend.linear(x, w, None)
    w.ptr[1] = 1 << 40
    y = backend.linear(x, w, None)
    assert y[:, 8:16].isnan().all() and same_bits(y[:, :8], whole[:, :8]) and same_bits(y[:, 16:], whole[:, 16:])
    w = weight(8, 130, 0.6, "bf16", 0)
    w.masks[0, -1, -1] = -1
    assert backend.linear(x, w, None).isnan().all()


def test_leading_sides_and_nothing(backend: Bitmasks) -> None:
    w = weight(20, 100, 0.5, "bf16", 0)
    x = torch.randn(2, 3, 100)
    assert same_bits(backend.linear(x, w, None).reshape(6, 20), backend.linear(x.reshape(6, 100), w, None))
    assert backend.linear(x[:0], w, None).shape == (0, 3, 20)


def test_packing(backend: Bitmasks) -> None:
    if backend.device == "cpu":
        pytest.skip("packing on a device copies to the CPU: nothing of it is emulated")
    w = torch.randn(20, 130) * (torch.rand(20, 130) < 0.4)
    there, here = (
        OPS.bitmask_pack(*backend.move(w), None, None, "int8", 64),
        OPS.bitmask_pack(w, None, None, "int8", 64),
    )
    assert all(torch.equal(a.cpu(), b) for a, b in zip(there, here, strict=True))
    assert OPS.bitmask_validate(*there[:3], 20, 130).item() == here[0].numel() - 64


def test_errors(backend: Bitmasks) -> None:
    w = weight(20, 100, 0.5, "int8", 0)
    x = torch.randn(2, 100)
    for change, message in (
        ({"x": torch.randn(2, 99)}, r"bitmask_linear: x: expected \[..., 100\]"),
        ({"scale": None}, r"bitmask_linear: scale: expected one"),
        ({"row_sum": None}, r"bitmask_linear: row_sum: expected one"),
        ({"masks": w.masks[:-1]}, r"bitmask_linear: masks: expected"),
        ({"compute": "fast"}, r"bitmask_linear: compute: expected"),
        ({"bias": torch.randn(3)}, r"bitmask_linear: bias: expected"),
    ):
        good = dict(
            x=x, values=w.values, masks=w.masks, ptr=w.ptr, scale=w.scale, row_sum=w.row_sum, bias=None, n=20, k=100
        )
        call = good | {"compute": "int8"} | change
        call = {name: backend.move(v)[0] if isinstance(v, Tensor) else v for name, v in call.items()}
        with pytest.raises(RuntimeError, match=message):
            backend.ops.bitmask_linear(**call)
