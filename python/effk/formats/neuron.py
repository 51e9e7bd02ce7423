"""Stored form of neuron rows (``csrc/formats/neuron.h`` has the packed one): what files hold, whatever the kernels
read.

Rows in floating point are stored as the plain matrix ``[f, d]``. Quantised ones are codes and scales, ``w = code *
scale``: int8 ``[f, d]``, or two 4-bit codes plus 8 a byte ``[f, ceil(d / 2)]``, the first column in the low bits;
scales fp32 ``[f, groups]``. Codes to packed rows and back is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.relu_ffn import ROWS, groups
from . import large_pages

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GROUPS = (0, 32, 64, 128)


def check_rows(who: str, rows: str, group: int) -> None:
    """Raise ``ValueError`` for a kind of rows or a group that does not exist."""
    if rows not in ROWS:
        raise ValueError(f"{who}: rows: expected one of {ROWS}, got {rows!r}")
    if type(group) is not int or group not in (GROUPS if rows in ("int8", "int4") else (0,)):
        legal = GROUPS if rows in ("int8", "int4") else "0 for rows in floating point"
        raise ValueError(f"{who}: group: expected {legal}, got {group!r}")


def stored_shapes(rows: str, group: int, f: int, d: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> shape and dtype of what a file holds of one matrix: "weight", or "codes" and "scales"."""
    if rows in DTYPES:
        return {"weight": ((f, d), DTYPES[rows])}
    codes = ((f, d), torch.int8) if rows == "int8" else ((f, -(-d // 2)), torch.uint8)
    return {"codes": codes, "scales": ((f, groups(d, group)), torch.float32)}


def stored_bytes(rows: str, group: int, f: int, d: int) -> int:
    """Bytes of :func:`stored_shapes`."""
    return sum(shape[0] * shape[1] * dtype.itemsize for shape, dtype in stored_shapes(rows, group, f, d).values())


def to_stored(packed: Tensor, scales: Tensor | None, rows: str, d: int) -> dict[str, Tensor]:
    """The stored form of packed rows uint8 ``[f, row bytes]``."""
    if rows in DTYPES:
        return {"weight": packed.view(DTYPES[rows])[:, :d].contiguous()}
    if rows == "int8":
        return {"codes": packed.view(torch.int8)[:, :d].contiguous(), "scales": scales.clone()}
    shifts = 4 * torch.arange(8, dtype=torch.int32)
    words = packed.view(torch.int32).reshape(len(packed), -1, 1, 16)
    nibbles = ((words >> shifts[:, None]) & 15).flatten(1)[:, :d].to(torch.uint8)
    nibbles = torch.nn.functional.pad(nibbles, (0, d % 2), value=8)
    return {"codes": nibbles[:, ::2] | nibbles[:, 1::2] << 4, "scales": scales.clone()}


def from_stored(stored: dict[str, Tensor], rows: str, d: int) -> tuple[Tensor, Tensor | None]:
    """Packed rows and scales, in large pages as ``relu_ffn_pack`` would make them; inverse of :func:`to_stored`.

    Raises:
        ValueError: values that are not finite.
    """
    for name in ("weight", "scales"):
        if name in stored and not bool(stored[name].isfinite().all()):
            raise ValueError(f"{name}: expected finite values, got NaN or Inf")
    if rows in DTYPES:
        return torch.ops.effk.relu_ffn_pack(stored["weight"].contiguous(), False, rows, 0)[0], None
    codes, scales = stored["codes"], large_pages.moved(stored["scales"])
    if rows == "int8":
        return large_pages.moved(torch.nn.functional.pad(codes, (0, -d % 64)).view(torch.uint8)), scales
    nibbles = torch.stack([codes & 15, codes >> 4], -1).flatten(1)[:, :d].to(torch.int32)
    nibbles = torch.nn.functional.pad(nibbles, (0, -d % 128), value=8).reshape(len(codes), -1, 8, 16)
    words = (nibbles << (4 * torch.arange(8, dtype=torch.int32))[:, None]).sum(2, dtype=torch.int32)
    return large_pages.moved(words.flatten(1).view(torch.uint8)), scales
