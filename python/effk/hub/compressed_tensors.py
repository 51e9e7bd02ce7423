"""Reading sparse checkpoints of compressed-tensors: formats "sparse-bitmask", "sparse-24-bitmask" and "dense".

Two forms of a weight ``[n, k]`` are stored beside ordinary tensors, under the name of the module (older files: of its
``weight``)::

    sparse-bitmask      shape, compressed [stored], bitmask uint8 [n, ceil(k / 8)], row_offsets [n]
    sparse-24-bitmask   shape, compressed [n, k / 2], bitmask

Serving engines dropped these formats in 2026; here they become :class:`effk.nn.BitmaskLinear` or dense tensors. The format is
looked up in a table of known names, files are read as untrusted: every size, dtype, bit and offset is checked before use.
Eight-bit floats, which some releases store viewed as int8, are read as what the file's header says.

Source: the files written by compressed-tensors 0.8 to 0.12 (``sparse_compressors``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..formats.bitmask import expand, unpack_bits
from ..nn.bitmask_linear import BitmaskLinear
from ..ops.bitmask_linear import break_even

FORMATS = ("dense", "sparse-bitmask", "sparse-24-bitmask")
_PARTS = ("shape", "compressed", "bitmask", "row_offsets")
_MOST = 1 << 34  # weights of one layer


def sparsity_format(config: Mapping[str, Any]) -> str:
    """The format of a checkpoint by its ``config.json``; "dense" where none is said.

    Raises:
        ValueError: a format that is not in :data:`FORMATS`, or a configuration that is not an object.
    """
    for key in ("compression_config", "quantization_config"):
        quantization = config.get(key)
        if quantization is None:
            continue
        _expect(key, type(quantization).__name__, isinstance(quantization, Mapping), "an object")
        sparsity = quantization.get("sparsity_config") or {}
        _expect(f"{key}.sparsity_config", sparsity, isinstance(sparsity, Mapping), "an object")
        name = sparsity.get("format", "dense")
        known = isinstance(name, str) and name in FORMATS
        _expect(f"{key}.sparsity_config.format", name, known, f"one of {FORMATS}")
        return name
    return "dense"


def decompress(name: str, parts: Mapping[str, Tensor]) -> Tensor:
    """The dense weight of one module from its stored parts.

    Raises:
        ValueError: naming the module and what does not fit.
    """
    missing = [part for part in _PARTS[:3] if part not in parts]
    _expect(name, sorted(parts), not missing, f"the parts {_PARTS[:3]}")
    values, bitmask, sides = parts["compressed"], parts["bitmask"], parts["shape"].flatten()
    integral = not sides.is_floating_point() and sides.numel() == 2
    _expect(f"{name}.shape", sides.tolist(), integral, "two integers")
    n, k = map(int, sides)
    _expect(f"{name}.shape", [n, k], n > 0 and k > 0 and n * k <= _MOST, "positive sides of a layer")
    legal = bitmask.dtype == torch.uint8 and tuple(bitmask.shape) == (n, -(-k // 8))
    _expect(f"{name}.bitmask", f"{bitmask.dtype} {list(bitmask.shape)}", legal, f"torch.uint8 {[n, -(-k // 8)]}")
    if values.dim() == 2:
        _expect(f"{name}.compressed", list(values.shape), tuple(values.shape) == (n, k // 2), f"{[n, k // 2]}")
    else:
        _expect(f"{name}.compressed", list(values.shape), values.dim() == 1, "one dimension, or two for 2:4")
    kind, flat = values.dtype, values.flatten()
    if kind.is_floating_point and kind.itemsize == 1:  # masked writes know no fp8
        flat = flat.view(torch.uint8)
    try:
        dense = expand(flat, bitmask, k)
    except ValueError as error:
        raise ValueError(f"load: {name}: {error}") from None
    if (offsets := parts.get("row_offsets")) is not None:
        counts = unpack_bits(bitmask, k).sum(1)
        same = offsets.numel() == n and torch.equal(offsets.flatten().to(torch.int64), counts.cumsum(0) - counts)
        _expect(f"{name}.row_offsets", f"{list(offsets.shape)}", same, "the number of bits before each row")
    return dense.view(kind)


def tensors(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Names and dense tensors of a checkpoint, one at a time: the whole model is never expanded in memory by this.

    Args:
        folder: holds ``config.json`` and ``*.safetensors``.

    Raises:
        ValueError: an unknown format, or a file that does not hold what its format says.
        FileNotFoundError: there is no such file.
    """
    folder = Path(folder)
    form = sparsity_format(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"load: {folder}: expected *.safetensors, got none")
    compressed: dict[str, dict[str, Path]] = {}
    for file in files:
        with safe_open(file, "pt") as content:
            for name in content.keys():  # noqa: SIM118  (not a mapping)
                base, _, part = name.rpartition(".")
                if form == "dense" or part not in _PARTS:
                    yield name, content.get_tensor(name)
                else:
                    compressed.setdefault(base.removesuffix(".weight"), {})[name] = file
    for base, places in compressed.items():
        parts = {}
        for name, file in places.items():
            with safe_open(file, "pt") as content:
                parts[name.rpartition(".")[2]] = content.get_tensor(name)
        _expect(base, sorted(places), len(parts) == len(places), "each part once")
        yield f"{base}.weight", decompress(base, parts)


def load_into(model: nn.Module, folder: str | Path, values: str | None = None, compute: str = "float") -> list[str]:
    """Fill ``model`` from a checkpoint, a tensor at a time; the names of layers that became sparse.

    Args:
        values: None: weights stay dense. "fp32", "bf16" or "int8": linear layers with enough zeros for the format become
            :class:`effk.nn.BitmaskLinear` as they are read ("int8" rounds them to the nearest code).

    Raises:
        ValueError: as :func:`tensors`; a tensor that the model lacks, of another shape, or one that the file lacks.
    """
    own, sparse, shared = model.state_dict(), [], {}
    missing = set(own)
    for name, tensor in own.items():
        shared.setdefault(tensor.data_ptr(), []).append(name)
    for name, tensor in tensors(folder):
        target = own.get(name)
        _expect(name, list(tensor.shape), target is not None and target.shape == tensor.shape, "a tensor of the model")
        missing -= {name, *shared[target.data_ptr()]}
        with torch.no_grad():
            target.copy_(tensor)
        base = name.removesuffix(".weight")
        module = model.get_submodule(base) if base != name else None
        if values is None or type(module) is not nn.Linear or len(shared[target.data_ptr()]) > 1:
            continue
        if float((tensor == 0).float().mean()) > break_even(values):
            bias = module.bias
            layer = BitmaskLinear.from_linear(module, values, compute=compute)
            if bias is not None:  # its numbers may come later
                layer.bias = bias.data
            parent, _, leaf = base.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer)
            sparse.append(base)
    _expect("model", sorted(missing)[:3], not missing, "no tensor that the files lack")
    return sparse


def _expect(name: str, got: Any, ok: bool, expected: str) -> None:
    if not ok:
        raise ValueError(f"load: {name}: expected {expected}, got {got!r}")
