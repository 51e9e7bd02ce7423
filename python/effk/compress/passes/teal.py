"""TEAL: small inputs of every linear layer of the blocks count as zero; no training.

Liu et al., "Training-Free Activation Sparsity in Large Language Models", 2024 (arXiv:2408.14690). Thresholds are
quantiles of ``|x|`` (the published ``quantile(0.5 + p / 2)`` of x is the same only for symmetric inputs); within a
block the shares of its layers are raised greedily, each time that of the layer which harms the block's output least,
as published.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...nn.input_sparse_linear import InputSparseLinear
from ...nn.relu_ffn import SparseFFN
from ..activation import ActivationHandler, ActivationRecipe, Session, exact_rows
from ..calibrate import Block, stream_blocks
from ..layers import Layer, find_layers, replace_module
from ..registry import register
from ..sparse_networks import SparseNetwork
from .cats import magnitude_quantile

_STEP = 0.05  # of a layer's share, over its part of the block's weights
_CHECKED = 256  # tokens that the block's error is measured on


@dataclass(frozen=True, kw_only=True)
class Teal(ActivationRecipe):
    """Thresholds on the inputs of all linear layers of the blocks that hold a feed-forward network.

    Attributes:
        sparsity: the share of input entries left out, weighted by the layers' sizes, on calibration text.
        allocation: "uniform": every layer that share; "greedy": see the module.
    """

    name: ClassVar[str] = "teal"
    version: ClassVar[int] = 1

    sparsity: float = 0.4
    allocation: str = "uniform"

    def check(self) -> None:
        super().check()
        self._expect("sparsity", 0 <= self.sparsity < 1, "a share in [0, 1)")
        self._expect("allocation", self.allocation in ("uniform", "greedy"), "'uniform' or 'greedy'")
        self._expect("model_steps", self.model_steps == 0, "0: the method trains nothing")


@register(Teal)
class TealHandler(ActivationHandler):
    own_options = ("sparsity", "allocation")

    def needs_calibration(self, recipe: Teal) -> bool:
        return True

    def exact(self, recipe: Teal) -> str:
        return "small inputs of linear layers count as zero, in prompts too"

    def refuses(self, network: SparseNetwork, recipe: Teal) -> str:
        return ""

    def options(self, network: SparseNetwork, recipe: Teal) -> dict[str, Any]:
        return super().options(network, recipe) | {name: getattr(recipe, name) for name in self.own_options}

    def check(self, network: SparseNetwork, options: Mapping[str, Any]) -> None:
        super().check(network, options)
        Teal(**{name: options[name] for name in self.own_options})

    def convert(
        self, session: Session, network: SparseNetwork, options: Mapping[str, Any], x: Tensor | None
    ) -> SparseFFN | None:
        session.notes.setdefault("blocks", {})[network.block] = dict(options)
        return None

    def finish(self, session: Session) -> None:
        blocks = session.notes.pop("blocks")
        layers = [layer for layer in find_layers(session.model)[0] if layer.block in blocks]
        shares = session.notes["shares"] = {}
        for block in stream_blocks(session.model, layers, session.fitted):
            members = [layer for layer in layers if layer.block == block.name]
            if not members:
                continue
            options = blocks[block.name]
            inputs = _magnitudes(block, members)
            chosen = {layer.name: options["sparsity"] for layer in members}
            if options["allocation"] == "greedy":
                chosen = _allocate(block, members, inputs, options["sparsity"])
            for layer in members:
                threshold = magnitude_quantile(inputs[layer.input_group], chosen[layer.name])
                weight, bias = layer.weight(), getattr(layer.module, "bias", None)
                rows = options["rows"] or exact_rows(weight)
                module = InputSparseLinear.from_weight(weight, bias, threshold, rows, options["group"])
                replace_module(session.model, layer.name, module.eval())
                layer.module = None
            shares |= chosen
            session.progress("apply", len(shares), len(layers))


def _magnitudes(block: Block, layers: list[Layer]) -> dict[str, Tensor]:
    """input group -> values that its layers read."""
    seen: dict[str, list[Tensor]] = {}
    for index in range(len(block.hidden)):
        block.observe(
            index, block.hidden[index], layers, lambda group, x: seen.setdefault(group, []).append(x.flatten())
        )
    return {group: torch.cat(parts) for group, parts in seen.items()}


@torch.no_grad()
def _allocate(block: Block, layers: list[Layer], inputs: Mapping[str, Tensor], target: float) -> dict[str, float]:
    """Shares by layer whose mean, weighted by size, is ``target``; layers over one input are raised together."""
    groups = {group: list(same) for group, same in itertools.groupby(layers, key=lambda layer: layer.input_group)}
    sizes = {group: sum(layer.n * layer.k for layer in same) for group, same in groups.items()}
    total = sum(sizes.values())
    index, hidden = len(block.hidden) - 1, block.hidden[-1]
    shares, cuts = dict.fromkeys(groups, 0.0), dict.fromkeys(groups, 0.0)

    def cut(group: str, x: Tensor) -> Tensor:
        return torch.where(x.abs() > cuts[group], x, 0.0)

    handles = [
        layer.module.register_forward_pre_hook(lambda m, args, g=group: (cut(g, args[0]), *args[1:]))
        for group, same in groups.items()
        for layer in same
    ]
    try:
        wanted = _last(block.run(index, hidden))
        while sum(shares[g] * sizes[g] for g in groups) < target * total:
            errors = {}
            for group in groups:
                share = min(0.95, shares[group] + _STEP * total / (len(groups) * sizes[group]))
                if share <= shares[group]:
                    continue
                kept, cuts[group] = cuts[group], float(magnitude_quantile(inputs[group], share))
                errors[group] = (float((_last(block.run(index, hidden)) - wanted).norm()), share)
                cuts[group] = kept
            if not errors:
                break
            best = min(errors, key=lambda group: errors[group][0])
            shares[best] = errors[best][1]
            cuts[best] = float(magnitude_quantile(inputs[best], shares[best]))
    finally:
        for handle in handles:
            handle.remove()
    return {layer.name: shares[group] for group, same in groups.items() for layer in same}


def _last(y: Tensor) -> Tensor:
    return y.float().flatten(0, -2)[-_CHECKED:]
