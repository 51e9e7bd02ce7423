"""The quick cases of `python -m bench --op attention` as pytest-benchmark tests: `pytest bench/`."""

from __future__ import annotations

import pytest
import torch

import effk
from bench import attention_table, table
from bench.attention_problem import SMOLLM2, Problem

PLAN = attention_table.Plan(shapes=(SMOLLM2,), tiers=(effk.isa.active(),), contexts=(512,), prompts=(512,))
CASES = [(arguments, entry) for arguments in attention_table.problems(PLAN) for entry in attention_table.entries(PLAN)]


@pytest.mark.parametrize(("arguments", "entry"), CASES, ids=str)
def test_attention(benchmark: object, arguments: tuple, entry: attention_table.Entry) -> None:
    """Ours and the competitors; outputs are checked first."""
    with torch.inference_mode():
        problem = Problem(*arguments)
        made, stored = entry.function(problem, entry.dtype)
        match = problem.match(made.read(made.call(0)), made, stored)
        table.repeat(benchmark, entry, f"{problem.keys()}", made.call, match)
