"""``effk.compress`` on whole models: equal to the dequantised model, honest report, refusals before any work."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import effk
from dense_twin import assert_equals_dequantised
from effk.compress import Recipe, compress, registry
from effk.nn import WqEmbedding, WqLinear, WqTiedHead
from small_models import MODELS, Nearest, small_model, token_batches


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("embedding_bits", [None, 8])
def test_logits_equal_the_dequantised_model(name: str, embedding_bits: int | None) -> None:
    model = small_model(name)
    effk.compress(model, Nearest(bits=4, outliers=0.01, embedding_bits=embedding_bits))
    assert_equals_dequantised(model, token_batches(1)[0])


@pytest.mark.parametrize("name", MODELS)
def test_generation_with_and_without_cache_agrees(name: str) -> None:
    model = small_model(name)
    effk.compress(model, Nearest(bits=4, embedding_bits=8))
    ids = token_batches(1)[0][:, :5]
    runs = [model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*runs)


def test_every_layer_is_replaced_or_explained() -> None:
    for name in MODELS:
        model = small_model(name)
        linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
        report = effk.compress(model, Nearest(bits=4))
        assert set(linear) == set(report.layers) | set(report.skipped), name
        assert all(type(model.get_submodule(layer)) is WqLinear for layer in report.layers)


def test_the_report_is_true() -> None:
    model = small_model("llama")
    dense = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    report = effk.compress(model, Nearest(bits=3, outliers=0.01, hessian=True), calib=token_batches())
    assert report.model_bytes_before == before
    for name, layer in report.layers.items():
        original, stored = dense[name + ".weight"], model.get_submodule(name).to_weight()
        error = (original - stored.dequantize()).norm() / original.norm()
        assert layer.error == pytest.approx(float(error), rel=1e-5)
        assert layer.bytes_after == stored.nbytes() and layer.true_bits == stored.bits_per_weight()
        assert layer.outliers == int(0.01 * original.numel() + 1e-9) and layer.output_error > 0
    saved = sum(layer.bytes_before - layer.bytes_after for layer in report.layers.values())
    assert report.model_bytes_after == before - saved
    assert report.nominal_bits == 3 and report.true_bits > 3
    assert set(report.seconds) == {"prepare", "plan", "apply"}
    assert json.loads(json.dumps(report.to_json()))["layers"].keys() == report.layers.keys()
    assert "lm_head" in str(report) and "3.000 bits" in str(report)


def test_shared_embedding_is_counted_once_and_named() -> None:
    model = small_model("llama")
    report = effk.compress(model, Nearest(bits=4, embedding_bits=8))
    assert type(model.model.embed_tokens) is WqEmbedding and type(model.lm_head) is WqTiedHead
    assert model.lm_head._embedding is model.model.embed_tokens
    assert "lm_head" not in report.skipped
    plain = effk.compress(small_model("llama"), Nearest(bits=4))
    rows, width = 97, 72
    assert plain.model_bytes_after - report.model_bytes_after == rows * width * 4 - rows * (width + 2 * 2)


@pytest.mark.parametrize("ignore", [("lm_head",), ()])
def test_a_head_of_its_own_has_eight_bits_too(ignore: tuple[str, ...]) -> None:
    """Unless the recipe compresses it like any other layer."""
    model = small_model("qwen2")
    report = effk.compress(model, Nearest(bits=4, embedding_bits=8, ignore=ignore))
    assert type(model.lm_head) is WqLinear and model.lm_head.bits == (8 if ignore else 4)
    assert set(report.embedding) == {"model.embed_tokens"} | ({"lm_head"} if ignore else set())
    assert report.nominal_bits == 4 and "lm_head" not in report.skipped
    for name, entry in report.embedding.items():
        assert (entry.bits, entry.weights, entry.bytes_before) == (
            8,
            97 * 72,
            4 * 97 * 72,
        ) and 0 < entry.error < 0.01, name


def test_the_function_of_eight_bits_is_nearly_the_model() -> None:
    for name in MODELS:
        model = small_model(name)
        ids = token_batches(1)[0]
        with torch.no_grad():
            before = model(ids).logits
            effk.compress(model, Nearest(bits=8, embedding_bits=8))
            error = (model(ids).logits - before).norm() / before.norm()
        assert error < 0.02, name


def test_blocks_that_read_one_input_share_a_call() -> None:
    report = effk.compress(small_model("llama"), Nearest(bits=4))
    assert len(report.fused) == 6
    assert report.fused["model.layers.0.mlp.gate_proj+up_proj"] == (
        "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj",
    )  # fmt: skip
    model = small_model("llama")
    mixed = effk.compress(model, Nearest(bits=4, per_layer={"*.k_proj": {"compute": "int8"}}))
    names = mixed.fused["model.layers.0.self_attn.q_proj+k_proj+v_proj"]
    assert [name.rpartition(".")[2] for name in names] == ["q_proj", "v_proj"], "another compute form stays out"
    assert effk.compress(small_model("gpt2"), Nearest()).fused == {}
    assert effk.compress(small_model("llama"), Nearest(fuse=False)).fused == {}


def test_fusing_changes_no_bit() -> None:
    ids = token_batches(1)[0]
    for compute in ("float", "int8"):
        logits = []
        for fuse in (True, False):
            model = small_model("llama")
            effk.compress(model, Nearest(bits=4, compute=compute, fuse=fuse))
            with torch.no_grad():
                logits.append(model(ids).logits)
        assert torch.equal(*logits)


def test_compute_is_what_the_recipe_says() -> None:
    model = small_model("llama")
    effk.compress(model, Nearest(compute="float", per_layer={"*.down_proj": {"compute": "int8"}}))
    forms = {name: m.compute for name, m in model.named_modules() if isinstance(m, WqLinear)}
    assert all((form == "int8") == name.endswith("down_proj") for name, form in forms.items())


def test_package_is_the_function() -> None:
    assert callable(effk.compress) and effk.compress.compress is compress
    assert effk.compress.registry is registry


def refused(
    message: str, model: nn.Module, recipe: Recipe, error: type[Exception] = ValueError, **arguments: object
) -> None:
    """Compression raises ``message`` and the model is bit for bit what it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=message):
        effk.compress(model, recipe, **arguments)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before)


