"""The canonical QUIK weight: exact round trips, true sizes, the released layout, refusals by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from effk.formats.hadamard import rotate
from effk.formats.quik import (
    QuikWeight,
    base_columns,
    from_released,
    pack_nibbles,
    split_meta,
    state_shapes,
    unpack_nibbles,
    weight_bytes,
)
from effk.formats.wq import WqWeight


def random_quik(
    n: int = 37, k: int = 100, bits: int = 4, outliers: int = 6, seed: int = 0, **fields: Any
) -> QuikWeight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (n, k), generator=generator, dtype=torch.uint8)
    scales = torch.rand(n, generator=generator) * 0.01 + 1e-4
    columns = torch.randperm(k, generator=generator)[:outliers].sort().values
    return QuikWeight.from_codes(codes, scales, torch.randn(n, k, generator=generator), columns, bits=bits, **fields)


def same(a: QuikWeight, b: QuikWeight) -> bool:
    one, two = a.to_state(), b.to_state()
    return a.geometry() == b.geometry() and all(torch.equal(one[key], two[key]) for key in {*one, *two})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("outliers", [0, 6, 98])
@pytest.mark.parametrize("bits", [4, 8])
def test_state_round_trip(bits: int, outliers: int, dtype: torch.dtype) -> None:
    weight = random_quik(bits=bits, outliers=outliers, dtype=dtype)
    state = weight.to_state()
    assert same(QuikWeight.from_state(dict(state), weight.geometry()), weight)
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == state_shapes(weight.geometry())
    assert ("w_out" in state) == (outliers > 0)


def test_dense_weight_by_the_formula() -> None:
    """Column by column in float64, which is exact: 4 or 8 bits times 24."""
    for bits in (4, 8):
        weight = random_quik(bits=bits)
        codes, dense = weight.base.codes(), weight.dequantize(torch.float64)
        base = [column for column in range(100) if column not in weight.fp_idx.tolist()]
        assert weight.int_idx.tolist() == base
        for j, column in enumerate(base):
            expected = weight.base.scales[:, 0].double() * (codes[:, j].double() - 2 ** (bits - 1))
            assert torch.equal(dense[:, column], expected)
        for j, column in enumerate(weight.fp_idx.tolist()):
            assert torch.equal(dense[:, column], weight.w_out[:, j].double())
        sums = dense[:, base].sum(1)
        assert torch.allclose(weight.reduced().double(), sums, rtol=2**-23, atol=0), "of dequantised base weights only"
        assert not torch.allclose(weight.reduced().double(), dense.sum(1), rtol=1e-3)


def test_reduced_weights_are_exact_where_fp32_sums_are_not() -> None:
    """Thousands of weights that nearly cancel: the sum of codes is exact, so is its product up to one rounding."""
    codes = torch.full((1, 8192), 255, dtype=torch.uint8)
    codes[0, ::2] = 1
    codes[0, 0] = 2
    weight = QuikWeight.from_codes(
        codes, torch.tensor([0.3]), torch.zeros(1, 8192), torch.empty(0, dtype=torch.int64), bits=8
    )
    assert float(weight.reduced()) == float(torch.tensor(0.3) * torch.tensor(1.0))


@pytest.mark.parametrize(("n", "k", "outliers"), [(64, 4096, 256), (32, 8192, 256), (48, 576, 0), (7, 101, 3)])
@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_are_the_closed_form(n: int, k: int, outliers: int, bits: int) -> None:
    weight = random_quik(n, k, bits, outliers)
    assert weight.nbytes() == weight_bytes(n, k, bits, outliers)
    share = outliers / k
    expected = bits * (1 - share) + 16 * share  # plus a scale a row and an index an outlier column
    assert weight.bits_per_weight() == pytest.approx(expected + 32 / k + 32 * outliers / (n * k))
    if (bits, k, outliers) == (4, 4096, 256):
        assert expected == 4.75
    if (bits, k, outliers) == (4, 8192, 256):
        assert expected == 4.375


def test_shares_of_operations_of_llama_2_70b() -> None:
    """256 outlier columns, 896 in the 8-bit down projection: 70.3 % of the linear layers' products have 4 bits, 26.6 % 8."""
    hidden, feed, kv = 8192, 28672, 1024
    shapes = [(hidden, hidden)] * 2 + [(kv, hidden)] * 2 + [(feed, hidden)] * 2
    low = sum(n * (k - 256) for n, k in shapes)
    eight, kept = hidden * (feed - 896), sum(n * 256 for n, _ in shapes) + hidden * 896
    total = low + eight + kept
    assert [round(100 * part / total, 1) for part in (low, eight, kept)] == [70.3, 26.6, 3.1]


