"""Recipes of activation sparsity: conversion of every architecture, what is exact is exact, saved models come back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

import effk
from effk.compress import make_plan, plan_from_json
from effk.compress.passes.cats import Cats
from effk.compress.passes.moefy import Moefy
from effk.compress.passes.relufy import Relufy, swap_activations
from effk.compress.passes.reuse import Reuse
from effk.compress.passes.rtn import Rtn
from effk.compress.passes.sparse_predictor import SparsePredictor
from effk.compress.passes.teal import Teal
from effk.compress.solvers.balanced_kmeans import balanced_kmeans
from effk.compress.sparse_networks import find_sparse_networks
from effk.nn import ExpertRouter, InputSparseLinear, ReluNorm, SparseFFN, WqLinear
from effk.nn.relu_ffn import sparse_ffns
from small_models import FEEDFORWARDS, VOCABULARY, small_model, token_batches

IDS = token_batches(1)[0]
CALIB = token_batches(16)
_SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def model_with_zeros(name: str) -> nn.Module:
    """Two random blocks whose networks have exact zeros as they come."""
    torch.manual_seed(0)
    gated = _SMALL | {"intermediate_size": 80, "num_key_value_heads": 2}
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**gated, hidden_act="relu", mlp_bias=True)),
        "phi3": lambda: Phi3ForCausalLM(Phi3Config(**gated, hidden_act="relu2")),
        "falcon": lambda: FalconForCausalLM(FalconConfig(**_SMALL, activation="relu", bias=True, alibi=False)),
        "gemma3n": lambda: Gemma3nForCausalLM(
            Gemma3nTextConfig(
                **_SMALL, intermediate_size=80, num_key_value_heads=2, head_dim=12, vocab_size_per_layer_input=VOCABULARY,
                hidden_size_per_layer_input=8, activation_sparsity_pattern=[0.8, 0.8], laurel_rank=4,
                layer_types=["sliding_attention", "full_attention"], num_kv_shared_layers=0,
            )
        ),
    }[name]()  # fmt: skip
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def output(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    out = model(ids)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


@pytest.mark.parametrize("name", ["llama", "phi3", "falcon", "gemma3n", "opt"])
def test_exact_models_stay_what_they_are(name: str, tmp_path: Path) -> None:
    model = small_model(name) if name == "opt" else model_with_zeros(name)
    ids = IDS[:1, :6]
    expected = [output(model, ids), output(model)]
    report = effk.compress(model, Relufy())
    assert len(sparse_ffns(model)) == len(report.networks) == model.config.num_hidden_layers
    assert report.statement().startswith("exact") and all(ffn.exact for ffn in sparse_ffns(model).values())
    for got, wanted in zip([output(model, ids), output(model)], expected, strict=True):  # the kernel; PyTorch
        # A few blocks of chains of up to 192 products, logits of a few units.
        assert float((got - wanted).abs().max() / wanted.abs().max()) < 2e-5
    effk.save(model, tmp_path)
    loaded = effk.load(tmp_path)
    assert torch.equal(output(loaded, ids), output(model, ids)) and type(loaded) is type(model)
    if name == "gemma3n":
        assert all(ffn.gate == "gelu_gauss" for ffn in sparse_ffns(model).values())


@torch.no_grad()
def decoded(model: nn.Module, prompt: Tensor, following: Tensor) -> Tensor:
    """Logits behind the prompt and each of the following tokens, one by one with a cache."""
    out = model(prompt, use_cache=True)
    logits = [out.logits[:, -1]]
    for i in range(following.shape[1]):
        out = model(following[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[:, -1])
    return torch.stack(logits, 1)


@pytest.mark.parametrize("name", ["llama", "falcon", "opt"])
def test_decoding_is_exact(name: str) -> None:
    """48 tokens of the dense model's own: the same logits at every one of them, and the same next token but for ties."""
    model = small_model(name) if name == "opt" else model_with_zeros(name)
    following = model.generate(IDS[:1, :6], max_new_tokens=48, do_sample=False, eos_token_id=None)[:, 6:]
    expected = decoded(model, IDS[:1, :6], following)
    effk.compress(model, Relufy())
    for ffn in sparse_ffns(model).values():
        ffn.counting = True
    got = decoded(model, IDS[:1, :6], following)
    for ffn in sparse_ffns(model).values():
        report = ffn.density_report()
        assert report.tokens == 54 and 0 < report.mean < 0.9, "neurons are skipped"
    assert float((got - expected).abs().max() / expected.abs().max()) < 2e-5  # as for a prompt
    best = expected.topk(2, -1).values
    clear = best[..., 0] - best[..., 1] > 4e-5 * expected.abs().max()
    assert torch.equal(got.argmax(-1)[clear], expected.argmax(-1)[clear]) and float(clear.float().mean()) > 0.9


