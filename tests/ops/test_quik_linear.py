"""quik_linear and its parts against the float64 reference, on every tier, and what they promise besides."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from dyad_cases import same_bits
from effk.formats.wq import WqWeight
from effk.ops import quik_linear as ql
from quik_cases import BITS, DTYPES, SPLITS, Quik, nibbles, quik, signed, weight_from_codes
from wq_cases import check

ops = torch.ops.effk
ROWS = (0, 1, 7, 8, 9, 33, 130)


def case(i: int, **how: object) -> Quik:
    """Layers in which everything else varies with ``i``."""
    kinds = {
        "n": (1, 16, 40, 67, 130, 400)[i % 6],
        "n_base": (2, 62, 64, 96, 200, 330)[i // 2 % 6],
        "n_out": (0, 1, 16, 33)[i % 4],
        "bits_w": BITS[i % 4][0],
        "bits_a": BITS[i % 4][1],
        "mode": ql.MODES[i // 3 % 2],
        "dtype": DTYPES[i % 3],
        "w_dtype": DTYPES[i // 4 % 3],
        "bias": (None, *DTYPES)[i // 5 % 4],
        "split": SPLITS[i // 2 % 3],
        "seed": i,
    }
    return quik(**(kinds | how))


# ---- the fused operation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ROWS)
def test_matches_reference(tier: str, rows: int) -> None:
    for i in range(24 if tier != "scalar" else 12):
        p = case(i, m=rows)
        expected = p.reference()
        y = p.run()
        assert y.dtype == p.x.dtype
        check(y, expected, p.bound(expected), str(p))


@pytest.mark.emulated
def test_matches_reference_small(tier: str) -> None:
    """A slice that is quick enough for an emulated CPU."""
    for i, rows in itertools.product(range(6), (1, 9, 13)):
        p = case(i, m=rows, n=35, n_base=70)
        expected = p.reference()
        check(p.run(), expected, p.bound(expected), str(p))


@pytest.mark.parametrize(("bits_w", "bits_a"), [*BITS, (4, 16), (8, 16)])
@pytest.mark.parametrize("mode", ql.MODES)
def test_sizes_of_models(bits_w: int, bits_a: int, mode: str) -> None:
    """Sums longer than a piece of the packed operand, more tiles of rows than one, more columns than a chunk."""
    for m, n, n_base, n_out in ((2048, 33, 70, 3), (200, 500, 4100, 64), (9, 1000, 2051, 256), (1, 1000, 2051, 256)):
        p = quik(m, n, n_base, n_out, bits_w, bits_a, mode, torch.bfloat16)
        expected = p.reference()
        check(p.run(), expected, p.bound(expected), str(p))


def test_specified_tolerance() -> None:
    """The specification's: relative to the largest result of the row."""
    for dtype, allowed in ((torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)):
        for bits_w, bits_a in BITS:
            p = quik(40, 256, 1024, 32, bits_w, bits_a, dtype=dtype, w_dtype=torch.float16)
            expected = p.reference()
            check(p.run(), expected, allowed * expected.abs().amax(1, keepdim=True).expand_as(expected), str(p))


@pytest.mark.parametrize("n_out", (0, 16))
def test_equals_its_parts(tier: str, n_out: int) -> None:
    """Split, quantise, multiply, dequantise: without outliers the same bits, with them the fused chain of sums differs."""
    for i, (bits_w, bits_a) in enumerate(BITS):
        p = quik(21, 50, 130, n_out, bits_w, bits_a, "sim", DTYPES[i % 3], seed=i)
        w = p.packed()
        qx, s, z, x_out = ops.quik_quantize(p.x, p.int_idx, p.fp_idx, 130, bits_a, "sim")
        acc = ops.quik_int_matmul(qx, w.packed, 50, 130, bits_w, bits_a)
        y_in = p.bias.expand(21, 50).contiguous()
        if n_out:
            y_in = ops.dense_linear(x_out.float(), w.w_out, 50, p.bias, "none")
        dtype = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[p.x.dtype]
        y = ops.quik_dequantize(acc, s, z, w.w_scale, w.w_reduced, y_in, bits_a, dtype)
        expected = p.reference()
        check(y, expected, 2 * p.bound(expected), str(p))
        if not n_out:
            assert same_bits(y, p.run()), str(p)


