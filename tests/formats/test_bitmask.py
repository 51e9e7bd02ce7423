"""The canonical sparse weight and its module: exact round trips, malformed tensors refused, dtypes that stay."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch
from torch import Tensor, nn

from effk.formats.bitmask import BitmaskTensor, expand, pack_bits, state_shapes, unpack_bits
from effk.nn import BitmaskLinear


def sparse(n: int, k: int) -> Tensor:
    return torch.randn(n, k).where(torch.rand(n, k) < 0.4, torch.zeros(()))


def test_bytes_by_hand() -> None:
    w = torch.tensor([[0, 0, 5, 0, -1, 0, 0, 2, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0, 0, 7]], dtype=torch.int8)
    weight = BitmaskTensor.from_dense(w, torch.ones(2, 1))
    assert weight.bitmask.tolist() == [[0x94, 0], [0, 2]] and weight.values.tolist() == [5, -1, 2, 7]
    assert weight.row_ptr.tolist() == [0, 3, 4] and weight.nbytes() == 4 + 4 + 24 + 8
    assert torch.equal(weight.dense(), w)


def test_round_trips() -> None:
    for n, k in ((1, 1), (7, 63), (8, 64), (9, 129), (20, 1000)):
        keep = torch.rand(n, k) < 0.5
        assert torch.equal(unpack_bits(pack_bits(keep), k), keep)
        w = sparse(n, k)
        for dense, scales, group in (
            (w, None, 0), (w.bfloat16(), None, 0), ((w * 30).to(torch.int8), torch.rand(n, 1), 0),
            ((w * 30).to(torch.int8), torch.rand(n, -(-k // 64)), 64 if k > 64 else 0),
        ):  # fmt: skip
            weight = BitmaskTensor.from_dense(dense, scales, group)
            back = BitmaskTensor.from_state(weight.to_state(), weight.geometry())
            assert torch.equal(back.dense(), dense) and back.nbytes() == weight.nbytes()
            assert {name: (tuple(t.shape), t.dtype) for name, t in weight.to_state().items()} == state_shapes(
                weight.geometry()
            )
            module = BitmaskLinear.from_weight(weight)
            assert torch.equal(module.to_weight().dense(), dense) and torch.equal(
                module.dequantize(), weight.dequantize()
            )


def test_malformed_tensors() -> None:
    good = BitmaskTensor.from_dense((sparse(5, 70) * 30).to(torch.int8), torch.ones(5, 1))

    def refused(match: str, **parts: object) -> None:
        with pytest.raises(ValueError, match=match):
            dataclasses.replace(good, **parts).validate()

    refused("bitmask: expected .* got torch.uint8", bitmask=good.bitmask[:, :-1])
    refused("no bits beyond column 70", bitmask=good.bitmask | 128)
    refused("row_ptr: expected the number of bits", values=good.values[:-1])
    refused("row_ptr: expected the number of bits", row_ptr=good.row_ptr.flip(0))
    refused("scales: expected .* got none", scales=None)
    refused("scales: expected finite", scales=good.scales * torch.nan)
    refused("group_size: expected 0", group=32)
    with pytest.raises(ValueError, match="as many as values"):
        expand(good.values[:-1], good.bitmask, 70)
    with pytest.raises(ValueError, match="stored: expected 0 to 350"):
        state_shapes(good.geometry() | {"stored": 351})


def test_module() -> None:
    linear = nn.Linear(130, 24)
    linear.weight.data = sparse(24, 130)
    for values in ("fp32", "bf16", "int8"):
        module = BitmaskLinear.from_linear(linear, values)
        x = torch.randn(3, 130)
        expected = torch.nn.functional.linear(x, module.dequantize(), linear.bias)
        assert torch.allclose(module(x), expected, atol=1e-4)
        half = pickle.loads(pickle.dumps(module)).to(torch.bfloat16)
        assert half.values.dtype == module.values.dtype and half.bias.dtype == torch.bfloat16
        assert half(x.bfloat16()).dtype == torch.bfloat16
        other = BitmaskLinear.from_linear(linear, values)
        if other.values is not None:
            other.load_state_dict(module.state_dict())
            assert torch.equal(other(x), module(x))


def test_a_damaged_state_is_refused() -> None:
    """A mask with more bits than values would be read beyond them."""
    module = BitmaskLinear.from_linear(nn.Linear(70, 9).requires_grad_(False), "fp32")
    state = module.state_dict()
    state["ptr"] = state["ptr"] * 2
    with pytest.raises(RuntimeError, match="bitmask_validate: ptr"):
        module.load_state_dict(state)


def test_bad_choices() -> None:
    weight = BitmaskTensor.from_dense(sparse(4, 8))
    with pytest.raises(ValueError, match="compute: expected one of"):
        BitmaskLinear(4, 8, "int4")
    with pytest.raises(ValueError, match="compute: expected 'float' for values of 32 bits"):
        BitmaskLinear.from_weight(weight, compute="int8")
    with pytest.raises(ValueError, match=r"bias: expected floating point \[4\]"):
        BitmaskLinear.from_weight(weight, torch.ones(5))
