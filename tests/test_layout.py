"""The packed layout t16 is a promise to every kernel: its bytes are written down here, and its geometry is data."""

from __future__ import annotations

import hashlib

import pytest
import torch

from effk import _C
from effk.formats.wq import WqWeight
from effk.ops import wq_linear as wq
from wq_cases import BITS, random_weight


def weight_of(codes: torch.Tensor, bits: int, group_size: int = 32) -> WqWeight:
    groups = -(-codes.shape[1] // group_size)
    scales = torch.arange(1, codes.shape[0] * groups + 1).reshape(-1, groups).half()
    return WqWeight.from_codes(codes, scales, bits=bits, group_size=group_size)


def nonzero_bytes(packed: torch.Tensor) -> dict[int, int]:
    flat = packed.flatten()
    return {int(i): int(flat[i]) for i in flat.nonzero().flatten()}


def test_golden_bytes_8_bits() -> None:
    """Chunk = 4 columns; byte row * 4 + column. Rows 1 and 17, the second in the second tile of 2 chunks."""
    codes = torch.zeros(18, 6, dtype=torch.uint8)
    codes[1] = torch.tensor([0xA0, 0xA1, 0xA2, 0xA3, 0xA4, 0xA5])
    codes[17, 5] = 0x77
    packed = wq.pack(weight_of(codes, 8)).packed
    assert list(packed.shape) == [2, 2, 64]
    assert nonzero_bytes(packed) == {
        4: 0xA0, 5: 0xA1, 6: 0xA2, 7: 0xA3,  # first chunk of the first tile
        64 + 4: 0xA4, 64 + 5: 0xA5,          # second chunk
        2 * 64 + 64 + 5: 0x77,               # second tile, second chunk, row 1 of the tile, column 1 of the chunk
    }  # fmt: skip


def test_golden_bytes_4_bits() -> None:
    """Chunk = 8 columns; columns 0-3 in the low nibbles, 4-7 in the high ones."""
    codes = torch.zeros(16, 9, dtype=torch.uint8)
    codes[2] = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 9])
    packed = wq.pack(weight_of(codes, 4)).packed
    assert list(packed.shape) == [1, 2, 64]
    assert nonzero_bytes(packed) == {8: 0x51, 9: 0x62, 10: 0x73, 11: 0x84, 64 + 8: 0x09}


def test_golden_bytes_2_bits() -> None:
    """Chunk = 16 columns; column 4f + c in bits 2f and 2f + 1 of byte c of the row."""
    codes = torch.zeros(16, 17, dtype=torch.uint8)
    codes[3] = torch.tensor([1, 2, 3, 0, 2, 2, 2, 2, 3, 3, 3, 3, 0, 0, 0, 1, 3])
    packed = wq.pack(weight_of(codes, 2)).packed
    assert list(packed.shape) == [1, 2, 64]
    assert nonzero_bytes(packed) == {
        12: 0b00_11_10_01, 13: 0b00_11_10_10, 14: 0b00_11_10_11, 15: 0b01_11_10_00, 64 + 12: 0b11,
    }  # fmt: skip


def test_golden_bytes_3_bits() -> None:
    """Chunk = 32 columns in three units: low bits of columns 0-15, of 16-31, and the high bit of 4f + c in bit f."""
    codes = torch.zeros(16, 32, dtype=torch.uint8)
    codes[0, 0], codes[0, 4], codes[0, 16], codes[0, 31] = 0b101, 0b110, 0b011, 0b111
    packed = wq.pack(weight_of(codes, 3)).packed
    assert list(packed.shape) == [1, 1, 192]
    assert nonzero_bytes(packed) == {
        0: 0b10_01, 64: 0b11, 64 + 3: 0b11_00_00_00, 128: 0b0000_0011, 128 + 3: 0b1000_0000,
    }  # fmt: skip


def test_golden_scales_and_zeros() -> None:
    """[tile][group][row]; rows of the last tile beyond the weight are zero."""
    weight = weight_of(torch.zeros(18, 40, dtype=torch.uint8), 4)
    zeros = torch.arange(36, dtype=torch.uint8).reshape(18, 2) % 16
    weight = WqWeight.from_codes(weight.codes(), weight.scales, bits=4, group_size=32, zeros=zeros)
    packed = wq.pack(weight)
    assert packed.scales.shape == packed.zeros.shape == (2, 2, 16)
    assert packed.scales[0, 0].tolist() == [float(v) for v in range(1, 33, 2)]
    assert packed.scales[0, 1].tolist() == [float(v) for v in range(2, 33, 2)]
    assert packed.scales[1, 1].tolist() == [34.0, 36.0] + [0.0] * 14
    assert packed.zeros[1, 1].tolist() == [1, 3] + [0] * 14


