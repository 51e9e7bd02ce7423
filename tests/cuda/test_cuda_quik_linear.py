"""The CUDA kernels of quik_linear and sp24 and their bindings against float64 and exact integers: on a GPU, and emulated."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from cuda_backend import ORDERS, Backend, offered
from dyad_cases import same_bits
from effk.ops import quik_linear as ql
from quik_cases import BITS, DTYPES, SPLITS, Quik, quik, signed
from wq_cases import check

NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
LAST_PLACE = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-23}
MANY_ROWS = 64  # csrc/ops/wq_linear/cuda.h, kMaxRows: above it a weight that meets 16-bit activations is written out


class Quiks(Backend):
    def arguments(self, p: Quik) -> tuple:
        """Of quik_linear, packed where the backend is."""
        w = ql.pack(p.base)
        w_out = None if p.w_out is None else self.ops.dense_pack(*self.move(p.w_out), NAMES[p.w_out.dtype])
        tensors = self.move(p.x, w.packed, w.w_scale, w.w_reduced)
        rest = self.move(p.bias, p.int_idx, p.fp_idx)
        return *tensors, w_out, *rest, *w[4:], p.bits_a, p.mode

    def run(self, p: Quik) -> Tensor:
        return self.ops.quik_linear(*self.arguments(p)).cpu()

    def quantized(self, p: Quik, bits: int) -> list[Tensor]:
        x, int_idx, fp_idx = self.move(p.x, p.int_idx, p.fp_idx)
        return [t.cpu() for t in self.ops.quik_quantize(x, int_idx, fp_idx, p.base.k, bits, p.mode)]


@pytest.fixture(params=ORDERS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Quiks]:
    yield from offered(request.param, monkeypatch, Quiks)


def case(i: int, **how: object) -> Quik:
    """Layers in which everything else varies with ``i``."""
    kinds = {
        "n": (1, 40, 67, 130)[i % 4],
        "n_base": (2, 62, 64, 130)[i // 2 % 4],
        "n_out": (0, 1, 31, 40)[i % 4],
        "bits_w": BITS[i % 4][0],
        "bits_a": BITS[i % 4][1],
        "mode": ql.MODES[i // 3 % 2],
        "dtype": DTYPES[i % 3],
        "w_dtype": DTYPES[i // 2 % 3],
        "bias": (None, *DTYPES)[i // 5 % 4],
        "split": SPLITS[i // 2 % 3],
        "seed": i,
    }
    return quik(**(kinds | how))


def bound(p: Quik, expected: Tensor) -> Tensor:
    """That of the CPU; and where the weight is written out, the rounding of it and of the bias to the type of x."""
    total = p.bound(expected)
    rows = p.rows.double()
    if p.weight_only and (p.x.dtype == torch.float32 or len(rows) > MANY_ROWS):
        columns, outlier = ql.columns(p.int_idx, p.fp_idx, rows.shape[1], p.base.k)
        codes = p.base.codes().double() - (1 << (p.base.bits - 1))
        terms = rows[:, columns].abs() @ (codes * p.base.scales.double()).abs().T
        if p.w_out is not None:
            terms = terms + rows[:, outlier].abs() @ p.w_out.double().abs().T
        if p.bias is not None:
            terms = terms + p.bias.double().abs()
        total = total + LAST_PLACE[p.x.dtype] * terms.reshape(expected.shape)
    return total


@pytest.mark.parametrize("rows", (0, 1, 8, 9, 70))
def test_matches_reference(backend: Quiks, rows: int) -> None:
    for i in range(12):
        p = case(i, m=rows)
        expected = p.reference()
        y = backend.run(p)
        assert y.dtype == p.x.dtype
        check(y, expected, bound(p, expected), str(p))


def test_activations_in_16_bits(backend: Quiks) -> None:
    """Weight-only at any number of rows, with the limits of its two ways."""
    for i, rows in enumerate((0, 1, 9, 64, 65)):
        p = case(i, m=rows, bits_a=16, dtype=DTYPES[1 + i % 2], n_out=(0, 20)[i % 2])
        expected = p.reference()
        check(backend.run(p), expected, bound(p, expected), str(p))


def test_outliers_in_the_tile(backend: Quiks) -> None:
    """The same type of x and outliers: the product goes on over them; 256 of them, and both sides of a step of 32."""
    for i, (n_out, dtype) in enumerate(itertools.product((32, 33, 256), DTYPES[1:])):
        bits_w, bits_a = BITS[i % 4]
        p = quik(20, 33, 90, n_out, bits_w, bits_a, "sim", dtype, dtype, seed=i)
        expected = p.reference()
        check(backend.run(p), expected, bound(p, expected), str(p))


def test_quantize_equals_the_cpu(backend: Quiks) -> None:
    """Codes, scales, zeros and outliers to the bit, in both forms; rows that are constant, huge, tiny, not finite."""
    for i, (dtype, bits, mode) in enumerate(itertools.product(DTYPES, (4, 8), ql.MODES)):
        p = case(i, m=19, n_base=(62, 64, 131)[i % 3], bits_a=bits, mode=mode, dtype=dtype)
        p.x[1], p.x[2], p.x[3] = 0.0, -1.5, p.x[3].abs()
        p.x[4, :] *= 1e-7
        p.x[5, i % p.x.shape[1]] = torch.nan
        p.x[6, -1] = torch.inf
        p.x[7, 0] = 65504.0
        if dtype != torch.float16:
            p.x[8] = torch.randn(p.x.shape[1]) * 3e38  # a range beyond fp32
        wanted = torch.ops.effk.quik_quantize(p.x, p.int_idx, p.fp_idx, p.base.k, bits, mode)
        for got, want in zip(backend.quantized(p, bits), wanted, strict=True):
            assert got.dtype == want.dtype and same_bits(got, want), str(p)


def test_integers_are_exact(backend: Quiks) -> None:
    rng = torch.Generator().manual_seed(1)
    for bits_w, bits_a in BITS:
        for m, n, k, extreme in ((7, 33, 62, False), (66, 20, 577, False), (3, 5, 2000, True)):
            low = -(1 << (bits_a - 1))
            q = torch.full((m, k), low) if extreme else torch.randint(low, -low, (m, k), generator=rng)
            p = quik(1, n, k, 0, bits_w, bits_a, seed=k)
            codes = p.base.codes().long() - (1 << (bits_w - 1))
            qx = q.to(torch.int8)
            if bits_a == 4:
                even = torch.nn.functional.pad(qx, (0, k % 2)).view(torch.uint8) & 15
                qx = even[:, ::2] | even[:, 1::2] << 4
                assert torch.equal(signed(qx, k).long(), q)
            acc = backend.ops.quik_int_matmul(*backend.move(qx.contiguous(), p.packed().packed), n, k, bits_w, bits_a)
            assert acc.dtype == torch.int32 and torch.equal(acc.cpu().long(), q @ codes.T)


def test_equals_its_parts(backend: Quiks) -> None:
    """Split, quantise, multiply, dequantise: the same bits where there are no outliers."""
    for i, (bits_w, bits_a) in enumerate(BITS):
        p = quik(21, 50, 130, 0, bits_w, bits_a, "sim", DTYPES[i % 3], seed=i)
        w = ql.pack(p.base)
        qx, s, z, _ = backend.quantized(p, bits_a)
        packed, scale, reduced, qx, s, z = backend.move(*w[:3], qx, s, z)
        acc = backend.ops.quik_int_matmul(qx, packed, 50, 130, bits_w, bits_a)
        (y_in,) = backend.move(p.bias.expand(21, 50).contiguous())
        y = backend.ops.quik_dequantize(acc, s, z, scale, reduced, y_in, bits_a, NAMES[p.x.dtype])
        assert same_bits(y.cpu(), backend.run(p)), str(p)


def test_rows_that_are_not_finite(backend: Quiks) -> None:
    """NaN in a row of the results, and nothing in the others."""
    for i, (bits_w, bits_a) in enumerate(BITS):
        p = case(i, m=20, bits_w=bits_w, bits_a=bits_a, mode="sim", n_base=64)
        clean = backend.run(p)
        p.x[3, 5], p.x[11, -1] = torch.nan, -torch.inf
        y = backend.run(p)
        bad = torch.zeros(20, dtype=torch.bool)
        bad[[3, 11]] = True
        assert y[bad].isnan().all() and same_bits(y[~bad], clean[~bad]), str(p)


def test_rows_do_not_meet(backend: Quiks) -> None:
    """A row's bits are the same in any batch, on either side of a tile."""
    for i, dtype in enumerate(DTYPES):
        p = quik(140, 70, 130, 40, *BITS[i], "sim", dtype, dtype, seed=i)
        whole = backend.run(p)
        rows = p.x
        for m in (1, 9, 64, 129):
            p.x = rows[:m].contiguous()
            assert same_bits(backend.run(p), whole[:m])


