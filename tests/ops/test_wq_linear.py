"""wq_linear against the float64 reference, on every tier, and what it promises beyond being close."""

from __future__ import annotations

import itertools

import pytest
import torch

from effk import isa
from effk.formats.wq import GROUP_SIZES, WqWeight
from effk.ops import wq_linear as wq
from wq_cases import BITS, DTYPES, assert_close, bound, check, kinds, random_input, random_weight

ROWS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 31, 32, 33, 64, 130)
# Remainders of the tile (16 rows), the pair of tiles, the chunk (4 to 32 columns), the group; and a single column.
SHAPES = ((33, 576), (17, 200), (50, 130), (15, 257), (64, 300), (31, 33), (16, 1), (1, 67), (47, 319))
COMPUTE = ("float", "int8")


def bits_of(y: torch.Tensor) -> torch.Tensor:
    """The tensor as integers: NaN equals NaN, and -0 differs from 0."""
    return y.contiguous().view({4: torch.int32, 2: torch.int16}[y.element_size()])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(bits_of(a), bits_of(b))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("compute", COMPUTE)
def test_matches_reference(tier: str, compute: str, bits: int, dtype: torch.dtype) -> None:
    """Kinds x groups x outliers on shapes in turn; all row counts, but only those that change the path on slow tiers."""
    rows = (0, 1, 4, 5, 13, 33) if tier == "scalar" else ROWS
    shapes = itertools.cycle(SHAPES)
    for seed, (kind, group, sparse) in enumerate(itertools.product(kinds(bits, compute), GROUP_SIZES, (0.0, 0.02))):
        n, k = next(shapes)
        scale_dtype = torch.float32 if seed % 3 == 0 else torch.float16
        weight = random_weight(n, k, bits, group, kind, outliers=sparse, scale_dtype=scale_dtype, seed=seed)
        bias = torch.randn(n).to(DTYPES[seed % 3]) if seed % 2 else None
        packed = wq.pack(weight)
        x = random_input(max(rows), k, dtype, seed)
        expected = wq.reference(x, weight, bias, compute)
        allowed = bound(x, weight, expected, bias, compute)
        for m in rows:
            y = wq.linear(x[:m], packed, bias, compute)
            assert y.dtype == dtype
            check(y, expected[:m], allowed[:m], f"{kind} group {group} outliers {sparse} {n}x{k} m {m}")


@pytest.mark.emulated
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("compute", COMPUTE)
def test_matches_reference_small(tier: str, compute: str, bits: int) -> None:
    """A slice of the above that is quick enough for an emulated CPU."""
    for kind in kinds(bits, compute):
        weight = random_weight(37, 203, bits, 64, kind, outliers=0.02)
        packed = wq.pack(weight)
        for m, dtype in ((1, torch.float32), (3, torch.bfloat16), (9, torch.float16), (17, torch.float32)):
            x = random_input(m, 203, dtype)
            assert_close(wq.linear(x, packed, None, compute), x, weight, None, compute, f"{kind} m {m}")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("compute", COMPUTE)
def test_row_does_not_depend_on_its_batch(tier: str, compute: str, bits: int) -> None:
    for kind, dtype in itertools.product(kinds(bits, compute), DTYPES):
        weight = random_weight(50, 200, bits, 64, kind, outliers=0.02)
        packed, bias = wq.pack(weight), torch.randn(50)
        x = random_input(33, 200, dtype)
        whole = wq.linear(x, packed, bias, compute)
        for m in (1, 2, 4, 5, 8, 13, 16):
            for first in (0, 7, 33 - m):
                part = wq.linear(x[first : first + m], packed, bias, compute)
                assert same_bits(part, whole[first : first + m]), (kind, dtype, m, first)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("compute", COMPUTE)
def test_result_does_not_depend_on_threads(compute: str, bits: int) -> None:
    weight = random_weight(515, 1100, bits, 128, "asymmetric", outliers=0.01)  # several grains of work for each thread
    packed = wq.pack(weight)
    for m in (1, 5, 40):
        x = random_input(m, 1100, torch.bfloat16)
        torch.set_num_threads(1)
        alone = wq.linear(x, packed, None, compute)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert same_bits(wq.linear(x, packed, None, compute), alone), (m, threads)


def on_every_tier(call) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
    results = {}
    for name in isa.supported():
        with isa.use(name):
            results[name] = call()
    return results


@pytest.mark.parametrize("bits", BITS)
def test_int8_form_is_the_same_on_every_tier(bits: int) -> None:
    """The integer sums are exact and the order of everything else is fixed, so the tiers agree in every bit."""
    for kind, group, dtype in itertools.product(kinds(bits, "int8"), (0, 32, 128), DTYPES):
        weight = random_weight(49, 333, bits, group, kind, outliers=0.02)
        packed, bias = wq.pack(weight), torch.randn(49)
        x = random_input(19, 333, dtype)
        for m in (1, 3, 19):
            results = on_every_tier(lambda: wq.linear(x[:m], packed, bias, "int8"))  # noqa: B023
            for name, y in results.items():
                assert same_bits(y, results["scalar"]), (name, kind, group, dtype, m)