def test_correction_matters(tier: str) -> None:
    """With w_reduced forced to 0 results are far off: the term is really there (it vanishes where the zero point is h)."""
    for bits_w, bits_a in BITS:
        p = quik(20, 40, 256, 0, bits_w, bits_a, "sim")
        w = p.packed()._replace(w_reduced=torch.zeros(40))
        expected = p.reference()
        wrong = ql.linear(p.x, w, p.bias, *p.how)
        assert ((wrong.double() - expected).abs() > 100 * p.bound(expected)).double().mean() > 0.5
        check(p.run(), expected, p.bound(expected), str(p))


def test_dequantised_input(tier: str) -> None:
    """The epilogue equals multiplying the dequantised activations: an identity that knows nothing of the correction."""
    for i, mode in itertools.product(range(4), ql.MODES):
        p = quik(12, 40, 200, 8, *BITS[i], mode, seed=i, dtype=torch.float32)
        p = replace(p, mode=mode, x=p.x.repeat(2, 1))
        q, s, z, x_out = p.quantized()
        half = 2 ** (p.bits_a - 1)
        x = s.double()[:, None] * (q.double() + half) + z.double()[:, None]
        weight = (p.base.codes().double() - (1 << (p.base.bits - 1))) * p.base.scales.double()
        expected = x @ weight.T + x_out.double() @ p.w_out.double().T + p.bias.double()
        check(p.run(), expected, p.bound(expected) + 1e-12, str(p))


def test_large_accumulators(tier: str) -> None:
    """8 bits, 11008 columns of random full-range codes: |A| about 6e5 and beyond what 16 bits hold."""
    p = quik(10 if tier == "scalar" else 70, 32, 11008, 0, 8, 8, "sim", torch.float16)
    q, *_ = p.quantized()
    acc = ops.quik_int_matmul(q.contiguous(), p.packed().packed, 32, 11008, 8, 8)
    assert acc.abs().max() > 65504
    y, expected = p.run(), p.reference()
    assert y.isfinite().all()
    check(y, expected, p.bound(expected), str(p))


def test_outliers_matter() -> None:
    """32 of 512 columns scaled by 60: relative error below 0.02 with them in 16 bits, above 0.2 without (4 bits)."""
    rng = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 512, generator=rng), torch.randn(96, 512, generator=rng)
    outlier = torch.randperm(512, generator=rng)[:32].sort().values
    x[:, outlier] *= 60
    base = torch.tensor([c for c in range(512) if c not in set(outlier.tolist())])
    exact = x.double() @ w.double().T

    def error(columns: torch.Tensor, outliers: torch.Tensor | None) -> float:
        codes, scales = ql.weight_quant(w[:, columns], 4, clip_search=True)
        p = Quik(
            x,
            weight_from_codes(codes.long(), scales, 4),
            None if outliers is None else w[:, outliers].half(),
            None,
            columns.int(),
            None if outliers is None else outliers.int(),
            4,
            "kernel",
        )
        return float((p.run().double() - exact).norm() / exact.norm())

    assert error(base, outlier) < 0.02
    assert error(torch.arange(512), None) > 0.2


# ---- rows and threads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ql.MODES)
def test_threads_do_not_matter(tier: str, mode: str) -> None:
    for m, n, n_base, n_out in ((33, 200, 100, 16), (300, 70, 64, 5), (9, 17, 70, 0), (3, 100, 64, 8)):
        p = quik(m, n, n_base, n_out, mode=mode, dtype=torch.bfloat16)
        torch.set_num_threads(1)
        expected = p.run()
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert same_bits(p.run(), expected), f"{threads} threads: {p}"


