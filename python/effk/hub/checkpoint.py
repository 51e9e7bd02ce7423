"""Saving and loading compressed models.

A saved model is a directory that transformers reads: ``config.json`` with a ``quantization_config`` (:mod:`.record`)
and one safetensors file of canonical weights, whose name is its content's hash and stands in the config
(``transformers_weights``). Saving writes the new weights beside the old, then replaces ``config.json`` in one step,
then removes what it no longer names. So at every moment, also after ``kill -9`` or on a full disk, the directory holds
one whole model: the old or the new. Loading reads tensors and JSON, never code, and checks hash, header, shapes and
ranges.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .atomic import TEMPORARY_SUFFIX, publish, write_temporary
from .record import QUANT_METHOD, check_record, describe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONFIG = "config.json"
_PREFIX, _SUFFIX = "effk-", ".safetensors"


def save(model: nn.Module, directory: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
    """Save a compressed transformers model, and optionally its tokenizer, so that :func:`load` gives it back.

    Needs memory for the canonical form of the whole model beside the packed one.

    Returns:
        The directory.

    Raises:
        ValueError: no compressed layer, or not a transformers model (whose config is needed to build it again).
        OSError: the disk is full or refuses; a model already in the directory is untouched.
    """
    if not hasattr(model, "config") or not hasattr(model.config, "to_dict"):
        raise ValueError(f"save: model: expected a transformers model with a config, got {type(model).__name__}")
    record, tensors = describe(model)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)

    temporary = write_temporary(directory, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    digest, size = file_digest(temporary)
    weights = directory / f"{_PREFIX}{digest[:16]}{_SUFFIX}"
    publish(temporary, weights)
    _save_companions(model, directory, tokenizer)

    record["weights"] = {"file": weights.name, "bytes": size, "sha256": digest}
    config = model.config.to_dict() | {
        "architectures": [type(model).__name__],
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "transformers_weights": weights.name,
        "quantization_config": record,
    }
    text = json.dumps(config, indent=1, default=str) + "\n"
    publish(write_temporary(directory, lambda path: path.write_text(text, encoding="utf-8")), directory / CONFIG)
    _remove_stale(directory, keep=weights.name)
    return directory


def load(
    directory: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """Load a model that :func:`save` wrote, in evaluation mode and running on the kernels.

    Its ``generate`` takes transformers' arguments and runs on :mod:`effk.runtime`.

    Args:
        directory: a local directory.
        dtype: of everything that is not compressed (activations follow it); None keeps the saved one.
        device: where the model goes.

    Raises:
        FileNotFoundError: no saved model there.
        ValueError: anything in it is damaged, inconsistent or of another version.
    """
    import transformers

    directory = Path(directory)
    config = read_config(directory)
    record = config["quantization_config"]
    check_record(record)
    if record["weights"] is not None:
        find_weights(directory, record["weights"])
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    architecture = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)):
        raise ValueError(
            f"load: {directory / CONFIG}: architectures: expected a model class of transformers, got {names!r}"
        )
    model = architecture.from_pretrained(directory, dtype=dtype or "auto", local_files_only=True)
    from ..runtime.attached import attach

    _leave_file(model, directory)
    return attach(model.to(device).eval())


def _leave_file(model: nn.Module, directory: Path) -> None:
    """Copy the tensors that are still in the mapped file: one small norm keeps all of the file in the process's memory."""
    mapped = _mapped(str(directory.resolve()))
    copies: dict[int, tuple[Tensor, Tensor]] = {}  # with the original, so that its id stays its own
    for module in model.modules():
        for group in (module._parameters, module._buffers):
            for name, tensor in group.items():
                if tensor is None or not any(start <= tensor.data_ptr() < end for start, end in mapped):
                    continue
                if id(tensor) not in copies:  # not only its data: a view would keep what it is a view of
                    copy = tensor.detach().clone()
                    if isinstance(tensor, nn.Parameter):
                        copy = nn.Parameter(copy, tensor.requires_grad)
                    copies[id(tensor)] = tensor, copy
                group[name] = copies[id(tensor)][1]


def _mapped(folder: str) -> list[tuple[int, int]]:
    """Addresses at which files of a folder are mapped; none where the system does not tell."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    spans = (line.split(maxsplit=5) for line in lines)
    found = [fields[0].split("-") for fields in spans if len(fields) > 5 and fields[5].startswith(folder + "/")]
    return [(int(start, 16), int(end, 16)) for start, end in found]


def read_config(directory: Path) -> dict[str, Any]:
    """The parsed ``config.json`` of a saved model, known to be ours."""
    path = directory / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"load: {directory}: expected a saved model with a {CONFIG}, got none")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"load: {path}: expected JSON, got: {error}") from None
    record = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(record, dict) or record.get("quant_method") != QUANT_METHOD:
        method = record.get("quant_method") if isinstance(record, dict) else None
        raise ValueError(f"load: {path}: quant_method: expected {QUANT_METHOD!r}, got {method!r}")
    return config


def find_weights(directory: Path, entry: dict[str, Any]) -> Path:
    """The weights file that the record's ``weights`` entry names.

    Raises:
        ValueError: the name leaves the directory, or there is no such file.
    """
    path = directory / entry["file"]
    if path.name != entry["file"]:
        raise ValueError(f"load: weights.file: expected a plain file name, got {entry['file']!r}")
    if not path.is_file():
        raise ValueError(f"load: {path}: expected the weights named by {CONFIG}, got no such file")
    return path


def check_file(path: Path, expected: dict[str, Any]) -> None:
    """Compare a weights file with the ``weights`` entry of the record.

    Raises:
        ValueError: its size or hash differs.
    """
    digest, size = file_digest(path)
    if (digest, size) != (expected["sha256"], expected["bytes"]):
        raise ValueError(
            f"load: {path}: expected {expected['bytes']} bytes with sha256 {expected['sha256'][:16]}..., "
            f"got {size} with {digest[:16]}...: the file is damaged"
        )


def file_digest(path: Path) -> tuple[str, int]:
    """The sha256 in hexadecimal and the size of a file."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
            size += len(part)
    return digest.hexdigest(), size


def read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, safetensors dtype) of every tensor in a file, without reading the data.

    Raises:
        ValueError: not a well-formed safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"load: {path}: expected a safetensors file, got: {error}") from None


def _save_companions(model: nn.Module, directory: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Generation defaults and tokenizer: small files, each replaced in one step, the same before and after."""
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        text = generation.to_json_string(use_diff=True)
        publish(
            write_temporary(directory, lambda path: path.write_text(text, encoding="utf-8")),
            directory / "generation_config.json",
        )
    if tokenizer is None:
        return
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        for source in sorted(path for path in Path(scratch).rglob("*") if path.is_file()):
            target = directory / source.relative_to(scratch)
            target.parent.mkdir(parents=True, exist_ok=True)
            data = source.read_bytes()
            publish(write_temporary(target.parent, lambda path, data=data: path.write_bytes(data)), target)


def _remove_stale(directory: Path, keep: str) -> None:
    """Remove weights that the config no longer names, and what an interrupted save left."""
    stale = [path for path in directory.glob(f"{_PREFIX}*{_SUFFIX}") if path.name != keep]
    for path in (*stale, *directory.glob(f"*{TEMPORARY_SUFFIX}")):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