@pytest.mark.emulated
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("compute", COMPUTE)
def test_small_integers_are_exact(tier: str, compute: str, bits: int) -> None:
    """x of small integers, scales of powers of two: every fp32 sum is exact, so the result is the reference itself.

    In the int8 form each activation group holds a 127, which makes its scale 1 and its rounding exact. Integers up to
    127 are exact in bf16; sums stay below 200 columns * 127 * 255 * 2 < 2**24.
    """
    base = random_weight(35, 200, bits, 32, "asymmetric")
    scales = 2.0 ** torch.randint(-3, 4, base.scales.shape, generator=torch.Generator().manual_seed(3))
    for zeros in (None, base.zeros):
        weight = WqWeight.from_codes(base.codes(), scales.half(), bits=bits, group_size=32, zeros=zeros)
        packed = wq.pack(weight)
        x = torch.randint(-7, 8, (21, 200), generator=torch.Generator().manual_seed(4)).float()
        x[:, ::32] = 127
        expected = wq.reference(x, weight)
        assert torch.equal(expected, wq.reference(x, weight, None, "int8"))
        for m, dtype in itertools.product((1, 4, 21), DTYPES):
            y = wq.linear(x[:m].to(dtype), packed, None, compute)
            assert torch.equal(y, expected[:m].to(dtype)), (m, dtype)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("code", ("zero", "top", "alternating"))
@pytest.mark.parametrize("sign", (1, -1, 0))
def test_extreme_codes_do_not_saturate(tier: str, bits: int, code: str, sign: int) -> None:
    """The largest sums there are: an instruction that saturates at 16 bits, or a sum carried too long in them, fails."""
    n, k, top = 20, 512, (1 << bits) - 1
    codes = torch.full((n, k), top if code == "top" else 0, dtype=torch.uint8)
    if code == "alternating":
        codes[:, ::2] = top
    x = torch.full((9, k), 127.0 * (sign or 1))
    if sign == 0:
        x[:, ::2] = -127.0
    for group, zero in itertools.product((32, 128, 0), (None, 0, top)):
        groups = k // group if group else 1
        zeros = None if zero is None else torch.full((n, groups), zero, dtype=torch.uint8)
        weight = WqWeight.from_codes(codes, torch.ones(n, groups), bits=bits, group_size=group, zeros=zeros)
        packed = wq.pack(weight)
        expected = wq.reference(x, weight)
        for m, compute in itertools.product((1, 4, 9), COMPUTE):
            y = wq.linear(x[:m], packed, None, compute)
            assert torch.equal(y.double(), expected[:m]), (group, zero, m, compute)


@pytest.mark.parametrize("bad", (torch.nan, torch.inf, -torch.inf))
@pytest.mark.parametrize("compute", COMPUTE)
def test_non_finite_row_stays_alone(tier: str, compute: str, bad: float) -> None:
    for kind, dtype, m in itertools.product(("symmetric", "asymmetric"), DTYPES, (3, 13)):
        weight = random_weight(40, 150, 4, 64, kind)
        packed, x = wq.pack(weight), random_input(m, 150, dtype)
        clean = wq.linear(x, packed, None, compute)
        x[2, 149] = bad
        y = wq.linear(x, packed, None, compute)
        if compute == "int8":
            assert y[2].isnan().all()
        else:
            touched = weight.codes()[:, 149] != (8 if kind == "symmetric" else weight.zeros[:, -1])
            assert not y[2][touched].isfinite().any()
        keep = torch.arange(m) != 2
        assert same_bits(y[keep], clean[keep])


@pytest.mark.parametrize("compute", COMPUTE)
def test_small_numbers(tier: str, compute: str) -> None:
    """Subnormal, zero and negative scales; rows of zeros and of numbers whose reciprocal overflows."""
    base = random_weight(32, 160, 4, 32)
    for scale, dtype in ((2.0**-24, torch.float16), (-(2.0**-20), torch.float16), (0.0, torch.float16),
                         (2.0**-140, torch.float32), (-1.0, torch.float32)):  # fmt: skip
        weight = WqWeight.from_codes(
            base.codes(), torch.full_like(base.scales, scale, dtype=dtype), bits=4, group_size=32
        )
        packed = wq.pack(weight)
        for magnitude in (1.0, 0.0, 2.0**-60, 2.0**-118, 2.0**-125, 2.0**-140, 2.0**80):
            x = random_input(6, 160) * magnitude
            assert_close(wq.linear(x, packed, None, compute), x, weight, None, compute, f"scale {scale} x {magnitude}")


