"""QuikLinear: exact round trips, the op it is, stored numbers that must not move, sharing, rotation, batches."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effk.formats.hadamard import rotate
from effk.formats.quik import QuikWeight
from effk.nn import QuikLinear, QuikMultiLinear
from effk.ops import quik_linear as op


def random_quik(
    n: int = 37, k: int = 100, bits: int = 4, outliers: int = 6, seed: int = 0, **fields: Any
) -> QuikWeight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (n, k), generator=generator, dtype=torch.uint8)
    scales = torch.rand(n, generator=generator) * 0.01 + 1e-4
    columns = torch.randperm(k, generator=torch.Generator().manual_seed(0))[:outliers].sort().values
    return QuikWeight.from_codes(codes, scales, torch.randn(n, k, generator=generator), columns, bits=bits, **fields)


def same(a: QuikWeight, b: QuikWeight) -> bool:
    one, two = a.to_state(), b.to_state()
    return a.geometry() == b.geometry() and all(torch.equal(one[key], two[key]) for key in {*one, *two})


@pytest.mark.parametrize("outliers", [0, 6, 98])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_canonical_round_trip(bits: int, outliers: int, dtype: torch.dtype) -> None:
    weight = random_quik(bits=bits, outliers=outliers, dtype=dtype)
    module = QuikLinear.from_weight(weight, torch.randn(37), 8)
    assert same(module.to_weight(), weight)
    assert torch.equal(module.dequantize(), weight.dequantize())
    assert (module.fp_idx is None) == (outliers == 0)


def test_columns_in_order_need_no_index() -> None:
    plain = random_quik()
    behind = dataclasses.replace(plain, fp_idx=torch.arange(94, 100, dtype=torch.int32))
    module, x = QuikLinear.from_weight(behind), torch.randn(12, 100)
    assert module.int_idx is None and module.fp_idx is None and same(module.to_weight(), behind)
    order = torch.cat((plain.int_idx, plain.fp_idx)).long()
    shuffled = torch.empty_like(x)
    shuffled[:, order] = x
    assert torch.equal(module(x), QuikLinear.from_weight(plain)(shuffled))


@pytest.mark.parametrize("quantizer", ["kernel", "sim"])
@pytest.mark.parametrize(("bits", "bits_a"), [(4, 4), (4, 8), (8, 8), (4, 16)])
def test_module_is_the_op(bits: int, bits_a: int, quantizer: str) -> None:
    weight, bias = random_quik(bits=bits), torch.randn(37)
    module = QuikLinear.from_weight(weight, bias, bits_a, quantizer)
    packed = op.pack(weight.base, weight.w_out)
    for x in (torch.randn(4, 5, 100), torch.randn(2, 100)):
        expected = op.linear(x, packed, bias, weight.int_idx, weight.fp_idx, bits_a, quantizer)
        assert torch.equal(module(x), expected) and expected.shape == (*x.shape[:-1], 37)


def test_against_the_definition() -> None:
    """fp32 sums of 100 terms, and a code of fp32 that is one off where the quotient is next to a half."""
    weight, bias, x = random_quik(bits=8), torch.randn(37), torch.randn(20, 100)
    expected = op.reference(x, weight.base, weight.w_out, bias, weight.int_idx, weight.fp_idx, 8, "sim")
    got = QuikLinear.from_weight(weight, bias, 8, "sim")(x).double()
    step = (x.amax(1) - x.amin(1)).double() / 255
    one_code = step[:, None] * weight.dequantize().double().abs().amax(1)
    rounding = 104 * 2**-24 * (x.double().abs() @ weight.dequantize().double().abs().t() + bias.abs())
    assert bool(((got - expected).abs() <= one_code + rounding).all())
    assert float((got - expected).abs().median()) < float(rounding.median()), "most sums meet no such quotient"


@pytest.mark.parametrize("quantizer", ["kernel", "sim"])
def test_batches_are_their_sequences(quantizer: str) -> None:
    """[B, T, K] is the loop over B, bit for bit, also when the shape changes between calls: nothing is kept."""
    for bias, outliers in ((torch.randn(37), 6), (None, 0)):
        module = QuikLinear.from_weight(random_quik(outliers=outliers), bias, 4, quantizer)
        for shape in ((3, 16, 100), (2, 9, 100), (5, 33, 100)):
            x = torch.randn(shape)
            assert torch.equal(module(x), torch.stack([module(part) for part in x]))
        assert module(torch.empty(0, 100)).shape == (0, 37)


def test_few_rows_of_the_kernel_quantiser_are_weight_only() -> None:
    """The limit that the docs tell of; "sim" knows none."""
    weight, x = random_quik(), torch.randn(20, 100)
    exact = x.double() @ weight.dequantize(torch.float64).t()
    bound = 2 * 104 * 2**-24 * (x.double().abs() @ weight.dequantize(torch.float64).abs().t())
    close = [
        bool(((QuikLinear.from_weight(weight, None, 4, q)(x[:m]).double() - exact[:m]).abs() <= bound[:m]).all())
        for q in ("kernel", "sim") for m in (op.FEW_ROWS, op.FEW_ROWS + 1)
    ]  # fmt: skip
    assert close == [True, False, False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_conversions_leave_stored_numbers_alone(dtype: torch.dtype) -> None:
    module = QuikLinear.from_weight(random_quik(k=96, outliers=0, rotated=True), torch.randn(37))
    model = nn.Sequential(nn.Linear(4, 4), module, QuikLinear.from_weight(random_quik(dtype=torch.bfloat16)))
    before = {
        name: t.clone() for name, t in model.state_dict().items() if not name.startswith("0") and "bias" not in name
    }
    model.to(dtype).float().half()
    after = model.state_dict()
    assert all(after[name].dtype == t.dtype and torch.equal(after[name], t) for name, t in before.items())
    assert module.bias.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotated_inputs(dtype: torch.dtype) -> None:
    weight = random_quik(k=96, outliers=0, bits=8)
    turned = dataclasses.replace(weight, rotated=True)
    x = torch.randn(16, 96).to(dtype)
    module = QuikLinear.from_weight(turned, None, 8)
    assert torch.equal(module(x), QuikLinear.from_weight(weight, None, 8)(rotate(x)))
    assert same(module.to_weight(), turned) and torch.equal(module.dequantize(), turned.dequantize())
    error = (module(x).double() - x.double() @ turned.dequantize(torch.float64).t()).norm()
    assert float(error / module(x).double().norm()) < 0.02


def test_outliers_pay() -> None:
    """32 of 512 columns scaled by 60: below 0.02 with them apart at 4 bits, above 0.2 without."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 512, generator=generator)
    columns = torch.randperm(512, generator=generator)[:32].sort().values
    x[:, columns] *= 60
    dense = torch.randn(48, 512, generator=generator)
    errors = []
    for kept in (columns, columns[:0]):
        base = torch.ones(512, dtype=torch.bool)
        base[kept] = False
        codes = torch.zeros(48, 512, dtype=torch.uint8)
        found, scales = op.weight_quant(dense[:, base], 4, clip_search=False)
        codes[:, base] = (found + 8).to(torch.uint8)
        weight = QuikWeight.from_codes(codes, scales.float(), dense, kept, bits=4)
        exact = x @ dense.t()
        errors.append(float((QuikLinear.from_weight(weight, None, 4)(x) - exact).norm() / exact.norm()))
    assert errors[0] < 0.02 and errors[1] > 0.2


