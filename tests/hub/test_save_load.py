"""Saved models come back bit for bit, by every road, in a fresh process; what is damaged is refused by name."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import effk
from effk.hub.checkpoint import file_digest
from effk.nn import WqLinear
from small_models import MODELS, Nearest, small_model, token_batches

IDS = token_batches(1)[0]


def compressed(name: str = "llama", dtype: torch.dtype = torch.float32, **fields: Any) -> nn.Module:
    model = small_model(name, dtype)
    effk.compress(model, Nearest(**{"bits": 4, "outliers": 0.01, "embedding_bits": 8} | fields))
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fields", [{}, {"embedding_bits": None, "bits": 3, "outliers": 0.0, "compute": "int8"}])
def test_every_road_leads_back(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model = compressed(name, **fields)
    expected = logits(model)
    effk.save(model, tmp_path / "a")
    loaded = effk.load(tmp_path / "a")
    assert torch.equal(logits(loaded), expected) and not loaded.training
    assert type(loaded) is type(model)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert loaded._effk_recipe == Nearest(**{"bits": 4, "outliers": 0.01, "embedding_bits": 8} | fields).to_json()
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert torch.equal(logits(auto), expected)
    for source, road in ((auto, "b"), (model, "c")):  # transformers' own saving, of a loaded and of a new model
        source.save_pretrained(tmp_path / road)
        assert torch.equal(logits(effk.load(tmp_path / road)), expected)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / road)), expected)
    effk.save(effk.load(tmp_path / "a"), tmp_path / "a")  # over itself
    assert torch.equal(logits(effk.load(tmp_path / "a")), expected)


def test_fresh_process_and_either_import_order(tmp_path: Path) -> None:
    model = compressed()
    effk.save(model, tmp_path / "model")
    torch.save((IDS, logits(model)), tmp_path / "expected.pt")
    body = (
        "import torch; ids, expected = torch.load('expected.pt'); torch.set_num_threads(2)\n"
        "model = AutoModelForCausalLM.from_pretrained('model')\n"
        "assert torch.equal(model(ids).logits, expected)\n"
    )
    for first in (
        "import effk\nfrom transformers import AutoModelForCausalLM\n",
        "from transformers import AutoModelForCausalLM\nimport effk\n",
    ):
        subprocess.run([sys.executable, "-c", first + body], cwd=tmp_path, check=True, timeout=120)


def test_dtype_can_be_chosen_and_stored_numbers_stay(tmp_path: Path) -> None:
    model = compressed("qwen2")
    effk.save(model, tmp_path)
    half = effk.load(tmp_path, dtype=torch.bfloat16)
    name = "model.layers.0.self_attn.q_proj"
    assert half.dtype == half.get_submodule(name).bias.dtype == torch.bfloat16
    assert logits(half).dtype == torch.bfloat16
    for a, b in zip(model.modules(), half.modules(), strict=True):
        if isinstance(a, WqLinear):
            assert (
                torch.equal(a.packed, b.packed) and torch.equal(a.scales, b.scales) and a.scales.dtype == b.scales.dtype
            )
    effk.save(half, tmp_path)
    assert effk.load(tmp_path).dtype == torch.bfloat16
    assert torch.equal(logits(effk.load(tmp_path)), logits(half))


def test_files_hold_only_the_canonical_form(tmp_path: Path) -> None:
    model = compressed()
    effk.save(model, tmp_path)
    (weights,) = tmp_path.glob("*.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    record = config["quantization_config"]
    assert config["transformers_weights"] == weights.name == record["weights"]["file"]
    assert (record["weights"]["sha256"], record["weights"]["bytes"]) == file_digest(weights)
    assert record["weights"]["sha256"].startswith(weights.stem.removeprefix("effk-"))
    assert record["layers"]["model.layers.0.mlp.up_proj"]["compute"] == "float"
    held = load_file(weights)
    assert {name.rpartition(".")[2] for name in held} == {
        "qweight",
        "scales",
        "out_ptr",
        "out_col",
        "out_val",
        "weight",
    }
    layer = model.model.layers[0].mlp.up_proj.to_weight()
    assert all(torch.equal(held[f"model.layers.0.mlp.up_proj.{k}"], v) for k, v in layer.to_state().items())
    data = sum(t.numel() * t.element_size() for t in held.values())
    header = struct.unpack("<Q", weights.read_bytes()[:8])[0]
    assert weights.stat().st_size == 8 + header + data


def test_saving_over_another_model_removes_its_weights_only(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "left.effk-tmp").write_text("from an interrupted save")
    effk.save(compressed(bits=4), tmp_path)
    first = {path.name for path in tmp_path.iterdir()}
    effk.save(compressed(bits=2), tmp_path)
    second = {path.name for path in tmp_path.iterdir()}
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 and first - second == {
        n for n in first if n.startswith("effk-")
    }
    assert (tmp_path / "notes.txt").read_text() == "mine" and not list(tmp_path.glob("*.effk-tmp"))


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a model with compressed layers, got none"):
        effk.save(small_model("llama"), tmp_path / "none")
    with pytest.raises(ValueError, match="expected a transformers model with a config, got Sequential"):
        effk.save(nn.Sequential(nn.Linear(32, 4)), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        effk.save(compressed(), tmp_path / "file")


LAYER = "model.layers.1.mlp.up_proj"


def edit_config(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change tensors and make hash and size fit again: what somebody who means harm would do."""
    (weights,) = directory.glob("*.safetensors")
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights)
    digest, size = file_digest(weights)
    edit_config(directory, lambda c: c["quantization_config"]["weights"].update(sha256=digest, bytes=size))


