"""Where the feed-forward networks of a transformer are: ``down(act(up(x)))``, or ``down(act(gate(x)) * up(x))``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .layers import Layer, find_layers

# What reads the input, what writes the output, and the activation, by their names inside a block. The gate is first.
_SHAPES = (
    (("fc1",), "fc2", "activation_fn"),  # OPT
    (("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", "mlp.act"),  # GPT-NeoX
    (("mlp.c_fc",), "mlp.c_proj", "mlp.act"),  # GPT-2
    (("intermediate.dense",), "output.dense", "intermediate.intermediate_act_fn"),  # BERT
    (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", "mlp.act_fn"),  # Llama, Mistral, Qwen2
)


@dataclass(eq=False)
class FeedForward:
    """One network.

    Attributes:
        name: of the innermost module that holds all its layers.
        block: of the transformer block around it.
        up: the layers that read the input: one, or gate and up.
        down: the layer that writes the output.
        act: the activation, element by element.
    """

    name: str
    block: str
    up: tuple[Layer, ...]
    down: Layer
    act: Callable[[Tensor], Tensor]

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers, those that read first."""
        return (*self.up, self.down)

    @property
    def width(self) -> int:
        """Hidden units."""
        return self.down.k

    def hidden(self, outputs: Sequence[Tensor]) -> Tensor:
        """The input of ``down`` from the outputs of ``up``."""
        first = self.act(outputs[0])
        return first if len(outputs) == 1 else first * outputs[1]

    def run(self, modules: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
        """The network's output with ``modules`` in the places of ``layers``; no dropout."""
        return modules[-1](self.hidden([module(x) for module in modules[:-1]]))


def find_feedforwards(model: nn.Module) -> tuple[list[FeedForward], dict[str, str]]:
    """The networks of ``model`` in order, and those that cannot be replaced with the reason.

    Known are the shapes of OPT, GPT-NeoX, GPT-2, BERT and Llama, by the names of their layers.
    """
    found, refused = find_layers(model)
    layers, modules = {layer.name: layer for layer in found}, dict(model.named_modules(remove_duplicate=False))
    networks: list[FeedForward] = []
    unfit: dict[str, str] = {}
    for block in dict.fromkeys(layer.block for layer in found if layer.block is not None):
        for ups, down, act in _SHAPES:
            names = [f"{block}.{leaf}" for leaf in (*ups, down)]
            if not all(name in layers or name in refused for name in names) or f"{block}.{act}" not in modules:
                continue
            parent = _common(names)
            bad = [name for name in names if name not in layers]
            if bad:
                unfit[parent] = f"{bad[0]}: {refused[bad[0]]}"
                continue
            *first, last = (layers[name] for name in names)
            networks.append(FeedForward(parent, block, tuple(first), last, modules[f"{block}.{act}"]))
    return networks, unfit


@torch.no_grad()
def hidden_differs(network: FeedForward, x: Tensor, seen: Tensor) -> float:
    """How far what ``down`` was ``seen`` to read is from what this module takes it to read; relative."""
    told = network.hidden([layer.module(x) for layer in network.up])
    return float((told - seen).float().norm() / seen.float().norm().clamp_min(torch.finfo(torch.float32).tiny))


def _common(names: Sequence[str]) -> str:
    parts = [name.split(".")[:-1] for name in names]
    shared = [column[0] for column in zip(*parts, strict=False) if len(set(column)) == 1]
    return ".".join(shared)
