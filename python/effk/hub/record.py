"""The ``quantization_config`` of a saved model: which modules are compressed and how their tensors look.

::

    {"quant_method": "effk", "version": 1, "fuse": true, "recipe": {...},
     "layers": {module: {"n", "k", "bits", "group_size", "scale_dtype", "zeros", "codebook", "outliers",
                         "compute", "bias"}},
     "embedding": {"name", "head", "head_bias", the fields above but "bias"} or null,
     "dyad": {module: {"in_features", "out_features", "n_dyad", "variant", "bias", "rank",
                       "weight": null or the fields of a layer but "bias"}},
     "quik": {module: {"n", "k", "bits", "outliers", "out_dtype", "rotated", "pattern", "bits_a", "quantizer",
                       "bias"}},
     "relu_ffn": {module: {"d", "f", "gated", "gate", "rows", "group", "biases", "param", "silent", "selector"}},
     "input_sparse": {module: {"n", "k", "rows", "group", "bias", "threshold"}},
     "relu_norms": [module],
     "experts": {parameter: {"n", "k", "bits", "group_size", "scale_dtype", "zeros", "codebook", "outliers",
                             "experts", "compute"}},
     "weights": {"file", "bytes", "sha256"} or null}

The tensors of a module are stored beside its other ones as ``<module>.qweight``, ``<module>.scales`` and so on, in
the canonical form (:mod:`effk.formats.wq`); those of a DYAD layer are its parameters, or, for quantised blocks, the
canonical form of the one matrix that holds both components (:func:`effk.ops.dyad_linear.stacked`); those of a QUIK
layer the canonical form of :mod:`effk.formats.quik`; those of a stack of experts the canonical form of all experts'
rows, one after the other (``n`` counts them all); for sparse networks see :mod:`.sparse_record`. "dyad" and what
follows it may be missing. ``recipe`` tells how the model was made; loading does not need it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..formats import bitmask as bitmask_format
from ..formats import quik as quik_format
from ..formats.wq import state_shapes
from ..nn import (
    BitmaskLinear,
    DyadLinear,
    DyadLowRank,
    DyadWqLinear,
    QuikLinear,
    WqEmbedding,
    WqGroupedLinear,
    WqLinear,
    WqTiedHead,
)
from ..nn.quik_linear import ACTIVATION_BITS, QUANTIZERS
from .sparse_record import check_sparse, describe_sparse

QUANT_METHOD = "effk"
VERSION = 1
PROVENANCE = "_effk_recipe"  # attribute of a compressed model: the JSON record of its recipe
_MODULE_FIELDS = {"compute", "bias"}
_QUIK_FIELDS = {"bits_a", "quantizer", "bias"}
_EXPERT_FIELDS = {"experts", "compute"}
_EMBEDDING_FIELDS = {"name", "head", "head_bias", "compute"}


def describe(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The record of a compressed model (``weights`` null) and all tensors to store, on the CPU.

    Parameters and buffers that several modules share are stored once, under their first name.

    Raises:
        ValueError: the model holds no compressed layer.
    """
    layers: dict[str, dict[str, Any]] = {}
    embedding: dict[str, Any] | None = None
    dyad: dict[str, dict[str, Any]] = {}
    quik: dict[str, dict[str, Any]] = {}
    bitmask: dict[str, dict[str, Any]] = {}
    experts: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    heads = {id(m._embedding): (name, m) for name, m in model.named_modules() if isinstance(m, WqTiedHead)}
    skip: set[str] = set()
    fused = False
    for name, module in model.named_modules():
        if isinstance(module, DyadLowRank):
            dyad[name] = _dyad_fields(module.dyad) | {"rank": module.a.shape[1]}
        elif isinstance(module, (DyadLinear, DyadWqLinear)) and name.rpartition(".")[0] not in dyad:
            dyad[name] = _dyad_fields(module) | {"rank": 0}
        if isinstance(module, DyadWqLinear):
            tensors |= {f"{name}.{key}": tensor for key, tensor in module.to_weight().to_state().items()}
            skip |= {f"{name}.{key}" for key in module._buffers if key != "bias"}
        if isinstance(module, BitmaskLinear):
            weight = module.to_weight()
            tensors |= {f"{name}.{key}": tensor for key, tensor in weight.to_state().items()}
            skip |= {f"{name}.{key}" for key in module._buffers if key != "bias"}
            bitmask[name] = weight.geometry() | {"compute": module.compute, "bias": module.bias is not None}
        if isinstance(module, QuikLinear):
            weight = module.to_weight()
            tensors |= {f"{name}.{key}": tensor for key, tensor in weight.to_state().items()}
            skip |= {f"{name}.{key}" for key in module._buffers if key != "bias"}
            how = {"bits_a": module.bits_a, "quantizer": module.quantizer, "bias": module.bias is not None}
            quik[name] = weight.geometry() | how
            fused = fused or module._shared is not None
        if isinstance(module, WqGroupedLinear):
            weight = module.to_weight()
            tensors |= {f"{name}.{key}": tensor for key, tensor in weight.to_state().items()}
            skip |= {f"{name}.{key}" for key in module._buffers}
            experts[name] = weight.geometry() | {"experts": module.experts, "compute": module.compute}
        if isinstance(module, WqLinear):
            weight = module.to_weight()
            tensors |= {f"{name}.{key}": tensor for key, tensor in weight.to_state().items()}
            skip |= {f"{name}.{key}" for key in module._buffers}
            fields = weight.geometry() | {"compute": module.compute}
            if isinstance(module, WqEmbedding):
                head_name, head = heads.get(id(module), (None, None))
                bias = None if head is None else head.bias
                embedding = {"name": name, "head": head_name, "head_bias": bias is not None, **fields}
                continue
            layers[name] = fields | {"bias": module.bias is not None}
            fused = fused or module._shared is not None
            if module.bias is not None:
                tensors[f"{name}.bias"] = module.bias
    sparse, sparse_tensors, hidden = describe_sparse(model)
    tensors |= sparse_tensors
    skip |= hidden
    stored = (layers, dyad, quik, bitmask, experts, *sparse.values())
    if embedding is None and not any(stored):
        raise ValueError("save: model: expected a model with compressed layers, got none")
    for name, tensor in (*model.named_parameters(), *_persistent_buffers(model)):
        if name not in skip:
            tensors[name] = tensor.detach()
    record = {
        "quant_method": QUANT_METHOD,
        "version": VERSION,
        "fuse": fused,
        "recipe": getattr(model, PROVENANCE, None),
        "layers": layers,
        "embedding": embedding,
        "dyad": dyad,
        "quik": quik,
        "bitmask": bitmask,
        **sparse,
        "experts": experts,
        "weights": None,
    }
    return record, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def check_record(record: Mapping[str, Any]) -> None:
    """Check the whole record before anything is built from it.

    Raises:
        ValueError: naming the entry, what was expected and what came.
    """
    _expect("quant_method", record.get("quant_method"), record.get("quant_method") == QUANT_METHOD, f"{QUANT_METHOD!r}")
    _expect("version", record.get("version"), record.get("version") == VERSION, f"{VERSION}")
    _expect("fuse", record.get("fuse"), type(record.get("fuse")) is bool, "a boolean")
    layers = record.get("layers")
    _expect("layers", type(layers).__name__, isinstance(layers, dict), "an object")
    for name, fields in layers.items():
        _check_module(name, fields, _MODULE_FIELDS)
        _expect(f"{name}.bias", fields["bias"], type(fields["bias"]) is bool, "a boolean")
    embedding = record.get("embedding")
    if embedding is not None:
        _check_module("embedding", embedding, _EMBEDDING_FIELDS)
        head = embedding["head"]
        _expect("embedding.name", embedding["name"], isinstance(embedding["name"], str), "a module name")
        _expect("embedding.head", head, head is None or isinstance(head, str), "a module name or null")
        _expect("embedding.head_bias", embedding["head_bias"], type(embedding["head_bias"]) is bool, "a boolean")
    dyad = record.get("dyad", {})
    _expect("dyad", type(dyad).__name__, isinstance(dyad, dict), "an object")
    for name, fields in dyad.items():
        _check_dyad(name, fields)
    quik = record.get("quik", {})
    _expect("quik", type(quik).__name__, isinstance(quik, dict), "an object")
    for name, fields in quik.items():
        _check_quik(name, fields)
    bitmask = record.get("bitmask", {})
    _expect("bitmask", type(bitmask).__name__, isinstance(bitmask, dict), "an object")
    for name, fields in bitmask.items():
        _check_bitmask(name, fields)
    check_sparse(record, _expect)
    experts = record.get("experts", {})
    _expect("experts", type(experts).__name__, isinstance(experts, dict), "an object")
    for name, fields in experts.items():
        _check_module(name, fields, _EXPERT_FIELDS)
        count, plain = fields["experts"], not (fields["codebook"] or fields["outliers"])
        whole = type(count) is int and count > 0 and fields["n"] % count == 0
        _expect(f"{name}.experts", count, whole, f"a divisor of the {fields['n']} rows")
        _expect(name, fields, plain, "integer codes alone")
    weights = record.get("weights")
    if weights is not None:
        legal = isinstance(weights, dict) and {k: type(v) for k, v in weights.items()} == {
            "file": str, "bytes": int, "sha256": str,
        }  # fmt: skip
        _expect("weights", weights, legal, "null or an object with file, bytes and sha256")


