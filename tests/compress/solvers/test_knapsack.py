"""The exact allocation against brute force and against a mixed-integer solver."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from effk.compress.solvers.knapsack import Allocation, InfeasibleBudget, allocate

LLAMA_7B = [4096 * 4096] * 4 + [4096 * 11008] * 3  # weights of one block's linear layers


def brute_force(scores: np.ndarray, costs: np.ndarray, budget: int) -> tuple[float, int] | None:
    """Least (score, cost) over all choices within the budget."""
    best = None
    for choice in itertools.product(range(scores.shape[1]), repeat=len(scores)):
        cost = int(costs[np.arange(len(costs)), choice].sum())
        score = float(scores[np.arange(len(scores)), choice].sum())
        if cost <= budget and (best is None or (round(score, 9), cost) < (round(best[0], 9), best[1])):
            best = (score, cost)
    return best


@pytest.mark.parametrize("solver", ["dp", "milp"])
@pytest.mark.parametrize("seed", range(25))
def test_equals_brute_force(solver: str, seed: int) -> None:
    generator = np.random.default_rng(seed)
    items, unit = int(generator.integers(1, 9 if seed % 5 == 0 else 7)), (1, 4, 16)[seed % 3]
    scores = generator.random((items, 3)).round(1 if seed % 2 else 6)  # one decimal makes ties
    costs = generator.integers(1, 20, (items, 3)) * unit
    budget = int(costs.sum() * generator.random())
    expected = brute_force(scores, costs, budget)
    if expected is None:
        with pytest.raises(InfeasibleBudget):
            allocate(scores, costs, budget, solver=solver)
        return
    found = allocate(scores, costs, budget, solver=solver)
    assert found.score == pytest.approx(expected[0], abs=1e-9)
    assert found.cost <= budget
    if solver == "dp":
        assert found.cost == expected[1], "among optimal allocations the cheapest"


@pytest.mark.parametrize("average", [2.0, 2.4, 3.2, 4.0])
def test_equals_milp_on_224_layers(average: float) -> None:
    generator = np.random.default_rng(7)
    sizes = LLAMA_7B * 32
    scores = [[9 * x, 3 * x * generator.random(), x] for x in generator.random(len(sizes))]
    costs = [[size * bits // 8 for bits in (2, 3, 4)] for size in sizes]
    budget = int(average * sum(sizes) / 8)
    exact = allocate(scores, costs, budget, solver="dp")
    assert exact.cost <= budget
    # The MILP solver may keep a solution within its own integrality and gap tolerances (1e-6 relative).
    reference = allocate(scores, costs, budget, solver="milp")
    assert exact.score <= reference.score + 1e-9
    assert exact.score == pytest.approx(reference.score, rel=1e-6)


def test_ends_of_the_range_are_uniform() -> None:
    sizes = LLAMA_7B * 4
    scores = [[3.0, 2.0, 1.0]] * len(sizes)
    costs = [[size * bits for bits in (2, 3, 4)] for size in sizes]
    assert allocate(scores, costs, 2 * sum(sizes)).choices == [0] * len(sizes)
    assert allocate(scores, costs, 4 * sum(sizes)).choices == [2] * len(sizes)


def test_objective_never_rises_with_the_budget() -> None:
    generator = np.random.default_rng(3)
    scores = np.sort(generator.random((30, 3)))[:, ::-1]
    costs = [[2 * s, 3 * s, 4 * s] for s in generator.integers(1, 9, 30)]
    budgets = range(sum(c[0] for c in costs), sum(c[2] for c in costs) + 1)
    totals = [allocate(scores, costs, budget).score for budget in budgets]
    assert all(later <= earlier for earlier, later in itertools.pairwise(totals))


def test_ties_take_less_memory_then_the_earlier_layer_gives_way() -> None:
    assert allocate([[1.0, 1.0, 1.0]] * 3, [[2, 3, 4]] * 3, 12).choices == [0, 0, 0]
    assert allocate([[1.0, 0.0]] * 2, [[1, 2]] * 2, 3).choices == [0, 1]


def test_grouped_items_share_their_choice() -> None:
    generator = np.random.default_rng(5)
    scores, costs = generator.random((6, 3)), generator.integers(1, 9, (6, 3))
    groups = ["a", "b", "a", "c", "b", "a"]
    for budget in (25, 30, 40):
        try:
            found = allocate(scores, costs, budget, groups=groups)
        except InfeasibleBudget as error:
            assert error.least > budget
            continue
        assert len({(g, c) for g, c in zip(groups, found.choices, strict=True)}) == 3
        merged = [(np.array(scores)[idx].sum(0), np.array(costs)[idx].sum(0)) for idx in ([0, 2, 5], [1, 4], [3])]
        expected = brute_force(np.array([m[0] for m in merged]), np.array([m[1] for m in merged]), budget)
        assert found.score == pytest.approx(expected[0], abs=1e-9)


def test_infeasible_names_the_least_budget() -> None:
    with pytest.raises(InfeasibleBudget, match="expected at least 5 .* got 4") as caught:
        allocate([[1.0, 0.0]] * 2, [[2, 4], [3, 5]], 4)
    assert caught.value.least == 5


def test_true_byte_costs_fall_back_to_milp() -> None:
    """Costs without a common divisor make the table too large; the answer must not change."""
    generator = np.random.default_rng(11)
    costs = (generator.random((40, 3)) * 1e7).astype(int) + np.array([10_000_000, 20_000_000, 30_000_000])
    scores = np.sort(generator.random((40, 3)))[:, ::-1]
    budget = int(costs[:, 1].sum())
    found = allocate(scores, costs, budget)
    assert found == allocate(scores, costs, budget, solver="milp")
    assert found.cost <= budget


def test_no_items() -> None:
    assert allocate([], [], 0) == Allocation([], 0.0, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1.0]], [], 1), "of one length"),
        (([[1.0, 2.0]], [[1]], 1), "as many scores as costs"),
        (([[]], [[]], 1), "as many scores as costs"),
        (([[float("nan")]], [[1]], 1), "finite scores"),
        (([[1.0]], [[-1]], 1), "non-negative integer costs"),
        (([[1.0]], [[1.5]], 1), "non-negative integer costs"),
    ],
)
def test_bad_arguments(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        allocate(*arguments)
    with pytest.raises(ValueError, match="solver: expected"):
        allocate([[1.0]], [[1]], 1, solver="simplex")