def test_copies_compute_the_same() -> None:
    module = QuikLinear.from_weight(random_quik(), torch.randn(37), 4, "sim")
    fresh = QuikLinear.from_weight(random_quik(seed=5), torch.zeros(37), 4, "sim")
    fresh.load_state_dict(module.state_dict())
    x = torch.randn(9, 100)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), fresh):
        assert torch.equal(other(x), module(x)) and same(other.to_weight(), module.to_weight())


def test_compile_and_export_without_breaks() -> None:
    for fields in ({}, {"k": 96, "outliers": 0, "rotated": True}):
        weight = random_quik(**fields)
        module = nn.Sequential(
            QuikLinear.from_weight(weight, torch.randn(37), 8)
        )  # export counts a root's None buffers
        x = torch.randn(12, weight.k)
        with torch.no_grad():
            torch._dynamo.reset()
            assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))
            assert torch.equal(torch.export.export(module, (x,)).module()(x), module(x))


# Sharing


class Block(nn.Module):
    """q, k, v over one input, as an attention module calls them."""

    def __init__(self, quantizer: str, bits_a: int = 8) -> None:
        super().__init__()
        self.q = QuikLinear.from_weight(random_quik(seed=1), torch.randn(37), bits_a, quantizer)
        self.k = QuikLinear.from_weight(random_quik(16, bits=8 if bits_a > 4 else 4, seed=2), None, bits_a, quantizer)
        self.v = QuikLinear.from_weight(random_quik(16, seed=3), torch.randn(16), bits_a, quantizer)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        return torch.cat((self.q(x), self.k(x), self.v(x)), dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits_a", [4, 8, 16])
@pytest.mark.parametrize("quantizer", ["kernel", "sim"])
def test_sharing_changes_no_bit(
    quantizer: str, bits_a: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = Block(quantizer, bits_a).to(dtype)
    shared = copy.deepcopy(alone)
    QuikMultiLinear([shared.q, shared.k, shared.v]).attach()
    calls: list[int] = []
    original = QuikMultiLinear.forward
    monkeypatch.setattr(QuikMultiLinear, "forward", lambda self, x: (calls.append(1), original(self, x))[1])
    for m in (1, 8, 9, 40):
        x = torch.randn(m, 100, dtype=dtype)
        assert torch.equal(shared(x), alone(x))
    assert len(calls) == 4 and alone.state_dict().keys() == shared.state_dict().keys()
    x = torch.randn(3, 100, dtype=dtype)
    shared.q(x)
    x.mul_(2)
    assert torch.equal(shared.k(x), alone.k(x)), "products of what x was are not served"


def test_only_layers_that_round_alike_share() -> None:
    first = QuikLinear.from_weight(random_quik())
    others = {
        "bits_a": QuikLinear.from_weight(random_quik(), None, 4),
        "quantizer": QuikLinear.from_weight(random_quik(), None, 8, "sim"),
        "columns": QuikLinear.from_weight(
            dataclasses.replace(random_quik(), fp_idx=torch.arange(6, dtype=torch.int32))
        ),
        "count": QuikLinear.from_weight(random_quik(outliers=8)),
        "inputs": QuikLinear.from_weight(random_quik(k=102)),
    }
    for name, other in others.items():
        with pytest.raises(ValueError, match="two or more that agree in in_features, outlier columns"):
            QuikMultiLinear([first, other])
            pytest.fail(name)
    turned = QuikLinear.from_weight(random_quik(k=96, outliers=0, rotated=True))
    with pytest.raises(ValueError, match="not rotated"):
        QuikMultiLinear([turned, turned])


def test_bad_arguments() -> None:
    weight = random_quik()
    for arguments, message in (
        ((torch.zeros(36),), r"bias: expected floating point \[37\]"),
        ((None, 5), r"bits_a: expected one of \(4, 8, 16\), got 5"),
        ((None, 8, "paper"), "quantizer: expected one of"),
    ):
        with pytest.raises(ValueError, match=message):
            QuikLinear.from_weight(weight, *arguments)
    with pytest.raises(ValueError, match="bits_a: expected at least the weight's 8, got 4"):
        QuikLinear.from_weight(random_quik(bits=8), None, 4)
    with pytest.raises(ValueError, match="w_out: expected finite"):
        QuikLinear.from_weight(dataclasses.replace(weight, w_out=weight.w_out / 0))


def test_what_it_says_of_itself() -> None:
    text = repr(QuikLinear.from_weight(random_quik(), None, 4, "sim"))
    assert all(part in text for part in ("bits=4, bits_a=4", "outliers=6", "quantizer=sim"))