def test_gemma3n_in_bf16_takes_the_rounded_quantile() -> None:
    model = model_with_zeros("gemma3n").bfloat16()
    block = model.model.layers[0].mlp
    x = torch.randn(3, 48).bfloat16()
    with torch.no_grad():
        expected = block(x).float()
    effk.compress(model, Relufy())
    ffn = model.model.layers[0].mlp
    assert float(ffn.param) == float(torch.distributions.Normal(0, 1).icdf(torch.tensor(0.8)).bfloat16())
    # transformers rounds g, a, u and h to bf16 (2^-9 each), the kernel only y; neurons next to the cut may differ.
    with torch.no_grad():
        assert float((ffn(x).float() - expected).norm() / expected.norm()) < 2.0**-6


def stage_two(model: LlamaForCausalLM | FalconForCausalLM, ids: Tensor) -> Tensor:
    """By hand: a ReLU behind each norm whose output attention or network read."""
    model = copy.deepcopy(model)
    blocks = model.model.layers if hasattr(model, "model") else model.transformer.h
    for block in blocks:
        for norm in ("input_layernorm", "post_attention_layernorm"):
            if hasattr(block, norm):
                getattr(block, norm).register_forward_hook(lambda m, args, out: out.relu())
    return output(model, ids)


@pytest.mark.parametrize("name", ["llama", "falcon"])
def test_stage_two(name: str, tmp_path: Path) -> None:
    """Falcon's parallel block has one norm for both branches."""
    model = model_with_zeros(name)
    expected = stage_two(model, IDS[:1, :6])
    report = effk.compress(model, Relufy(stage=2), CALIB)
    norms = [n for n, m in model.named_modules() if isinstance(m, ReluNorm)]
    assert len(norms) == (4 if name == "llama" else 2) == len(report.notes["relu_norms"])
    got = output(model, IDS[:1, :6])
    assert float((got - expected).abs().max() / expected.abs().max()) < 2e-5
    if name == "llama":
        assert len(report.inputs) == 6 and all(0.3 < share < 0.7 for share in report.inputs.values())
    effk.save(model, tmp_path)
    assert torch.equal(output(effk.load(tmp_path)), output(model))


@pytest.mark.parametrize("name", FEEDFORWARDS)
def test_stage_one(name: str) -> None:
    """The same model as one whose activations were swapped by hand, on every architecture."""
    model = small_model(name)
    twin = copy.deepcopy(model)
    assert len(swap_activations(twin)) == (0 if name == "opt" else 3) and not swap_activations(twin)
    effk.compress(model, Relufy(), CALIB[:8])
    torch.testing.assert_close(output(model), output(twin), atol=1e-4, rtol=1e-4)


def test_parameters_from_calibration() -> None:
    shifted = effk.compress(small_model("llama"), Relufy(activation="shifted_relu", sparsity=0.9), CALIB)
    assert all(abs(s.density.mean - 0.1) < 0.03 for s in list(shifted.measured.values())[:1])
    loose, tight = (
        effk.compress(small_model("gpt2"), Relufy(activation="fatrelu", cett=cett), CALIB) for cett in (0.4, 0.05)
    )
    for name in loose.networks:
        assert loose.measured[name].density.mean < tight.measured[name].density.mean


def test_training_lowers_the_loss_and_the_density() -> None:
    calib = token_batches(32)
    plain, trained, dense = (
        effk.compress(small_model("llama"), Relufy(model_steps=steps, model_rate=3e-3, density_weight=weight), calib)
        for steps, weight in ((0, 0.0), (30, 0.0), (30, 1.0))
    )

    def mean(report: Any) -> float:
        return sum(s.density.mean for s in report.measured.values())

    assert plain.perplexity_after == plain.perplexity_prepared
    assert trained.perplexity_after == pytest.approx(trained.perplexity_prepared, rel=1e-4)
    assert mean(dense) < 0.9 * mean(trained)


def test_cats_threshold_and_its_statement() -> None:
    model = small_model("llama")
    report = effk.compress(model, Cats(sparsity=0.6), CALIB)
    assert report.statement().startswith("approximate: small values of SiLU")
    assert all(abs(s.density.mean - 0.4) < 0.06 for s in report.measured.values())
    with pytest.raises(ValueError, match="not SiLU"):
        effk.compress(small_model("gpt2"), Cats(), CALIB)


