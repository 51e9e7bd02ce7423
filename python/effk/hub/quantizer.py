"""effk as a quantisation method of transformers, so that ``from_pretrained`` and ``save_pretrained`` know our models.

Loading: before weights are read, every compressed module of the (empty) model is replaced by a :class:`StoredWeight`,
and the files' names, shapes, types and hash are compared with the config; afterwards the weights are checked and
packed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..compress.embedding import EmbeddingPair, install_embedding, untie
from ..compress.experts import group_experts
from ..compress.fuse import fuse_shared_inputs
from ..compress.layers import replace_module
from ..nn import BitmaskLinear, DyadLinear, DyadLowRank, DyadWqLinear, QuikLinear, WqGroupedLinear, WqLinear
from .checkpoint import check_file, find_weights, read_header
from .record import PROVENANCE, QUANT_METHOD, VERSION, check_record, describe
from .stored import StoredBitmaskWeight, StoredQuikWeight, StoredWeight
from .stored_sparse import StoredSparse, finish_sparse, place_sparse

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..formats.bitmask import BitmaskTensor
    from ..formats.quik import QuikWeight
    from ..formats.wq import WqWeight

_SAFETENSORS_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "F32": torch.float32, "I64": torch.int64,
    "F64": torch.float64,
}  # fmt: skip


@register_quantization_config(QUANT_METHOD)
class EffkConfig(QuantizationConfigMixin):
    """The record of :mod:`effk.hub.record` in the shape that transformers expects."""

    def __init__(self, quant_method: str = QUANT_METHOD, **record: Any) -> None:
        self.quant_method = quant_method
        self.record = record
        check_record(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The record as a JSON object."""
        return {"quant_method": self.quant_method, **copy.deepcopy(self.record)}


@register_quantizer(QUANT_METHOD)
class EffkQuantizer(HfQuantizer):
    """Builds compressed modules while transformers loads a model; see the module's docstring."""

    requires_calibration = True  # a plain model is compressed by effk.compress, not while loading

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        record = self.quantization_config.record
        tied_to = dict(getattr(model, "all_tied_weights_keys", {}))
        for name, fields in record["layers"].items():
            _check_target(model, name, fields, transposed_ok=True)
            replace_module(model, name, StoredWeight(fields, fields["n"] if fields["bias"] else None))
        for name, fields in record.get("quik", {}).items():
            _check_target(model, name, fields, transposed_ok=True)
            replace_module(model, name, StoredQuikWeight(fields, fields["n"] if fields["bias"] else None))
        for name, fields in record.get("bitmask", {}).items():
            _check_target(model, name, fields, transposed_ok=True)
            replace_module(model, name, StoredBitmaskWeight(fields, fields["n"] if fields["bias"] else None))
        for name, fields in record.get("experts", {}).items():
            _empty_experts(model, name, fields)
        for name, fields in record.get("dyad", {}).items():
            _check_target(model, name, {"n": fields["out_features"], "k": fields["in_features"]}, transposed_ok=True)
            replace_module(model, name, _empty_dyad(fields, model.get_submodule(name).weight))
        place_sparse(model, record, _check_target)
        if (entry := record["embedding"]) is not None:
            _check_target(model, entry["name"], entry, transposed_ok=False)
            replace_module(model, entry["name"], StoredWeight(entry, None))
            if entry["head"] is not None:
                _check_target(model, entry["head"], entry, transposed_ok=False)
                head = model.get_submodule(entry["head"])
                head.weight = None  # the embedding's; only a bias is the head's own
                if (head.bias is not None) != entry["head_bias"]:
                    raise ValueError(
                        f"load: {entry['head']}: expected head_bias {head.bias is not None}, got the opposite"
                    )
        untie(model)
        _check_files(model, record, checkpoint_files or (), optional=set(tied_to))
        # Nothing is missing, so only buffers that no file holds are still to be initialised.
        for module in model.modules():
            if not module._non_persistent_buffers_set:
                module._is_hf_initialized = True

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        record = self.quantization_config.record
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        for name, fields in record["layers"].items():
            stored = model.get_submodule(name)
            replace_module(model, name, WqLinear.from_weight(_weight(name, stored), stored.bias, fields["compute"]))
        for name, fields in record.get("quik", {}).items():
            stored = model.get_submodule(name)
            module = QuikLinear.from_weight(_weight(name, stored), stored.bias, fields["bits_a"], fields["quantizer"])
            replace_module(model, name, module)
        for name, fields in record.get("bitmask", {}).items():
            stored = model.get_submodule(name)
            replace_module(
                model, name, BitmaskLinear.from_weight(_weight(name, stored), stored.bias, fields["compute"])
            )
        for name, fields in record.get("experts", {}).items():
            weight = _weight(name, model.get_submodule(name))
            replace_module(model, name, WqGroupedLinear.from_weight(weight, fields["experts"], fields["compute"]))
        for name, fields in record.get("dyad", {}).items():
            if fields["weight"] is not None:
                inner = f"{name}.dyad" if fields["rank"] else name
                replace_module(model, inner, _quantised_dyad(inner, model.get_submodule(inner), fields))
        finish_sparse(model, record)
        if (entry := record["embedding"]) is not None:
            weight = _weight(entry["name"], model.get_submodule(entry["name"]))
            install_embedding(model, EmbeddingPair(entry["name"], entry["head"]), weight, entry["compute"], dtype)
        if record["fuse"]:
            fuse_shared_inputs(model)
        setattr(model, PROVENANCE, record["recipe"])
        model.is_quantized = False  # True would make model.float() and .half() refuse, which our modules allow
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What ``save_pretrained`` writes: canonical tensors. ``effk.hub.save`` also replaces old files atomically."""
        record, tensors = describe(model)
        model.config.quantization_config = EffkConfig(**record)
        if record["experts"]:
            _keep_stacks(model)
        return tensors, {}

    def is_serializable(self) -> bool:
        """Always: the canonical form is what ``save_pretrained`` writes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can train on top: gradients flow to activations."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The layers trace without graph breaks."""
        return True


