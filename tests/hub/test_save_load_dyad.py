"""Models with DYAD layers come back bit for bit by every road; damaged records are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import effk
from effk.compress.passes.dyad import Dyad, init_dyad
from effk.compress.passes.rtn import Rtn
from effk.nn import DyadLinear, WqLinear
from small_models import FEEDFORWARDS, small_model, token_batches

IDS = token_batches(1)[0]
FIELDS: tuple[dict[str, Any], ...] = ({}, {"rank": 3, "variant": "dt"}, {"start": "random", "variant": "ot"})


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    out = model(IDS)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def converted(name: str, **fields: Any) -> nn.Module:
    model = small_model(name)
    effk.compress(model, Dyad(n=4, **fields), token_batches(8))
    return model


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("name", FEEDFORWARDS)
def test_every_road_leads_back(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model = converted(name, **fields)
    expected, auto = output(model), AutoModel if name == "bert" else AutoModelForCausalLM
    effk.save(model, tmp_path / "a")
    loaded = effk.load(tmp_path / "a")
    assert torch.equal(output(loaded), expected) and type(loaded) is type(model) and not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert loaded._effk_recipe == Dyad(n=4, **fields).to_json()
    assert torch.equal(output(auto.from_pretrained(tmp_path / "a")), expected)
    for source, road in ((loaded, "b"), (model, "c")):
        source.save_pretrained(tmp_path / road)
        assert torch.equal(output(effk.load(tmp_path / road)), expected)
    assert all(parameter.requires_grad for parameter in loaded.parameters()), "training can go on"


def test_a_model_trained_from_scratch_is_saved_like_any_other(tmp_path: Path) -> None:
    model = small_model("opt")
    init_dyad(model, n=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    assert torch.equal(output(effk.load(tmp_path)), output(model))


def test_another_dtype(tmp_path: Path) -> None:
    effk.save(converted("llama", rank=2), tmp_path)
    half = effk.load(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and output(half).dtype == torch.bfloat16


def test_attention_can_be_quantised_beside_it(tmp_path: Path) -> None:
    model = converted("llama")
    effk.compress(model, Rtn(bits=8))
    assert isinstance(model.model.layers[0].self_attn.q_proj, WqLinear)
    assert isinstance(model.model.layers[0].mlp.up_proj, DyadLinear)
    effk.save(model, tmp_path)
    assert torch.equal(output(effk.load(tmp_path)), output(model))


def quantised(**fields: Any) -> nn.Module:
    torch.manual_seed(0)
    config = small_model("llama").config.to_dict() | {"hidden_size": 96, "intermediate_size": 160}
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    effk.compress(model, Dyad(n=2, group_size=32, **fields), token_batches(8))
    return model


@pytest.mark.parametrize(
    "fields",
    [{"bits": 4}, {"bits": 8, "compute": "int8", "variant": "ot"}, {"bits": 3, "rank": 2, "variant": "dt"}],
)
def test_quantised_blocks(fields: dict[str, Any], tmp_path: Path) -> None:
    model = quantised(**fields)
    effk.save(model, tmp_path / "a")
    loaded = effk.load(tmp_path / "a")
    assert torch.equal(output(loaded), output(model)) and loaded.state_dict().keys() == model.state_dict().keys()
    loaded.save_pretrained(tmp_path / "b")
    assert torch.equal(output(AutoModelForCausalLM.from_pretrained(tmp_path / "b")), output(model))
    (weights,) = (tmp_path / "a").glob("*.safetensors")
    inner = "dyad." if "rank" in fields else ""
    held = load_file(weights)
    assert held[f"model.layers.1.mlp.up_proj.{inner}qweight"].dtype == torch.uint8, "the canonical form"
    assert f"model.layers.1.mlp.up_proj.{inner}packed" not in held


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f["weight"].update(n=192), r"up_proj.weight: expected \[160, 96\]"),
        (lambda f: f["weight"].update(bits=5), "up_proj.weight: geometry: bits"),
        (lambda f: f["weight"].pop("compute"), "up_proj.weight: expected an object"),
        (lambda f: f.update(variant="dt"), r"up_proj.weight: expected \[320, 48\]"),
        (lambda f: f.update(n_dyad=4), r"up_proj.weight: expected \[160, 48\]"),
        (lambda f: f.update(weight=None), "missing"),
    ],
)
def test_tampered_records_of_quantised_blocks(
    change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    effk.save(quantised(bits=4), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config["quantization_config"]["dyad"][LAYER])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        effk.load(tmp_path)


LAYER = "model.layers.1.mlp.up_proj"
EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "blocks": (lambda d: d[LAYER].update(n_dyad=8), f"{LAYER}.wl: expected"),
    "blocks that do not divide": (lambda d: d[LAYER].update(n_dyad=5), f"{LAYER}.n_dyad: expected a divisor"),
    "no blocks": (lambda d: d[LAYER].update(n_dyad=0), f"{LAYER}.n_dyad: expected a divisor"),
    "variant": (lambda d: d[LAYER].update(variant="up"), f"{LAYER}.variant: expected"),
    "rank": (lambda d: d[LAYER].update(rank=2), r"missing"),
    "negative rank": (lambda d: d[LAYER].update(rank=-2), f"{LAYER}.rank: expected"),
    "bias": (lambda d: d[LAYER].update(bias=False), "unknown"),
    "sides": (lambda d: d[LAYER].update(in_features=76), f"{LAYER}: expected the model's shape"),
    "huge": (lambda d: d[LAYER].update(in_features=4 * 10**15), f"{LAYER}: expected the model's shape"),
    "a field too many": (lambda d: d[LAYER].update(colour="red"), f"{LAYER}: expected an object"),
    "type": (lambda d: d[LAYER].update(n_dyad="4"), f"{LAYER}: expected an object"),
    "gone": (lambda d: d.pop(LAYER), f"{LAYER}.weight"),
    "unknown": (lambda d: d.update({"model.layers.9.x": d[LAYER]}), "model.layers.9.x: expected a module"),
}


@pytest.mark.parametrize("case", EDITS)
def test_tampered_records(case: str, tmp_path: Path) -> None:
    effk.save(converted("llama"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change, message = EDITS[case]
    change(config["quantization_config"]["dyad"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        effk.load(tmp_path)
