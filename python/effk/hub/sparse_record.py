"""Sparse networks in a saved model: their entries of the record and their tensors; :mod:`.stored_sparse` is the way
back.

Of an :class:`effk.nn.SparseFFN` a file holds, under ``<module>.gate``, ``.up`` and ``.down``, the stored form of its
rows (:mod:`effk.formats.neuron`; down transposed), ``<module>.gate_bias`` and so on, ``.param``, and a selector's
tensors under ``.selector``; of an :class:`effk.nn.InputSparseLinear` the same of ``W^T`` under ``.columns``,
``.bias`` and ``.threshold``. ``silent`` names the modules that do nothing beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.neuron import check_rows
from ..nn.input_sparse_linear import InputSparseLinear
from ..nn.neuron_selector import SELECTORS
from ..nn.relu_ffn import SparseFFN
from ..nn.relu_norm import ReluNorm
from ..nn.sparse_gate import PER_NEURON, WITHOUT_PARAM
from ..ops.relu_ffn import GATES

PARTS = ("gate", "up", "down")
_FFN = {
    "d": int, "f": int, "gated": bool, "gate": str, "rows": str, "group": int, "biases": list, "param": int, "silent": list,
}  # fmt: skip
_LINEAR = {"n": int, "k": int, "rows": str, "group": int, "bias": bool, "threshold": int}
_MOST = 1 << 31  # of any size


def describe_sparse(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor], set[str]]:
    """Entries of the record, tensors to store, and names of tensors that these replace."""
    ffns: dict[str, dict[str, Any]] = {}
    linears: dict[str, dict[str, Any]] = {}
    norms: list[str] = []
    tensors: dict[str, Tensor] = {}
    skip: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, SparseFFN):
            ffns[name] = {
                "d": module.d, "f": module.f, "gated": module.gated, "gate": module.gate, "rows": module.rows,
                "group": module.group, "biases": [getattr(module, f"{part}_bias") is not None for part in PARTS],
                "param": 0 if module.param is None else module.param.numel(), "silent": list(getattr(module, "silent", ())),
                "selector": None if module.selector is None else {"kind": module.selector.kind, **module.selector.fields()},
            }  # fmt: skip
            for part, stored in module.stored().items():
                tensors |= {f"{name}.{part}.{key}": tensor for key, tensor in stored.items()}
            skip |= {f"{name}.{part}_{what}" for part in PARTS for what in ("rows", "scales")}
        elif isinstance(module, InputSparseLinear):
            linears[name] = {
                "n": module.out_features, "k": module.in_features, "rows": module.rows, "group": module.group,
                "bias": module.bias is not None, "threshold": 0 if module.threshold is None else module.threshold.numel(),
            }  # fmt: skip
            tensors |= {f"{name}.columns.{key}": tensor for key, tensor in module.stored().items()}
            skip |= {f"{name}.columns", f"{name}.scales"}
        elif isinstance(module, ReluNorm):
            norms.append(name)
    return {"relu_ffn": ffns, "input_sparse": linears, "relu_norms": norms}, tensors, skip


def check_sparse(record: Mapping[str, Any], expect: Callable[[str, Any, bool, str], None]) -> None:
    """Check the entries; ``expect(name, got, ok, expected)`` raises."""
    for key, fields in (("relu_ffn", _FFN), ("input_sparse", _LINEAR)):
        entries = record.get(key, {})
        expect(key, type(entries).__name__, isinstance(entries, dict), "an object")
        for name, entry in entries.items():
            got = {k: type(v) for k, v in entry.items() if k != "selector"} if isinstance(entry, dict) else None
            legal = got == fields and ("selector" in entry) == (key == "relu_ffn")
            expect(name, entry, legal, f"an object with {sorted(fields)}")
            (_check_ffn if key == "relu_ffn" else _check_linear)(name, entry, expect)
    norms = record.get("relu_norms", [])
    expect("relu_norms", norms, isinstance(norms, list) and all(isinstance(n, str) for n in norms), "module names")


def _check_ffn(name: str, entry: Mapping[str, Any], expect: Callable[..., None]) -> None:
    for side in ("d", "f"):
        expect(f"{name}.{side}", entry[side], 0 < entry[side] < _MOST, "a size")
    gate, param, biases, selector = entry["gate"], entry["param"], entry["biases"], entry["selector"]
    expect(f"{name}.gate", gate, gate in GATES and (gate != "drelu" or entry["gated"]), f"one of {GATES}")
    counts = (0,) if gate in WITHOUT_PARAM else (1, entry["f"]) if gate in PER_NEURON else (1,)
    expect(f"{name}.param", param, param in counts, f"one of {counts}")
    legal = len(biases) == 3 and all(type(b) is bool for b in biases) and (entry["gated"] or not biases[0])
    expect(f"{name}.biases", biases, legal, "three booleans")
    expect(f"{name}.silent", entry["silent"], all(isinstance(n, str) for n in entry["silent"]), "module names")
    _check_rows(name, entry, expect)
    if selector is None:
        return
    known = isinstance(selector, dict) and selector.get("kind") in SELECTORS
    expect(f"{name}.selector", selector, known, f"null or one of the kinds {sorted(SELECTORS)}")
    try:
        built = build_selector(selector)
    except (TypeError, ValueError, RuntimeError) as error:
        expect(f"{name}.selector", selector, False, f"fields of {selector['kind']} ({error})")
    sides = {"d": entry["d"], "f": entry["f"]} if "f" in selector else {"d": entry["d"]} if "d" in selector else {}
    fits = all(getattr(built, side) == value for side, value in sides.items())
    if selector["kind"] == "experts":
        fits = fits and built.group >= 1 and built.experts == -(-entry["f"] // built.group)
    expect(f"{name}.selector", selector, fits, f"one for {entry['f']} neurons over {entry['d']} inputs")


def _check_linear(name: str, entry: Mapping[str, Any], expect: Callable[..., None]) -> None:
    for side in ("n", "k"):
        expect(f"{name}.{side}", entry[side], 0 < entry[side] < _MOST, "a size")
    expect(f"{name}.threshold", entry["threshold"], entry["threshold"] in (0, 1, entry["k"]), f"0, 1 or {entry['k']}")
    _check_rows(name, entry, expect)


def _check_rows(name: str, entry: Mapping[str, Any], expect: Callable[..., None]) -> None:
    try:
        check_rows(name, entry["rows"], entry["group"])
    except ValueError as error:
        expect(f"{name}.rows", [entry["rows"], entry["group"]], False, f"rows and group that exist ({error})")


def build_selector(fields: Mapping[str, Any]) -> nn.Module:
    """A selector without numbers."""
    with torch.device("meta"):
        return SELECTORS[fields["kind"]](**{k: v for k, v in fields.items() if k != "kind"})
