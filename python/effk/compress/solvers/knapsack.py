"""Exact allocation: one choice per layer, least total score within a budget (a multiple-choice knapsack).

    minimise sum_i score[i][c_i]   subject to   sum_i cost[i][c_i] <= budget,   one choice c_i per item

is solved by dynamic programming over consumed cost in units of the greatest common divisor of all cost differences
(the integer program of Li et al., "LLM-MQ", 2023, equations 3-5; for 224 layers of LLaMA-2-7B at 2, 3 and 4 bits the
table has 224 x 12353 entries). True byte costs can have a small divisor; then the mixed-integer solver HiGHS takes over.

Among optimal allocations the one of least cost wins, then the cheapest choice for the earliest item.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_MAX_TABLE = 40_000_000  # entries of the backward pass (int16 choices: 80 MB); beyond, HiGHS is used
_MILP_GAP = 0.0


class Allocation(NamedTuple):
    """``choices[i]`` is the index chosen for item i; ``score`` and ``cost`` are the totals."""

    choices: list[int]
    score: float
    cost: int


class InfeasibleBudget(ValueError):
    """The budget is below the cheapest possible allocation; ``least`` is that one's cost."""

    def __init__(self, budget: int, least: int) -> None:
        super().__init__(f"allocate: budget: expected at least {least} (every item's cheapest choice), got {budget}")
        self.least = least


def allocate(
    scores: Sequence[Sequence[float]],
    costs: Sequence[Sequence[int]],
    budget: int,
    *,
    groups: Sequence[int | str] | None = None,
    solver: str = "auto",
) -> Allocation:
    """The optimal choice for every item.

    Args:
        scores: per item, the harm of each choice.
        costs: per item, the integer cost of each choice, same lengths.
        budget: the largest total cost.
        groups: per item a label; items with equal labels take the same choice index (their scores and costs add up).
        solver: "dp", "milp" or "auto" (dynamic programming while its table is small).

    Raises:
        InfeasibleBudget: even the cheapest choices cost more.
        ValueError: lengths differ, a score is not finite, a cost is not a non-negative integer, or grouped items have
            different numbers of choices.
    """
    _check(scores, costs, groups, solver)
    members = _members(groups, len(scores))
    merged_scores = [np.sum([np.asarray(scores[i], float) for i in m], axis=0) for m in members]
    merged_costs = [np.sum([np.asarray(costs[i], np.int64) for i in m], axis=0) for m in members]
    least = sum(int(c.min()) for c in merged_costs)
    if budget < least:
        raise InfeasibleBudget(budget, least)
    unit, units, room = _in_units(merged_costs, budget)
    if solver == "auto":
        solver = "dp" if (room + 1) * len(members) <= _MAX_TABLE else "milp"
    picked = _dynamic(merged_scores, units, room) if solver == "dp" else _milp(merged_scores, units, room)
    choices = [0] * len(scores)
    for group, choice in zip(members, picked, strict=True):
        for item in group:
            choices[item] = choice
    score = math.fsum(float(scores[i][c]) for i, c in enumerate(choices))
    return Allocation(choices, score, sum(int(costs[i][c]) for i, c in enumerate(choices)))


def _in_units(costs: list[np.ndarray], budget: int) -> tuple[int, list[np.ndarray], int]:
    """(unit, per-item costs above the cheapest in units, units left above the cheapest allocation)."""
    above = [c - c.min() for c in costs]
    unit = int(np.gcd.reduce(np.concatenate(above))) if above else 0
    room = (budget - sum(int(c.min()) for c in costs)) // unit if unit else 0
    scaled = [a // unit if unit else a for a in above]
    return unit, scaled, min(int(room), sum(int(a.max()) for a in scaled))


def _dynamic(scores: list[np.ndarray], units: list[np.ndarray], room: int) -> list[int]:
    """Best score of the items from i on for every remaining room, from the last item back; then a walk forward."""
    best = np.zeros(room + 1)
    table = []
    for score, unit in zip(reversed(scores), reversed(units), strict=True):
        value = np.full(room + 1, np.inf)
        choice = np.zeros(room + 1, np.int16)
        for c in np.lexsort((score, unit)):  # cheap choices first: they win ties
            if unit[c] > room:
                continue
            tried = best[: room + 1 - unit[c]] + score[c]
            better = tried < value[unit[c] :]
            value[unit[c] :][better] = tried[better]
            choice[unit[c] :][better] = c
        best = value
        table.append(choice)
    # Less room with an equal score means less cost: start from the smallest.
    left = int(np.flatnonzero(best == best[room])[0])
    picked = []
    for choice, unit in zip(reversed(table), units, strict=True):
        picked.append(int(choice[left]))
        left -= int(unit[picked[-1]])
    return picked


def _milp(scores: list[np.ndarray], units: list[np.ndarray], room: int) -> list[int]:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import block_diag, csr_array, vstack

    flat_scores, flat_units = np.concatenate(scores), np.concatenate(units)
    one_each = block_diag([np.ones((1, len(s))) for s in scores], format="csr")
    spread = float(np.ptp(flat_scores)) or 1.0
    constraints = LinearConstraint(
        vstack([one_each, csr_array(flat_units[None, :].astype(float))]),
        np.concatenate([np.ones(len(scores)), [0.0]]),
        np.concatenate([np.ones(len(scores)), [float(room)]]),
    )
    result = milp(
        flat_scores / spread,
        constraints=constraints,
        integrality=np.ones(len(flat_scores)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": _MILP_GAP},
    )
    if result.x is None:
        raise RuntimeError(f"allocate: HiGHS found no solution of a feasible problem: {result.message}")
    edges = np.cumsum([0, *(len(s) for s in scores)])
    return [int(np.argmax(result.x[a:b])) for a, b in zip(edges[:-1], edges[1:], strict=True)]


def _members(groups: Sequence[int | str] | None, items: int) -> list[list[int]]:
    if groups is None:
        return [[i] for i in range(items)]
    found: dict[int | str, list[int]] = {}
    for item, label in enumerate(groups):
        found.setdefault(label, []).append(item)
    return list(found.values())


def _check(scores, costs, groups, solver: str) -> None:
    if solver not in ("auto", "dp", "milp"):
        raise ValueError(f"allocate: solver: expected 'auto', 'dp' or 'milp', got {solver!r}")
    if len(scores) != len(costs) or (groups is not None and len(groups) != len(scores)):
        raise ValueError(
            f"allocate: expected scores, costs and groups of one length, got {len(scores)}, {len(costs)} and "
            f"{None if groups is None else len(groups)}"
        )
    for i, (score, cost) in enumerate(zip(scores, costs, strict=True)):
        if len(score) != len(cost) or len(score) == 0:
            raise ValueError(f"allocate: item {i}: expected as many scores as costs, got {len(score)} and {len(cost)}")
        if not np.isfinite(np.asarray(score, float)).all():
            raise ValueError(f"allocate: item {i}: expected finite scores, got {list(score)}")
        if any(int(c) != c or c < 0 for c in cost):
            raise ValueError(f"allocate: item {i}: expected non-negative integer costs, got {list(cost)}")
    for group in _members(groups, len(scores)):
        if len({len(scores[i]) for i in group}) > 1:
            raise ValueError(f"allocate: expected grouped items with equally many choices, got items {group}")
