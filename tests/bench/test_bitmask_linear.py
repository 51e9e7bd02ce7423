"""The benchmark of bitmask_linear: its oracle, its backends on a small size, a whole run, bars."""

from __future__ import annotations

import pytest
import torch

import effk
from bench import bitmask_bars, bitmask_table
from bench import bitmask_linear as problem
from bench.bitmask_linear import Layer, Problem
from bench.report import Row
from bench.verdict import Verdict

SMALL = Layer(48, 256)
PLAN = bitmask_table.Plan(layers=(SMALL,), tiers=(effk.isa.supported()[-1],), rows=(1, 20), wait_s=0.1, turns=1)


@pytest.fixture
def few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rotation of three copies instead of hundreds of so small a weight."""
    monkeypatch.setattr(problem.machine, "copies", lambda nbytes: 3)


@pytest.mark.parametrize("m", (1, 20))
def test_every_backend_gives_the_exact_results(m: int, few_copies: None) -> None:
    """And no result of another row of the weight would pass."""
    with torch.inference_mode():
        p = Problem(SMALL, m)
        for entry in bitmask_table.entries(PLAN):
            made = entry.function(p)
            y = made.call(0)
            assert made.match(y) <= 1 and made.match(made.call(1)) <= 1, str(entry)
            assert made.match(y.roll(1, 1)) > 1, str(entry)


def test_whole_run(few_copies: None) -> None:
    with torch.inference_mode():
        result = bitmask_table.run(PLAN, lambda line: None)
    rows = [r for r in result.rows if r.op == "bitmask_linear"]
    assert rows and all(r.us > 0 and r.roofline > 0 and r.match <= 1 for r in rows)
    assert {r.shape["sparsity"] for r in rows} == {0.0, 0.5, 0.75}
    verdicts = list(bitmask_bars.judge([*rows], 1))
    assert all(v.findings for v in verdicts if "M = 1" in v.name)


def row(backend: str, us: float, bits: int, sparsity: float, case: str = "int8") -> Row:
    shape = {"M": 1, "N": 48, "K": 256, "bits": bits, "sparsity": sparsity}
    return Row("bitmask_linear", case, shape, "int8", "avx2", 1, backend, "1", us, 0.0, 1.0, 1.0, 0.5, None, 0.1)


def test_bars_take_the_faster_dense_weight() -> None:
    rows = [
        row(problem.NAME, 10.0, 8, 0.75), row(problem.WQ, 14.0, 4, 0.0, "int8, one scale a row"),
        row(problem.WQ, 12.5, 4, 0.0, "int8, groups of 128"), row(problem.NAME, 20.0, 8, 0.5), row(problem.WQ, 32.0, 8, 0.0),
    ]  # fmt: skip
    found: dict[str, Verdict] = {v.name: v for v in bitmask_bars.judge(rows, 1)}
    four, eight = (
        found["int8, 75% zeros, M = 1: x wq_linear of 4 bits"],
        found["int8, 50% zeros, M = 1: x wq_linear of 8 bits"],
    )
    assert four.worst.value == 1.25 and four.outcome == "fail"
    assert eight.worst.value == 1.6 and eight.outcome == "pass"
