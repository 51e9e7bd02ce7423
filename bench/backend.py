"""What the tables are made of: a backend, ours or a competitor, and the runner that it builds for one shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from .problem import Oracle, Problem, Rounding


class Runner:
    """One weight in enough copies to be cold, multiplied with the first m rows of the problem's x."""

    nbytes: int  # of one copy, everything its kernel reads for it: codes, scales, zero points, outliers
    oracle: Oracle
    products: int = 1  # how many copies one `call` multiplies with

    def bind(self, m: int) -> None:
        """Prepares for x[:m]."""
        raise NotImplementedError

    def activate(self) -> None:
        """Called before each series of calls, since backends take turns; not timed."""

    def call(self) -> None:
        """Multiplies x with the next `products` copies."""
        raise NotImplementedError

    def warm(self) -> Callable[[], None] | None:
        """A call that multiplies with one and the same copy, or None where there is no such call."""
        return None

    def outputs(self) -> list[tuple[int, Tensor]]:
        """(rows the weight was rolled by, y [m, n]) of the first and the last copy."""
        raise NotImplementedError


@dataclass(frozen=True)
class Backend:
    """A way to multiply with a weight of `bits` bits: its identity, its rounding and how to build its runner."""

    name: str
    version: str
    case: str  # form and settings
    bits: int  # class that it competes in; its true bits follow from nbytes
    group: int  # columns that share a scale, 0 = per row
    dtype: str  # of x
    rounding: Rounding
    build: Callable[[Problem], Runner]
    isa: str = "native"  # ours: the tier
    outliers: float = 0.0  # share of weights beside the codes


@dataclass(frozen=True)
class Missing:
    """A baseline that cannot run here, and why."""

    name: str
    reason: str


class CallRunner(Runner):
    """One Python call per product, rotating over copies."""

    def __init__(
        self,
        problem: Problem,
        oracle: Oracle,
        nbytes: int,
        copies: Sequence[object],
        call: Callable[[Tensor, object], Tensor],
        dtype: object,
    ) -> None:
        self.oracle, self.nbytes = oracle, nbytes
        self._x_all, self._copies, self._call, self._dtype = problem.x, copies, call, dtype
        self._next = 0

    def bind(self, m: int) -> None:
        self._x = self._x_all[:m].to(self._dtype).contiguous()

    def call(self) -> None:
        self._call(self._x, self._copies[self._next])
        self._next = (self._next + 1) % len(self._copies)

    def warm(self) -> Callable[[], None]:
        return lambda: self._call(self._x, self._copies[0])

    def outputs(self) -> list[tuple[int, Tensor]]:
        return [(0, self._call(self._x, copy)) for copy in (self._copies[0], self._copies[-1])]


def distinct(rows: np.ndarray, copy: int) -> np.ndarray:
    """A copy that no optimiser can merge with another: rows rolled down by `copy`, other bits after len(rows) copies.

    Runtimes share equal constants of a graph, and a shared weight is not cold. Only rolled copies can be checked.
    """
    rolled = np.roll(rows, copy, 0)
    return rolled ^ rolled.dtype.type(copy // len(rows)) if copy >= len(rows) else rolled


def checkable(rows: int, copies: int) -> tuple[int, int]:
    """The first copy that `distinct` makes, and the last that is only rolled."""
    return 0, min(rows, copies) - 1


@dataclass
class Field:
    """All backends for one shape."""

    backends: list[Backend] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
