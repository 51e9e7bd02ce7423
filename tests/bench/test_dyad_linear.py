"""The benchmark of dense and DYAD layers: its oracle, its backends on a small size, a whole run, and bars."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import effk
from bench import dyad_bars, dyad_page, dyad_problem, dyad_table
from bench.baselines import torch_dense
from bench.dyad_problem import DENSE_KINDS, FF, FORWARD, KINDS, TRAINING, Layer, Problem, flops, weight_bytes
from bench.report import Row, set_vs_best, shape_name
from bench.verdict import Verdict

LAYER = Layer(64, 96)
PLAN = dyad_table.Plan(layers=(LAYER,), tiers=(effk.isa.supported()[-1],), tokens=(1, 20), wait_s=0.1, turns=1)


@pytest.fixture
def few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rotation of three copies instead of hundreds of so small a weight."""
    monkeypatch.setattr(dyad_problem.machine, "copies", lambda nbytes: 3)


@pytest.mark.parametrize("tokens", (1, 20))
@pytest.mark.parametrize("kind", KINDS)
def test_every_backend_gives_the_exact_results(kind: str, tokens: int, few_copies: None) -> None:
    if tokens == 1 and kind.startswith(TRAINING):
        return
    with torch.inference_mode(not kind.startswith(TRAINING)):
        problem, found = Problem(LAYER, tokens, kind.rpartition(" ")[2]), set()
        for entry in dyad_table.entries(PLAN, kind):
            if not entry.version or (made := entry.function(problem, kind, entry.n, 1)) is None:
                continue
            match = problem.match(kind, entry.n, made.read(made.call(0)), made.rounds_parts)
            assert match <= 1, str(entry)
            if tokens > 1:
                other = problem.match(kind, entry.n, made.read(made.call(1)), made.rounds_parts)
                assert other > 1, f"{entry}: of another input"
            found.add((entry.name, entry.n))
    assert {("effk dyad_linear", 4), ("effk dyad_linear", 8), ("torch F.linear", 0)} <= found