def geometry_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The :meth:`WqWeight.geometry` part of a module's entry."""
    return {
        key: value for key, value in fields.items() if key not in _MODULE_FIELDS | _EMBEDDING_FIELDS | _EXPERT_FIELDS
    }


def _check_module(name: str, fields: Any, extra: set[str]) -> None:
    _expect(
        name,
        type(fields).__name__,
        isinstance(fields, dict) and extra <= set(fields),
        f"an object with {sorted(extra)}",
    )
    try:
        state_shapes(geometry_of(fields))
    except (ValueError, TypeError) as error:
        raise ValueError(f"load: quantization_config: {name}: {error}") from None
    _expect(f"{name}.compute", fields["compute"], fields["compute"] in ("float", "int8"), "'float' or 'int8'")


def _dyad_fields(module: DyadLinear | DyadWqLinear) -> dict[str, Any]:
    names = ("in_features", "out_features", "n_dyad", "variant")
    weight = None
    if isinstance(module, DyadWqLinear):
        weight = module.to_weight().geometry() | {"compute": module.compute}
    return {name: getattr(module, name) for name in names} | {"bias": module.bias is not None, "weight": weight}


def _check_dyad(name: str, fields: Any) -> None:
    kinds = {"in_features": int, "out_features": int, "n_dyad": int, "variant": str, "bias": bool, "rank": int}
    legal = isinstance(fields, dict) and {key: type(fields[key]) for key in fields if key != "weight"} == kinds
    _expect(name, fields, legal and "weight" in fields, f"an object with {[*sorted(kinds), 'weight']}")
    sides = (fields["out_features"], fields["in_features"])
    whole = min(*sides, fields["n_dyad"]) > 0 and not any(side % fields["n_dyad"] for side in sides)
    _expect(f"{name}.n_dyad", fields["n_dyad"], whole, "a divisor of both sides")
    _expect(f"{name}.variant", fields["variant"], fields["variant"] in ("it", "ot", "dt"), "'it', 'ot' or 'dt'")
    _expect(f"{name}.rank", fields["rank"], 0 <= fields["rank"] <= min(sides), "0 or a rank")
    if (weight := fields["weight"]) is not None:
        _check_module(f"{name}.weight", weight, {"compute"})
        n, k = sides[0], 2 * sides[1] // fields["n_dyad"]
        stacked = (n, k) if fields["variant"] == "it" else (2 * n, k // 2)
        _expect(f"{name}.weight", [weight["n"], weight["k"]], (weight["n"], weight["k"]) == stacked, f"{list(stacked)}")


def quik_geometry(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The :meth:`QuikWeight.geometry` part of a QUIK layer's entry."""
    return {key: value for key, value in fields.items() if key not in _QUIK_FIELDS}


def _check_quik(name: str, fields: Any) -> None:
    legal = isinstance(fields, dict) and set(fields) >= _QUIK_FIELDS
    _expect(name, type(fields).__name__, legal, f"an object with {sorted(_QUIK_FIELDS)}")
    try:
        quik_format.state_shapes(quik_geometry(fields))
    except (ValueError, TypeError) as error:
        raise ValueError(f"load: quantization_config: {name}: {error}") from None
    bits_a, quantizer = fields["bits_a"], fields["quantizer"]
    wide_enough = type(bits_a) is int and bits_a in ACTIVATION_BITS and bits_a >= fields["bits"]
    _expect(f"{name}.bits_a", bits_a, wide_enough, f"at least {fields['bits']}, of {ACTIVATION_BITS}")
    _expect(f"{name}.quantizer", quantizer, quantizer in QUANTIZERS, f"one of {QUANTIZERS}")
    _expect(f"{name}.bias", fields["bias"], type(fields["bias"]) is bool, "a boolean")


def _check_bitmask(name: str, fields: Any) -> None:
    legal = isinstance(fields, dict) and set(fields) >= _MODULE_FIELDS
    _expect(name, type(fields).__name__, legal, f"an object with {sorted(_MODULE_FIELDS)}")
    try:
        bitmask_format.state_shapes(geometry_of(fields))
    except (ValueError, TypeError) as error:
        raise ValueError(f"load: quantization_config: {name}: {error}") from None
    compute = fields["compute"]
    ok = compute == "float" or (compute == "int8" and fields["bits"] == 8)
    _expect(f"{name}.compute", compute, ok, "'float', or 'int8' with 8 bits")
    _expect(f"{name}.bias", fields["bias"], type(fields["bias"]) is bool, "a boolean")


def _expect(name: str, got: Any, ok: bool, expected: str) -> None:
    if not ok:
        raise ValueError(f"load: quantization_config: {name}: expected {expected}, got {got!r}")


def _persistent_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    transient = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    return [(name, buffer) for name, buffer in model.named_buffers() if name not in transient]