@pytest.mark.parametrize("compute", COMPUTE)
def test_shapes_of_x(compute: str) -> None:
    weight = random_weight(33, 96)
    packed = wq.pack(weight)
    x = random_input(30, 96)
    whole = wq.linear(x, packed, None, compute)
    assert same_bits(wq.linear(x[4], packed, None, compute), whole[4])
    assert same_bits(wq.linear(x.reshape(2, 3, 5, 96), packed, None, compute), whole.reshape(2, 3, 5, 33))
    assert same_bits(wq.linear(x[::3], packed, None, compute), whole[::3])
    assert same_bits(wq.linear(x.T.contiguous().T, packed, None, compute), whole)
    assert same_bits(wq.linear(x[:1].expand(4, 96), packed, None, compute), whole[:1].expand(4, 33))
    wide = torch.randn(30, 101)
    wide[:, 5:] = x
    assert same_bits(wq.linear(wide[:, 5:], packed, None, compute), whole)
    for shape in ((0, 96), (2, 0, 96)):
        y = wq.linear(torch.empty(shape, dtype=torch.bfloat16), packed, None, compute)
        assert y.shape == (*shape[:-1], 33) and y.dtype == torch.bfloat16


@pytest.mark.parametrize("compute", COMPUTE)
def test_no_rows_of_weight(compute: str) -> None:
    packed = wq.pack(random_weight(0, 96))
    assert wq.linear(torch.randn(3, 96), packed, torch.empty(0), compute).shape == (3, 0)


def test_misaligned_buffers(tier: str) -> None:
    """No buffer needs to be aligned: views that start in the middle of an allocation give the same bits."""

    def shifted(t: torch.Tensor | None) -> torch.Tensor | None:
        if t is None:
            return None
        room = torch.empty(t.numel() + 1, dtype=t.dtype)
        room[1:] = t.flatten()
        return room[1:].view(t.shape)

    for bits, kind, compute in itertools.product(BITS, ("asymmetric", "table", "row_tables"), COMPUTE):
        if kind not in kinds(bits, compute):
            continue
        packed = wq.pack(random_weight(35, 150, bits, 32, kind, outliers=0.05))
        odd = wq.PackedWeight(*map(shifted, packed.tensors), *packed.geometry)
        for m, dtype in ((1, torch.float32), (9, torch.bfloat16)):
            x, bias = random_input(m, 150, dtype), torch.randn(35, dtype=dtype)
            y = wq.linear(x, packed, bias, compute)
            assert same_bits(wq.linear(shifted(x), odd, shifted(bias), compute), y), (bits, kind, m)


def test_many_columns_take_wide_indices(tier: str) -> None:
    weight = random_weight(5, 65600, 4, 256, outliers=0.001)
    assert weight.out_col.dtype == torch.int32
    for m in (1, 9):
        x = random_input(m, 65600)
        assert_close(wq.linear(x, wq.pack(weight)), x, weight, None, "float")


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("share", (0.001, 0.02, 0.06, 0.2))
def test_any_number_of_outliers(compute: str, share: float) -> None:
    """Kernels group tiles by their outliers: several together, one at a time, too many for that, and rows with none."""
    weight = random_weight(149, 2000, 3, 128, "asymmetric", outliers=share)
    packed, x = wq.pack(weight), random_input(9, 2000)
    results = on_every_tier(lambda: wq.linear(x[:1], packed, None, compute))
    for name, y in results.items():
        assert_close(y, x[:1], weight, None, compute, name)
        with isa.use(name):
            assert same_bits(y, wq.linear(x, packed, None, compute)[:1]), name
    assert compute == "float" or all(same_bits(y, results["scalar"]) for y in results.values())


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("m", (0, 1, 3, 33))
def test_multi_linear_equals_its_parts(tier: str, compute: str, m: int) -> None:
    weights = [
        random_weight(33, 200, 4, 64, "symmetric", seed=1),
        random_weight(16, 200, 3, 128, "asymmetric", outliers=0.03, seed=2),
        random_weight(47, 200, 8, 0, "symmetric", seed=3),
        random_weight(0, 200, 2, 32, "symmetric", seed=4),
        random_weight(9, 200, 2, 32, "row_tables" if compute == "float" else "table", seed=5),
        random_weight(18, 200, 4, 256, "table", outliers=0.01, seed=6),
    ]
    packed = [wq.pack(w) for w in weights]
    biases = [None if i % 2 else torch.randn(w.n) for i, w in enumerate(weights)]
    x = random_input(m, 200, torch.bfloat16)
    together = wq.multi_linear(x, packed, biases, compute)
    assert len(together) == len(weights)
    for y, p, b in zip(together, packed, biases, strict=True):
        assert same_bits(y, wq.linear(x, p, b, compute))


def test_multi_linear_of_many_and_of_none() -> None:
    packed = [wq.pack(random_weight(17, 64, 4, 32, seed=i)) for i in range(70)]
    x = random_input(2, 64)
    for y, p in zip(wq.multi_linear(x, packed, None, "int8"), packed, strict=True):
        assert same_bits(y, wq.linear(x, p, None, "int8"))
    assert wq.multi_linear(x, []) == []
