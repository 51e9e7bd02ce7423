"""Sparse networks while a model is loaded: modules that hold tensors as the file does, and the packing of these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..compress.layers import replace_module
from ..formats.neuron import stored_shapes
from ..nn.input_sparse_linear import InputSparseLinear
from ..nn.relu_ffn import SparseFFN
from ..nn.relu_norm import ReluNorm
from .sparse_record import PARTS, build_selector


class StoredSparse(nn.Module):
    """The tensors of one module as a file holds them, for a checkpoint loader to fill; compare
    :class:`.stored.StoredWeight`."""

    def __init__(self, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        super().__init__()
        self.geometry_tensors = tuple(shapes)
        for name, (shape, dtype) in shapes.items():
            part, _, leaf = name.rpartition(".")
            if part and part not in self._modules:
                self.add_module(part, nn.Module())
            owner = self.get_submodule(part) if part else self
            owner.register_buffer(leaf, torch.empty(shape, dtype=dtype))

    def tensor(self, name: str) -> Tensor | None:
        """One of them, or None."""
        part, _, leaf = name.rpartition(".")
        return self.get_submodule(part)._buffers[leaf] if name in self.geometry_tensors else None


def place_sparse(model: nn.Module, record: Mapping[str, Any], check_target: Callable[..., None]) -> None:
    """Put modules to be filled in place of what the model was built with."""
    for name, entry in record.get("relu_ffn", {}).items():
        for other in (name, *entry["silent"]):
            _expect_module(model, other)
        d, f = entry["d"], entry["f"]
        shapes = {
            f"{part}.{key}": kind
            for part in (PARTS if entry["gated"] else PARTS[1:])
            for key, kind in stored_shapes(entry["rows"], entry["group"], f, d).items()
        }
        shapes |= {
            f"{part}_bias": ((d if part == "down" else f,), torch.float32)
            for part, there in zip(PARTS, entry["biases"], strict=True)
            if there
        }
        if entry["param"]:
            shapes["param"] = ((entry["param"],), torch.float32)
        _check_width(model, name, d)
        stored = StoredSparse(shapes)
        if entry["selector"] is not None:
            stored.selector = build_selector(entry["selector"]).to_empty(device="cpu").requires_grad_(False)
        replace_module(model, name, stored)
        for other in entry["silent"]:
            replace_module(model, other, nn.Identity())
    for name, entry in record.get("input_sparse", {}).items():
        check_target(model, name, {"n": entry["n"], "k": entry["k"]}, transposed_ok=True)
        shapes = {
            f"columns.{k}": v for k, v in stored_shapes(entry["rows"], entry["group"], entry["k"], entry["n"]).items()
        }
        shapes |= {"bias": ((entry["n"],), torch.float32)} if entry["bias"] else {}
        shapes |= {"threshold": ((entry["threshold"],), torch.float32)} if entry["threshold"] else {}
        replace_module(model, name, StoredSparse(shapes))
    for name in record.get("relu_norms", []):
        _expect_module(model, name)
        replace_module(model, name, ReluNorm(model.get_submodule(name)))


def finish_sparse(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Pack what was loaded.

    Raises:
        ValueError: naming the module whose numbers are not legal.
    """
    for name, entry in record.get("relu_ffn", {}).items():
        held: StoredSparse = model.get_submodule(name)
        parts = PARTS if entry["gated"] else PARTS[1:]
        try:
            module = SparseFFN.from_stored(
                {part: dict(held.get_submodule(part)._buffers) for part in parts},
                entry["d"], entry["f"], entry["gate"], entry["rows"], entry["group"],
                [held.tensor(f"{part}_bias") for part in PARTS], held.tensor("param"),
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"load: {name}: {error}") from None
        module.silent = tuple(entry["silent"])
        module.selector = held._modules.get("selector")
        replace_module(model, name, module.eval())
    for name, entry in record.get("input_sparse", {}).items():
        held = model.get_submodule(name)
        try:
            module = InputSparseLinear.from_stored(
                dict(held.columns._buffers), entry["n"], entry["k"], entry["rows"], entry["group"],
                held.tensor("bias"), held.tensor("threshold"),
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"load: {name}: {error}") from None
        replace_module(model, name, module.eval())


def _expect_module(model: nn.Module, name: str) -> None:
    try:
        model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"load: {name}: expected a module of {type(model).__name__}, got none of that name") from None


def _check_width(model: nn.Module, name: str, d: int) -> None:
    """The network's inputs, as the model was built, before anything of that size is allocated."""
    place = model.get_submodule(name)
    sides = {
        side
        for module in place.modules()
        if getattr(module, "weight", None) is not None
        for side in module.weight.shape
    }
    if d not in sides:
        raise ValueError(f"load: {name}: expected d among the model's {sorted(sides)}, got {d}")
