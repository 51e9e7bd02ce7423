"""The benchmark of quik_linear: its oracle, its backends on a small size, a whole run, bars and the page."""

from __future__ import annotations

import math

import pytest
import torch

import effk
from bench import quik_bars, quik_page, quik_problem, quik_table
from bench.quik_problem import KINDS, LAYER, PRODUCT, Layer, Problem
from bench.report import Row
from bench.verdict import Verdict

SMALL = Layer(48, 96)
PLAN = quik_table.Plan(layers=(SMALL,), tiers=(effk.isa.supported()[-1],), rows=(2, 20), wait_s=0.1, turns=1)


@pytest.fixture
def few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rotation of three copies instead of hundreds of so small a weight."""
    monkeypatch.setattr(quik_problem.machine, "copies", lambda nbytes: 3)


@pytest.mark.parametrize("m", (2, 20))
@pytest.mark.parametrize("kind", KINDS)
def test_every_backend_gives_the_exact_results(kind: str, m: int, few_copies: None) -> None:
    """And no result of another layer would pass."""
    with torch.inference_mode():
        problem, found = Problem(SMALL, m), set()
        for entry in quik_table.entries(PLAN):
            if not entry.version or (made := entry.function(problem, kind, entry.bits, entry.outliers)) is None:
                continue
            y = made.read(made.call(0))
            assert made.match(y) <= 1, str(entry)
            assert made.match(made.read(made.call(1))) <= 1, str(entry)
            assert made.match(y.roll(1, 1)) > 1, f"{entry}: of other rows of the weight"
            found.add((entry.name, entry.bits, entry.outliers))
    ours = {
        ("effk quik_linear", bits, outliers)
        for bits in (4, 8)
        for outliers in (False, True)
        if kind == LAYER or not outliers
    }
    assert ours <= found
    if kind == LAYER or m > 16:  # torch._int_mm takes no fewer rows, and other products need packages that are optional
        assert any(not name.startswith("effk") for name, *_ in found)


def test_the_oracle_is_the_layer() -> None:
    problem = Problem(SMALL, 20)
    exact = problem.x.double() @ problem.w.double().T
    assert problem.match_dense(torch.float32)(exact) < 1e-6
    assert problem.match_dense(torch.float32, 127)(exact) < 1e-6
    sums = problem.codes.double() @ problem.int_weight(8).double().T
    assert problem.match_product(8)(sums.int()) == 0.0
    assert problem.match_product(8)(sums.int() + 1) == math.inf
    assert problem.match_product(8)(sums.float()) < 1 < problem.match_product(8)(sums.float() * 1.001)
    base = problem.base(8, True)
    assert base.weight.k == 96 - 24 and base.w_out.shape == (48, 24)
    kept = torch.cat((base.int_idx, base.fp_idx)).sort().values
    assert torch.equal(kept, torch.arange(96, dtype=torch.int32))


def test_whole_run(few_copies: None) -> None:
    lines: list[str] = []
    result = quik_table.run(PLAN, lines.append)
    rows = [r for r in result.rows if r.op == "quik_linear"]
    assert rows and all(r.us > 0 and r.roofline > 0 for r in rows)
    assert all(r.valid for r in rows), [r for r in rows if not r.valid]
    assert {r.kind for r in rows} == set(KINDS)
    assert {tuple(r.shape) for r in rows} == {("M", "N", "K", "bits_w", "bits_a", "outliers")}
    assert not any(line.startswith("wrong") for line in lines)
    for kind, _ in quik_page.sections(rows):
        for line in quik_page.lines(rows, kind):
            assert len(line) == len(quik_page.HEADERS[kind])


def row(
    backend: str, us: float, kind: str = LAYER, m: int = 512, bits: int = 8, outliers: int = 256, isa: str = "native"
) -> Row:
    shape = {"M": m, "N": 4096, "K": 4096, "bits_w": bits, "bits_a": 8, "outliers": outliers}
    tier = "avx512vnni" if backend.startswith("effk") else isa
    return Row("quik_linear", kind, shape, "bfloat16", tier, 1, backend, "1", us, 0.1, 1.0, 900.0, 0.9, None, 0.5)


def found(rows: list[Row], name: str) -> Verdict:
    (verdict,) = [v for v in quik_bars.judge(rows, 1) if v.name == name]
    return verdict


def test_bars() -> None:
    peak = Row("machine", "int8 peak", {}, "", "avx512vnni", 1, "cpu", "", None, None, None, 1000.0, None, None, None)
    rows = [
        peak,
        row("effk quik_linear", 10.0),
        row("effk quik_linear", 9.0, bits=4),
        row("effk separate operations", 12.0),
        row("effk separate operations", 18.0, bits=4),
        row("torch F.linear bf16", 20.0, outliers=0),
        row("torch F.linear fp32", 60.0, outliers=0),
        row("torch dynamic int8", 8.5, outliers=0),
        row("onnxruntime DynamicQuantizeMatMul", 9.5, outliers=0),
        row("effk quik_linear", 5.0, PRODUCT, outliers=0),
        row("effk quik_linear", 5.5, PRODUCT, bits=4, outliers=0),
        row("torch._int_mm", 5.2, PRODUCT, outliers=0),
        row("effk quik_linear", 3.0, m=4),
        row("effk wq_linear", 2.9, m=4),
    ]
    assert found(rows, "product: share of the measured VNNI peak").worst.value == 0.9
    assert found(rows, "product: x fastest competitor").worst.value == pytest.approx(5.2 / 5.5)
    assert found(rows, "product, M = 2048: x fastest competitor").outcome == "open"
    assert found(rows, "product of 4-bit weights: time of 8-bit ones / time").worst.value == pytest.approx(5 / 5.5)
    assert found(rows, "layer, M = 512: x torch F.linear bf16").worst.value == 2.0
    assert found(rows, "layer, M = 512: x torch F.linear fp32").outcome == "fail"
    assert found(rows, "layer: x the same steps as separate operations").worst.value == pytest.approx(1.2)
    assert found(rows, "layer: x dynamic int8 without outliers").worst.value == pytest.approx(0.85)
    few = found(rows, "layer, M <= 8: x wq_linear on the same weights")
    assert few.worst.value == pytest.approx(2.9 / 3) and "M=4 4096x4096 W8A8 + 256" in few.worst.where
    assert list(quik_bars.judge([peak], 1)) == []
