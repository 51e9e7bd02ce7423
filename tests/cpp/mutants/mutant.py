"""What a planted bug is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    file: str  # below csrc
    old: str
    new: str
    unit: str  # file below csrc that is recompiled


def planter(op: str, folder: str) -> Callable[[str, str, str, str, str | None], Mutant]:
    """Bugs in the files of a folder; those in headers that tiers share are compiled into the portable one, the fastest to compile."""

    def plant(name: str, file: str, old: str, new: str, unit: str | None = None) -> Mutant:
        own = "scalar.cpp" if file.endswith(".h") else file
        return Mutant(f"{op}: {name}", f"{folder}/{file}", old, new, f"{folder}/{unit or own}")

    return plant