def pruned(pattern: str, bits: int, k: int = 48, outliers: int = 8) -> QuikWeight:
    """Random codes, every unit with the zeros that the pattern asks for, or more."""
    generator = torch.Generator().manual_seed(3)
    weight = random_quik(k=k, bits=bits, outliers=outliers)
    codes = weight.base.codes().reshape(37, -1, 4, 2 if pattern == "pair4:8" else 1)
    gone = torch.rand(codes.shape[:3], generator=generator).argsort(-1)[..., :2]
    mask = torch.zeros(codes.shape[:3], dtype=torch.bool).scatter_(-1, gone, True).unsqueeze(-1)
    codes = codes.masked_fill(mask, 1 << (bits - 1)).reshape(37, -1)
    codes[:, :8] = 1 << (bits - 1)  # a unit of nothing
    base = WqWeight.from_codes(codes, weight.base.scales, bits=bits, group_size=0)
    return dataclasses.replace(weight, base=base, pattern=pattern)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("pattern", ["2:4", "pair4:8"])
def test_pruned_weights_store_half_and_come_back(pattern: str, bits: int) -> None:
    weight = pruned(pattern, bits)
    weight.validate()
    state = weight.to_state()
    back = QuikWeight.from_state(dict(state), weight.geometry())
    assert same(back, weight) and torch.equal(back.base.codes(), weight.base.codes())
    assert sum(t.numel() * t.element_size() for t in state.values()) == weight.nbytes()
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == state_shapes(weight.geometry())
    per_weight = bits / 2 + (1 if pattern == "2:4" else 0.5)
    assert 8 * (state["qweight"].shape[1] + state["meta"].shape[1]) == pytest.approx(per_weight * 40, abs=8)
    damaged = {**state, "meta": state["meta"] ^ 0xFF}
    with pytest.raises((ValueError, RuntimeError), match="meta"):
        QuikWeight.from_state(damaged, weight.geometry())
    full = dataclasses.replace(random_quik(k=48, bits=bits, outliers=8), pattern=pattern)
    with pytest.raises(ValueError, match=f"zeros of pattern {pattern}"):
        full.validate()
    with pytest.raises(ValueError, match="base columns for"):
        dataclasses.replace(random_quik(k=50, bits=bits, outliers=8), pattern=pattern).validate()


def test_a_rotated_weight_is_told_for_unrotated_inputs() -> None:
    plain, x = random_quik(k=96, outliers=0), torch.randn(5, 96, dtype=torch.float64)
    turned = dataclasses.replace(plain, rotated=True)
    assert torch.equal(turned.stored(torch.float64), plain.dequantize(torch.float64))
    expected = rotate(x) @ turned.stored(torch.float64).t()
    assert torch.allclose(x @ turned.dequantize(torch.float64).t(), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(x @ plain.dequantize(torch.float64).t(), expected, rtol=1e-2)


def test_nibbles_are_a_bijection() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    codes = unpack_nibbles(every)
    assert torch.equal(pack_nibbles(codes), every)
    low, high = codes[0::2].tolist(), codes[1::2].tolist()
    assert low == [(b & 15) - 16 * (b & 15 > 7) for b in range(256)], "column 2j is the low nibble"
    assert high == [(b >> 4) - 16 * (b >> 4 > 7) for b in range(256)]


@pytest.mark.parametrize("bits", [4, 8])
def test_released_layout(bits: int) -> None:
    """Base columns by rising activation, two's complement, half-type scales; ours are sorted."""
    generator = torch.Generator().manual_seed(1)
    n, k, outliers = 5, 24, 4
    order = torch.randperm(k, generator=generator)
    base, kept = order[: k - outliers], order[k - outliers :]
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (n, k - outliers), generator=generator).to(torch.int8)
    scales = (torch.rand(n, 1, generator=generator) + 0.5).half()
    values = torch.randn(n, outliers, generator=generator).half()
    stored = pack_nibbles(codes) if bits == 4 else codes
    weight = from_released(stored, scales, values, base, kept, bits)
    expected = torch.zeros(n, k, dtype=torch.float64)
    expected[:, base], expected[:, kept] = scales.double() * codes.double(), values.double()
    assert torch.equal(weight.dequantize(torch.float64), expected)
    assert weight.int_idx.tolist() == sorted(base.tolist()) and weight.fp_idx.tolist() == kept.tolist()
    with pytest.raises(ValueError, match="each of 24 columns once"):
        from_released(stored, scales, values, base, kept.flip(0).clone().fill_(int(kept[0])), bits)
    with pytest.raises(ValueError, match=r"from_released: int_weight: expected"):
        from_released(stored[:, 1:], scales, values, base, kept, bits)