def test_golden_codebook() -> None:
    """[tile][code][row] for one table a row; as it is when shared."""
    codes, scales = torch.zeros(17, 32, dtype=torch.uint8), torch.ones(17, 1)
    tables = torch.arange(17 * 4).float().reshape(17, 4)
    own = wq.pack(WqWeight.from_codes(codes, scales, bits=2, group_size=32, codebook=tables)).codebook
    assert own.shape == (2, 4, 16)
    assert own[0, 3].tolist() == [4.0 * row + 3 for row in range(16)]
    assert own[1, 2].tolist() == [66.0] + [0.0] * 15
    shared = wq.pack(WqWeight.from_codes(codes, scales, bits=2, group_size=32, codebook=tables[1])).codebook
    assert shared.tolist() == [4.0, 5.0, 6.0, 7.0]


# SHA-256 of the packed bytes of a 37 x 203 weight whose code at flat index i is (i * 2654435761 >> 24) mod 2**bits.
GOLDEN = {
    2: "6f11263673a5509a6f3861b00dabba4cb9b3f63a5a5b92848e2e173f3f60f9c9",
    3: "37938316a880f577cf8b989ebdc6b9b87539a3bcf3714d19754c5339cbcdd72e",
    4: "11ea30bf6fb54313ed58899f01175089517167554bed1a057326cdef9595a76d",
    8: "c0789a59883035c0ab1245910b4a1d5a5943f062ebbffacd286a83247d464bc3",
}


@pytest.mark.parametrize("bits", BITS)
def test_golden_hash(bits: int) -> None:
    index = torch.arange(37 * 203, dtype=torch.int64)
    codes = ((index * 2654435761 >> 24) % (1 << bits)).to(torch.uint8).reshape(37, 203)
    packed = wq.pack(weight_of(codes, bits)).packed
    assert hashlib.sha256(packed.numpy().tobytes()).hexdigest() == GOLDEN[bits]


@pytest.mark.parametrize("bits", BITS)
def test_tile_map_describes_the_bytes(bits: int) -> None:
    """Packing in Python from the exported map gives the library's bytes, and no two codes share a bit."""
    n, k = 35, 70
    weight = random_weight(n, k, bits, 32)
    packed = wq.pack(weight).packed
    rebuilt, used = bytearray(packed.numel()), bytearray(packed.numel())
    low_bits = 2 if bits == 3 else bits
    for code, (byte, shift, high_byte, high_shift) in zip(
        weight.codes().flatten().tolist(), _C.tile_map(n, k, bits), strict=True
    ):
        low_mask = ((1 << low_bits) - 1) << shift
        assert not used[byte] & low_mask
        used[byte] |= low_mask
        rebuilt[byte] |= (code << shift) & low_mask
        assert (high_byte == -1) == (bits != 3)
        if bits == 3:
            assert not used[high_byte] & (1 << high_shift)
            used[high_byte] |= 1 << high_shift
            rebuilt[high_byte] |= (code >> 2) << high_shift
    assert bytes(rebuilt) == packed.numpy().tobytes()


@pytest.mark.parametrize("bits", BITS)
def test_cut_by_rows_is_a_view(bits: int) -> None:
    """Tiles [1, 3) of every packed array are the packed rows [16, 48)."""
    weight = random_weight(60, 130, bits, 64, "asymmetric" if bits == 8 else "row_tables")
    whole, part = wq.pack(weight), wq.pack(weight.rows(16, 48))
    for name in ("packed", "scales", "zeros", "codebook"):
        a, b = getattr(whole, name), getattr(part, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.equal(a[1:3], b)


@pytest.mark.parametrize("bits", BITS)
def test_cut_by_groups_is_a_slice(bits: int) -> None:
    """K can be cut at multiples of one group: chunks of columns [64, 128) are those of a weight of these columns."""
    weight = random_weight(33, 192, bits, 64)
    columns = WqWeight.from_codes(weight.codes()[:, 64:128], weight.scales[:, 1:2], bits=bits, group_size=64)
    chunks = 64 // (32 if bits == 3 else 32 // bits)
    assert torch.equal(wq.pack(weight).packed[:, chunks : 2 * chunks], wq.pack(columns).packed)
    assert torch.equal(wq.pack(weight).scales[:, 1:2], wq.pack(columns).scales)


@pytest.mark.parametrize(("n", "k", "bits"), ((-1, 4, 4), (4, 0, 4), (4, 4, 5)))
def test_tile_map_refuses(n: int, k: int, bits: int) -> None:
    with pytest.raises(ValueError, match="^tile_map: n, k, bits: expected"):
        _C.tile_map(n, k, bits)
