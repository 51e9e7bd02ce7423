"""Packed weights lie side by side in large pages, whatever their size, and give their memory back."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mappings import SMAPS, asks_for_large_pages, resident_in_large_pages

LARGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
on_linux = pytest.mark.skipif(
    not SMAPS.exists() or not LARGE.exists() or "[never]" in LARGE.read_text(), reason="the system has no large pages"
)
SHARED = 8 << 20  # larger weights have memory of their own


def packed(rows: int, value: int) -> Tensor:
    """Neuron rows of ``1536 rows`` bytes, all ``value``."""
    return torch.ops.effk.relu_ffn_pack(torch.full((rows, 768), float(value)), False, "bf16", 0)[0]


@on_linux
def test_small_weights_share_large_pages() -> None:
    gc.collect()
    before = resident_in_large_pages()
    held = [packed(300, 1) for _ in range(80)]  # 460 KB each
    size = sum(w.numel() for w in held)
    assert all(asks_for_large_pages(w) for w in held)
    spans = sorted((w.data_ptr(), w.data_ptr() + w.numel()) for w in held)
    apart = [begin - end for (_, end), (begin, _) in itertools.pairwise(spans)]
    assert sum(gap < 64 for gap in apart) > 0.9 * len(apart), "one behind the other"
    assert resident_in_large_pages() - before < size + (4 << 20)
    del held
    assert resident_in_large_pages() - before < (4 << 20)


@on_linux
def test_what_is_freed_among_others_goes_back() -> None:
    gc.collect()
    before = resident_in_large_pages()
    held = [packed(3000, number) for number in range(24)]  # 4.6 MB each
    rest = held[::4]
    del held
    assert resident_in_large_pages() - before < sum(w.numel() for w in rest) + len(rest) * (4 << 20)
    assert all(bool((w.view(torch.bfloat16) == 4 * number).all()) for number, w in enumerate(rest))


def test_weights_do_not_meet() -> None:
    """Of all sizes, freed in between: each keeps its values, none shares a byte with another."""
    generator, held = torch.Generator().manual_seed(0), {}
    for number in range(200):
        rows = int(torch.randint(1, 4 * SHARED // 1536 if number % 20 == 0 else 900, (1,), generator=generator))
        held[number % 120] = (number, packed(rows, number))
        if number % 3 == 0:
            held.pop(int(torch.randint(120, (1,), generator=generator)), None)
    spans = sorted((w.data_ptr(), w.data_ptr() + w.numel()) for _, w in held.values())
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert all(w.data_ptr() % 64 == 0 and bool((w.view(torch.bfloat16) == n).all()) for n, w in held.values())