@pytest.mark.parametrize("allocation", ["uniform", "greedy"])
def test_teal(allocation: str, tmp_path: Path) -> None:
    model = small_model("llama")
    report = effk.compress(model, Teal(sparsity=0.4, allocation=allocation), CALIB)
    assert len(report.inputs) == 21 and all(
        isinstance(model.get_submodule(name), InputSparseLinear) for name in report.inputs
    )
    shares = report.notes["shares"]
    if allocation == "uniform":
        assert set(shares.values()) == {0.4} and abs(sum(report.inputs.values()) / 21 - 0.6) < 0.05
    else:
        assert len(set(shares.values())) > 1
    effk.save(model, tmp_path)
    assert torch.equal(output(effk.load(tmp_path)), output(model))


def test_moefy_changes_nothing_while_all_experts_run(tmp_path: Path) -> None:
    model = small_model("opt")
    expected = output(model)
    report = effk.compress(model, Moefy(size=8, steps=20, tau=1.0), CALIB)
    torch.testing.assert_close(output(model), expected, atol=1e-5, rtol=1e-4)
    router = next(iter(sparse_ffns(model).values())).selector
    assert isinstance(router, ExpertRouter) and router.experts == 13
    router.tau = 0.3
    assert not torch.allclose(output(model), expected, atol=1e-5)
    assert all(s.prediction.recall == 1 for s in report.measured.values())
    effk.save(model, tmp_path)
    assert torch.equal(output(effk.load(tmp_path)), output(model))
    with pytest.raises(ValueError, match="experts of 7"):
        effk.compress(small_model("opt"), Moefy(size=7), CALIB)
    with pytest.raises(ValueError, match="relufy first"):
        effk.compress(small_model("llama"), Moefy(size=8), CALIB)


def test_clusters_are_balanced_and_found() -> None:
    centres = 5 * torch.eye(4, 6)
    rows = centres.repeat_interleave(8, 0) + 0.1 * torch.randn(32, 6)
    shuffled = torch.randperm(32)
    chosen = balanced_kmeans(rows[shuffled], 4, 20, seed=1)
    assert chosen.bincount(minlength=4).tolist() == [8] * 4
    spread = sum(
        float((rows[shuffled][chosen == c] - rows[shuffled][chosen == c].mean(0)).square().sum()) for c in range(4)
    )
    assert spread < 0.2 * float((rows - rows.mean(0)).square().sum())
    with pytest.raises(ValueError, match="divisor of 32"):
        balanced_kmeans(rows, 5, 1, 0)


@pytest.mark.parametrize("kind", ["lowrank", "sign"])
def test_predictors_keep_what_they_promise(kind: str, tmp_path: Path) -> None:
    model = small_model("opt")
    report = effk.compress(model, SparsePredictor(kind=kind, recall=0.9, epochs=3), token_batches(32))
    for found in report.measured.values():
        assert found.prediction.recall > 0.8 and found.prediction.missed_mass < 0.2
        assert found.prediction.density >= found.prediction.recall * found.density.mean * 0.9
    effk.save(model, tmp_path)
    assert torch.equal(output(effk.load(tmp_path)), output(model))


@pytest.mark.parametrize("fields", [{"gamma": 3}, {"method": "griffin", "share": 0.3}])
def test_reuse_while_generating(fields: dict[str, Any], tmp_path: Path) -> None:
    """A second prompt gives what it gives alone: no state of the first is left."""
    model = small_model("opt" if "gamma" in fields else "llama")
    effk.compress(model, Reuse(**fields))
    prompts = [IDS[:1, :7], IDS[1:, :9]]

    def answer(prompt: Tensor) -> list[int]:
        return model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)[0].tolist()

    alone = answer(prompts[1])
    answer(prompts[0])
    assert answer(prompts[1]) == alone
    effk.save(model, tmp_path)
    model = effk.load(tmp_path)
    assert answer(prompts[1]) == alone


def test_plans_are_edited_and_applied() -> None:
    plan = make_plan(
        small_model("llama"), Cats(sparsity=0.5, per_layer={"*.1.mlp": {"sparsity": 0.9}}, ignore=("*.2.mlp",)), CALIB
    )
    assert plan.skipped == {"model.layers.2.mlp": "ignored by the recipe"}
    plan = plan_from_json(plan.to_json().replace('"sparsity": 0.9', '"sparsity": 0.8'))
    model = small_model("llama")
    report = effk.compress(model, Cats(), CALIB, plan)
    assert [round(s.density.mean, 1) for s in report.measured.values()] == [0.5, 0.2]
    broken = plan_from_json(plan.to_json().replace('"sparsity": 0.8', '"sparsity": 1.8'))
    with pytest.raises(ValueError, match="sparsity: expected a share"):
        effk.compress(small_model("llama"), Cats(), CALIB, broken)


