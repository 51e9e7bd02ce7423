"""SparseFFN, its gates and selectors: the kernel, PyTorch and the float64 formula agree; masks, state and tuning do as
told."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from effk.nn import (
    ActiveSetReuse,
    ExpertRouter,
    InputSparseLinear,
    LowRankPredictor,
    ReluNorm,
    SignPredictor,
    SparseFFN,
    SparseGate,
)
from effk.nn.neuron_selector import choose_experts, griffin_statistic
from effk.nn.relu_ffn import pack_mask
from effk.ops import relu_ffn as rf

PARAMS = {"shifted_relu": 0.5, "fatrelu": 0.75, "silu_threshold": 0.25, "gelu_gauss": 0.6744898, "top_k": 5.0}
D, F = 20, 36


def weights(gated: bool = True) -> list[Tensor | None]:
    return [torch.randn(F, D) / D**0.5 if gated else None, torch.randn(F, D) / D**0.5, torch.randn(D, F) / F**0.5]


def layer(gate: str = "relu", gated: bool = True, rows: str = "fp32", **extra: object) -> SparseFFN:
    biases = [0.1 * torch.randn(F) if gated else None, 0.1 * torch.randn(F), 0.1 * torch.randn(D)]
    return SparseFFN.from_weights(*weights(gated), biases, gate, PARAMS.get(gate), rows, **extra)


def reference(ffn: SparseFFN, x: Tensor, mask: Tensor | None = None, group: int = 1) -> Tensor:
    biases = (ffn.gate_bias, ffn.up_bias, ffn.down_bias)
    return rf.reference(x, *ffn.to_dense(), *biases, ffn.gate, ffn.param, mask, group)[0]


@pytest.mark.parametrize("rows", rf.ROWS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("gate", rf.GATES)
def test_kernel_and_torch_agree_with_the_formula(gate: str, gated: bool, rows: str) -> None:
    if gate == "drelu" and not gated:
        with pytest.raises(ValueError, match="gated network"):
            layer(gate, gated, rows)
        return
    ffn, x = layer(gate, gated, rows), torch.randn(3, D)
    expected = reference(ffn, x)
    for way in ("kernel", "reference", "many tokens"):
        ffn.reference = way == "reference"
        got = ffn(x.repeat(4, 1))[:3] if way == "many tokens" else ffn(x)
        # Chains of D and F fp32 products of values of a few units.
        torch.testing.assert_close(got.double(), expected, atol=2 * (D + F) * 2.0**-24 * 8, rtol=1e-5)
    ffn.reference = False
    assert torch.equal(ffn(x.view(1, 3, D)), ffn(x)[None]) and ffn.exact == (gate != "silu_threshold")


def test_hand_fixture() -> None:
    """Specification, section 8.2."""
    x, x2 = torch.tensor([1, -2, 0.5, 3]), torch.tensor([-1, 1, 1, 0.0])
    wg = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 2, -1], [1, 1, 2, 1.0]])
    wu = torch.tensor([[2, 1, 0, 0], [1, 1, 1, 1], [0, 0, 4, 0], [0, 1, 0, 1.0]])
    wdt = torch.tensor([[1, 2, 3, 4], [9, 9, 9, 9], [5, 5, 5, 5], [1, -1, 0, 2.0]])
    for kind, param, y in (
        ("relu", None, [3, -3, 0, 6]), ("shifted_relu", 0.5, [2.5, -2.5, 0, 5]), ("fatrelu", 1.5, [3, -3, 0, 6]),
        ("relu2", None, [9, -9, 0, 18]), ("drelu", None, [3, -3, 0, 6]),
        ("silu_threshold", 0.25, [2.857722, -2.857722, 0, 5.715445]),
        ("gelu_gauss", 0.6744898, [1.477508, -1.477508, 0, 2.955016]),
    ):  # fmt: skip
        ffn = SparseFFN.from_weights(wg, wu, wdt.t().contiguous(), kind=kind, param=param)
        for ffn.reference in (False, True):
            torch.testing.assert_close(ffn(x), torch.tensor(y, dtype=torch.float32), atol=2e-6, rtol=1e-6)
    ffn = SparseFFN.from_weights(wg, wu, wdt.t().contiguous())
    ffn.counting = True
    assert ffn(torch.stack([x, x2])).tolist() == [[3, -3, 0, 6], [51, 47, 49, 53]]
    report = ffn.density_report()
    assert (report.tokens, report.mean, report.max) == (2, 0.625, 0.75) and ffn.density_report().tokens == 0
    assert pack_mask(ffn.activity(torch.stack([x, x2]))).tolist() == [[9], [14]]


@pytest.mark.parametrize("kind", [g for g in rf.GATES if g != "drelu"])
def test_gates_have_the_gradients_of_what_they_are(kind: str) -> None:
    gate, g = SparseGate(kind, PARAMS.get(kind)), torch.randn(4, 9, dtype=torch.float64)
    g.requires_grad_()
    expected, active = rf.reference_gate(g, kind, None if gate.param is None else gate.param)
    (wanted,) = torch.autograd.grad(expected.square().sum(), g)
    x = g.detach().float().requires_grad_()
    a = gate(x)
    (got,) = torch.autograd.grad(a.square().sum(), x)
    torch.testing.assert_close(a.double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1e-4)
    assert torch.equal(a != 0, active & (a != 0))


def test_gradients_reach_the_input_and_only_that() -> None:
    ffn, x = layer("relu"), torch.randn(2, D, requires_grad=True)
    ffn(x).square().sum().backward()
    y = x.detach().double().requires_grad_()
    reference(ffn, y).square().sum().backward()
    torch.testing.assert_close(x.grad.double(), y.grad, atol=1e-4, rtol=1e-4)
    assert not list(ffn.parameters())


@pytest.mark.parametrize("group", [1, 4, 16])
def test_masks(group: int) -> None:
    ffn, x = layer("relu"), torch.randn(2, D)
    free, allowed = ffn(x), torch.rand(-(-F // group)) < 0.5
    ffn.set_mask(allowed, group)
    assert not ffn.exact
    expected = reference(ffn, x, pack_mask(allowed[None]), group)
    for ffn.reference in (False, True):
        torch.testing.assert_close(ffn(x).double(), expected, atol=1e-5, rtol=1e-5)
    ffn.reference = False
    ffn.set_mask(torch.ones_like(allowed), group)
    assert torch.equal(ffn(x), free)
    ffn.set_mask(None)
    assert torch.equal(ffn(x), free) and ffn.exact
    with pytest.raises(ValueError, match=r"mask: expected bool \[36\]"):
        ffn.set_mask(torch.ones(35, dtype=torch.bool))


@pytest.mark.parametrize(("rows", "group"), [("fp32", 0), ("bf16", 0), ("fp16", 0), ("int8", 32), ("int4", 0)])
def test_state_and_stored_form_come_back(rows: str, group: int) -> None:
    ffn, x = layer("fatrelu", rows=rows, group=group), torch.randn(2, D)
    other = copy.deepcopy(ffn)
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(ffn.state_dict())
    biases = [ffn.gate_bias, ffn.up_bias, ffn.down_bias]
    again = SparseFFN.from_stored(ffn.stored(), D, F, "fatrelu", rows, group, biases, ffn.param)
    assert torch.equal(other(x), ffn(x)) and torch.equal(again(x), ffn(x))
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), ffn.state_dict().values(), strict=True))
    assert ffn.to(torch.bfloat16).up_bias.dtype == torch.float32
    assert ffn(x.bfloat16()).dtype == torch.bfloat16


def test_float_rows_lose_nothing() -> None:
    plain = weights()
    dense = SparseFFN.from_weights(*plain).to_dense()
    assert all(torch.equal(a, b) for a, b in zip(dense, plain, strict=True))


def test_autotune_decides_from_the_table_alone() -> None:
    """Specification, section 4.8: alpha + beta u against (1 - margin) dense."""
    ffn = layer("relu")
    table = {1: (1.0, 2.0, 3.0), 4: (1.0, 2.0, 3.0), 8: (1.0, 2.0, 3.0), 16: (1.0, 2.0, 1.0)}
    modes = ffn.autotune({1: 0.1, 4: 0.84, 8: 0.86, 16: 0.1}, margin=0.1, table=table)
    assert modes == {1: "sparse", 4: "sparse", 8: "dense", 16: "torch", 17: "torch"} == ffn.modes
    assert [ffn.mode(n) for n in (1, 3, 7, 8, 15, 16, 99)] == ["sparse", "sparse", "sparse", "dense", "dense"] + [
        "torch"
    ] * 2
    assert ffn.autotune({1: 0.5}, margin=0.0, table={1: (1.0, 2.0, 2.0)}) == {1: "dense", 9: "torch"}
    timed = ffn.autotune({1: 0.1}, rounds=3)
    assert set(timed) == {1, 9} and timed[1] in ("sparse", "dense")


def test_compiles_without_breaks() -> None:
    ffn, x = layer("relu"), torch.randn(1, D)
    assert torch.equal(torch.compile(ffn, fullgraph=True)(x), ffn(x))


# ---- selectors -----------------------------------------------------------------------------------


def test_sign_predictor_fixture_and_counts() -> None:
    """Specification, section 3.8."""
    x = torch.tensor([[1, -2, 0.5, 3, -1, 2, -0.5, 1]])
    w = torch.tensor([[-1, 1, -1, 1, 1, -1, 1, -1.0]])
    for alpha, kept in ((6.99, False), (7.0, True)):
        assert SignPredictor.from_gate(w, alpha).allowed(x).tolist() == [[kept]]
    x, w = torch.randn(5, 21), torch.randn(9, 21)
    expected = ((x[:, None] < 0) ^ (w[None] < 0)).sum(-1)
    assert torch.equal(SignPredictor.from_gate(w).negatives(x), expected.float())


R = torch.tensor([[0.1, 4, 2, 0.5, 3.4]])


@pytest.mark.parametrize(
    ("rule", "tau", "chosen"),
    [
        ("dynk_max", 0.5, {1, 2, 4}), ("dynk_max", 0.2, {1, 4}), ("dynk_max", 1.0, {0, 1, 2, 3, 4}), ("dynk", 0.3, {1}),
        ("dynk", 0.5, {1, 4}), ("dynk", 0.75, {1, 2, 4}), ("dynk", 0.9, {1, 2, 4}), ("dynk", 1.0, {0, 1, 2, 3, 4}),
    ],
)  # fmt: skip
def test_experts_fixture(rule: str, tau: float, chosen: set[int]) -> None:
    """Specification, section 3.9."""
    assert set(choose_experts(R, rule, tau)[0].nonzero().flatten().tolist()) == chosen


def test_experts_ties_and_zeros() -> None:
    zero = torch.zeros(1, 4)
    assert choose_experts(zero, "dynk", 0.5).tolist() == [[True, False, False, False]]
    assert choose_experts(zero, "dynk_max", 0.5).all()
    assert choose_experts(torch.ones(1, 4), "dynk", 0.5).tolist() == [[True, True, False, False]]


def test_a_selector_masks_token_by_token() -> None:
    ffn, x = layer("relu"), torch.randn(3, D)
    ffn.selector = LowRankPredictor(D, F, 6)
    kept = ffn.selector.allowed(x)
    torch.testing.assert_close(ffn(x).double(), reference(ffn, x, pack_mask(kept)), atol=1e-5, rtol=1e-5)
    assert torch.equal(kept, (x @ ffn.selector.w1.t() @ ffn.selector.w2.t()) >= 0) and not kept.all()
    ffn.selector = ExpertRouter(D, 9, 4, rule="dynk", tau=0.3)
    chosen = ffn.selector.allowed(x)
    torch.testing.assert_close(ffn(x).double(), reference(ffn, x, pack_mask(chosen), 4), atol=1e-5, rtol=1e-5)


def test_window_reuse() -> None:
    """Exact, exact, then twice on the union of the two; a prompt starts anew; another batch raises."""
    ffn, xs = layer("relu"), torch.randn(8, 1, D)
    exact = [ffn(x) for x in xs]
    ffn.selector = reuse = ActiveSetReuse("window", gamma=2)
    for start in (0, 4):
        got = [ffn(x) for x in xs[start : start + 4]]
        assert torch.equal(got[0], exact[start]) and torch.equal(got[1], exact[start + 1])
        union = ffn.activity(xs[start]) | ffn.activity(xs[start + 1])
        for i in (2, 3):
            torch.testing.assert_close(
                got[i].double(), reference(ffn, xs[start + i], pack_mask(union)), atol=1e-5, rtol=1e-5
            )
            assert not torch.equal(got[i], exact[start + i])
    with pytest.raises(RuntimeError, match="expected 1 sequences as before, got 3"):
        ffn(torch.randn(3, 1, D))
    ffn(xs[0]), ffn(xs[1])
    prompt = torch.randn(1, 5, D)
    ffn(prompt)
    assert torch.equal(ffn(xs[5]), exact[5]) and reuse.step == 1, "a prompt ends the window of the sequence before"
    reuse.reset()
    assert ffn(torch.randn(3, 1, D)).shape == (3, 1, D)


def test_griffin() -> None:
    torch.testing.assert_close(
        griffin_statistic(torch.tensor([[3.0, 0, 4], [0, 5, 12]])), torch.tensor([0.6, 0.3846154, 1.2215142])
    )
    ffn = layer("relu")
    ffn.selector = ActiveSetReuse("griffin", share=0.25)
    for seed in (0, 1):  # a second prompt replaces the first's neurons
        prompt = torch.randn(2, 7, D, generator=torch.Generator().manual_seed(seed))
        x, plain = torch.randn(2, 1, D), copy.deepcopy(ffn)
        plain.selector = None
        torch.testing.assert_close(ffn(prompt), plain(prompt))
        statistic = griffin_statistic(plain.hidden(prompt)[0])
        kept = statistic >= statistic.sort(-1, descending=True).values[:, 8:9]
        assert kept.sum(-1).tolist() == [9, 9]
        torch.testing.assert_close(
            ffn(x)[:, 0].double(), reference(ffn, x[:, 0], pack_mask(kept)), atol=1e-5, rtol=1e-5
        )


# ---- the rest of stage 2 and TEAL ----------------------------------------------------------------


@pytest.mark.parametrize("rows", rf.ROWS)
def test_input_sparse_linear(rows: str) -> None:
    w, b, x = torch.randn(7, 30), torch.randn(7), torch.randn(2, 30)
    for threshold in (None, 0.5, torch.rand(30)):
        module = InputSparseLinear.from_weight(w, b, threshold, rows)
        kept = ~(x.abs() <= (0.0 if threshold is None else threshold))
        expected = torch.where(kept, x, 0.0).double() @ module.to_dense().double().t() + b
        for got in (module(x), module(x.repeat(5, 1))[:2], module(x.clone().requires_grad_())):
            torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)
        assert module.exact == (threshold is None)
        again = InputSparseLinear.from_stored(module.stored(), 7, 30, rows, 0, module.bias, module.threshold)
        assert torch.equal(again(x), module(x))
    if rows == "fp32":
        assert torch.equal(module.to_dense(), w)


def test_relu_norm_is_put_once() -> None:
    norm = ReluNorm(torch.nn.LayerNorm(4))
    assert bool((norm(torch.randn(3, 4)) >= 0).all())
    with pytest.raises(ValueError, match="without a ReLU behind it"):
        ReluNorm(norm)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "tanh"}, "gate: expected one of"),
        ({"kind": "relu", "param": 1.0}, "param: expected none for gate 'relu'"),
        ({"kind": "fatrelu"}, "param: expected one for gate 'fatrelu'"),
        ({"kind": "fatrelu", "param": torch.ones(3)}, "expected 1 or 36 values, got 3"),
        ({"rows": "int7"}, "rows: expected one of"),
        ({"group": 32}, "group: expected 0 for rows in floating point"),
        ({"rows": "int8", "group": 33}, "group: expected"),
        ({"biases": (torch.ones(3), None, None)}, r"gate_bias: expected \[36\], got \[3\]"),
    ],
)
def test_bad_arguments(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseFFN.from_weights(*weights(), **change)
