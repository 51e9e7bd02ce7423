"""Where the experts of mixtures are: stacks of weights in one parameter, or plain layers below a module ``experts``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..nn import GroupedExperts
from .layers import Layer, block_of, find_layers, replace_module
from .recipe import matches

_STACKS = ("gate_up_proj", "down_proj")
_EXPERT_LAYERS = ("*.experts.*",)


@dataclass(eq=False)
class ExpertStack(Layer):
    """A parameter ``[experts, n, k]`` as one weight ``[experts * n, k]``: groups never cross rows, so no expert sees another.

    ``module`` is the parameter itself, ``n`` counts the rows of all experts.
    """

    experts: int = 1

    @property
    def bias(self) -> None:
        return None

    def weight(self) -> Tensor:
        weight = self.module.detach().reshape(self.n, self.k).float().contiguous()
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{self.name}: expected finite values, got NaN or Inf")
        return weight


def find_experts(model: nn.Module) -> tuple[list[Layer], dict[str, str]]:
    """The weights of experts in module order, and every other linear layer or stack with the reason why it stays.

    Stacks are those of transformers' mixtures with gates: parameters ``gate_up_proj`` ``[E, 2 I, H]`` and ``down_proj``
    ``[E, H, I]`` of one module. Where experts are modules of their own, their layers are found by name.
    """
    linears, kept = find_layers(model)
    found: list[Layer] = [layer for layer in linears if matches(layer.name, _EXPERT_LAYERS)]
    kept |= {layer.name: "no expert" for layer in linears if not matches(layer.name, _EXPERT_LAYERS)}
    for name, module in model.named_modules():
        deep = {key: p for key, p in module._parameters.items() if p is not None and p.dim() == 3}
        if not deep:
            continue
        reason = _unfit(module)
        for key, parameter in deep.items():
            full = f"{name}.{key}" if name else key
            if reason is not None or key not in _STACKS:
                kept[full] = reason or "no stack of gate_up_proj and down_proj"
                continue
            experts, n, k = parameter.shape
            size = parameter.numel() * parameter.element_size()
            found.append(ExpertStack(full, parameter, block_of(full), full, False, experts * n, k, size, experts))
    order = {name: i for i, (name, _) in enumerate((*model.named_modules(), *model.named_parameters()))}
    return sorted(found, key=lambda layer: order[layer.name]), kept


def group_experts(model: nn.Module, name: str) -> GroupedExperts:
    """Put :class:`effk.nn.GroupedExperts` with the same parameters in the place of the experts at ``name``; idempotent.

    Raises:
        ValueError: the module has another shape.
    """
    module = model.get_submodule(name)
    if isinstance(module, GroupedExperts):
        return module
    if reason := _unfit(module):
        raise ValueError(f"{name}: expected experts of a mixture, got {type(module).__name__}: {reason}")
    grouped = GroupedExperts(module.gate_up_proj, module.down_proj, module.act_fn, module.gate_up_proj.shape[0])
    replace_module(model, name, grouped.train(module.training))
    return grouped


def _unfit(module: nn.Module) -> str | None:
    """Why ``module`` does not compute what :class:`effk.nn.GroupedExperts` does; None if it does."""
    if isinstance(module, GroupedExperts):
        return None
    first, second = (module._parameters.get(key) for key in _STACKS)
    if first is None or second is None:
        return "no stack of gate_up_proj and down_proj"
    for key, expected in (
        ("has_gate", True), ("has_bias", False), ("is_transposed", False), ("is_concatenated", True),
        ("has_post_expert_norm", False),
    ):  # fmt: skip
        if getattr(module, key, expected) != expected:
            return f"its experts have {key} {not expected}"
    gate = getattr(type(module), "_apply_gate", None)
    if gate is not None and gate.__name__ != "_default_apply_gate":
        return "its experts have a gate of their own"
    experts, rows, inputs = first.shape
    if second.dim() != 3 or second.shape != (experts, inputs, rows // 2) or not hasattr(module, "act_fn"):
        return f"its experts have shapes {list(first.shape)} and {list(second.shape)}"
    if first.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its experts are {first.dtype}"
    return None
