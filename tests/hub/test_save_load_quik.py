"""Models with QUIK layers come back bit for bit by every road; damaged records are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

import effk
from effk.compress.apply import model_bytes
from effk.compress.passes.dyad import Dyad
from effk.compress.passes.quik import Quik
from effk.compress.passes.rtn import Rtn
from effk.nn import QuikLinear, WqLinear
from small_models import FEEDFORWARDS, small_model, token_batches

IDS = token_batches(1)[0]
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"quantizer": "sim", "bits": 8, "bits_a": 8, "outliers": 0},
    {"bits_a": 16, "outliers": 6, "embedding_bits": 8},
    {"pattern": "2:4"},
)


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    out = model(IDS)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def compressed(name: str, **fields: Any) -> nn.Module:
    model = small_model(name)
    if name == "bert":
        fields.pop("embedding_bits", None)
    effk.compress(model, Quik(**fields), token_batches(4))
    return model


@pytest.mark.parametrize("fields", SETTINGS)
@pytest.mark.parametrize("name", FEEDFORWARDS)
def test_every_road_leads_back(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model = compressed(name, **fields)
    expected, auto = output(model), AutoModel if name == "bert" else AutoModelForCausalLM
    effk.save(model, tmp_path / "a")
    loaded = effk.load(tmp_path / "a")
    assert torch.equal(output(loaded), expected) and type(loaded) is type(model)
    assert loaded.state_dict().keys() == model.state_dict().keys() and loaded._effk_recipe == model._effk_recipe
    assert torch.equal(output(auto.from_pretrained(tmp_path / "a")), expected)
    for source, road in ((loaded, "b"), (model, "c")):
        source.save_pretrained(tmp_path / road)
        assert torch.equal(output(effk.load(tmp_path / road)), expected)
    shared = [m for m in loaded.modules() if isinstance(m, QuikLinear) and m._shared is not None]
    assert len(shared) == sum(isinstance(m, QuikLinear) and m._shared is not None for m in model.modules())


def test_a_rotated_model_with_an_untied_head(tmp_path: Path) -> None:
    model = compressed("llama", rotate=True)
    effk.save(model, tmp_path / "a")
    loaded = effk.load(tmp_path / "a")
    assert torch.equal(output(loaded), output(model)) and loaded.model.layers[0].mlp.down_proj.rotated
    assert not loaded.config.tie_word_embeddings and loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    loaded.save_pretrained(tmp_path / "b")
    assert torch.equal(output(effk.load(tmp_path / "b")), output(model))


def test_the_file_holds_the_canonical_form_and_what_the_report_counts(tmp_path: Path) -> None:
    model = compressed("llama")
    size = model_bytes(model)
    effk.save(model, tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    held = load_file(path)
    names = {name.rpartition(".")[2] for name in held if ".up_proj." in name}
    assert names == {"qweight", "scales", "fp_idx", "w_out"}
    assert held[f"{LAYER}.w_out"].dtype == torch.float16 and held[f"{LAYER}.fp_idx"].dtype == torch.int32
    assert sum(tensor.numel() * tensor.element_size() for tensor in held.values()) == size


def test_another_dtype(tmp_path: Path) -> None:
    effk.save(compressed("llama"), tmp_path)
    half = effk.load(tmp_path, dtype=torch.bfloat16)
    module = half.model.layers[1].mlp.up_proj
    assert output(half).dtype == torch.bfloat16 and module.scales.dtype == torch.float32
    assert module.to_weight().w_out.dtype == torch.float16


def test_beside_other_methods(tmp_path: Path) -> None:
    model, batches = small_model("llama"), token_batches(8)
    effk.compress(model, Quik(ignore=("lm_head", "*self_attn*")), batches)
    effk.compress(model, Rtn(bits=4))
    assert isinstance(model.model.layers[0].self_attn.q_proj, WqLinear)
    assert isinstance(model.model.layers[0].mlp.up_proj, QuikLinear)
    effk.save(model, tmp_path)
    assert torch.equal(output(effk.load(tmp_path)), output(model))
    other = small_model("llama")
    effk.compress(other, Dyad(n=4), batches)
    effk.compress(other, Quik(bits_a=8), batches)
    effk.save(other, tmp_path / "dyad")
    assert torch.equal(output(effk.load(tmp_path / "dyad")), output(other))


LAYER = "model.layers.1.mlp.up_proj"
EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "bits": (lambda q: q[LAYER].update(bits=8), rf"{LAYER}.bits_a: expected at least 8"),
    "no such bits": (lambda q: q[LAYER].update(bits=5), rf"{LAYER}: geometry: bits: expected"),
    "outliers": (lambda q: q[LAYER].update(outliers=14), rf"{LAYER}\..*: expected"),
    "odd": (lambda q: q[LAYER].update(outliers=15), rf"{LAYER}: geometry: outliers: expected an even"),
    "all": (lambda q: q[LAYER].update(outliers=72), rf"{LAYER}: geometry: outliers: expected 0 to 71"),
    "rows": (lambda q: q[LAYER].update(n=96), f"{LAYER}: expected the model's shape"),
    "huge": (lambda q: q[LAYER].update(n=4 * 10**15), f"{LAYER}: expected"),
    "dtype": (lambda q: q[LAYER].update(out_dtype="bfloat16"), f"{LAYER}.w_out: expected"),
    "rotated": (lambda q: q[LAYER].update(rotated=1), f"{LAYER}: geometry: out_dtype, rotated"),
    "activations": (lambda q: q[LAYER].update(bits_a=6), f"{LAYER}.bits_a: expected"),
    "quantizer": (lambda q: q[LAYER].update(quantizer="paper"), f"{LAYER}.quantizer: expected one of"),
    "bias": (lambda q: q[LAYER].update(bias=True), "missing"),
    "a field too many": (lambda q: q[LAYER].update(colour="red"), f"{LAYER}: geometry: expected fields"),
    "a field less": (lambda q: q[LAYER].pop("bits_a"), f"{LAYER}: expected an object"),
    "pattern": (lambda q: q[LAYER].update(pattern="2:4"), "missing"),
    "no such pattern": (lambda q: q[LAYER].update(pattern="3:4"), f"{LAYER}: geometry: pattern: expected None or"),
    "gone": (lambda q: q.pop(LAYER), f"{LAYER}.weight"),
    "unknown": (lambda q: q.update({"model.layers.9.x": q[LAYER]}), "model.layers.9.x: expected a module"),
}


@pytest.mark.parametrize("case", EDITS)
def test_tampered_records(case: str, tmp_path: Path) -> None:
    effk.save(compressed("llama"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change, message = EDITS[case]
    change(config["quantization_config"]["quik"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        effk.load(tmp_path)
