"""Layers that read the same input share one kernel call (:mod:`effk.nn.siblings`)."""

from __future__ import annotations

from torch import nn

from ..nn import QuikLinear, QuikMultiLinear, WqLinear, WqMultiLinear
from ..nn.quik_linear import same_input
from .layers import SHARED_INPUT, input_group


def fuse_shared_inputs(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Attach q, k, v and gate, up of every block to one call each; returns group -> member names.

    Members that are not compressed, or read the input in another form than the first, stay out; a group needs two. The
    layers keep their place in the model, so that neither its code nor its ``state_dict`` changes. Idempotent.
    """
    groups: dict[str, dict[str, WqLinear | QuikLinear]] = {}
    for name, module in model.named_modules():
        if type(module) in (WqLinear, QuikLinear) and (group := input_group(name)) != name:
            groups.setdefault(group, {})[name] = module
    fused = {}
    for group, members in groups.items():
        first = next(iter(members.values()))
        same = {name: module for name, module in members.items() if _alike(first, module)}
        if len(same) >= 2:
            order = [leaf for leaves in SHARED_INPUT for leaf in leaves]
            names = sorted(same, key=lambda name: order.index(name.rpartition(".")[2]))
            kind = QuikMultiLinear if type(first) is QuikLinear else WqMultiLinear
            kind([same[name] for name in names]).attach()
            fused[group] = tuple(names)
    return fused


def _alike(first: WqLinear | QuikLinear, other: WqLinear | QuikLinear) -> bool:
    if type(first) is not type(other):
        return False
    if isinstance(first, QuikLinear):
        return same_input(first, other)
    return first.compute == other.compute and first.in_features == other.in_features