def test_released_activation_scales() -> None:
    scale, zero = split_meta(torch.tensor([0.5, -1.0, 0.25, 2.0], dtype=torch.float16))
    assert scale.tolist() == [0.5, 0.25] and zero.tolist() == [-1.0, 2.0] and scale.dtype == torch.float32
    with pytest.raises(ValueError, match=r"expected \[2 M\], got \[3\]"):
        split_meta(torch.zeros(3))


def changed(weight: QuikWeight, **fields: Any) -> QuikWeight:
    return dataclasses.replace(weight, **fields)


def with_base(weight: QuikWeight, **fields: Any) -> QuikWeight:
    return dataclasses.replace(weight, base=dataclasses.replace(weight.base, **fields))


GOOD = random_quik()
_INDEX = GOOD.fp_idx
BAD: dict[str, tuple[Any, str]] = {
    "odd base": (lambda: random_quik(outliers=5), "even number of base columns for 4 bits, got 100 - 5 = 95"),
    "too many base columns": (lambda: random_quik(n=1, k=131074, bits=8, outliers=1), "at most 131071 base columns, got 131073"),
    "twice": (lambda: changed(GOOD, fp_idx=_INDEX.index_fill(0, torch.tensor([1]), int(_INDEX[0]))), "6 distinct columns, got 5"),
    "beyond": (lambda: changed(GOOD, fp_idx=_INDEX.index_fill(0, torch.tensor([5]), 100)), r"in \[0, 100\), got"),
    "negative": (lambda: changed(GOOD, fp_idx=_INDEX.index_fill(0, torch.tensor([0]), -1)), r"got -1\.\."),
    "too few": (lambda: changed(GOOD, k=102), "to make 102, got 100"),
    "index dtype": (lambda: changed(GOOD, fp_idx=_INDEX.long()), r"fp_idx: expected torch.int32 \[6\]"),
    "fp32 outliers": (lambda: changed(GOOD, w_out=GOOD.w_out.float()), "w_out: expected torch.float16 or torch.bfloat16"),
    "outlier rows": (lambda: changed(GOOD, w_out=GOOD.w_out[1:]), r"w_out: .* \[37, 6\], got .* \[36, 6\]"),
    "infinite": (lambda: changed(GOOD, w_out=GOOD.w_out / 0), "w_out: expected finite"),
    "half scales": (lambda: with_base(GOOD, scales=GOOD.base.scales.half()), "fp32 scales, got group_size 0 and torch.float16"),
    "zero points": (lambda: with_base(GOOD, zeros=torch.zeros(37, 1, dtype=torch.uint8)), "no zero points"),
    "negative scale": (lambda: with_base(GOOD, scales=-GOOD.base.scales), "positive values"),
    "three bits": (lambda: changed(GOOD, base=WqWeight.from_codes(torch.zeros(37, 94, dtype=torch.uint8), torch.ones(37, 1), bits=3, group_size=0)), "one of \\(4, 8\\), got 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refusals(case: str) -> None:
    make, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        make().validate()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 3}, "bits: expected one of"),
        ({"outliers": 101}, "outliers: expected 0 to 99"),
        ({"outliers": 5}, "even number"),
        ({"n": -1}, "n: expected a non-negative"),
        ({"rotated": 1}, "rotated"),
        ({"pattern": "1:2"}, "pattern: expected None or one of"),
        ({"pattern": "2:4"}, "multiple of 4 base columns"),
        ({"out_dtype": "float32"}, "out_dtype"),
        ({"colour": "red"}, "expected fields"),
        ({"outliers": 8}, "qweight: expected"),
        ({"outliers": 0}, r"expected tensors \['qweight', 'scales'\]"),
    ],
)
def test_bad_geometry(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuikWeight.from_state(GOOD.to_state(), GOOD.geometry() | fields)


def test_base_columns() -> None:
    columns: Tensor = torch.tensor([3, 0], dtype=torch.int32)
    assert base_columns(5, columns).tolist() == [1, 2, 4] and base_columns(2, columns[:0]).tolist() == [0, 1]
