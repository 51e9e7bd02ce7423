"""Options of the commands that decode, and the generator they ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
import typer

from .models import Opened

if TYPE_CHECKING:
    from ..runtime import Generator

CACHES = ("fp16", "int8", "fp32")

Threads = Annotated[int | None, typer.Option(help="Of the kernels; default: PyTorch's.")]
Cache = Annotated[str, typer.Option(help="Dtype of keys and values: fp16, int8 or fp32.")]
Speculate = Annotated[
    str,
    typer.Option(help="Guess tokens ahead: ngram (from the text so far), exit:N (the model's first N blocks), none."),
]


def check_decoding(threads: int | None, cache: str, speculate: str) -> None:
    """Refuse options that cannot be, before anything is loaded."""
    if threads is not None and threads < 1:
        raise ValueError(f"--threads: expected at least 1, got {threads}")
    if cache not in CACHES:
        raise ValueError(f"--cache: expected one of {', '.join(CACHES)}, got {cache!r}")
    kind, _, blocks = speculate.partition(":")
    if speculate not in ("none", "ngram") and not (kind == "exit" and blocks.isdigit()):
        raise ValueError(f"--speculate: expected none, ngram or exit:N, got {speculate!r}")


def make_generator(opened: Opened, threads: int | None, cache: str, speculate: str) -> Generator:
    """The generator of an opened model.

    Raises:
        UnsupportedModel: not even transformers' forward can be decoded with.
        ValueError: fewer blocks than ``exit:N`` needs.
    """
    from ..runtime import Generator, decoder_for
    from ..runtime.speculative import ModelDrafter, NGramDrafter, early_exit

    if threads is not None:
        torch.set_num_threads(threads)
    drafter = None
    if speculate == "ngram":
        drafter = NGramDrafter()
    elif speculate != "none":
        drafter = ModelDrafter(decoder_for(early_exit(opened.model, int(speculate.partition(":")[2]))), cache)
    return Generator(opened.model, opened.need_tokenizer("text"), cache=cache, drafter=drafter)
