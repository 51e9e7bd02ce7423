"""A speed bar and what was found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One bar at one row: the figure, and where it was found."""

    value: float
    where: str


@dataclass(frozen=True)
class Verdict:
    """A bar over all its rows."""

    name: str
    threads: int
    least: float
    findings: tuple[Finding, ...]
    op: str = "wq_linear"
    information: bool = False  # said beside the bars, not counted among them

    @property
    def worst(self) -> Finding | None:
        """The lowest figure."""
        return min(self.findings, key=lambda f: f.value, default=None)

    @property
    def outcome(self) -> str:
        """ "pass", "fail", or "open" when there are no rows for it."""
        if self.worst is None:
            return "open"
        return "pass" if self.worst.value >= self.least else "fail"
