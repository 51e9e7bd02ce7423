"""Packed weights that are loaded lie in large pages, with the bytes that packing gives them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from effk.formats.large_pages import PAGE, empty_like, moved, reserve
from effk.formats.neuron import from_stored, to_stored
from effk.nn import BitmaskLinear
from mappings import asks_for_large_pages


def in_large_pages(t: Tensor) -> bool:
    """Whether ``t`` begins with a page of a mapping that was advised so."""
    return asks_for_large_pages(t) and t.data_ptr() % PAGE == 0


@pytest.mark.parametrize(("rows", "group"), [("bf16", 0), ("int8", 0), ("int8", 32), ("int4", 32)])
def test_loaded_neuron_rows(rows: str, group: int) -> None:
    d = 1500  # not whole blocks of columns
    f = 12000  # scales of groups of 32: 2.3 MB
    packed, scales = torch.ops.effk.relu_ffn_pack(torch.randn(f, d), False, rows, group)
    again, again_scales = from_stored(to_stored(packed, scales, rows, d), rows, d)
    assert torch.equal(again, packed) and in_large_pages(packed) and in_large_pages(again)
    if group:
        assert torch.equal(again_scales, scales) and in_large_pages(again_scales)


def test_loaded_sparse_weights() -> None:
    linear = torch.nn.Linear(4096, 2048, bias=False)
    linear.weight.data[:, ::2] = 0
    layer = BitmaskLinear.from_linear(linear)
    other = copy.deepcopy(layer)
    other.values.zero_()
    assert not in_large_pages(other.values)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.values, layer.values) and in_large_pages(other.values)


def test_every_dtype_and_what_is_too_small() -> None:
    for dtype in (torch.uint8, torch.int8, torch.bfloat16, torch.uint16, torch.float32, torch.int64):
        t = torch.randint(0, 100, (3, PAGE // 2 + 5)).to(dtype)
        there = moved(t)
        assert there.dtype == dtype and there.shape == t.shape and torch.equal(there, t)
        assert empty_like(t.view(-1)).shape == (t.numel(),)
    small = torch.arange(10)
    assert moved(small) is small and moved(small[::2]).is_contiguous()
    assert empty_like(small).shape == (10,)


def test_memory_is_as_long_as_asked_and_writable() -> None:
    for nbytes in (1, PAGE - 1, PAGE, 3 * PAGE + 17):
        room = reserve(nbytes)
        assert room.shape == (nbytes,) and room.data_ptr() % PAGE == 0
        assert int(room.fill_(7).sum()) == 7 * nbytes
