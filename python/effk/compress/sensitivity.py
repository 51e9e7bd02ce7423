"""How much the loss minds an error in each layer: gradients streamed backwards through the blocks, and scores from them.

Memory is the model, the hidden states between all blocks for the batches used, and one block's inputs and gradients: a
forward pass keeps only block inputs; then, from the last block to the first, each is run again with gradients.

Scores of a weight change ``D = W - W'`` on T tokens, with inputs x, output gradients ``dy = dL/dy`` of the summed
log-loss and ``g = dy^T x`` the weight's gradient (all per layer; output scores are per token, so in nats):

* ``first_order``: ``|sum g D| / T`` (Li et al., "LLM-MQ", 2023, equations 1 and 2). Terms cancel: it is noisy.
* ``abs``: ``sum |g D| / T``.
* ``fisher``: ``sum_s sum (g_s D)^2 / 2T`` over sequences s, the diagonal Fisher approximation.
* ``hdiag``: ``sum_k (x^T x)_kk D_k^2 / T``, the output error with a diagonal Hessian; no loss involved.
* ``output_fisher``: ``sum_t sum_n (dy_tn (D x_t)_n)^2 / 2T``, a diagonal Fisher over outputs, which sees how the errors
  of one row's weights add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .calibrate import Block, find_blocks, record_calls
from .layers import Layer


@dataclass(frozen=True, eq=False)
class Probe:
    """One layer's inputs and output gradients on all sequences.

    Attributes:
        x: fp32 ``[S, L, K]``, the same object for layers of one input group.
        dy: fp32 ``[S, L, N]``, gradient of the summed log-loss of the text.
    """

    x: Tensor
    dy: Tensor

    @property
    def tokens(self) -> int:
        """Tokens seen."""
        return self.x.shape[0] * self.x.shape[1]

    def gradients(self) -> Tensor:
        """The weight's gradient for each sequence, ``[S, N, K]``."""
        return self.dy.transpose(1, 2) @ self.x


def _first_order(probe: Probe, change: Tensor) -> Tensor:
    return (probe.gradients().sum(0) * change).sum().abs()


def _abs(probe: Probe, change: Tensor) -> Tensor:
    return (probe.gradients().sum(0) * change).abs().sum()


def _fisher(probe: Probe, change: Tensor) -> Tensor:
    return (probe.gradients() * change).square().sum() / 2


def _hdiag(probe: Probe, change: Tensor) -> Tensor:
    return (probe.x.square().sum((0, 1)) * change.square()).sum()


def _output_fisher(probe: Probe, change: Tensor) -> Tensor:
    return (probe.dy * (probe.x @ change.t())).square().sum() / 2


_SCORES: dict[str, Callable[[Probe, Tensor], Tensor]] = {
    "first_order": _first_order,
    "abs": _abs,
    "fisher": _fisher,
    "hdiag": _hdiag,
    "output_fisher": _output_fisher,
}
SCORES = tuple(_SCORES)


def score(name: str, probe: Probe, change: Tensor) -> float:
    """The score ``name`` of a weight change fp32 ``[N, K]``.

    Raises:
        ValueError: an unknown score, or a change of another shape than the layer's weight.
    """
    if name not in _SCORES:
        raise ValueError(f"score: name: expected one of {SCORES}, got {name!r}")
    shape = (probe.dy.shape[-1], probe.x.shape[-1])
    if tuple(change.shape) != shape:
        raise ValueError(f"score: change: expected {list(shape)}, got {list(change.shape)}")
    return float(_SCORES[name](probe, change)) / probe.tokens


def make_monotone(scores: Sequence[float]) -> list[float]:
    """Scores in order of rising precision, each raised to the largest of those after it: more bits never look worse."""
    result = list(scores)
    for i in reversed(range(len(result) - 1)):
        result[i] = max(result[i], result[i + 1])
    return result


