"""Perplexity by one fixed definition, so that every figure of the project can be compared with every other."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .registry import Progress

DEFINITION = (
    "perplexity per token: exp of the mean negative log-likelihood (natural) over the text's first {windows} "
    "non-overlapping windows of {context} tokens, no special tokens added, each window on its own, its first token not scored"
)


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    context: int = 1024,
    windows: int = 8,
    *,
    batch: int = 1,
    progress: Progress | None = None,
) -> float:
    """Perplexity per token of a causal language model on ``text``.

    ``exp( -1 / (windows * (context - 1)) * sum_w sum_{t=1}^{context-1} log p(x_{w,t} | x_{w,0..t-1}) )``, where window w
    holds tokens ``w * context .. (w + 1) * context - 1`` of the text, tokenised as a whole without special tokens. The
    first token of a window is only context. Log-probabilities are computed in fp32 from the model's logits and summed
    in float64; ``batch`` windows run at once, which changes no result beyond rounding. ``progress`` is called as
    ``progress("evaluate", done, windows)``.

    It is a *token* perplexity: models with other tokenizers, and papers that count words, are not comparable.

    Raises:
        ValueError: the text has fewer than ``windows * context`` tokens, or an argument is out of range.
    """
    ids = token_windows(tokenizer, text, context, windows)
    total, scored = torch.zeros((), dtype=torch.float64), 0
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for part in ids.split(batch):
                part = part.to(device)
                logits = model(input_ids=part, use_cache=False).logits[:, :-1]
                losses = cross_entropy(logits.flatten(0, 1).float(), part[:, 1:].flatten(), reduction="none")
                total += losses.double().sum().cpu()
                scored += losses.numel()
                if progress is not None:
                    progress("evaluate", scored // (context - 1), windows)
    finally:
        model.train(training)
    return math.exp(total.item() / scored)


def token_windows(tokenizer: Any, text: str, length: int, count: int, *, spread: bool = False) -> Tensor:
    """int64 ``[count, length]``: consecutive windows from the start of ``text``, or evenly ``spread`` over all of it.

    Raises:
        ValueError: ``length`` below 2, ``count`` below 1, or a text of fewer than ``count * length`` tokens.
    """
    if length < 2 or count < 1:
        raise ValueError(f"token_windows: expected length >= 2 and count >= 1, got {length} and {count}")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
    if ids.numel() < count * length:
        raise ValueError(f"token_windows: text: expected at least {count * length} tokens, got {ids.numel()}")
    stride = length if not spread or count == 1 else (ids.numel() - length) // (count - 1)
    return torch.stack([ids[i * stride : i * stride + length] for i in range(count)])
