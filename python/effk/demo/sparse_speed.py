"""How fast a model with sparse activations decodes: dense, with the kernel reading every neuron, and skipping."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..compress import ActivationRecipe, SparsityReport, compress
from ..nn.relu_ffn import sparse_ffns

WAYS = {"kernel, every neuron": "dense", "kernel, skipping": "sparse"}
_ROUNDS = 100  # timed calls of every network


@dataclass
class Speed:
    """What was measured.

    Attributes:
        density, p95: share of active neurons, mean over networks and tokens, and the worst network's 95th percentile.
        tokens_per_second: how it decodes -> tokens/s, medians.
        ffn_us: the same for one feed-forward network alone, in microseconds, layers in turn.
        largest_error: between the logits of the model as it was and of skipping layers, over the largest logit.
    """

    density: float = 0.0
    p95: float = 0.0
    tokens_per_second: dict[str, float] = field(default_factory=dict)
    ffn_us: dict[str, float] = field(default_factory=dict)
    largest_error: float = 0.0


@torch.no_grad()
def decode(model: nn.Module, prompt: Tensor, ids: Tensor | None, count: int) -> tuple[float, Tensor, Tensor]:
    """Median seconds of ``count`` steps after the prompt ``[1, length]``, the tokens fed (greedy ones, or ``ids``), and
    their logits."""
    out = model(prompt, use_cache=True)
    seconds, logits, fed = [], [], []
    for number in range(count):
        token = out.logits[:, -1:].argmax(-1) if ids is None else ids[number].reshape(1, 1)
        start = time.perf_counter()
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        seconds.append(time.perf_counter() - start)
        logits.append(out.logits[0, -1])
        fed.append(token[0, 0])
    return statistics.median(seconds), torch.stack(fed), torch.stack(logits)


@torch.no_grad()
def ffn_seconds(model: nn.Module, xs: list[Tensor]) -> float:
    """Median time of one feed-forward network on one token, all layers in turn."""
    layers, seconds = list(sparse_ffns(model).values()), []
    for number in range(_ROUNDS):
        for layer, x in zip(layers, xs, strict=True):
            token = x[number % len(x)][None]
            start = time.perf_counter()
            layer(token)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure_speed(
    model: nn.Module, recipe: ActivationRecipe, prompt: Tensor, count: int, windows: Tensor
) -> tuple[SparsityReport, Speed]:
    """Compress ``model`` with ``recipe`` on ``windows`` of text and decode ``count`` tokens before and after."""
    speed = Speed()
    _, ids, _ = decode(model, prompt, None, count)
    seconds, _, dense = decode(model, prompt, ids, count)
    speed.tokens_per_second["PyTorch, dense"] = 1 / seconds
    report = compress(model, recipe, list(windows.split(8)))
    layers = sparse_ffns(model)
    found = report.measured.values()
    speed.density = statistics.fmean(s.density.mean for s in found)
    speed.p95 = max(s.density.p95 for s in found)
    xs: list[Tensor] = []
    hooks = [m.register_forward_pre_hook(lambda m, args: xs.append(args[0].reshape(-1, m.d))) for m in layers.values()]
    with torch.no_grad():
        model(windows[:1])
    for hook in hooks:
        hook.remove()
    for name, mode in WAYS.items():
        for layer in layers.values():
            layer.modes = {1: mode, 9: "torch"}
        decode(model, prompt, ids, min(4, count))
        seconds, _, logits = decode(model, prompt, ids, count)
        speed.tokens_per_second[name] = 1 / seconds
        speed.ffn_us[name] = 1e6 * ffn_seconds(model, xs)
    speed.largest_error = float((logits - dense).abs().max() / dense.abs().max())
    return report, speed
