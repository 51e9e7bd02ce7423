"""Plan entries that store integer grids: how a range mode becomes a format, and an edited format a range mode."""

from __future__ import annotations

from .plan import LayerPlan, Plan
from .solvers.rtn import ASYMMETRIC

_TWINS = {"mse": "mse_asym", "mse_asym": "mse", "asym": "sym_mid"}  # the mode of the other format; else "asym"


def format_of(mode: str) -> str:
    """The plan format of a range mode: "sym" or "asym"."""
    return "asym" if mode in ASYMMETRIC else "sym"


def mode_of(entry: LayerPlan) -> str:
    """The range mode for an entry: its own, or that mode's twin when the entry's format was edited to the other one."""
    mode = entry.options["mode"]
    return mode if format_of(mode) == entry.format else _TWINS.get(mode, "asym")


def check_affine(plan: Plan | None, method: str) -> None:
    """Refuse a plan with formats or options that integer grids do not have, before any work.

    Raises:
        ValueError: naming the layer.
    """
    for name, entry in plan.layers.items() if plan is not None else ():
        if entry.format not in ("sym", "asym"):
            raise ValueError(f"plan: {name}: format: expected 'sym' or 'asym' for {method}, got {entry.format!r}")
        if "mode" not in entry.options:
            raise ValueError(f"plan: {name}: options: expected a 'mode', got {dict(entry.options)}")
        if entry.scale_bytes != 2:
            raise ValueError(f"plan: {name}: scale_bytes: expected 2 for {method}, got {entry.scale_bytes}")