def test_several_weights(backend: Quiks) -> None:
    """The same bits as one by one, also where widths of weights differ, at few rows and many."""
    for m, bits_a, bits_w in (
        (3, 8, (4, 8)),
        (20, 8, (4, 8, 4)),
        (20, 4, (4, 4)),
        (20, 4, (8, 4)),
        (70, 16, (4, 4)),
        (9, 4, ()),
    ):
        parts = [
            quik(m, 20 + 30 * j, 96, 16, b, bits_a, "kernel", torch.float16, torch.float16, seed=5)
            for j, b in enumerate(bits_w)
        ]
        for p in parts:
            p.x, p.int_idx, p.fp_idx = parts[0].x, parts[0].int_idx, parts[0].fp_idx
        arguments = [backend.arguments(p) for p in parts]
        columns = [[a[j] for a in arguments] for j in (1, 2, 3, 4, 5, 8, 10)]
        x, int_idx, fp_idx = backend.move(*(t for p in (parts or [quik(m)])[:1] for t in (p.x, p.int_idx, p.fp_idx)))
        ys = backend.ops.quik_multi_linear(
            x, *columns[:5], int_idx, fp_idx, columns[5], 96, columns[6], bits_a, "kernel"
        )
        assert len(ys) == len(parts)
        for y, one in zip(ys, arguments, strict=True):
            assert same_bits(y.cpu(), backend.ops.quik_linear(*one).cpu())


