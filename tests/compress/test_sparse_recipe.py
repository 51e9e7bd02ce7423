"""The recipe "sparse": zeros where they are planned, sizes as planned, saved and loaded bit for bit, bad fields refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import effk
from effk.compress.apply import model_bytes
from effk.compress.passes.sparse import Sparse
from effk.nn import BitmaskLinear
from small_models import small_model, token_batches

IDS = token_batches(1)[0]
SETTINGS: tuple[dict[str, Any], ...] = (
    {"compute": "int8"},
    {"method": "wanda", "sparsity": 0.75, "group_size": 64},
    {"method": "magnitude", "values": "bf16", "pattern": "1:4"},
    {"pattern": "2:4", "values": "fp32"},
)


def sparse_layers(model: nn.Module) -> dict[str, BitmaskLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BitmaskLinear)}


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("fields", SETTINGS)
def test_compress_save_load(fields: dict[str, Any], tmp_path: Path) -> None:
    model = small_model("llama")
    recipe = Sparse(**fields)
    report = effk.compress(model, recipe, token_batches(4))
    layers = sparse_layers(model)
    assert layers and set(layers) == set(report.layers)
    share = {"1:4": 0.75, "2:4": 0.5}.get(recipe.pattern, recipe.sparsity)
    for name, module in layers.items():
        zeros = float((module.dequantize() == 0).float().mean())
        assert share - 0.01 <= zeros <= share + 0.05, name  # int8 adds what rounds to 0
        assert module.compute == recipe.compute
        if recipe.pattern is not None:
            kept, width = map(int, recipe.pattern.split(":"))
            assert int((module.dequantize().unflatten(1, (-1, width)) != 0).sum(2).max()) <= kept
    expected = logits(model)
    effk.save(model, tmp_path)
    loaded = effk.load(tmp_path)
    assert torch.equal(logits(loaded), expected) and model_bytes(loaded) == model_bytes(model)
    record = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["bitmask"]
    assert set(record) == set(layers)


def test_second_order_is_better(tmp_path: Path) -> None:
    batches, before = token_batches(8), logits(small_model("llama"))
    errors = {}
    for method in ("sparsegpt", "magnitude"):
        model = small_model("llama")
        effk.compress(model, Sparse(method=method, sparsity=0.6, values="fp32"), batches)
        errors[method] = float((logits(model) - before).norm())
    assert errors["sparsegpt"] < 0.9 * errors["magnitude"]


def test_keep_takes_the_zeros_that_are_there() -> None:
    model = small_model("llama")
    linears = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in f".{name}"]
    with torch.no_grad():
        for linear in linears[1:]:
            linear.weight *= (torch.rand_like(linear.weight) < 0.4).float()
    expected = logits(model)
    report = effk.compress(model, Sparse(method="keep", values="fp32"))
    assert len(sparse_layers(model)) == len(linears) - 1 and len(report.skipped) >= 1
    assert torch.allclose(logits(model), expected, atol=1e-5)


def test_bad_fields() -> None:
    for fields, match in (
        ({"sparsity": 0.1}, r"sparsity: expected a share above 0.125"),
        ({"method": "random"}, "method: expected one of"),
        ({"values": "int4"}, "values: expected one of"),
        ({"pattern": "1:4"}, "pattern: expected None or '2:4' for 'sparsegpt'"),
        ({"pattern": "4:4", "method": "wanda"}, "expected 'n:m'"),
        ({"values": "bf16", "compute": "int8"}, "compute: expected 'float' unless values are int8"),
        ({"values": "bf16", "group_size": 64}, "group_size: expected 0, or"),
    ):
        with pytest.raises(ValueError, match=match):
            Sparse(**fields)


def test_damaged_record(tmp_path: Path) -> None:
    model = small_model("llama")
    effk.compress(model, Sparse(method="magnitude"))
    effk.save(model, tmp_path)
    config = tmp_path / "config.json"
    good = config.read_text()
    for field, value, match in (
        ("stored", -1, "stored: expected 0 to"),
        ("bits", 4, "bits: expected one of"),
        ("compute", "x", "compute"),
    ):
        body = json.loads(good)
        next(iter(body["quantization_config"]["bitmask"].values()))[field] = value
        config.write_text(json.dumps(body))
        with pytest.raises(ValueError, match=match):
            effk.load(tmp_path)