def adopt(model: PreTrainedModel) -> None:
    """Make a model that was compressed in memory known as ours, so that its ``save_pretrained`` writes what loads."""
    empty = {"version": VERSION, "fuse": False, "recipe": None, "layers": {}, "embedding": None}
    empty |= {
        "dyad": {},
        "quik": {},
        "bitmask": {},
        "experts": {},
        "relu_ffn": {},
        "input_sparse": {},
        "relu_norms": [],
        "weights": None,
    }
    model.hf_quantizer = EffkQuantizer(EffkConfig(**empty))  # the record is made when the model is saved
    model.quantization_method = QUANT_METHOD


def _keep_stacks(model: PreTrainedModel) -> None:
    """Let ``save_pretrained`` rename tensors, but not cut compressed stacks into experts, as it does with plain ones."""
    steps = getattr(model, "_weight_conversions", None)
    if steps is None:  # a model from no file; transformers then leaves prefixes out as well
        steps = [s for s in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(s, PrefixChange)]
    model._weight_conversions = [step for step in steps if not isinstance(step, WeightConverter)]


def _empty_experts(model: nn.Module, name: str, fields: dict[str, Any]) -> None:
    """Put a stack without numbers at ``name``, for the loader to fill."""
    parent, _, leaf = name.rpartition(".")
    try:
        stack = getattr(model.get_submodule(parent), leaf)
    except AttributeError:
        raise ValueError(f"load: {name}: expected experts in {type(model).__name__}, got none") from None
    shape = [fields["experts"], fields["n"] // fields["experts"], fields["k"]]
    if not isinstance(stack, Tensor) or list(stack.shape) != shape:
        got = list(stack.shape) if isinstance(stack, Tensor) else type(stack).__name__
        raise ValueError(f"load: {name}: expected the model's stack {got}, got {shape}")
    try:
        group_experts(model, parent)
    except ValueError as error:
        raise ValueError(f"load: {error}") from None
    replace_module(model, name, StoredWeight(fields, None))


def _empty_dyad(fields: dict[str, Any], like: Tensor) -> DyadLinear | DyadLowRank | StoredWeight:
    """A layer without numbers, for the loader to fill."""
    n, variant, bias = fields["n_dyad"], fields["variant"], fields["bias"]
    with torch.device("meta"):
        module = DyadLinear(fields["in_features"], fields["out_features"], n, variant, bias)
        outer = DyadLowRank(module, fields["rank"]) if fields["rank"] else module
    if fields["weight"] is None:
        return outer.to(like.dtype).to_empty(device=like.device)
    stored = StoredWeight(fields["weight"], fields["out_features"] if bias else None)
    if outer is module:
        return stored
    outer = outer.to(like.dtype).to_empty(device=like.device)
    outer.dyad = stored
    return outer


def _quantised_dyad(name: str, stored: StoredWeight, fields: dict[str, Any]) -> DyadWqLinear:
    try:
        return DyadWqLinear.from_weight(
            _weight(name, stored), fields["n_dyad"], fields["variant"], stored.bias, fields["weight"]["compute"]
        )
    except ValueError as error:
        raise ValueError(f"load: {name}: {error}") from None


def _check_target(model: nn.Module, name: str, fields: dict[str, Any], transposed_ok: bool) -> None:
    try:
        weight = getattr(model.get_submodule(name), "weight", None)
    except AttributeError:
        weight = None
    shape = (fields["n"], fields["k"])
    if weight is None:
        saved = ", ".join(getattr(model.config, "architectures", None) or ())
        raise ValueError(
            f"load: {name}: expected a module with a weight in {type(model).__name__}, got none; saved as {saved}"
        )
    if tuple(weight.shape) != shape and not (transposed_ok and tuple(weight.shape) == shape[::-1]):
        raise ValueError(f"load: {name}: expected the model's shape {list(weight.shape)}, got {list(shape)}")


def _check_files(model: nn.Module, record: dict[str, Any], files: Sequence[str], optional: set[str]) -> None:
    """Compare the files with the record and with what the model expects, before anything is read from them."""
    if record["weights"] is not None:
        if len(files) != 1:
            raise ValueError(
                f"load: expected the one file {record['weights']['file']}, got {[Path(f).name for f in files]}"
            )
        check_file(find_weights(Path(files[0]).parent, record["weights"]), record["weights"])
    held: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in files:
        held |= read_header(Path(file))
    expected = model.state_dict()
    held = {name if name in expected else _renamed(model, name): kind for name, kind in held.items()}
    missing = sorted(set(expected) - set(held) - optional)
    unknown = sorted(set(held) - set(expected))
    if missing or unknown:
        raise ValueError(
            f"load: expected the tensors of the model, got {missing[:3]} missing and {unknown[:3]} unknown"
        )
    exact = {
        f"{prefix}.{key}"
        for prefix, module in model.named_modules()
        if isinstance(module, (StoredWeight, StoredSparse))
        for key in module.geometry_tensors
    }
    for name, tensor in expected.items():
        if name not in held:
            continue
        shape, code = held[name]
        dtype = _SAFETENSORS_DTYPES.get(code)
        same_kind = dtype is not None and dtype.is_floating_point == tensor.dtype.is_floating_point
        if shape != tuple(tensor.shape) or not (dtype == tensor.dtype if name in exact else same_kind):
            raise ValueError(f"load: {name}: expected {tensor.dtype} {list(tensor.shape)}, got {code} {list(shape)}")


def _renamed(model: nn.Module, name: str) -> str:
    """What transformers calls the tensor ``name`` of a file: ``save_pretrained`` writes some heads by older names."""
    for step in get_model_conversion_mapping(model):
        if type(step) is WeightRenaming:
            name, _ = step.rename_source_key(name)
    return name


def _weight(name: str, stored: StoredWeight) -> WqWeight | QuikWeight | BitmaskTensor:
    try:
        return stored.to_weight()
    except ValueError as error:
        raise ValueError(f"load: {name}: {error}") from None