def test_leading_sides_and_strides(backend: Quiks) -> None:
    p = quik(24, 40, 96, 16, dtype=torch.float16, w_dtype=torch.float16)
    whole = backend.run(p)
    arguments = list(backend.arguments(p))
    x = arguments[0]
    arguments[0] = x.reshape(2, 3, 4, -1)
    assert same_bits(backend.ops.quik_linear(*arguments).cpu(), whole.reshape(2, 3, 4, -1))
    arguments[0] = x.T.contiguous().T
    assert same_bits(backend.ops.quik_linear(*arguments).cpu(), whole)
    arguments[0] = torch.nn.functional.pad(x.flatten(), (1, 0))[1:].reshape(x.shape)  # off alignment
    assert same_bits(backend.ops.quik_linear(*arguments).cpu(), whole)
    arguments[0], packed = x, arguments[1]
    arguments[1] = torch.nn.functional.pad(packed.flatten(), (1, 0))[1:].reshape(packed.shape)
    assert same_bits(backend.ops.quik_linear(*arguments).cpu(), whole)


def sparse(n: int, k: int, width: int, seed: int) -> Tensor:
    """Random int8 of which two places of four are kept; width: columns a place."""
    rng = torch.Generator().manual_seed(seed)
    w = torch.randint(-128, 128, (n, k // (4 * width), 4, width), generator=rng, dtype=torch.int8)
    kept = torch.rand(w.shape[:3], generator=rng).argsort(2) < 2
    return (w * kept.unsqueeze(3)).reshape(n, k)


@pytest.mark.parametrize(("pattern", "width"), (("2:4", 1), ("pair4:8", 2)))
def test_pruned_weights(backend: Quiks, pattern: str, width: int) -> None:
    for n, k, m in ((1, 8, 1), (33, 64, 9), (20, 200, 70), (5, 24, 0)):
        w = sparse(n, k, width, seed=n)
        x = torch.randint(-128, 128, (m, k), generator=torch.Generator().manual_seed(k), dtype=torch.int8)
        halves = backend.move(*torch.ops.effk.sp24_compress(w, pattern))
        if backend.device == "cuda":
            again = backend.ops.sp24_compress(*backend.move(w), pattern)
            assert all(torch.equal(a, b) for a, b in zip(again, halves, strict=True))
        assert torch.equal(backend.ops.sp24_decompress(*halves, k, pattern).cpu(), w)
        acc = backend.ops.sp24_matmul(*backend.move(x), *halves, pattern)
        assert acc.dtype == torch.int32 and torch.equal(acc.cpu().long(), x.long() @ w.long().T)


def test_errors(backend: Quiks) -> None:
    p = quik(12, 40, 96, 16, dtype=torch.float16, w_dtype=torch.float16)
    a = backend.arguments(p)

    def call(**changes: object):
        names = "x packed w_scale w_reduced w_out bias int_idx fp_idx f_out n_base bits_w bits_a mode".split()
        return lambda: backend.ops.quik_linear(*(changes.get(n, v) for n, v in zip(names, a, strict=True)))

    other = backend.ops.dense_pack(*backend.move(torch.randn(41, 17)), "fp16")
    for message, wrong in {
        "quik_linear: mode: expected": call(mode="fast"),
        "quik_linear: bits_a: expected 4, 8 or 16": call(bits_a=6),
        "quik_linear: bits_w: expected 4 or 8": call(bits_w=16),
        "quik_linear: n_base: expected at most the 112": call(n_base=113),
        "quik_linear: packed: expected": call(n_base=88, int_idx=None, fp_idx=None),
        "quik_linear: w_scale: expected": call(w_scale=a[2].half()),
        "quik_linear: w_out: expected .* got None": call(w_out=None),
        "quik_linear: w_out: expected one of dense_pack, called on CUDA": call(w_out=a[4][:-40]),
        "quik_linear: w_out: expected what dense_pack returned": call(w_out=a[3]),
        "quik_linear: fp_idx: expected int32": call(fp_idx=None),
        "quik_linear: bias: expected": call(bias=a[5][1:]),
        "quik_int_matmul: qx: expected int8": lambda: backend.ops.quik_int_matmul(a[0], a[1], 40, 96, 4, 8),
        "quik_quantize: bits: expected 4 or 8": lambda: backend.ops.quik_quantize(a[0], None, None, 96, 16, "sim"),
        "quik_dequantize: dtype: expected": lambda: backend.ops.quik_dequantize(
            a[0].int(), a[3][:12], a[3][:12], a[2], a[3], None, 8, "int8"
        ),
        "sp24_decompress: k: expected a multiple of 8": lambda: backend.ops.sp24_decompress(a[1], a[1], 12, "pair4:8"),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            wrong()
    # What the size of packed outliers does not show makes the results NaN, at few rows and many: their words on the device
    # cannot be looked at without waiting.
    if other.numel() == a[4].numel():
        assert call(w_out=other)().isnan().all() and call(w_out=other, x=a[0][:3])().isnan().all()
    if backend.device == "cuda":  # elsewhere lists are checked element by element
        broken = a[6].clone()
        broken[5] = 112
        assert call(int_idx=broken)().isnan().all() and call(int_idx=broken, x=a[0][:3])().isnan().all()
