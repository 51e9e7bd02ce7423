"""The packed panels of dense_linear and dyad_linear are a promise to every kernel: header, order, padding, every byte."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from torch import Tensor

from effk import _C
from effk.ops import dense_linear as dl
from effk.ops import dyad_linear as dy

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
KINDS = ("dense", "it", "ot", "dt")


def header(packed: Tensor) -> tuple[int, ...]:
    """magic, version, kind, dtype, n, d_out, d_in: little endian, whatever the machine."""
    return struct.unpack("<IIiiqqq", packed[:40].numpy().tobytes())


def bits_of(w: Tensor) -> np.ndarray:
    return w.contiguous().view(torch.int32 if w.dtype == torch.float32 else torch.int16).numpy()


def panels(matrices: list[list[Tensor]]) -> bytes:
    """For each matrix, given as parts [columns, k]: tiles of 16 columns, k by k; bf16 in pairs of k; zeros as padding."""
    out = []
    for parts in matrices:
        columns, dtype = len(parts[0]), parts[0].dtype
        unit = 32 if dtype == torch.bfloat16 else 16
        padded = [torch.nn.functional.pad(p, (0, -p.shape[1] % unit, 0, -columns % 16)) for p in parts]
        whole = bits_of(torch.cat(padded, 1))
        for first in range(0, len(whole), 16):
            tile = whole[first : first + 16].T  # [k][16]
            if dtype == torch.bfloat16:
                tile = tile.reshape(-1, 2, 16).transpose(0, 2, 1)  # [k / 2][16][2]
            out.append(np.ascontiguousarray(tile).tobytes())
    return b"".join(out)


def weight(*shape: int, dtype: torch.dtype) -> Tensor:
    """Every entry another number, exact in every dtype."""
    return (torch.arange(1, int(np.prod(shape)) + 1).reshape(shape) % 251 - 125).to(dtype)


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("shape", ((1, 1), (16, 32), (18, 20), (37, 53), (5, 100)))
def test_dense_panels(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    w = weight(*shape, dtype=dtype)
    packed = dl.pack(w)
    assert header(packed) == (0x4C4E5045, 1, 0, list(NAMES).index(dtype), 1, *shape)
    assert packed[64:].numpy().tobytes() == panels([[w]])
    assert packed.numel() == _C.dense_packed_bytes(*shape, NAMES[dtype])


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("variant", dy.VARIANTS)
@pytest.mark.parametrize("shape", ((1, 1, 1), (2, 18, 20), (4, 16, 32), (3, 37, 21)))
def test_dyad_panels(dtype: torch.dtype, variant: str, shape: tuple[int, int, int]) -> None:
    """ "it": one matrix a block, both components one below the other; "ot", "dt": those of wl, then those of wu."""
    wl, wu = weight(*shape, dtype=dtype), weight(*shape, dtype=dtype).flip(0, 1, 2)
    packed = dy.pack(wl, wu, variant)
    assert header(packed) == (0x4C4E5045, 1, KINDS.index(variant), list(NAMES).index(dtype), *shape)
    matrices = [[a, b] for a, b in zip(wl, wu, strict=True)] if variant == "it" else [[w] for w in (*wl, *wu)]
    assert packed[64:].numpy().tobytes() == panels(matrices)
    assert packed.numel() == _C.dyad_packed_bytes(*shape, variant, NAMES[dtype])


def test_golden_bytes() -> None:
    """Some places written down: column 17 of the second block is lane 1 of its second tile."""
    wl, wu = torch.zeros(2, 18, 20), torch.zeros(2, 18, 20)
    wl[1, 17, 3], wu[0, 2, 19] = 1.0, -2.0
    for variant, dtype, places in (
        # fp32: a part has 32 rows of 64 bytes. "it": two parts a tile, two tiles a block.
        ("it", torch.float32, {2 * 4096 + 4096 + 3 * 64 + 4 + 2: 0x80, 2 * 4096 + 4096 + 3 * 64 + 4 + 3: 0x3F, (32 + 19) * 64 + 2 * 4 + 3: 0xC0}),
        ("dt", torch.float32, {3 * 2048 + 3 * 64 + 4 + 2: 0x80, 3 * 2048 + 3 * 64 + 4 + 3: 0x3F, 4 * 2048 + 19 * 64 + 2 * 4 + 3: 0xC0}),
        # bf16: pairs of rows, 64 bytes a pair, a lane's two values side by side.
        ("it", torch.bfloat16, {3 * 2048 + 1 * 64 + 4 + 2: 0x80, 3 * 2048 + 1 * 64 + 4 + 3: 0x3F, 16 * 64 + 9 * 64 + 2 * 4 + 3: 0xC0}),
    ):  # fmt: skip
        body = dy.pack(wl, wu, variant, dtype)[64:]
        at = {int(i): int(body[i]) for i in body.nonzero().flatten()}
        assert at == places, (variant, dtype)