def test_the_oracle_is_the_layer_and_its_derivatives() -> None:
    problem = Problem(LAYER, 20)
    for n in (0, 4, 8):
        dense = problem._dense(n)
        assert (dense != 0).sum() == {0: 6144, 4: 6144 * 7 // 16, 8: 6144 * 15 // 64}[n]
        x, w = problem.inputs[0].double().requires_grad_(), dense.clone().requires_grad_()
        gx, gw = torch.autograd.grad(x @ w.T, (x, w), problem.gy.double())
        whole = [gx, gw] if n == 0 else [gx, *effk.ops.dyad_linear.reference_backward(
            problem.gy, problem.inputs[0], *problem.weights(n))[1:3]]  # fmt: skip
        assert problem.match(f"{TRAINING} fp32", n, [t.detach() for t in whole]) < 1e-3
        y = (x @ w.T).detach()
        assert problem.match(f"{FORWARD} fp32", n, [y]) < 1e-3
        assert problem.match(f"{FF} fp32", n, [y.relu() @ problem._dense(n, second=True).T]) < 1e-3


def test_mistakes_do_not_match() -> None:
    problem = Problem(LAYER, 20)
    y = problem.inputs[0] @ problem._dense(4).T.float()
    assert problem.match(f"{FORWARD} fp32", 4, [y]) <= 1
    wl, wu = problem.weights(4)
    swapped = effk.ops.dyad_linear.reference(problem.inputs[0], wu, wl)
    other = effk.ops.dyad_linear.reference(problem.inputs[0], wl, wu, variant="dt")
    one = y.clone()
    one[3, 5] += 1e-3
    nan = y.clone()
    nan[0, 0] = math.nan
    for wrong in (swapped, other, one, nan, y.bfloat16(), y[:, :-1], y[:7], torch.zeros_like(y)):
        assert problem.match(f"{FORWARD} fp32", 4, [wrong]) > 1


def test_counts() -> None:
    assert flops(Layer(8, 16), 3, 0, "forward fp32") == 2 * 3 * 8 * 16
    assert flops(Layer(8, 16), 3, 4, "forward fp32") == flops(Layer(8, 16), 3, 0, "forward fp32") / 2
    assert flops(Layer(8, 16), 3, 8, "training bf16") == flops(Layer(8, 16), 3, 0, "training bf16") / 4
    assert flops(Layer(8, 16), 3, 4, "feed-forward fp32") == 2 * flops(Layer(8, 16), 3, 4, "forward fp32")
    assert weight_bytes(Layer(8, 16), 4, "forward bf16") == 8 * 16 * 2 / 2
    assert weight_bytes(Layer(8, 16), 0, "feed-forward fp32") == 2 * 8 * 16 * 4


@pytest.mark.slow
@pytest.mark.parametrize("op", ("dense_linear", "dyad_linear"))
def test_a_whole_run(op: str, few_copies: None) -> None:
    """Rows of all kinds, right and complete; dense competitors stand beside every n."""
    lines: list[str] = []
    kinds = DENSE_KINDS if op == "dense_linear" else KINDS
    plan = replace(PLAN, op=op, kinds=kinds)
    before = effk.isa.active()
    result = dyad_table.run(plan, lines.append)
    assert effk.isa.active() == before
    assert not any(line.startswith("wrong") for line in lines) and {row.op for row in result.rows} == {op}
    assert all(row.valid and row.us > 0 for row in result.rows) and {row.kind for row in result.rows} == set(kinds)
    blocks = {1} if op == "dense_linear" else {4, 8}
    for kind in kinds:
        theirs = [r for r in result.rows if r.backend == torch_dense.NAME and r.kind == kind]
        assert {r.shape["n"] for r in theirs} == blocks
    assert all(r.vs_best for r in result.rows if r.backend == f"effk {op}")
    assert {shape_name(r) for r in result.rows if r.shape["n"] == 4} <= {"T=1 64x96 n=4", "T=20 64x96 n=4"}
    if torch_dense.avoids_avx512():
        assert any("avoids AVX-512" in note for note in result.notes)


def row(backend: str, us: float, case: str, n: int, op: str = "dyad_linear", tokens: int = 512, gf: float = 1.0) -> Row:
    isa = "avx512" if backend.startswith("effk") else "native"
    keys = LAYER.keys(tokens, n)
    return Row(op, case, keys, "float32", isa, 1, backend, "1", us, 0.0, 1.0, gf, 0.5, None, 0.5)


def find(rows: list[Row], part: str, whole: bool = False) -> Verdict:
    set_vs_best(rows)
    (verdict,) = [v for v in dyad_bars.judge(rows, 1) if (part == v.name if whole else part in v.name)]
    return verdict


def test_bars() -> None:
    rows = [
        row("effk dyad_linear", 10.0, "forward fp32", 4),
        row("effk dense_linear", 16.0, "forward fp32, dense", 4),
        row("torch F.linear", 40.0, "forward fp32, dense, weight laid out in each call", 4),
        row("onnxruntime MatMul", 18.0, "forward fp32, dense, weight packed", 4),
        row("two torch.bmm", 17.0, "forward fp32, features first", 4),
        row("effk products of gathered blocks", 9.6, "forward fp32", 4),
        row("effk dyad_linear", 30.0, "training fp32", 4),
        row("torch F.linear", 80.0, "training fp32, dense, weight laid out in each call", 4),
        row("effk dyad_linear", 5.5, "forward fp32", 4, tokens=1),
        row("effk dense_linear", 9.0, "forward fp32, dense", 4, tokens=1),
        row("effk dyad_linear", 20.0, "feed-forward fp32", 4),
        row("effk dyad_linear", 22.0, "feed-forward fp32, two calls", 4),
    ]
    assert find(rows, "n=4 fp32: x torch").worst.value == 4.0 and find(rows, "n=4 fp32: x torch").outcome == "pass"
    assert find(rows, "n=4 fp32: x strongest dense").worst.value == 1.8
    assert find(rows, "n=4 fp32: x two torch.bmm", True).outcome == "fail"
    assert find(rows, "n=4, 8 fp32: time of the products").worst.value == 0.96
    assert find(rows, "n=4 fp32 training step").outcome == "fail"
    assert find(rows, "n=4 fp32 T=1").worst.value == pytest.approx(9.0 / 2 / 5.5)
    assert find(rows, "n=4 fp32 T=1").outcome == "fail" and find(rows, "n=8 fp32 T=1").outcome == "open"
    assert find(rows, "n=4 fp32: (2/n) of our dense").worst.value == 0.8
    assert find(rows, "n=4 fp32 feed-forward: time of two calls").worst.value == 1.1
    assert find(rows, "n=4 bf16: x torch").outcome == "open"
    (line, *_) = dyad_page.lines(rows, "dyad_linear")
    cells = dict(zip(dyad_page.HEADER, line, strict=True))
    assert (cells["effk us"], cells["effk dense us"], cells["x torch"], cells["x strongest"]) == ("5.5", "9", "-", "-")
    cells = dict(zip(dyad_page.HEADER, list(dyad_page.lines(rows, "dyad_linear"))[1], strict=True))
    assert (cells["x torch"], cells["strongest dense us"]) == ("4", "18 (onnxruntime MatMul)")
    peak = Row("machine", "fp32 peak", {}, "", "avx512", 1, "cpu", "", None, None, None, 100.0, None, None, None)
    note = Row("machine", torch_dense.AVOIDS, {}, "", "", 1, "cpu", "", *[None] * 7)
    rows = [peak, row("effk dense_linear", 10.0, "forward fp32", 1, "dense_linear", gf=81.0)]
    rows += [
        row("torch F.linear", 20.0, "forward fp32, weight laid out in each call", 1, "dense_linear", gf=40.0),
        note,
    ]
    assert find(rows, "dense fp32: share").outcome == "pass"
    assert "MKL without AVX-512" in find(rows, "dense fp32: x torch").name
    assert find(rows, "dense fp32: x strongest dense").worst.value == 2.0
    assert list(dyad_bars.judge([peak], 1)) == []
    assert "MKL without AVX-512" in next(dyad_page.notes(rows)) and list(dyad_page.notes(rows[:1])) == []
    assert list(dyad_page.sections(rows)) == [("dense_linear", "Dense layers")]
