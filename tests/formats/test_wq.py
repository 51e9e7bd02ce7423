"""The canonical weight: values, sizes, cuts, and every way in which it can be malformed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from effk.formats.wq import (
    CODEBOOKS,
    FP4,
    GROUP_SIZES,
    NF2,
    NF3,
    NF4,
    WqWeight,
    csr_from_mask,
    state_shapes,
    weight_bytes,
)
from wq_cases import random_weight as random_kind

VARIANTS = ("symmetric", "asymmetric", "table", "row_tables", "outliers")
SHAPES = [(1, 1), (17, 7), (16, 64), (33, 100), (5, 577)]


def random_weight(n: int, k: int, bits: int, group_size: int, variant: str) -> WqWeight:
    sparse = variant == "outliers"
    return random_kind(n, k, bits, group_size, "symmetric" if sparse else variant, outliers=0.05 if sparse else 0.0)


def variants(bits: int) -> tuple[str, ...]:
    return tuple(v for v in VARIANTS if bits < 8 or "table" not in v)


def by_definition(weight: WqWeight) -> torch.Tensor:
    """W in float64, element by element as the format's formula says."""
    codes, out = weight.codes(), torch.zeros(weight.n, weight.k, dtype=torch.float64)
    for n in range(weight.n):
        for k in range(weight.k):
            g, q = k // (weight.group_size or weight.k), int(codes[n, k])
            if weight.codebook is not None:
                value = float(weight.codebook[q] if weight.codebook.dim() == 1 else weight.codebook[n, q])
            else:
                value = q - (2 ** (weight.bits - 1) if weight.zeros is None else int(weight.zeros[n, g]))
            out[n, k] = float(weight.scales[n, g]) * value
        if weight.out_ptr is not None:
            for j in range(int(weight.out_ptr[n]), int(weight.out_ptr[n + 1])):
                out[n, int(weight.out_col[j])] += float(weight.out_val[j])
    return out


CASES = [(bits, variant) for bits in (2, 3, 4, 8) for variant in variants(bits)]


