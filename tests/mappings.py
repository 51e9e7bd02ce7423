"""What the system says of the memory that tensors lie in."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

SMAPS = Path("/proc/self/smaps")


def asks_for_large_pages(t: Tensor) -> bool:
    """Whether the mapping in which ``t`` begins was advised to be in large pages; whether there were any to give depends on
    the free memory."""
    if not SMAPS.exists() or "VmFlags" not in (maps := SMAPS.read_text()):
        pytest.skip("reads the flags of mappings from /proc")
    inside = False
    for line in maps.splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            low, high = (int(side, 16) for side in head.split("-"))
            inside = low <= t.data_ptr() < high
        elif inside and head == "VmFlags:":
            return "hg" in line.split()
    raise AssertionError("a tensor outside of all mappings")


def resident_in_large_pages() -> int:
    """Bytes of the process."""
    lines = SMAPS.read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("AnonHugePages:"))
