"""Streaming calibration: run a decoder block by block on a few token batches and watch the inputs of its linear layers.

Peak memory is the model, the hidden states of all batches at one depth, and the statistics of one block. Blocks are
compressed in order, and each sees the activations that the already compressed blocks before it produce, so that a
method can make up for their error (as GPTQ, Frantar et al. 2022, section 4). A second, uncompressed stream can run
along and tells how far the inputs have drifted.

One forward pass with every block replaced by a recorder gathers the first block's inputs and each block's own keyword
arguments (masks differ between blocks of sliding-window models); the blocks then run one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .layers import Layer

STATISTICS = ("hessian", "drift", "mean_abs", "mean_sq", "max_abs")


@dataclass
class LayerStats:
    """Statistics of the inputs ``x`` of one layer over ``rows`` tokens; fp32, None unless asked for.

    Attributes:
        rows: tokens seen.
        hessian: ``sum x^T x``, ``[K, K]``. The output error of a weight change D is ``trace(D H D^T)``.
        drift: ``sum (x_ref - x)^T x``, ``[K, K]``, with x_ref what the layer reads in the uncompressed model.
        mean_abs: mean of ``|x_k|``, ``[K]``.
        mean_sq: mean of ``x_k^2``, ``[K]``.
        max_abs: largest ``|x_k|``, ``[K]``.
    """

    rows: int = 0
    hessian: Tensor | None = None
    drift: Tensor | None = None
    mean_abs: Tensor | None = None
    mean_sq: Tensor | None = None
    max_abs: Tensor | None = None

    def update(self, x: Tensor, wanted: frozenset[str], reference: Tensor | None = None) -> None:
        """Add a batch of inputs ``[..., K]``; ``reference``, of the same shape, only for "drift"."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        before, self.rows = self.rows, self.rows + x.shape[0]
        if "hessian" in wanted:
            if self.hessian is None:
                self.hessian = x.new_zeros(x.shape[1], x.shape[1])
            self.hessian.addmm_(x.t(), x)
        if "drift" in wanted:
            if self.drift is None:
                self.drift = x.new_zeros(x.shape[1], x.shape[1])
            self.drift.addmm_((reference.reshape(x.shape).float() - x).t(), x)
        magnitude = x.abs()
        if "mean_abs" in wanted:
            self.mean_abs = self._mean(self.mean_abs, before, magnitude.sum(0))
        if "mean_sq" in wanted:
            self.mean_sq = self._mean(self.mean_sq, before, x.square().sum(0))
        if "max_abs" in wanted:
            largest = magnitude.amax(0)
            self.max_abs = largest if self.max_abs is None else torch.maximum(self.max_abs, largest)

    def _mean(self, old: Tensor | None, before: int, total: Tensor) -> Tensor:
        return (total if old is None else old * before + total) / self.rows


