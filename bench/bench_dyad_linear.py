"""The cases of `python -m bench --op dyad_linear` as pytest-benchmark tests: `pytest bench/`, with storage and compare.

Outputs are checked first.
"""

from __future__ import annotations

import pytest
import torch

import effk
from bench import dyad_table, table
from bench.dyad_problem import KINDS, QUICK, TRAINING, Layer, Problem

TOKENS = 512
PLAN = dyad_table.Plan(layers=QUICK, tiers=(effk.isa.active(),))
CASES = [(layer, kind, entry) for layer in QUICK for kind in KINDS for entry in dyad_table.entries(PLAN, kind)]


def measure(benchmark: object, layer: Layer, kind: str, entry: dyad_table.Entry) -> None:
    """Checks one backend, then times it; inputs take turns."""
    with torch.inference_mode(not kind.startswith(TRAINING)):
        problem = Problem(layer, TOKENS, kind.rpartition(" ")[2])
        made = entry.function(problem, kind, entry.n, torch.get_num_threads()) if entry.version else None
        if made is None:
            pytest.skip("no such call, or not installed")
        match = problem.match(kind, entry.n, made.read(made.call(0)), made.rounds_parts)
        table.repeat(benchmark, entry, f"{layer} {kind}", made.call, match)


@pytest.mark.parametrize(("layer", "kind", "entry"), CASES, ids=str)
def test_layer(benchmark: object, layer: Layer, kind: str, entry: dyad_table.Entry) -> None:
    """Ours and the competitors."""
    measure(benchmark, layer, kind, entry)
