"""The stored bit stream: golden bytes, every byte, and round trips at odd widths."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effk.formats.bitstream import BITS, pack_codes, row_bytes, unpack_codes

# Written by hand from the definition "code k occupies bits k*b .. k*b+b-1, low bits first": a format that moves these
# bytes cannot read older files.
GOLDEN = {
    2: ([0, 1, 2, 3, 3, 2], [0b11_10_01_00, 0b00_00_10_11]),
    3: ([0, 1, 2, 3, 4, 5, 6, 7, 7], [0b10_001_000, 0b1_100_011_0, 0b111_110_10, 0b00000_111]),
    4: ([0x1, 0xA, 0xF], [0xA1, 0x0F]),
    8: ([0, 127, 255], [0, 127, 255]),
}


@pytest.mark.parametrize("bits", BITS)
def test_golden_bytes(bits: int) -> None:
    codes, packed = GOLDEN[bits]
    codes, packed = torch.tensor([codes], dtype=torch.uint8), torch.tensor([packed], dtype=torch.uint8)
    assert torch.equal(pack_codes(codes, bits), packed)
    assert torch.equal(unpack_codes(packed, codes.shape[1], bits), codes)


@pytest.mark.parametrize("bits", [2, 4])
def test_every_byte(bits: int) -> None:
    packed = torch.arange(256, dtype=torch.uint8).reshape(-1, 1)
    codes = unpack_codes(packed, 8 // bits, bits)
    for byte in range(256):
        assert codes[byte].tolist() == [byte >> bits * i & (1 << bits) - 1 for i in range(8 // bits)]
    assert torch.equal(pack_codes(codes, bits), packed)


def test_sampled_three_byte_words() -> None:
    """Every 17th of the 2**24 words (17 is coprime to all byte boundaries), against integer shifts."""
    words = torch.arange(0, 1 << 24, 17)
    packed = torch.stack([words >> shift & 255 for shift in (0, 8, 16)], dim=1).to(torch.uint8)
    codes = unpack_codes(packed, 8, 3)
    expected = torch.stack([words >> 3 * i & 7 for i in range(8)], dim=1).to(torch.uint8)
    assert torch.equal(codes, expected)
    assert torch.equal(pack_codes(codes, 3), packed)


@given(
    bits=st.sampled_from(BITS),
    n=st.integers(0, 5),
    k=st.integers(1, 100),
    seed=st.integers(0, 2**16),
    top=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_round_trip(bits: int, n: int, k: int, seed: int, top: bool) -> None:
    low = (1 << bits) - 1 if top else 0
    codes = torch.randint(low, 1 << bits, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack_codes(codes, bits)
    assert packed.shape == (n, row_bytes(k, bits))
    assert torch.equal(unpack_codes(packed, k, bits), codes)
    padding = row_bytes(k, bits) * 8 - k * bits
    if n and padding:
        assert int(packed[:, -1].max()) >> (8 - padding) == 0, "padding bits must be zero"


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="codes: expected values below 4, got 4"):
        pack_codes(torch.tensor([[4]], dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match=r"codes: expected uint8 \[N, K\], got torch.int64"):
        pack_codes(torch.zeros(2, 2, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="bits: expected one of"):
        pack_codes(torch.zeros(2, 2, dtype=torch.uint8), 5)
    with pytest.raises(ValueError, match=r"packed: expected uint8 \[N, 3\]"):
        unpack_codes(torch.zeros(2, 4, dtype=torch.uint8), 8, 3)