def test_refusals_come_before_any_work() -> None:
    llama = small_model("llama")
    refused(
        r"per_layer: expected patterns that match .* got \['\*.c_attn'\]", llama, Nearest(per_layer={"*.c_attn": {}})
    )
    refused("calib: expected at least one batch", llama, Nearest(hessian=True))
    refused("expected at least one linear layer", llama, Nearest(ignore=("*",)))
    refused(r"expected ids in \[0, 97\)", llama, Nearest(), calib=[torch.full((1, 4), 200)])
    refused("recipe: expected one of .*, got dict", llama, {"bits": 4}, TypeError)
    refused("embedding_bits: expected None for this model", nn.Sequential(nn.Linear(32, 4)), Nearest(embedding_bits=8))
    damaged = small_model("llama")
    damaged.model.embed_tokens.weight.data[3, 4] = float("nan")
    refused("embedding_bits: .* holds NaN or Inf", damaged, Nearest(embedding_bits=8))
    damaged = small_model("llama")
    damaged.model.layers[2].mlp.up_proj.weight.data[3, 4] = float("inf")
    refused("model.layers.2.mlp.up_proj.weight: expected finite values", damaged, Nearest())


def test_layers_that_cannot_be_compressed_say_why() -> None:
    class Odd(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(32, 16), Odd(16, 16), nn.Linear(16, 8, dtype=torch.float64), nn.Linear(8, 4))
    model[3].weight = nn.Parameter(torch.empty(0, 8))
    report = effk.compress(model, Nearest())
    assert set(report.layers) == {"0"}
    assert report.skipped == {
        "1": "is a Odd, not a plain nn.Linear", "2": "weight is torch.float64", "3": "weight is empty",
    }  # fmt: skip


def test_a_module_under_two_names_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    model.add_module("again", model[0])
    report = effk.compress(model, Nearest())
    assert set(report.layers) == {"2"} and report.skipped == {"0": "shares its weight with again"}


def test_progress_is_told() -> None:
    told: list[tuple[str, int, int]] = []
    effk.compress(small_model("gpt2"), Nearest(), progress=lambda *step: told.append(step))
    assert [step for step in told if step[0] == "apply"] == [("apply", done, 12) for done in range(13)]


def test_a_wrong_kernel_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-check compares each layer's kernel with the stored weight."""
    original = WqLinear.from_weight.__func__

    def corrupt(cls: type[WqLinear], *args: object, **kwargs: object) -> WqLinear:
        module = original(cls, *args, **kwargs)
        module.packed.view(-1)[0] ^= 1  # one bit of one code
        return module

    monkeypatch.setattr(WqLinear, "from_weight", classmethod(corrupt))
    with pytest.raises(RuntimeError, match="expected the kernel to match the stored weight"):
        effk.compress(small_model("llama"), Nearest(bits=4))