def test_rows_do_not_matter(tier: str) -> None:
    """A batch is its rows; one that is not finite spoils itself only, and nothing is kept from call to call."""
    for bits_w, bits_a in BITS:
        p = quik(150, 50, 100, 9, bits_w, bits_a, "sim", torch.bfloat16)
        whole = p.run()
        for rows in (slice(0, 1), slice(3, 9), slice(60, 133), slice(149, 150)):
            assert same_bits(replace(p, x=p.x[rows]).run(), whole[rows]), str(p)
        batch = replace(p, x=p.x.reshape(3, 50, -1)).run()
        assert same_bits(batch.reshape(whole.shape), whole)


def test_limit_of_few_rows(tier: str) -> None:
    """Mode "kernel" rounds activations beyond FEW_ROWS rows only, mode "sim" always."""
    for mode in ql.MODES:
        many = quik(ql.FEW_ROWS + 1, 40, 100, 8, 4, 4, mode)
        few, only = replace(many, x=many.x[:-1]), replace(many, bits_a=16)
        assert same_bits(few.run(), replace(only, x=few.x).run()) == (mode == "kernel")
        assert not same_bits(many.run(), only.run())
        for p in (few, many):
            expected = p.reference()
            check(p.run(), expected, p.bound(expected), str(p))


@pytest.mark.parametrize("mode", ql.MODES)
@pytest.mark.parametrize("bits_a", (4, 8))
def test_rows_that_are_not_finite(tier: str, bits_a: int, mode: str) -> None:
    p = quik(40, 33, 90, 12, 4, bits_a, mode)
    good = p.run()
    columns = (int(p.int_idx[0]), int(p.int_idx[-1]), int(p.fp_idx[0]), int(p.fp_idx[-1]))
    x = p.x.clone()
    for row, (column, value) in enumerate(itertools.product(columns, (torch.nan, torch.inf, -torch.inf))):
        x[row, column] = value
    y = replace(p, x=x).run()
    assert y[:12].isnan().all()
    assert same_bits(y[12:], good[12:])
    qx, s, z, _ = ops.quik_quantize(x, p.int_idx, p.fp_idx, 90, bits_a, mode)
    assert s[:12].isnan().all() and z[:12].isnan().all() and not signed(qx, 90)[:12].any()


def test_several_weights_share_x(tier: str) -> None:
    """Equal to the separate calls, bit for bit, whatever the bits, outlier dtypes and heights of the others."""
    for m, mode in itertools.product((1, 5, 40), ql.MODES):
        parts = [
            quik(m, n, 100, 16, bits_w, 8, mode, torch.bfloat16, w_dtype, bias, seed=3)
            for n, bits_w, w_dtype, bias in (
                (48, 4, torch.bfloat16, None), (17, 8, torch.float16, torch.float32), (90, 4, torch.float32, torch.bfloat16)
            )
        ]  # fmt: skip
        first = parts[0]
        ys = ql.multi_linear(first.x, [p.packed() for p in parts], [p.bias for p in parts], *first.how)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for y, p in zip(ys, parts, strict=True):
                assert same_bits(y, replace(p, x=first.x, int_idx=first.int_idx, fp_idx=first.fp_idx).run())
    assert ql.multi_linear(first.x, []) == []


# ---- quantising -------------------------------------------------------------------------------------------------------


def near_half(x: torch.Tensor, s: torch.Tensor, z: torch.Tensor, mode: str) -> torch.Tensor:
    """Where the exact quotient is within 1e-3 of a half: there a code may be the neighbour."""
    quotient = (x.double() - (z[:, None] if mode == "kernel" else 0)) / s[:, None]
    return ((quotient - quotient.floor()) - 0.5).abs() < 1e-3