def put(name: str, index: int, value: int) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        wide = tensors[name].to(torch.float64)
        wide.view(-1)[index] = value
        tensors[name] = (
            wide.to(torch.int64).to(tensors[name].dtype) if value == int(value) else wide.to(tensors[name].dtype)
        )

    return change


RECORD_EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "version": (lambda r: r.update(version=2), "version: expected 1, got 2"),
    "method": (lambda r: r.update(quant_method="gptq"), "quant_method: expected 'effk', got 'gptq'"),
    "layers": (lambda r: r.update(layers=[]), "layers: expected an object"),
    "bits": (lambda r: r["layers"][LAYER].update(bits=5), f"{LAYER}: geometry: bits"),
    "other bits": (lambda r: r["layers"][LAYER].update(bits=8), f"{LAYER}.qweight: expected"),
    "shape": (lambda r: r["layers"][LAYER].update(n=105), f"{LAYER}: expected the model's shape"),
    "huge": (lambda r: r["layers"][LAYER].update(n=10**15), f"{LAYER}: expected the model's shape"),
    "negative": (lambda r: r["layers"][LAYER].update(k=-1), "k: expected a non-negative integer"),
    "group": (lambda r: r["layers"][LAYER].update(group_size=64), f"{LAYER}.scales: expected"),
    "scales": (lambda r: r["layers"][LAYER].update(scale_dtype="float32"), f"{LAYER}.scales: expected torch.float32"),
    "zeros": (lambda r: r["layers"][LAYER].update(zeros=True), f"{LAYER}.zeros"),
    "outliers": (lambda r: r["layers"][LAYER].update(outliers=3), f"{LAYER}.out_col: expected"),
    "no outliers": (lambda r: r["layers"][LAYER].update(outliers=None), "unknown"),
    "compute": (lambda r: r["layers"][LAYER].update(compute="int4"), f"{LAYER}.compute: expected"),
    "bias": (lambda r: r["layers"][LAYER].update(bias=True), f"{LAYER}.bias"),
    "field gone": (lambda r: r["layers"][LAYER].pop("bits"), f"{LAYER}: geometry: expected fields"),
    "layer gone": (lambda r: r["layers"].pop(LAYER), f"{LAYER}.weight"),
    "layer unknown": (
        lambda r: r["layers"].update({"model.layers.9.x": r["layers"][LAYER]}),
        "model.layers.9.x: expected a mod",
    ),
    "embedding": (lambda r: r.update(embedding=None), "model.embed_tokens"),
    "head": (lambda r: r["embedding"].update(head="model.norm"), "model.norm: expected the model's shape"),
    "file": (lambda r: r["weights"].update(file="../secret.safetensors"), "expected a plain file name|no such file"),
    "digest": (lambda r: r["weights"].update(sha256="0" * 64), "the file is damaged"),
    "weights": (lambda r: r.update(weights={"file": 3}), "weights: expected null or an object"),
    "fuse": (lambda r: r.update(fuse="yes"), "fuse: expected a boolean"),
}

