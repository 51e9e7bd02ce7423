"""Mixtures with compressed experts come back bit for bit by every road; damaged records are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import effk
from effk.compress.apply import model_bytes
from effk.compress.passes.moqe import MoQE
from effk.nn import WqGroupedLinear
from mixtures import MIXTURES, small_mixture
from small_models import token_batches

IDS = token_batches(1)[0]


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    return model(IDS).logits


def compressed(name: str, **fields: Any) -> nn.Module:
    model = small_mixture(name)
    effk.compress(model, MoQE(**fields))
    return model


@pytest.mark.parametrize(
    "fields", ({"bits": 2}, {"bits": 3, "group_size": 32, "mode": "asym", "compute": "int8"}, {"embedding_bits": 8})
)
@pytest.mark.parametrize("name", MIXTURES)
def test_every_road_leads_back(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model = compressed(name, **fields)
    expected = output(model)
    effk.save(model, tmp_path / "a")
    loaded = effk.load(tmp_path / "a")
    assert torch.equal(output(loaded), expected) and type(loaded) is type(model)
    assert loaded.state_dict().keys() == model.state_dict().keys() and loaded._effk_recipe == model._effk_recipe
    assert torch.equal(output(AutoModelForCausalLM.from_pretrained(tmp_path / "a")), expected)
    for source, road in ((loaded, "b"), (model, "c")):
        source.save_pretrained(tmp_path / road)
        assert torch.equal(output(effk.load(tmp_path / road)), expected)
    assert loaded.to(torch.bfloat16).model.layers[1].mlp.experts.down_proj.scales.dtype == torch.float16


def test_the_file_holds_the_canonical_form_and_what_the_report_counts(tmp_path: Path) -> None:
    model = compressed("mixtral", bits=2)
    effk.save(model, tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    held = load_file(path)
    qweight = held["model.layers.0.mlp.experts.gate_up_proj.qweight"]
    assert qweight.dtype == torch.uint8 and tuple(qweight.shape) == (4 * 208, 18)
    assert sum(t.numel() * t.element_size() for t in held.values()) == model_bytes(model)


def test_a_stack_that_stayed_plain_comes_back(tmp_path: Path) -> None:
    model = small_mixture("mixtral")
    effk.compress(model, MoQE(ignore=("lm_head", "*.0.mlp.experts.down_proj")))
    effk.save(model, tmp_path)
    loaded = effk.load(tmp_path)
    assert torch.equal(output(loaded), output(model))
    assert isinstance(loaded.model.layers[0].mlp.experts.down_proj, nn.Parameter)
    assert isinstance(loaded.model.layers[0].mlp.experts.gate_up_proj, WqGroupedLinear)


BAD: tuple[tuple[str, Callable[[dict[str, Any]], Any], str], ...] = (
    ("experts", lambda e: e.update(experts=3), "a divisor of the 832 rows"),
    ("experts", lambda e: e.update(experts=True), "a divisor"),
    ("experts", lambda e: e.update(experts=2), r"the model's stack \[4, 208, 72\], got \[2, 416, 72\]"),
    ("k", lambda e: e.update(k=80), r"the model's stack"),
    ("codebook", lambda e: e.update(codebook="shared"), "integer codes alone"),
    ("bits", lambda e: e.update(bits=5), "bits: expected one of"),
    ("compute", lambda e: e.update(compute="fp8"), "'float' or 'int8'"),
    ("compute", lambda e: e.pop("compute"), "an object with"),
)


@pytest.mark.parametrize(("field", "spoil", "expected"), BAD, ids=[f"{f}-{i}" for i, (f, *_) in enumerate(BAD)])
def test_damaged_records(field: str, spoil: Callable[[dict[str, Any]], Any], expected: str, tmp_path: Path) -> None:
    effk.save(compressed("mixtral"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    spoil(config["quantization_config"]["experts"]["model.layers.0.mlp.experts.gate_up_proj"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"load: .*{expected}"):
        effk.load(tmp_path)


def test_a_name_that_the_model_lacks(tmp_path: Path) -> None:
    effk.save(compressed("mixtral"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    experts = config["quantization_config"]["experts"]
    experts["model.layers.7.mlp.experts.down_proj"] = experts.pop("model.layers.1.mlp.experts.down_proj")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"layers\.7\.mlp\.experts\.down_proj: expected experts in MixtralForCausalLM"):
        effk.load(tmp_path)
