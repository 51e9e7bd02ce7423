"""Layers that read the same input share one kernel call (:class:`effk.nn.WqMultiLinear`)."""

from __future__ import annotations

from torch import nn

from ..nn import WqLinear, WqMultiLinear
from .layers import SHARED_INPUT, input_group


def fuse_shared_inputs(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Attach q, k, v and gate, up of every block to one call each; returns group -> member names.

    Members that are not compressed, or compute in another form than the first, stay out; a group needs two. The
    layers keep their place in the model, so that neither its code nor its ``state_dict`` changes. Idempotent.
    """
    groups: dict[str, dict[str, WqLinear]] = {}
    for name, module in model.named_modules():
        if type(module) is WqLinear and (group := input_group(name)) != name:
            groups.setdefault(group, {})[name] = module
    fused = {}
    for group, members in groups.items():
        first = next(iter(members.values()))
        same = {
            name: module
            for name, module in members.items()
            if module.compute == first.compute and module.in_features == first.in_features
        }
        if len(same) >= 2:
            order = [leaf for leaves in SHARED_INPUT for leaf in leaves]
            names = sorted(same, key=lambda name: order.index(name.rpartition(".")[2]))
            WqMultiLinear([same[name] for name in names]).attach()
            fused[group] = tuple(names)
    return fused
