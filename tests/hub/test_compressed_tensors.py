"""Checkpoints of compressed-tensors: written by hand as its files are, read back; damaged and unknown ones are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from effk.compress.solvers.prune import magnitude
from effk.formats.bitmask import pack_bits
from effk.hub.compressed_tensors import decompress, load_into, sparsity_format, tensors
from effk.nn import BitmaskLinear
from small_models import small_model, token_batches


def parts(w: Tensor, form: str) -> dict[str, Tensor]:
    """The stored parts of one weight."""
    keep = w != 0
    if form == "sparse-24-bitmask":  # exactly two places of four, zeros among them where there are fewer
        groups = keep.unflatten(1, (-1, 4))
        best = groups.to(torch.int8).argsort(dim=2, descending=True, stable=True)[..., :2]
        keep = torch.zeros_like(groups).scatter_(2, best, True).flatten(1)
        compressed = w.view(torch.int8)[keep].view(w.dtype) if w.element_size() == 1 else w[keep]
        shape = torch.tensor(w.shape).reshape(-1, 1)
        return {"shape": shape, "compressed": compressed.reshape(len(w), -1), "bitmask": pack_bits(keep)}
    values = w.view(torch.int8)[keep].view(w.dtype) if w.element_size() == 1 else w[keep]
    counts = keep.sum(1)
    return {
        "shape": torch.tensor(w.shape), "compressed": values, "bitmask": pack_bits(keep),
        "row_offsets": counts.cumsum(0) - counts,
    }  # fmt: skip


def write(folder: Path, state: dict[str, Tensor], form: str, targets: set[str], infix: str = "") -> None:
    out = {}
    for name, tensor in state.items():
        base = name.removesuffix(".weight")
        if form == "dense" or base not in targets:
            out[name] = tensor.clone()
        else:
            out |= {f"{base}{infix}.{part}": value.contiguous() for part, value in parts(tensor, form).items()}
    save_file(out, folder / "model.safetensors")
    config = {"quantization_config": {"quant_method": "compressed-tensors", "sparsity_config": {"format": form}}}
    (folder / "config.json").write_text(json.dumps(config))


def pruned(pattern: str | None = None) -> tuple[nn.Module, dict[str, Tensor], set[str]]:
    model = small_model("opt")  # biases
    targets = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in name}
    with torch.no_grad():
        for name in targets:
            weight = model.get_submodule(name).weight
            weight.copy_(magnitude(weight, 0.5, pattern))
    state = {name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}
    return model, state, targets


@pytest.mark.parametrize(
    ("form", "infix"), (("sparse-bitmask", ""), ("sparse-bitmask", ".weight"), ("sparse-24-bitmask", ""), ("dense", ""))
)
def test_models_come_back(form: str, infix: str, tmp_path: Path) -> None:
    model, state, targets = pruned("2:4" if "24" in form else None)
    write(tmp_path, state, form, targets, infix)
    ids = token_batches(1)[0]
    with torch.no_grad():
        expected = model(ids).logits
        plain = small_model("opt")
        for p in plain.parameters():
            p.fill_(9.0)
        assert load_into(plain, tmp_path) == []
        assert torch.equal(plain(ids).logits, expected)
        sparse = small_model("opt")
        for p in sparse.parameters():
            p.fill_(9.0)
        assert set(load_into(sparse, tmp_path, "fp32")) == targets
        assert sum(isinstance(m, BitmaskLinear) for m in sparse.modules()) == len(targets)
        assert torch.allclose(sparse(ids).logits, expected, atol=1e-4)


def test_types_of_values() -> None:
    w = magnitude(torch.randn(6, 24), 0.5, "2:4")
    kinds = [torch.float32, torch.float16, torch.bfloat16]
    if hasattr(torch, "float8_e4m3fn"):
        kinds.append(torch.float8_e4m3fn)
    for kind in kinds:
        dense = w.to(kind)
        bits = torch.uint8 if dense.element_size() == 1 else kind
        for form in ("sparse-bitmask", "sparse-24-bitmask"):
            stored = parts(dense.view(torch.uint8) if bits == torch.uint8 else dense, form)
            stored["compressed"] = stored["compressed"].view(kind)
            back = decompress("layer", stored)
            assert back.dtype == kind and torch.equal(back.float(), dense.float())


def test_damaged_parts() -> None:
    w = magnitude(torch.randn(6, 20), 0.5)
    good = parts(w, "sparse-bitmask")

    def refused(match: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=match):
            decompress("layer", {k: v for k, v in (good | changes).items() if v is not None})

    assert torch.equal(decompress("layer", good), w)
    refused("layer: expected the parts", bitmask=None)
    refused("layer.shape: expected two integers", shape=torch.ones(3))
    refused("layer.shape: expected positive sides", shape=torch.tensor([1 << 40, 20]))
    refused("layer.shape: expected positive sides", shape=torch.tensor([-6, -20]))
    refused("layer.bitmask: expected torch.uint8", shape=torch.tensor([7, 20]))
    refused("layer.bitmask: expected torch.uint8", bitmask=good["bitmask"].int())
    refused("no bits beyond column 20", bitmask=good["bitmask"] | 128)
    refused("as many as values", compressed=good["compressed"][:-1])
    refused("layer.compressed: expected one dimension", compressed=good["compressed"][None, None])
    refused(r"layer.compressed: expected \[6, 10\]", compressed=good["compressed"][None])
    refused("layer.row_offsets: expected the number of bits", row_offsets=good["row_offsets"] + 1)


def test_formats_are_a_fixed_table(tmp_path: Path) -> None:
    def config(form: object) -> dict[str, Any]:
        return {"quantization_config": {"sparsity_config": {"format": form}}}

    assert sparsity_format({}) == "dense" and sparsity_format({"quantization_config": {"bits": 4}}) == "dense"
    assert (
        sparsity_format({"compression_config": {"sparsity_config": {"format": "sparse-bitmask"}}}) == "sparse-bitmask"
    )
    for form in ("os", "torch.nn", "", None, ["dense"], "marlin-24"):
        with pytest.raises(ValueError, match="sparsity_config.format: expected one of"):
            sparsity_format(config(form))
    with pytest.raises(ValueError, match="expected an object"):
        sparsity_format({"quantization_config": "dense"})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"expected \*.safetensors"):
        list(tensors(tmp_path))


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    _, state, targets = pruned()
    name = sorted(targets)[0]
    write(tmp_path, {k: v for k, v in state.items() if k != f"{name}.weight"}, "sparse-bitmask", targets)
    with pytest.raises(ValueError, match="no tensor that the files lack"):
        load_into(small_model("opt"), tmp_path)
    write(tmp_path, state | {f"{name}.weight": torch.ones(3, 3)}, "sparse-bitmask", targets)
    with pytest.raises(ValueError, match=f"{name}.weight: expected a tensor of the model"):
        load_into(small_model("opt"), tmp_path)