def test_quantised_rows_beside_quantised_attention(tmp_path: Path) -> None:
    model = small_model("opt")
    exact = output(model)
    effk.compress(model, Relufy(rows="int8", group=32))
    assert float((output(model) - exact).norm() / exact.norm()) < 0.02
    effk.compress(model, Rtn(bits=8))
    assert isinstance(model.model.decoder.layers[0].self_attn.q_proj, WqLinear)
    assert isinstance(model.model.decoder.layers[0].fc1, SparseFFN)
    effk.save(model, tmp_path / "a")
    loaded = effk.load(tmp_path / "a")
    assert torch.equal(output(loaded), output(model))
    loaded.save_pretrained(tmp_path / "b")
    assert torch.equal(output(effk.load(tmp_path / "b")), output(model))
    (weights,) = (tmp_path / "a").glob("*.safetensors")
    from safetensors.torch import load_file

    assert load_file(weights)["model.decoder.layers.0.fc1.up.codes"].dtype == torch.int8


def test_what_does_not_fit_is_refused() -> None:
    strange = small_model("llama")
    strange.model.layers[1].mlp.act_fn = nn.Tanh()
    assert [network.kind for network in find_sparse_networks(strange)[0]] == ["silu", "other", "silu"]
    assert "not understood" in make_plan(strange, Relufy()).skipped["model.layers.1.mlp"]
    lying = small_model("llama")
    lying.model.layers[1].mlp.forward = lambda x: x
    assert "is not down(act(gate x) * up x)" in find_sparse_networks(lying)[1]["model.layers.1.mlp"]
    with pytest.raises(ValueError, match="calib: expected token ids"):
        effk.compress(small_model("llama"), Cats())
    broken = small_model("llama")
    broken.model.layers[2].mlp.up_proj.weight.data[0, 0] = torch.nan
    before = output(small_model("llama"))
    with pytest.raises(ValueError, match=r"layers.2.mlp.up_proj.weight: expected finite"):
        effk.compress(broken, Relufy())
    assert not sparse_ffns(broken) and before.isfinite().all()


LAYER = "model.layers.1.mlp"
EDITS = {
    "gate": ({"gate": "tanh"}, f"{LAYER}.gate: expected"),
    "gate with a parameter": ({"gate": "fatrelu"}, f"{LAYER}.param: expected"),
    "rows": ({"rows": "int8"}, f"{LAYER}"),
    "group": ({"group": 7}, f"{LAYER}.rows: expected"),
    "width": ({"d": 73}, f"{LAYER}: expected d among"),
    "neurons": ({"f": 105}, r"expected"),
    "huge": ({"f": 10**12}, f"{LAYER}.f: expected a size"),
    "biases": ({"biases": [True]}, f"{LAYER}.biases: expected"),
    "selector": ({"selector": {"kind": "oracle"}}, f"{LAYER}.selector: expected"),
    "selector's fields": ({"selector": {"kind": "sign", "d": 5, "f": 104}}, f"{LAYER}.selector: expected"),
    "type": ({"d": "72"}, f"{LAYER}: expected an object"),
    "silent": ({"silent": ["model.nowhere"]}, "model.nowhere: expected a module"),
}


@pytest.mark.parametrize("case", EDITS)
def test_tampered_records(case: str, tmp_path: Path) -> None:
    model = small_model("llama")
    effk.compress(model, Relufy())
    effk.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change, message = EDITS[case]
    config["quantization_config"]["relu_ffn"][LAYER].update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        effk.load(tmp_path)


def test_report_and_plot(tmp_path: Path) -> None:
    report = effk.compress(small_model("opt"), Relufy(), CALIB)
    report.save(str(tmp_path / "report.json"))
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    record = json.loads((tmp_path / "report.json").read_text())
    assert record["statement"].startswith("exact") and len(record["networks"]) == 3
    costs = record["costs"]
    rho = sum(s.density.mean for s in report.measured.values()) / 3
    assert costs["ffn_macs"] == pytest.approx(3 * 72 * 104 * (1 + rho)) and costs["ffn_macs_dense"] == 3 * 2 * 72 * 104
    assert 0 < costs["phi"] < 1 and "unused after" in str(report)
