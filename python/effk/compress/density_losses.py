"""Losses that make feed-forward activations sparse, as plug-ins for any trainer.

All read the post-activation tensors ``z`` of every network (what ``down`` reads, or ``act(gate x)`` of a gated one),
in fp32, padding left out::

    deft   mean over layers, tokens, neurons of z^2 / (z^2 + eps)                       a smooth count of non-zeros
    l1     mean over layers and tokens of sum_i |z_i|                                   sum, not mean, over neurons
    hoyer  mean over layers and tokens of (sum_i |z_i|)^2 / (sum_i z_i^2 + 1e-15)       1 (one neuron) .. f (flat)

``DensityLoss(model, ...)`` hooks the activations and adds ``weight * loss`` to the ``loss`` of the model's output
while it trains, so trainers, and PEFT models around it, need no change. Published weights are for these
normalisations.

Sources: DEFT (Runwal et al., 2402.01911), L1 and its schedule from ProSparse (Song et al., 2402.13516), Hoyer from
D2DMoE (Szatkowski et al., 2310.04361).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .sparse_networks import activations

LOSSES = ("deft", "l1", "hoyer")


def deft(z: Tensor, eps: float = 1e-7) -> Tensor:
    """Mean of ``z^2 / (z^2 + eps)``: a value well above ``sqrt(eps)`` counts 1; only values about it feel a pull."""
    square = z.float().square()
    return (square / (square + eps)).mean()


def l1(z: Tensor) -> Tensor:
    """``sum_i |z_i|``, mean over tokens."""
    return z.float().abs().sum(-1).mean()


def hoyer(z: Tensor) -> Tensor:
    """``(sum_i |z_i|)^2 / (sum_i z_i^2 + 1e-15)``, mean over tokens."""
    z = z.float()
    return (z.abs().sum(-1).square() / (z.square().sum(-1) + 1e-15)).mean()


def hoyer_below(g: Tensor, offset: float = 10.0) -> Tensor:
    """Hoyer's measure of ``max(g, -offset) + offset`` for the pre-activations of a GELU: pushes them below
    ``-offset``."""
    return hoyer(g.float().clamp_min(-offset) + offset)


def sine_stage(start: float, end: float, position: float) -> float:
    """A stage of ProSparse's schedule: the weight rises along half a sine; ``position`` in [0, 1] is that in the
    stage."""
    return start + 0.5 * (1 + math.sin(-math.pi / 2 + math.pi * position)) * (end - start)


def prosparse_schedule(warm: float, stages: Sequence[tuple[int, float]], warm_steps: int) -> Callable[[int], float]:
    """step -> weight: ``warm`` for ``warm_steps``, then stages ``(steps, weight at its end)``, then the last weight."""

    def weight(step: int) -> float:
        step, last = step - warm_steps, warm
        for steps, end in stages:
            if step < steps:
                return last if step < 0 else sine_stage(last, end, step / steps)
            step, last = step - steps, end
        return last

    return weight


class DensityLoss:
    """Adds a sparsity loss to a model that trains.

    ``with DensityLoss(model, "deft"): trainer.train()``, or :meth:`attach` and :meth:`detach`. Attached, the outputs
    of ``model`` (a transformers model called with ``labels``) carry ``loss + weight * density loss`` in training
    mode, and :attr:`last` the density loss alone; :meth:`value` gives it to a training loop of one's own. Gradients
    reach whatever requires them: under PEFT the adapters alone. Where transformers' Trainer accumulates gradients, each
    part of a batch carries the weight of its share of the predicted tokens, as the task's loss does.

    Args:
        model: what the trainer calls, under PEFT the wrapped model; its feed-forward networks are found by
            :func:`effk.compress.sparse_networks.activations`.
        kind: "deft", "l1" or "hoyer".
        weight: a number, or a function of the step (forward passes that trained so far), such as
            :func:`prosparse_schedule`.
        eps: of DEFT; published: 1e-7, with prompt tuning 20.

    Raises:
        ValueError: an unknown kind, ``eps`` not positive, no networks of a known shape.
        RuntimeError: while training: the model was called past its hooks, or its activations ran without gradients
            (reentrant checkpointing: ask for ``use_reentrant=False``); the loss would be missing without a word.
    """

    def __init__(
        self, model: nn.Module, kind: str = "deft", weight: float | Callable[[int], float] = 1.0, eps: float = 1e-7
    ) -> None:
        if kind not in LOSSES:
            raise ValueError(f"DensityLoss: kind: expected one of {LOSSES}, got {kind!r}")
        if not eps > 0:
            raise ValueError(f"DensityLoss: eps: expected a positive number, got {eps!r}")
        self.acts = activations(model)
        if not self.acts:
            raise ValueError("DensityLoss: model: expected feed-forward networks of a known shape, got none")
        self.model, self.kind, self.weight, self.eps, self.step = model, kind, weight, eps, 0
        self.last: Tensor | None = None
        self.density: float = float("nan")  # exact share of non-zeros in the last step
        self._seen: list[Tensor] = []
        self._kept: Tensor | None = None
        self._share, self._called = 1.0, False
        self._handles: list[Any] = []

    def attach(self) -> DensityLoss:
        """Register the hooks."""
        if not self._handles:
            self._handles = [act.register_forward_hook(self._watch) for act in self.acts.values()]
            self._handles.append(self.model.register_forward_pre_hook(self._start, with_kwargs=True))
            self._handles.append(self.model.register_forward_hook(self._add))
        return self

    def detach(self) -> None:
        """Remove them."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._seen = [], []

    __enter__ = attach

    def __exit__(self, *error: object) -> None:
        self.detach()

    def value(self) -> Tensor:
        """The density loss of the last forward pass, not weighted; taken once."""
        tensors, self._seen = self._seen, []
        if not tensors:
            raise RuntimeError("DensityLoss: value: expected a forward pass with gradients before it, got none")
        tokens = [z.flatten(0, -2) for z in tensors]
        if self._kept is not None:
            tokens = [z[_fit(self._kept, len(z)).to(z.device)] for z in tokens]
        measure = {"deft": lambda z: deft(z, self.eps), "l1": l1, "hoyer": hoyer}[self.kind]
        self.density = sum(float((z.detach() != 0).float().mean()) for z in tokens) / len(tokens)
        self.last = torch.stack([measure(z) for z in tokens]).mean()
        return self.last

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask, labels, predicted = (kwargs.get(name) for name in ("attention_mask", "labels", "num_items_in_batch"))
        self._seen, self._called = [], True
        self._kept = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        self._share = 1.0
        if predicted is not None and isinstance(labels, Tensor):  # the Trainer's: a part of an accumulated batch
            self._share = float((labels[..., 1:] != -100).sum() / predicted)

    def _watch(self, module: nn.Module, args: tuple[Tensor, ...], z: Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        if not self._called and len(self._seen) >= 2 * len(self.acts):
            raise RuntimeError(
                "DensityLoss: model: expected calls of the model that it was given, got calls of a part of it or "
                "of its forward()"
            )
        self._seen.append(z)

    def _add(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        loss = getattr(output, "loss", None)
        if loss is None or not self.model.training or not torch.is_grad_enabled():
            return output
        if not self._seen:
            raise RuntimeError(
                "DensityLoss: model: expected activations with gradients, got none; gradient checkpointing needs "
                "use_reentrant=False"
            )
        weight = self.weight(self.step) if callable(self.weight) else self.weight
        self.step += 1
        output.loss = loss + weight * self._share * self.value()
        if isinstance(output, dict):
            output["loss"] = output.loss
        return output


def _fit(kept: Tensor, rows: int) -> Tensor:
    """A mask ``[batch, length]`` for ``rows`` activations; what PEFT puts in front of the tokens counts."""
    ahead = rows // len(kept) - kept.shape[1]
    if ahead > 0:
        kept = torch.cat([kept.new_ones(len(kept), ahead), kept], 1)
    return kept[:, max(0, -ahead) :].flatten()
