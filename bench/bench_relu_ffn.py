"""The cases of `python -m bench --op relu_ffn` as pytest-benchmark tests: `pytest bench/`, with storage and compare.

Outputs are checked first.
"""

from __future__ import annotations

import pytest
import torch

import effk
from bench import relu_table, table
from bench.relu_problem import DOWN, KINDS, LAYERS, Problem, Weights

PLAN = relu_table.Plan(layers=LAYERS[-1:], tiers=(effk.isa.active(),))
CASES = [(kind, entry) for kind in KINDS for entry in relu_table.entries(PLAN, kind)]


@pytest.mark.parametrize(("kind", "entry"), CASES, ids=str)
def test_layer(benchmark: object, kind: str, entry: relu_table.Entry) -> None:
    """Ours and the competitors at a tenth of the neurons."""
    with torch.inference_mode():
        what, _, rows = kind.partition(" ")
        problem = Problem(Weights(LAYERS[-1], rows, what == DOWN), relu_table.TOKENS.get(what, 1), 0.1)
        made = entry.function(problem, kind)
        if made is None:
            pytest.skip("no such call")
        match = made.match(made.call(0))
        table.repeat(benchmark, entry, f"{LAYERS[-1]} {kind}", made.call, match)
