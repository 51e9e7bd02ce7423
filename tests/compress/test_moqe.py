"""moqe: the experts alone become small, by exactly what the bits say, and the model computes with what is stored."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

import effk
from effk.compress import Plan, make_plan
from effk.compress.apply import model_bytes
from effk.compress.passes.moqe import MoQE
from effk.compress.passes.rtn import Rtn
from effk.compress.solvers.rtn import decode, round_to_nearest
from effk.nn import GroupedExperts, WqGroupedLinear, WqLinear
from mixtures import MIXTURES, ListOfExperts, small_mixture
from small_models import small_model, token_batches

IDS = token_batches(1)[0]


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


def stacks(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.dim() == 3}


def rounded(model: nn.Module, bits: int, group_size: int) -> nn.Module:
    """A plain copy whose stacks hold the rounded numbers, expert by expert."""
    plain = copy.deepcopy(model)
    for parameter in stacks(plain).values():
        for expert in parameter.data:
            codes, grid = round_to_nearest(expert.float(), bits, group_size, "mse")
            expert.copy_(decode(codes, grid, bits, group_size))
    return plain


@pytest.mark.parametrize("bits", (2, 3, 4))
@pytest.mark.parametrize("name", MIXTURES)
def test_the_model_computes_with_rounded_experts(name: str, bits: int) -> None:
    """Logits as of transformers' own experts over the same rounded numbers: two ways to sum fp32 products of up to 104
    terms in two blocks, on logits of order one, hence 1e-4 is generous and 1e-2 (one more rounded layer) is not reached.
    """
    model = small_mixture(name)
    group = 32 if bits == 3 else 0
    expected = logits(rounded(model, bits, group))
    before, everything = model_bytes(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    report = effk.compress(model, MoQE(bits=bits, group_size=group))
    assert (logits(model) - expected).abs().max() < 1e-4 < (expected - logits(small_mixture(name))).abs().max()
    assert set(report.layers) == {n for n, p in everything.items() if p.dim() == 3}
    for n, p in model.named_parameters():  # the rest: router, shared expert, attention, norms, head
        assert torch.equal(p, everything[n])
    for layer_name, layer in report.layers.items():
        assert layer.bytes_before == 4 * everything[layer_name].numel() and layer.bits == bits
        assert len(layer.expert_errors) == everything[layer_name].shape[0] and 0 < layer.error < 0.6
        weighed = sum((e * w.norm()) ** 2 for e, w in zip(layer.expert_errors, everything[layer_name], strict=True))
        assert float(weighed.sqrt() / everything[layer_name].norm()) == pytest.approx(layer.error, rel=1e-5)
    assert report.model_bytes_before == before and report.model_bytes_after == model_bytes(model)
    saved = sum(layer.bytes_before - layer.bytes_after for layer in report.layers.values())
    assert before - report.model_bytes_after == saved
    assert "no expert" in report.skipped.values() and "lm_head" in report.skipped


def test_size_identity() -> None:
    """With a share f of the parameters in experts, b bits leave 1 - f (1 - b / 16) of a 16-bit model, and the scales.

    f = 0.91 and 2 bits make 79.6 %, the paper's figure.
    """
    fields = {"hidden_size": 96, "intermediate_size": 256, "num_local_experts": 8, "vocab_size": 97}
    model = small_mixture("mixtral", torch.bfloat16, **fields, num_hidden_layers=1)
    experts = sum(p.numel() for p in stacks(model).values())
    # Embedding and head are made as large as f = 0.91 asks.
    others = sum(p.numel() for p in model.parameters()) - experts - 2 * 97 * 96
    fields["vocab_size"] = round((experts * (1 / 0.91 - 1) - others) / (2 * 96))
    model = small_mixture("mixtral", torch.bfloat16, **fields, num_hidden_layers=1)
    share = experts / sum(p.numel() for p in model.parameters())
    assert share == pytest.approx(0.91, abs=1e-3)
    buffers = model_bytes(model) - 2 * sum(p.numel() for p in model.parameters())
    for bits, expected in ((2, 0.796), (3, 0.739), (4, 0.682)):
        small = copy.deepcopy(model)
        report = effk.compress(small, MoQE(bits=bits))
        assert report.plan.notes["expert_share"] == pytest.approx(share, abs=1e-6)
        scales = 2 * sum(p.shape[0] * p.shape[1] for p in stacks(model).values())
        codes_only = (report.model_bytes_after - scales - buffers) / (report.model_bytes_before - buffers)
        assert codes_only == pytest.approx(1 - share * (1 - bits / 16), abs=1e-12)
        assert 1 - codes_only == pytest.approx(expected, abs=1e-3)
        assert f"experts hold {share:.1%}" in str(report)


def test_plan_can_be_edited() -> None:
    model = small_mixture("mixtral")
    plan = make_plan(model, MoQE(bits=2))
    first, second, *rest = plan.layers
    edited = plan.edit(first, bits=8, group_size=32)
    edited = Plan.from_json(
        Plan(edited.recipe, {k: v for k, v in edited.layers.items() if k != second}, {second: "kept"}).to_json()
    )
    report = effk.compress(model, MoQE(bits=2), plan=edited)
    assert report.layers[first].bits == 8 and second not in report.layers and report.skipped[second] == "kept"
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts.gate_up_proj, WqGroupedLinear) and isinstance(experts.down_proj, nn.Parameter)
    assert logits(model).isfinite().all()
    with pytest.raises(ValueError, match="expected 4 experts, got 3"):
        fresh = small_mixture("mixtral")
        effk.compress(fresh, MoQE(), plan=make_plan(fresh, MoQE()).edit(first, options={"mode": "mse", "experts": 3}))


def test_experts_that_are_modules() -> None:
    model = nn.ModuleDict({"mlp": ListOfExperts()})
    x, plain = torch.randn(7, 48), copy.deepcopy(model)
    report = effk.compress(model, MoQE(bits=8, group_size=32))
    assert list(report.layers) == [f"mlp.experts.{e}.{i}" for e in range(3) for i in (0, 2)]
    assert all(isinstance(model.get_submodule(name), WqLinear) for name in report.layers)
    assert report.skipped == {"mlp.gate": "no expert"}
    with torch.no_grad():
        assert (model["mlp"](x) - plain["mlp"](x)).abs().max() < 0.02


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least one linear layer to compress"):
        effk.compress(small_model("llama"), MoQE())
    for fields in ({"bits": 5}, {"group_size": 48}, {"mode": "none"}):
        with pytest.raises(ValueError, match=f"recipe moqe: .*{next(iter(fields))}"):
            MoQE(**fields)
    odd = small_mixture("mixtral")
    odd.model.layers[0].mlp.experts.has_bias = True
    assert make_plan(odd, MoQE()).skipped["model.layers.0.mlp.experts.down_proj"] == "its experts have has_bias True"
    bad = small_mixture("mixtral")
    bad.model.layers[1].mlp.experts.down_proj.data[1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj: expected finite"):
        effk.compress(bad, MoQE())
    assert not any(isinstance(m, GroupedExperts) for m in bad.modules())


def test_dense_layers_can_follow() -> None:
    """First the experts, then another method on what is left."""
    model = small_mixture("qwen2_moe")
    effk.compress(model, MoQE(bits=4))
    effk.compress(model, Rtn(bits=8))
    assert isinstance(model.model.layers[1].mlp.experts.down_proj, WqGroupedLinear)
    assert isinstance(model.model.layers[0].mlp.down_proj, WqLinear) and logits(model).isfinite().all()


@pytest.mark.parametrize("compute", ("float", "int8"))
def test_module_computes_every_token_by_its_experts(compute: str) -> None:
    """Against one expert after the other; a token's result does not depend on the tokens beside it."""
    model = small_mixture("mixtral")
    effk.compress(model, MoQE(bits=8, compute=compute))
    experts = model.model.layers[0].mlp.experts
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(9, 72).to(dtype)
        index = torch.stack([torch.randperm(3)[:2] for _ in range(9)])  # the fourth expert gets no token
        weights = torch.rand(9, 2)
        y = experts(x, index, weights)
        assert y.dtype == dtype
        for t in range(9):
            alone = experts(x[t : t + 1], index[t : t + 1], weights[t : t + 1])
            assert torch.equal(alone[0], y[t])
        up, down = (
            m.to_weight().dequantize().view(4, -1, m.in_features) for m in (experts.gate_up_proj, experts.down_proj)
        )
        for t in range(9):
            expected = torch.zeros(72)
            for e, w in zip(index[t].tolist(), weights[t], strict=True):
                gate, second = linear(x[t].float(), up[e]).chunk(2)
                expected += w * linear(torch.nn.functional.silu(gate) * second, down[e])
            # int8 activations and bf16 results change a product by about 1 %; another expert, by its whole size.
            slack = 1e-5 if (compute, dtype) == ("float", torch.float32) else 0.05
            assert (y[t].float() - expected).norm() <= slack * expected.norm()


def test_whole_graph() -> None:
    model = small_mixture("mixtral")
    effk.compress(model, MoQE(bits=4))
    experts = model.model.layers[0].mlp.experts
    compiled = torch.compile(experts, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 8):
        call = (torch.randn(tokens, 72), torch.randint(0, 4, (tokens, 2)), torch.rand(tokens, 2))
        with torch.no_grad():
            assert torch.equal(compiled(*call), experts(*call))


def test_gradient_flows_through_experts() -> None:
    model = small_mixture("mixtral")
    effk.compress(model, MoQE(bits=4))
    x = torch.randn(5, 72, requires_grad=True)
    index, weights = torch.randint(0, 4, (5, 2)), torch.rand(5, 2, requires_grad=True)
    model.model.layers[0].mlp.experts(x, index, weights).sum().backward()
    assert x.grad.abs().min(1).values.gt(0).all() and weights.grad.abs().gt(0).all()
