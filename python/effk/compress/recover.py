"""Recovery: training what replaced a layer so that its outputs, or the model's, come close to the original's again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

_TOKENS = 512  # of a step on one network
_WARM = 0.05  # share of the steps in which the rate rises; it falls as a cosine afterwards


def is_decoder(model: nn.Module) -> bool:
    """Whether ``model`` is a transformers model that predicts next tokens."""
    return bool(getattr(model, "can_generate", lambda: False)())


@torch.no_grad()
def states(model: nn.Module, batch: Tensor) -> Tensor:
    """The last hidden states, fp32 ``[batch, length, features]``."""
    return _states(model, batch).float()


def recover_network(
    run: Callable[[Tensor], Tensor],
    parameters: Sequence[nn.Parameter],
    xs: Sequence[Tensor],
    wanted: Callable[[Tensor], Tensor],
    steps: int,
    rate: float,
    seed: int,
) -> None:
    """Minimise ``|run(x) - wanted(x)|^2``, relative to the variance of what is wanted, on random tokens of ``xs``."""
    tokens = torch.cat(list(xs))
    with torch.no_grad():
        target = torch.cat([wanted(x) for x in xs])
    scale = 1 / target.var(0, correction=0).sum().clamp_min(torch.finfo(torch.float32).tiny)
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        rows = torch.randint(len(tokens), (min(_TOKENS, len(tokens)),), generator=generator)
        return (run(tokens[rows]) - target[rows]).square().sum(1).mean() * scale

    _train(parameters, loss, steps, rate)


def recover_model(
    model: nn.Module,
    teacher: nn.Module,
    parameters: Sequence[nn.Parameter],
    batches: Sequence[Tensor],
    steps: int,
    rate: float,
    seed: int,
    progress: Any,
    extra: Callable[[], Tensor] | None = None,
) -> None:
    """Train ``parameters`` of ``model`` towards ``teacher``, one batch a step, batches in random order.

    A decoder by the divergence ``KL(teacher || model)`` of its next-token distributions (Hinton et al., 2015,
    arXiv:1503.02531, at temperature 1), other models by the squared error of the last hidden states over their
    variance. ``extra`` is called after each forward pass of ``model``; what it returns is added to the loss.
    """
    decoder = is_decoder(model)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    done = 0

    def loss() -> Tensor:
        nonlocal done
        if not order:
            order.extend(torch.randperm(len(batches), generator=generator).tolist())
        batch = batches[order.pop()]
        done += 1
        progress("recover", done, steps)
        if decoder:
            with torch.no_grad():
                target = log_softmax(teacher(batch, use_cache=False).logits.float(), -1)
            got = log_softmax(model(batch, use_cache=False).logits.float(), -1)
            return kl_div(got.flatten(0, 1), target.flatten(0, 1), reduction="batchmean", log_target=True)
        target = states(teacher, batch)
        variance = target.flatten(0, 1).var(0, correction=0).mean()
        return (_states(model, batch).float() - target).square().mean() / variance

    def total() -> Tensor:
        own = loss()
        return own if extra is None else own + extra()

    others = [p for p in model.parameters() if p.requires_grad and not any(p is q for q in parameters)]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        _train(parameters, total, steps, rate)
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _train(parameters: Sequence[nn.Parameter], loss: Callable[[], Tensor], steps: int, rate: float) -> None:
    optimizer = torch.optim.Adam(parameters, lr=rate)
    warm = max(1, int(_WARM * steps))
    with torch.enable_grad():
        for step in range(steps):
            share = max(0.0, (step - warm) / max(1, steps - warm))
            for group in optimizer.param_groups:
                group["lr"] = rate * min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * share))
            optimizer.zero_grad()
            loss().backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
    for parameter in parameters:
        parameter.grad = None


def _states(model: nn.Module, batch: Tensor) -> Tensor:
    inner = getattr(model, "base_model", model)
    return inner(batch, **({"use_cache": False} if is_decoder(model) else {})).last_hidden_state