@pytest.mark.parametrize(("bits", "variant"), CASES)
def test_dequantize_follows_the_formula(bits: int, variant: str) -> None:
    weight = random_weight(17, 70, bits, 32, variant)
    exact = by_definition(weight)
    assert torch.equal(weight.dequantize(torch.float64), exact)
    # fp32: code value and scale are exact; their product and the sum with an outlier are rounded once each.
    dense = by_definition(dataclasses.replace(weight, out_ptr=None, out_col=None, out_val=None))
    assert bool(((weight.dequantize() - exact).abs() <= (dense.abs() + exact.abs()) * 2.0**-24 + 1e-30).all())
    assert weight.dequantize(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(("bits", "variant"), CASES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_bytes_are_counted_truly(bits: int, group_size: int, variant: str) -> None:
    for n, k in SHAPES:
        weight = random_weight(n, k, bits, group_size, variant)
        nnz = 0 if weight.out_val is None else weight.out_val.numel()
        if nnz == 0 and weight.out_ptr is not None:
            continue  # a sparse part without entries is legal but never planned
        table = {"table": "shared", "row_tables": "row"}.get(variant)
        predicted = weight_bytes(n, k, bits, group_size, zeros=variant == "asymmetric", codebook=table, outliers=nnz)
        actual = sum(t.numel() * t.element_size() for t in weight.to_state().values())
        assert predicted == weight.nbytes() == actual
        assert weight.bits_per_weight() == 8 * actual / (n * k)


def test_size_formula_of_the_literature() -> None:
    """4096 columns in groups of 128: codes, fp16 scale, 8-bit zero; and 0.5 % outliers with 16-bit columns."""
    n = k = 4096
    assert 8 * weight_bytes(n, k, 4, 128) / (n * k) == 4 + 16 / 128
    assert 8 * weight_bytes(n, k, 2, 128, zeros=True) / (n * k) == 2 + 24 / 128
    nnz = int(0.005 * n * k)
    sparse = 8 * (weight_bytes(n, k, 2, 128, outliers=nnz) - weight_bytes(n, k, 2, 128)) / (n * k)
    assert sparse == pytest.approx(0.005 * 32 + 32 / k, rel=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_and_geometry_round_trip(variant: str) -> None:
    weight = random_weight(33, 100, 3, 64, variant)
    state, geometry = weight.to_state(), weight.geometry()
    shapes = state_shapes(geometry)
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == shapes
    again = WqWeight.from_state(state, geometry)
    assert torch.equal(again.dequantize(torch.float64), weight.dequantize(torch.float64))
    with pytest.raises(ValueError, match="expected tensors"):
        WqWeight.from_state({k: v for k, v in state.items() if k != "scales"}, geometry)
    with pytest.raises(ValueError):
        WqWeight.from_state(state, geometry | {"bits": 4})
    with pytest.raises(ValueError, match="geometry"):
        WqWeight.from_state(state, {k: v for k, v in geometry.items() if k != "n"})


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_are_the_rows(variant: str) -> None:
    weight = random_weight(53, 100, 4, 32, variant)
    whole = weight.dequantize(torch.float64)
    for start, stop in [(0, 16), (16, 48), (32, 53), (48, 48), (0, 53)]:
        part = weight.rows(start, stop)
        part.validate()
        assert torch.equal(part.dequantize(torch.float64), whole[start:stop])
    for start, stop in [(8, 16), (0, 17), (0, 64), (-16, 16), (32, 16)]:
        with pytest.raises(ValueError, match="rows: expected"):
            weight.rows(start, stop)


def test_tables_are_the_published_ones() -> None:
    """NF4 of QLoRA (appendix E) to the digits printed there; E2M1 by enumeration of sign, exponent and mantissa."""
    published = [
        -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
        0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
    ]  # fmt: skip
    torch.testing.assert_close(NF4, torch.tensor(published), atol=2e-7, rtol=0)
    torch.testing.assert_close(NF3[[0, 3, 7]], torch.tensor([-1.0, 0.0, 1.0]), atol=0, rtol=0)
    assert NF2.tolist() == [-1.0, 0.0, pytest.approx(0.3379152, abs=2e-7), 1.0]
    for code in range(16):
        sign, exponent, mantissa = -1 if code & 8 else 1, code >> 1 & 3, code & 1
        value = mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
        assert float(FP4[code]) == sign * value
    assert {name: table.numel() for name, table in CODEBOOKS.items()} == {"nf2": 4, "nf3": 8, "nf4": 16, "fp4": 16}


def test_csr_keeps_order_and_refuses_overflow() -> None:
    values = torch.arange(12.0).reshape(3, 4)
    ptr, col, val = csr_from_mask(values, values.long() % 3 == 1)
    assert ptr.tolist() == [0, 1, 3, 4] and col.tolist() == [1, 0, 3, 2] and val.tolist() == [1, 4, 7, 10]
    assert col.dtype == torch.uint16
    with pytest.raises(ValueError, match="finite in fp16"):
        csr_from_mask(torch.tensor([[1e6]]), torch.tensor([[True]]))
    wide = torch.zeros(1, 65537)
    assert csr_from_mask(wide, wide == 0).col.dtype == torch.int32


def broken(variant: str, **changes: object) -> WqWeight:
    return dataclasses.replace(random_weight(17, 33, 3, 32, variant), **changes)


def replaced(tensor: torch.Tensor, index: tuple[int, ...], value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


GOOD = {variant: random_weight(17, 33, 3, 32, variant) for variant in VARIANTS}
BROKEN = {
    "bits": (broken("symmetric", bits=5), "bits: expected"),
    "group_size": (broken("symmetric", group_size=48), "group_size: expected"),
    "n": (broken("symmetric", n=18), r"qweight: expected torch.uint8 \[18, 13\]"),
    "k": (broken("symmetric", k=0), "n, k: expected"),
    "qweight dtype": (broken("symmetric", qweight=GOOD["symmetric"].qweight.int()), "qweight: expected torch.uint8"),
    "qweight padding": (
        broken("symmetric", qweight=replaced(GOOD["symmetric"].qweight, (3, -1), 255)),
        "qweight: expected 5 zero padding bits",
    ),
    "scales shape": (broken("symmetric", scales=GOOD["symmetric"].scales[:, :1]), r"scales: .*\[17, 2\]"),
    "scales dtype": (
        broken("symmetric", scales=GOOD["symmetric"].scales.bfloat16()),
        "scales: expected torch.float16 or torch.float32",
    ),
    "scales nan": (
        broken("symmetric", scales=replaced(GOOD["symmetric"].scales, (0, 0), float("nan"))),
        "scales: expected finite",
    ),
    "zeros range": (
        broken("asymmetric", zeros=replaced(GOOD["asymmetric"].zeros, (2, 1), 8)),
        "zeros: expected codes below 8, got 8",
    ),
    "zeros beside codebook": (
        broken("table", zeros=GOOD["asymmetric"].zeros),
        "zeros: expected none beside a codebook",
    ),
    "codebook bits": (
        dataclasses.replace(random_weight(4, 32, 8, 32, "symmetric"), codebook=torch.zeros(256)),
        "none with 8 bits",
    ),
    "codebook size": (broken("table", codebook=torch.zeros(7)), r"codebook: expected torch.float32 \[8\]"),
    "codebook rows": (broken("row_tables", codebook=torch.zeros(16, 8)), r"codebook: expected torch.float32 \[17, 8\]"),
    "codebook inf": (broken("table", codebook=torch.full((8,), float("inf"))), "codebook: expected finite"),
    "half a sparse part": (broken("outliers", out_col=None), "expected all or none"),
    "pointers fall": (
        broken("outliers", out_ptr=replaced(GOOD["outliers"].out_ptr, (1,), 10_000)),
        "out_ptr: expected row pointers",
    ),
    "pointers start": (broken("outliers", out_ptr=GOOD["outliers"].out_ptr + 1), "out_ptr: expected row pointers"),
    "pointer count": (
        broken("outliers", out_ptr=GOOD["outliers"].out_ptr[:-1]),
        r"out_ptr: expected torch.int32|int32 \[18\]",
    ),
    "columns short": (broken("outliers", out_col=GOOD["outliers"].out_col[:-1]), "out_col: expected torch.uint16"),
    "column range": (
        broken("outliers", out_col=replaced(GOOD["outliers"].out_col.int(), (-1,), 33).to(torch.uint16)),
        r"out_col: expected columns in \[0, 33\)",
    ),
    "column order": (
        broken("outliers", out_col=GOOD["outliers"].out_col.int().flip(0).to(torch.uint16)),
        "out_col: expected strictly",
    ),
    "outlier inf": (
        broken("outliers", out_val=replaced(GOOD["outliers"].out_val, (0,), float("inf"))),
        "out_val: expected finite",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_malformed_weights_are_named(case: str) -> None:
    weight, message = BROKEN[case]
    with pytest.raises(ValueError, match=message):
        weight.validate()


def test_good_weights_pass() -> None:
    for weight in GOOD.values():
        weight.validate()
