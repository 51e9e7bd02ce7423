"""Rows of small integers as little-endian bit streams, the stored form of weight codes.

Code ``k`` of a row occupies bits ``k*b .. k*b + b-1`` of the row, low bits first. So a byte holds two 4-bit or four
2-bit codes, and eight 3-bit codes fill three bytes. The last byte of a row is padded with zero bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)


def row_bytes(k: int, bits: int) -> int:
    """Bytes of one packed row: ``ceil(k * bits / 8)``."""
    return (k * bits + 7) // 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack ``codes`` uint8 ``[N, K]``, each below ``2**bits``, to uint8 ``[N, ceil(K*bits/8)]``.

    Raises:
        ValueError: not uint8, not two-dimensional, unsupported bits, or a code out of range.
    """
    _check_bits("pack_codes", bits)
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise ValueError(f"pack_codes: codes: expected uint8 [N, K], got {codes.dtype} {list(codes.shape)}")
    if bits == 8:
        return codes.contiguous().clone()
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise ValueError(f"pack_codes: codes: expected values below {1 << bits}, got {int(codes.max())}")
    n, k = codes.shape
    per_word = 8 if bits == 3 else 8 // bits  # codes in the smallest whole number of bytes
    words = -(-k // per_word)
    if k != words * per_word:
        codes = torch.nn.functional.pad(codes, (0, words * per_word - k))
    c = codes.reshape(n, words, per_word).unbind(-1)
    if bits == 4:
        packed = c[0] | c[1] << 4
    elif bits == 2:
        packed = c[0] | c[1] << 2 | c[2] << 4 | c[3] << 6
    else:  # uint8 shifts drop what leaves the byte, which is what the straddling codes 2 and 5 need
        low = c[0] | c[1] << 3 | c[2] << 6
        mid = c[2] >> 2 | c[3] << 1 | c[4] << 4 | c[5] << 7
        high = c[5] >> 1 | c[6] << 2 | c[7] << 5
        packed = torch.stack((low, mid, high), dim=-1).reshape(n, 3 * words)
    return packed[:, : row_bytes(k, bits)].contiguous()


def unpack_codes(packed: Tensor, k: int, bits: int) -> Tensor:
    """Inverse of :func:`pack_codes`: uint8 ``[N, ceil(k*bits/8)]`` to codes uint8 ``[N, k]``.

    Raises:
        ValueError: not uint8, wrong width, or unsupported bits.
    """
    _check_bits("unpack_codes", bits)
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != row_bytes(k, bits):
        raise ValueError(
            f"unpack_codes: packed: expected uint8 [N, {row_bytes(k, bits)}] for k={k}, bits={bits}, "
            f"got {packed.dtype} {list(packed.shape)}"
        )
    n = packed.shape[0]
    if bits == 8:
        return packed.clone()
    if bits == 4:
        codes = torch.stack((packed & 15, packed >> 4), dim=-1)
    elif bits == 2:
        codes = torch.stack((packed & 3, packed >> 2 & 3, packed >> 4 & 3, packed >> 6), dim=-1)
    else:
        words = -(-k // 8)
        if packed.shape[1] != 3 * words:
            packed = torch.nn.functional.pad(packed, (0, 3 * words - packed.shape[1]))
        low, mid, high = packed.reshape(n, words, 3).unbind(-1)
        codes = torch.stack(
            (
                low & 7,
                low >> 3 & 7,
                low >> 6 | (mid & 1) << 2,
                mid >> 1 & 7,
                mid >> 4 & 7,
                mid >> 7 | (high & 3) << 1,
                high >> 2 & 7,
                high >> 5,
            ),
            dim=-1,
        )
    return codes.flatten(1)[:, :k].contiguous()


def _check_bits(op: str, bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"{op}: bits: expected one of {BITS}, got {bits!r}")