@pytest.mark.parametrize("mode", ql.MODES)
@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes(tier: str, dtype: torch.dtype, bits: int, mode: str) -> None:
    for m, n_base in (
        (0, 62),
        (1, 3840),
        (7, 2),
        (33, 64),
        (33, 62),
        (2048 if tier != "scalar" else 50, 64),
        (3, 10496),
    ):
        for split in SPLITS:
            p = quik(m, 1, n_base, 5, 4, bits, mode, dtype, split=split)
            codes, s, z, x_out = p.quantized()
            in_base, outlier = ql.columns(p.int_idx, p.fp_idx, p.x.shape[1], n_base)
            assert torch.equal(x_out, p.x[:, outlier])
            if not m:
                continue
            x = p.x[:, in_base].float()
            want, scale, zero = ql.act_quant(x, bits, mode)
            assert ((s.double() - scale).abs() <= 2.0**-22 * scale).all()
            if mode == "kernel":
                assert torch.equal(z.double(), zero)
                assert (
                    ((codes + 2.0 ** (bits - 1)) * s.double()[:, None] + zero[:, None] - x.double())
                    .abs()
                    .le((0.5 + 1e-3) * s.double()[:, None])
                    .all()
                )
            else:
                assert ((z.double() - zero).abs() <= 2.0**-21 * zero.abs() + scale * 1.001 * near_zero(x, bits)).all()
            differ = codes.double() != want
            assert (differ <= near_half(x, scale, zero, mode)).all() or mode == "sim"
            assert ((codes.double() - want).abs() <= 1).all()
            assert differ.double().mean() < 0.01
            wide = replace(p, x=p.x.float()).quantized()
            assert torch.equal(wide[0], codes) and torch.equal(wide[1], s) and torch.equal(wide[2], z)