@dataclass
class Block:
    """One transformer block during streaming.

    Attributes:
        name, module: the block.
        hidden: its input for every batch.
        calls: the other arguments of its call for every batch.
        reference: what its layers read in the uncompressed model, by input group and batch; empty without that stream.
    """

    name: str
    module: nn.Module
    hidden: list[Tensor]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    reference: dict[str, list[Tensor]] = field(default_factory=dict)

    def statistics(self, layers: Sequence[Layer], wanted: frozenset[str]) -> dict[str, LayerStats]:
        """Run the block on all batches, as far as needed, and return the input statistics of ``layers`` by name.

        Layers of one ``input_group`` share one :class:`LayerStats` object. "drift" needs the reference stream.

        Raises:
            ValueError: an unknown statistic, a layer that the block did not call, or non-finite activations.
        """
        if unknown := sorted(wanted - set(STATISTICS)):
            raise ValueError(f"calibrate: statistics: expected among {STATISTICS}, got {unknown}")
        if "drift" in wanted and not self.reference:
            raise ValueError("calibrate: statistics: expected the reference stream for 'drift', but it does not run")
        groups = {layer.input_group: LayerStats() for layer in layers}
        for index in range(len(self.hidden)):

            def watch(group: str, x: Tensor, index: int = index) -> None:
                reference = self.reference[group][index] if self.reference else None
                groups[group].update(x, wanted, reference)

            self.observe(index, self.hidden[index], layers, watch)
        for group, stats in groups.items():
            if stats.rows == 0:
                raise ValueError(f"calibrate: {group}: expected the block to call it, but it was not reached")
            for name in wanted:
                if not bool(getattr(stats, name).isfinite().all()):
                    raise ValueError(f"calibrate: {group}: expected finite activations, got NaN or Inf ({name})")
        return {layer.name: groups[layer.input_group] for layer in layers}

    def remember(self, group: str, x: Tensor) -> None:
        """Add what an input group read from one batch in the uncompressed model."""
        self.reference.setdefault(group, []).append(x)

    def observe(
        self,
        index: int,
        hidden: Tensor,
        layers: Sequence[Layer],
        watch: Callable[[str, Tensor], None],
        *,
        to_the_end: bool = False,
    ) -> Tensor | None:
        """Run batch ``index`` on ``hidden`` and call ``watch(input_group, x)`` for each input group of ``layers``.

        The run stops after the last group, as nothing later is of interest, unless ``to_the_end`` asks for the output.
        """
        waiting = {layer.input_group: layer.module for layer in reversed(layers)}  # the first member of each group

        def hook(group: str, args: tuple[Tensor, ...]) -> None:
            watch(group, args[0].detach())
            waiting.pop(group, None)
            if not waiting and not to_the_end:
                raise _AllSeen

        with ExitStack() as hooks:
            for group, module in tuple(waiting.items()):
                handle = module.register_forward_pre_hook(lambda module, args, group=group: hook(group, args))
                hooks.callback(handle.remove)
            with suppress(_AllSeen):
                return self.run(index, hidden)
        return None

    @torch.no_grad()
    def run(self, index: int, hidden: Tensor | None = None) -> Tensor:
        """The block's output for batch ``index``, as the module is now; ``hidden`` replaces the batch's input."""
        args, kwargs = self.calls[index]
        output = self.module(self.hidden[index] if hidden is None else hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def advance(self) -> None:
        """Turn ``hidden`` into the outputs for all batches; each replaces its input at once, so one depth is held."""
        for index in range(len(self.hidden)):
            self.hidden[index] = self.run(index)


@torch.no_grad()
def stream_blocks(
    model: nn.Module, layers: Sequence[Layer], calib: Sequence[Tensor], *, reference: bool = False
) -> Iterator[Block]:
    """Yield every block in order; what the caller changed in one is in effect for the inputs of the next.

    Args:
        model: a decoder of transformers' usual shape (Llama, Mistral, Qwen2, OPT, GPT-2).
        layers: the model's layers; their names say where the blocks are.
        calib: token ids, each int64 ``[batch, length]``.
        reference: also run a stream through the blocks as they are before the caller changes them, which costs one
            more forward pass, its hidden states, and one block's inputs for all batches.

    Raises:
        ValueError: no blocks, blocks in several stacks, or illegal token batches.
    """
    check_calib(model, calib)
    blocks = find_blocks(model, layers)
    training = model.training
    model.eval()
    try:
        hidden, calls = record_calls(model, blocks, calib)
        untouched = list(hidden) if reference else []
        for name, module in blocks.items():
            block = Block(name, module, hidden, calls.pop(name))
            members = [layer for layer in layers if layer.block == name]
            if reference:
                for index, batch in enumerate(untouched):
                    untouched[index] = block.observe(index, batch, members, block.remember, to_the_end=True)
            yield block
            block.advance()
    finally:
        model.train(training)


def find_blocks(model: nn.Module, layers: Sequence[Layer]) -> dict[str, nn.Module]:
    """All blocks of the one stack that holds ``layers``, by name."""
    stacks = {layer.block.rpartition(".")[0] for layer in layers if layer.block is not None}
    if len(stacks) != 1:
        raise ValueError(f"calibrate: expected a model with one stack of blocks, got {sorted(stacks) or 'none'}")
    (stack,) = stacks
    return {f"{stack}.{index}": module for index, module in model.get_submodule(stack).named_children()}


def check_calib(model: nn.Module, calib: Sequence[Tensor]) -> None:
    """Raise ``ValueError`` unless every batch is int64 ``[batch, length]`` with ids of the model's vocabulary."""
    if not len(calib):
        raise ValueError("calibrate: calib: expected at least one batch of token ids, got none")
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    limit = getattr(embedding, "num_embeddings", None)
    for index, batch in enumerate(calib):
        if not isinstance(batch, Tensor) or batch.dtype != torch.int64 or batch.dim() != 2 or batch.numel() == 0:
            got = f"{batch.dtype} {list(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
            raise ValueError(f"calibrate: calib[{index}]: expected non-empty int64 [batch, length], got {got}")
        if int(batch.min()) < 0 or (limit is not None and int(batch.max()) >= limit):
            raise ValueError(
                f"calibrate: calib[{index}]: expected ids in [0, {limit}), got {int(batch.min())}..{int(batch.max())}"
            )


class _AllSeen(Exception):
    """Ends a block's forward pass early: nothing after the last watched layer is of interest."""


@dataclass
class _Recorder:
    """Stands in for a block's ``forward``: notes the call and hands the hidden states on unchanged."""

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    hidden: list[Tensor] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        if self.hidden is not None:
            self.hidden.append(hidden)
        self.calls.append((args, kwargs))
        return hidden


@torch.no_grad()
def record_calls(
    model: nn.Module, blocks: Mapping[str, nn.Module], calib: Sequence[Tensor]
) -> tuple[list[Tensor], dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]]]:
    """The first block's inputs and every block's other arguments, per batch, without running any block."""
    inner = getattr(model, "base_model", model)  # without the head, whose logits would be thrown away
    options = {"use_cache": False} if hasattr(model, "config") else {}
    device = next(model.parameters()).device
    hidden: list[Tensor] = []
    recorders = {name: _Recorder(hidden=hidden if index == 0 else None) for index, name in enumerate(blocks)}
    with ExitStack() as restore:
        for name, module in blocks.items():
            module.forward = recorders[name]
            restore.callback(module.__dict__.pop, "forward")
        for batch in calib:
            inner(batch.to(device), **options)
    return hidden, {name: recorder.calls for name, recorder in recorders.items()}
