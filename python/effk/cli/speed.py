"""Generating text and timing it, in one way for every model: its own greedy ``generate``, batch 1, with cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

DEFINITION = (
    "decoded tokens per second: batch 1, greedy, generate() with its cache, transformers' for the original and "
    "effk's runtime for loaded models; "
    "time of {new} new tokens less the time of one, median of {rounds} rounds in which the models take turns"
)


def generate_ids(model: nn.Module, ids: Tensor, new: int, *, exactly: bool = False, **options: Any) -> Tensor:
    """The new token ids after the prompt ``ids`` int64 ``[1, length]``; ``exactly`` ignores the end-of-text token."""
    options = {"do_sample": False} | options
    if exactly:
        options["min_new_tokens"] = new
    if getattr(model.generation_config, "pad_token_id", None) is None:
        options["pad_token_id"] = 0
    with torch.inference_mode():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **options)
    return output[0, ids.shape[1] :]


def decode_speeds(models: Mapping[str, nn.Module], ids: Tensor, new: int, rounds: int) -> dict[str, float]:
    """Decoded tokens per second of each model by :data:`DEFINITION`; turns spread the machine's drift over all."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            generate_ids(model, ids, 2, exactly=True)
            seconds[name].append(_timed(model, ids, new) - _timed(model, ids, 1))
    return {name: (new - 1) / statistics.median(times) for name, times in seconds.items()}


def _timed(model: nn.Module, ids: Tensor, new: int) -> float:
    start = time.perf_counter()
    generate_ids(model, ids, new, exactly=True)
    return time.perf_counter() - start