TENSOR_EDITS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "missing": (lambda t: t.pop(f"{LAYER}.scales"), rf"\['{LAYER}.scales'\] missing"),
    "surplus": (lambda t: t.update(extra=torch.zeros(1)), r"\['extra'\] unknown"),
    "shape": (lambda t: t.update({f"{LAYER}.scales": torch.ones(3, 3).half()}), f"{LAYER}.scales: expected"),
    "dtype": (
        lambda t: t.update({f"{LAYER}.qweight": t[f"{LAYER}.qweight"].to(torch.int8)}),
        f"{LAYER}.qweight: expected",
    ),
    "nan": (lambda t: t[f"{LAYER}.scales"].fill_(float("nan")), f"{LAYER}: scales: expected finite"),
    "pointers": (put(f"{LAYER}.out_ptr", 1, 1_000_000), f"{LAYER}: out_ptr: expected"),
    "negative pointer": (put(f"{LAYER}.out_ptr", 1, -5), f"{LAYER}: out_ptr: expected"),
    "column": (put(f"{LAYER}.out_col", -1, 60_000), f"{LAYER}: out_col: expected columns in"),
    "outlier": (lambda t: t[f"{LAYER}.out_val"].fill_(float("inf")), f"{LAYER}: out_val: expected finite"),
    "embedding": (lambda t: t["model.embed_tokens.scales"].fill_(float("inf")), "model.embed_tokens: scales: expected"),
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("original")
    effk.save(compressed(), directory)
    return directory


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    for path in original.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize("case", RECORD_EDITS)
def test_tampered_record(case: str, copy: Path) -> None:
    change, message = RECORD_EDITS[case]
    edit_config(copy, lambda config: change(config["quantization_config"]))
    with pytest.raises(ValueError, match=message):
        effk.load(copy)


@pytest.mark.parametrize("case", TENSOR_EDITS)
def test_tampered_tensors_with_a_fitting_hash(case: str, copy: Path) -> None:
    change, message = TENSOR_EDITS[case]
    rewrite(copy, change)
    for load in (effk.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(copy)


def test_missing_and_broken_files(copy: Path) -> None:
    (weights,) = copy.glob("*.safetensors")
    data = weights.read_bytes()
    for damaged in (data[: len(data) // 2], data[:4], b"", data + b"\0", data[:-1] + bytes([data[-1] ^ 1])):
        weights.write_bytes(damaged)
        for load in (effk.load, AutoModelForCausalLM.from_pretrained):
            with pytest.raises(ValueError, match="the file is damaged"):
                load(copy)
    weights.unlink()
    with pytest.raises(ValueError, match="got no such file"):
        effk.load(copy)
    (copy / "config.json").write_bytes(b'{"a": \xff')
    with pytest.raises(ValueError, match="expected JSON"):
        effk.load(copy)
    (copy / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="quant_method: expected 'effk', got None"):
        effk.load(copy)
    (copy / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="expected a saved model"):
        effk.load(copy)


def test_architectures_are_classes_of_transformers_only(copy: Path) -> None:
    for name in ("os.system", "Trainer", "NoSuchModel", None):
        edit_config(copy, lambda config, name=name: config.update(architectures=[name]))
        with pytest.raises(ValueError, match="architectures: expected a model class"):
            effk.load(copy)