def stream_gradients(model: nn.Module, layers: Sequence[Layer], calib: Sequence[Tensor]) -> Iterator[dict[str, Probe]]:
    """Yield ``{layer name: Probe}`` for every block, from the last to the first. The model is not changed.

    Args:
        model: a causal decoder whose output has ``logits``; layers outside its blocks are not reported.
        layers: the layers of interest.
        calib: token ids, each int64 ``[batch, length]``, all of one length; the loss is the text's own. Logits and one
            block's activations with gradients are held for one batch at a time, so small batches save memory.

    Raises:
        ValueError: no blocks, or batches of different lengths.
    """
    if len({batch.shape[1] for batch in calib}) != 1:
        raise ValueError(f"stream_gradients: calib: expected one length, got {[batch.shape[1] for batch in calib]}")
    blocks = find_blocks(model, layers)
    with torch.no_grad():
        hidden, calls = record_calls(model, blocks, calib)
        stack = []
        for name, module in blocks.items():
            block = Block(name, module, hidden, calls[name])
            stack.append(block)
            hidden = [block.run(index) for index in range(len(calib))]
        gradients = [_loss_gradient(model, blocks, ids, last) for ids, last in zip(calib, hidden, strict=True)]
        while stack:
            block = stack.pop()
            members = [layer for layer in layers if layer.block == block.name]
            probes, gradients = _backward(block, members, gradients)
            yield probes


def _loss_gradient(model: nn.Module, blocks: dict[str, nn.Module], ids: Tensor, hidden: Tensor) -> Tensor:
    """Gradient of the summed loss of a batch with respect to the last block's output."""
    with ExitStack() as restore, torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        for module in blocks.values():
            module.forward = lambda *args, **kwargs: leaf
            restore.callback(module.__dict__.pop, "forward")
        logits = model(input_ids=ids.to(hidden.device), use_cache=False).logits[:, :-1]
        target = ids[:, 1:].to(logits.device)
        loss = cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="sum")
        return torch.autograd.grad(loss, leaf)[0]


def _backward(block: Block, members: Sequence[Layer], gradients: list[Tensor]) -> tuple[dict[str, Probe], list[Tensor]]:
    """Probes of one block's layers, and the gradients of its inputs from those of its outputs."""
    xs: dict[str, list[Tensor]] = {layer.input_group: [] for layer in members}
    dys: dict[str, list[Tensor]] = {layer.name: [] for layer in members}
    below = []
    for hidden, (args, kwargs), gradient in zip(block.hidden, block.calls, gradients, strict=True):
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        with ExitStack() as hooks, torch.enable_grad():
            for layer in members:

                def watch(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = layer.name) -> None:
                    seen[name] = (args[0].detach(), output)  # noqa: B023 -- called within this turn

                hooks.callback(layer.module.register_forward_hook(watch).remove)
            leaf = hidden.detach().requires_grad_()
            out = block.module(leaf, *args, **kwargs)
            out = out[0] if isinstance(out, tuple) else out
            wanted = [leaf, *(seen[layer.name][1] for layer in members)]
            bottom, *tops = torch.autograd.grad(out, wanted, gradient)
        below.append(bottom)
        sequences = len(hidden)  # OPT's feed-forward layers see them joined into one
        for layer, dy in zip(members, tops, strict=True):
            dys[layer.name].append(dy.reshape(sequences, -1, dy.shape[-1]))
        for group, first in {layer.input_group: layer.name for layer in members}.items():
            x = seen[first][0]
            xs[group].append(x.reshape(sequences, -1, x.shape[-1]))
    inputs = {group: torch.cat(parts).float() for group, parts in xs.items()}
    return {
        layer.name: Probe(inputs[layer.input_group], torch.cat(dys[layer.name]).float()) for layer in members
    }, below


def _by_sequence(t: Tensor, hidden: Tensor) -> Tensor:
    """``[batch, length, features]`` of a tensor that the block may have flattened to tokens (OPT does)."""
    return t.reshape(*hidden.shape[:2], t.shape[-1])