def near_zero(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of mode "sim" whose zero point is next to a half between two integers."""
    lo, hi = x.double().amin(1).clamp(max=0), x.double().amax(1).clamp(min=0)
    zi = -lo / ((hi - lo) / (2**bits - 1))
    return (((zi - zi.floor()) - 0.5).abs() < 1e-3).double()


@pytest.mark.parametrize("bits", (4, 8))
def test_ends_of_the_range(tier: str, bits: int) -> None:
    """The least value of a row gets code 0, the greatest code L, however the scale was rounded."""
    x = torch.randn(500, 70) * torch.logspace(-3, 4, 500)[:, None] + torch.randn(500, 1) * 10
    qx, _, _, _ = ops.quik_quantize(x, None, None, 70, bits, "kernel")
    codes, half = signed(qx, 70).long(), 2 ** (bits - 1)
    assert (codes.gather(1, x.argmin(1, keepdim=True)) == -half).all()
    assert (codes.gather(1, x.argmax(1, keepdim=True)) == half - 1).all()


@pytest.mark.parametrize("mode", ql.MODES)
@pytest.mark.parametrize("bits", (4, 8))
def test_unusual_rows(tier: str, bits: int, mode: str) -> None:
    """Constant, zero, one huge value, all negative, subnormal: exact or as the reference has it, and results finite."""
    x = torch.randn(11, 66)
    x[0], x[1], x[2] = 3.25, 0.0, -7.0
    x[3], x[3, 5] = 0.0, 65504.0
    x[4], x[4, 65] = 1.0, -65504.0
    x[5] = -x[5].abs() - 1
    x[6] *= 1e-40
    x[7] = 1e-45
    x[8] *= 1e-9
    base = quik(1, 20, 66, 0, 8, bits, mode).base
    p = Quik(x, base, None, None, None, None, bits, mode)
    codes, s, z, _ = p.quantized()
    want, scale, zero = ql.act_quant(x, bits, mode)
    assert ((s.double() - scale).abs() <= 2.0**-22 * scale + 2.0**-149).all() and s.isfinite().all() and (s > 0).all()
    assert ((codes.double() - want).abs() <= (1 if mode == "sim" else near_half(x, scale, zero, mode).double())).all()
    y, expected = p.run(), p.reference()
    check(y, expected, p.bound(expected), str(p))
    if mode == "kernel":  # a constant row loses nothing
        exact = x[:3].double() @ ((base.codes().double() - 128) * base.scales.double()).T
        check(y[:3], exact, 2e-6 * (exact.abs() + 1), "constant rows")


# ---- the integer product ----------------------------------------------------------------------------------------------


def integers(m: int, n: int, k: int, bits_w: int, bits_a: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    draw = lambda rows, bits: torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (rows, k), generator=rng)  # noqa: E731
    return draw(m, bits_a).to(torch.int8), draw(n, bits_w)


def multiply(codes: torch.Tensor, weight: torch.Tensor, bits_w: int, bits_a: int) -> torch.Tensor:
    n, k = weight.shape
    packed = ql.pack(weight_from_codes(weight, torch.ones(n), bits_w)).packed
    return ops.quik_int_matmul(codes if bits_a == 8 else nibbles(codes), packed, n, k, bits_w, bits_a)


def exact(codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """float64 is exact below 2**53, and has a fast product."""
    return (codes.double() @ weight.double().T).to(torch.int32)


@pytest.mark.emulated
@pytest.mark.parametrize(("bits_w", "bits_a"), BITS)
def test_integer_product(tier: str, bits_w: int, bits_a: int) -> None:
    for seed, (m, n, k) in enumerate(
        (
            (0, 5, 3),
            (1, 1, 1),
            (1, 17, 2),
            (2, 16, 7),
            (3, 15, 64),
            (7, 33, 62),
            (8, 48, 65),
            (9, 50, 130),
            (17, 49, 127),
        )
    ):
        codes, weight = integers(m, n, k, bits_w, bits_a, seed)
        assert torch.equal(multiply(codes, weight, bits_w, bits_a), exact(codes, weight)), (m, n, k)


@pytest.mark.parametrize(("bits_w", "bits_a"), BITS)
def test_integer_product_of_blocks(tier: str, bits_w: int, bits_a: int) -> None:
    """More rows than a tile, more columns than a chunk, sums in several pieces, with every remainder."""
    for seed, (m, n, k) in enumerate(
        ((70, 395, 100), (129, 30, 2050), (64, 401, 2048), (5, 40, 28672), (33, 64, 4163))
    ):
        if tier == "scalar" and m * n * k > 1 << 23:
            m, n = 3, 17
        codes, weight = integers(m, n, k, bits_w, bits_a, seed)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(multiply(codes, weight, bits_w, bits_a), exact(codes, weight)), (m, n, k)


@pytest.mark.parametrize(("bits_w", "bits_a"), BITS)
def test_extreme_operands(tier: str, bits_w: int, bits_a: int) -> None:
    """Every combination of least and greatest codes: no 16-bit sum saturates, the zero point's correction is exact."""
    k = 28672 if tier != "scalar" else 640
    ends = lambda bits: torch.tensor([-(1 << (bits - 1)), (1 << (bits - 1)) - 1])  # noqa: E731
    rows, weight = ends(bits_a)[:, None].expand(2, k), ends(bits_w)[:, None].expand(2, k)
    codes = torch.cat((rows, rows.flip(0), rows * (torch.arange(k) % 2 == 0))).to(torch.int8)
    assert torch.equal(multiply(codes, weight, bits_w, bits_a), exact(codes, weight))


def test_padding_is_not_read(tier: str) -> None:
    """Odd n_base in 4 bits: the other half of the last byte of a row means nothing."""
    codes, weight = integers(9, 20, 71, 4, 4)
    packed = ql.pack(weight_from_codes(weight, torch.ones(20), 4)).packed
    rows = nibbles(codes)
    rows[:, -1] |= 0xF0
    assert torch.equal(ops.quik_int_matmul(rows, packed, 20, 71, 4, 4), exact(codes, weight))


# ---- the reference's weight quantiser ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", (4, 8))
def test_clip_search(bits: int) -> None:
    """Never a larger error than without, for any row; codes in range; a zero row is fine."""
    w = torch.randn(60, 200) * torch.rand(60, 1)
    w[3], w[4, 0] = 0, 50
    error = {}
    for search in (False, True):
        codes, scales = ql.weight_quant(w, bits, search)
        assert codes.min() >= -(1 << (bits - 1)) and codes.max() <= (1 << (bits - 1)) - 1
        error[search] = (codes * scales[:, None] - w.double()).abs().pow(ql.CLIP_NORM).sum(1)
    assert (error[True] <= error[False]).all()
    assert (error[True] < error[False]).any()


def test_reduced_is_the_sum_of_the_dequantised_base() -> None:
    base: WqWeight = quik(1, 30, 77, 9).base
    expected = (base.codes().double() - 8).mul(base.scales.double()).sum(1)
    assert torch.allclose(ql.reduced(base).double(), expected, rtol=2.0**-23, atol=1e-12)
