"""The cases of `python -m bench --op quik_linear` as pytest-benchmark tests: `pytest bench/`, with storage and compare.

Outputs are checked first.
"""

from __future__ import annotations

import pytest
import torch

import effk
from bench import quik_table, table
from bench.quik_problem import KINDS, LAYERS, Problem

PLAN = quik_table.Plan(layers=LAYERS[:1], tiers=(effk.isa.active(),))
CASES = [(m, kind, entry) for m in (8, 128) for kind in KINDS for entry in quik_table.entries(PLAN)]


@pytest.mark.parametrize(("m", "kind", "entry"), CASES, ids=str)
def test_layer(benchmark: object, m: int, kind: str, entry: quik_table.Entry) -> None:
    """Ours and the competitors."""
    with torch.inference_mode():
        problem = Problem(LAYERS[0], m)
        made = entry.function(problem, kind, entry.bits, entry.outliers) if entry.version else None
        if made is None:
            pytest.skip("no such call, or not installed")
        match = made.match(made.read(made.call(0)))
        table.repeat(benchmark, entry, f"{LAYERS[0]} M={m} {kind}", made.call, match)
