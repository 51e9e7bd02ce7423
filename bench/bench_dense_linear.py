"""The cases of `python -m bench --op dense_linear` as pytest-benchmark tests: `pytest bench/`."""

from __future__ import annotations

import pytest

import effk
from bench import dyad_table
from bench.bench_dyad_linear import measure
from bench.dyad_problem import DENSE_KINDS, QUICK, Layer

PLAN = dyad_table.Plan(op="dense_linear", layers=QUICK, tiers=(effk.isa.active(),))
CASES = [(layer, kind, entry) for layer in QUICK for kind in DENSE_KINDS for entry in dyad_table.entries(PLAN, kind)]


@pytest.mark.parametrize(("layer", "kind", "entry"), CASES, ids=str)
def test_layer(benchmark: object, layer: Layer, kind: str, entry: dyad_table.Entry) -> None:
    """Ours and the competitors."""
    measure(benchmark, layer, kind, entry)
