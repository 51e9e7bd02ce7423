"""The benchmark of relu_ffn: its oracle, its backends on a small size, a whole run, bars and the page."""

from __future__ import annotations

import pytest
import torch

import effk
from bench import relu_bars, relu_page, relu_problem, relu_table
from bench.relu_problem import DOWN, KINDS, Layer, Problem, Weights
from bench.report import Row
from bench.verdict import Verdict

SMALL, PLAIN = Layer(128, 96, True), Layer(64, 160, False)
PLAN = relu_table.Plan(layers=(SMALL,), tiers=(effk.isa.supported()[-1],), densities=(0.1, 0.5), wait_s=0.1, turns=1)


@pytest.fixture
def few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rotation of three copies instead of hundreds of so small a weight."""
    monkeypatch.setattr(relu_problem.machine, "copies", lambda nbytes: 3)


@pytest.mark.parametrize("layer", (SMALL, PLAIN), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_backend_gives_the_exact_results(kind: str, layer: Layer, few_copies: None) -> None:
    """And no result of another list, or of other columns, would pass."""
    with torch.inference_mode():
        what, _, rows = kind.partition(" ")
        problem, found = Problem(Weights(layer, rows, what == DOWN), relu_table.TOKENS.get(what, 1), 0.1), set()
        for entry in relu_table.entries(PLAN, kind):
            if (made := entry.function(problem, kind)) is None:
                continue
            y = made.call(0)
            assert made.match(y) <= 1, str(entry)
            assert made.match(made.call(1)) <= 1, str(entry)
            assert made.match(y.roll(1, 1)) > 1, f"{entry}: of other columns"
            if problem.tokens == 1:
                assert made.match(made.call(3)) > 1, f"{entry}: of another list"
            found.add(entry.name)
    assert {"effk relu_ffn", "effk relu_ffn dense"} <= found
    assert any(not name.startswith("effk") for name in found)


def test_lists_have_no_neuron_in_common() -> None:
    lists = relu_problem.disjoint(100, 0.33, torch.Generator().manual_seed(0))
    assert [len(part) for part in lists] == [33] * 3 and len(torch.cat(lists).unique()) == 99


def test_whole_run(few_copies: None) -> None:
    lines: list[str] = []
    result = relu_table.run(PLAN, lines.append)
    rows = [r for r in result.rows if r.op == "relu_ffn"]
    assert rows and all(r.us > 0 and r.roofline > 0 for r in rows)
    assert all(r.valid for r in rows), [r for r in rows if not r.valid]
    assert {r.kind for r in rows} == set(KINDS)
    assert {tuple(r.shape) for r in rows} == {("M", "d", "f", "density", "gated")}
    assert not any(line.startswith(("wrong", "missing")) for line in lines)
    sections = list(relu_page.sections(rows))
    assert len(sections) == 4
    for kind, _ in sections:
        made = list(relu_page.lines(rows, kind))
        assert made and all(len(line) == len(relu_page.HEADER) for line in made)


def row(
    backend: str, us: float, kind: str = "layer bf16", density: float = 0.1, m: int = 1, roofline: float = 0.9
) -> Row:
    shape = {"M": m, "d": 4096, "f": 11008, "density": density, "gated": 1}
    tier = "avx512vnni" if backend.startswith("effk") else "native"
    return Row("relu_ffn", kind, shape, kind.split()[1], tier, 1, backend, "1", us, 0.1, 1.0, 1.0, roofline, None, 0.5)


def found(rows: list[Row], name: str) -> Verdict:
    (verdict,) = [v for v in relu_bars.judge(rows, 1) if v.name == name]
    return verdict


def test_bars() -> None:
    rows = [
        row("effk relu_ffn", 10.0),
        row("effk relu_ffn dense", 24.0, roofline=0.88),
        row("torch F.linear bf16", 40.0),
        row("torch F.linear fp32", 30.0),
        row("effk relu_ffn", 20.0, density=0.5),
        row("effk relu_ffn dense", 24.0, density=0.5),
        row("effk relu_ffn", 5.0, "down bf16"),
        row("effk rows_axpy", 4.0, "down bf16"),
        row("torch embedding_bag", 5.0, "down bf16"),
        row("effk relu_ffn", 10.0, "batch int4", 0.3, 8),
        row("effk relu_ffn dense", 12.0, "batch int4", 0.3, 8),
    ]
    assert found(rows, "reading all, bf16 and int8: share of the read bandwidth").worst.value == 0.88
    model = found(rows, "skipping: time by the cost model / time")
    assert model.worst.value == pytest.approx(24 / 20 * 2 / 3) and model.outcome == "fail"
    assert found(rows, "skipping: x reading all, every density").worst.value == pytest.approx(1.2)
    assert found(rows, "skipping, gated, bf16, density 0.1: x reading all").outcome == "pass"
    assert found(rows, "skipping, gated, bf16, density 0.1: x torch's dense layers").worst.value == pytest.approx(3)
    assert found(rows, "skipping, gated, int8 and int4, density 0.1: x reading all").outcome == "open"
    assert found(rows, "8 tokens, union 0.3: x reading all").outcome == "fail"
    down = "rows of down, fp32 and bf16, list {}: x torch embedding_bag".format
    assert found(rows, down("given to both")).worst.value == pytest.approx(1.25)
    assert found(rows, down("found too")).worst.value == pytest.approx(1.0)
    assert list(relu_bars.judge([], 1)) == []
