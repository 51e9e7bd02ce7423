"""Replacing feed-forward networks: plan, conversion block by block on calibration text, recovery, report.

One block at a time is calibrated and converted, on what the converted blocks before it produce, so that memory is the
model, the hidden states of all batches and one network's inputs (and a copy of the model, if the whole is recovered).
One in eight calibration sequences is held out: nothing is fitted to it, and network errors and perplexities are
measured on it.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .apply import model_bytes
from .calibrate import Block, check_calib, stream_blocks
from .feedforward import FeedForward, find_feedforwards, hidden_differs
from .layers import replace_module
from .networks import NetworkHandler, NetworkPlan, NetworkRecipe, NetworkReport, NetworkReportEntry
from .recipe import matches
from .recover import is_decoder, recover_model, states

HELD_OUT = 8  # one sequence in as many


def make_network_plan(model: nn.Module, recipe: NetworkRecipe, handler: NetworkHandler) -> NetworkPlan:
    """What the recipe does to every network; errors as :func:`effk.compress`."""
    networks, skipped = find_feedforwards(model)
    ignored = {network.name: "ignored by the recipe" for network in networks if matches(network.name, recipe.ignore)}
    chosen = [network for network in networks if network.name not in ignored]
    if not chosen:
        raise ValueError(
            "compress: model: expected at least one feed-forward network as in OPT, GPT-NeoX, GPT-2, BERT or Llama, "
            f"got none to replace; kept: {ignored | skipped or 'none'}"
        )
    if missing := recipe.unmatched([network.name for network in networks]):
        raise ValueError(
            f"compress: recipe {recipe.name}: per_layer: expected patterns that match networks, got {missing}; "
            f"the model has e.g. {[network.name for network in networks[:3]]}"
        )
    options = {network.name: handler.options(network, recipe.for_layer(network.name)) for network in chosen}
    return NetworkPlan(recipe.to_json(), options, ignored | skipped)


def compress_networks(
    model: nn.Module,
    recipe: NetworkRecipe,
    handler: NetworkHandler,
    calib: Sequence[Tensor],
    plan: NetworkPlan | None,
    progress: Any,
) -> NetworkReport:
    """What :func:`effk.compress` does for these recipes; see there."""
    start = time.perf_counter()
    made = make_network_plan(model, recipe, handler) if plan is None else plan
    networks = bind(made, find_feedforwards(model)[0], handler)
    if not len(calib) and (handler.needs_calibration(recipe) or recipe.model_steps):
        raise ValueError(f"compress: calib: expected token ids for recipe {recipe.name}, got none")
    if len(calib):
        check_calib(model, calib)
    for network in networks:
        for layer in network.layers:
            layer.weight()  # refuses NaN and Inf
    bytes_before = model_bytes(model)
    fitted, held = hold_out(calib)
    judged = held or fitted
    teacher = copy.deepcopy(model).requires_grad_(False) if recipe.model_steps else None
    before, reference = perplexity(model, judged), [states(model, batch) for batch in judged]

    entries: dict[str, NetworkReportEntry] = {}
    built: dict[str, tuple[FeedForward, list[nn.Module]]] = {}

    def convert(network: FeedForward, xs: list[Tensor], held: list[Tensor]) -> None:
        begin = time.perf_counter()
        old = [p for layer in network.layers for p in layer.module.parameters()]
        dtype = network.down.module.weight.dtype
        modules, entry = handler.build(network, made.networks[network.name], recipe, xs, held)
        new = [p for module in modules for p in module.to(dtype).parameters()]
        for layer, module in zip(network.layers, modules, strict=True):
            replace_module(model, layer.name, module.eval())
            layer.module = None  # the last reference to the dense weight
        entries[network.name] = dataclasses.replace(
            entry,
            parameters_before=sum(p.numel() for p in old),
            parameters_after=sum(p.numel() for p in new),
            bytes_before=sum(p.numel() * p.element_size() for p in old),
            seconds=time.perf_counter() - begin,
        )
        built[network.name] = network, modules
        progress("apply", len(entries), len(networks))

    if len(calib) and handler.needs_calibration(recipe):
        layers = [layer for network in networks for layer in network.layers]
        for block in stream_blocks(model, layers, [*fitted, *held]):
            for network in [network for network in networks if network.block == block.name]:
                xs = inputs(block, network)
                convert(network, xs[: len(fitted)], xs[len(fitted) :])
    else:
        for network in networks:
            convert(network, [], [])

    converted = perplexity(model, judged)
    if teacher is not None:
        trained = [p for _, modules in built.values() for module in modules for p in module.parameters()]
        recover_model(model, teacher, trained, fitted, recipe.model_steps, recipe.model_rate, recipe.seed, progress)
        teacher = None
    for name, (network, modules) in built.items():
        final = [handler.finish(module, made.networks[name], recipe) for module in modules]
        for layer, module in zip(network.layers, final, strict=True):
            replace_module(model, layer.name, module)
        entries[name] = dataclasses.replace(entries[name], bytes_after=sum(model_bytes(module) for module in final))
    return NetworkReport(
        plan=made,
        networks={network.name: entries[network.name] for network in networks},
        perplexity_before=before,
        perplexity_converted=converted,
        perplexity_after=perplexity(model, judged),
        output_error=drift(reference, [states(model, batch) for batch in judged]),
        held_out=sum(len(batch) for batch in held),
        skipped=dict(made.skipped),
        model_bytes_before=bytes_before,
        model_bytes_after=model_bytes(model),
        seconds=time.perf_counter() - start,
    )


def bind(plan: NetworkPlan, networks: Iterable[FeedForward], handler: NetworkHandler) -> list[FeedForward]:
    """The plan's networks, in the model's order, after checking every entry; ValueError."""
    by_name = {network.name: network for network in networks}
    if unknown := sorted(set(plan.networks) - set(by_name)):
        raise ValueError(f"plan: expected networks of the model, got {unknown}; it has e.g. {list(by_name)[:3]}")
    for name, options in plan.networks.items():
        handler.check(by_name[name], options)
    return [network for name, network in by_name.items() if name in plan.networks]


def hold_out(calib: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The batches without the last eighth of all sequences, and these; the second is empty for fewer than eight."""
    kept, held = list(calib), []
    left = sum(len(batch) for batch in calib) // HELD_OUT
    while left:
        batch = kept.pop()
        taken = min(left, len(batch))
        held.insert(0, batch[len(batch) - taken :])
        if taken < len(batch):
            kept.append(batch[: len(batch) - taken])
        left -= taken
    return kept, held


@torch.no_grad()
def inputs(block: Block, network: FeedForward) -> list[Tensor]:
    """What the network reads from every batch, ``[tokens, features]`` each.

    Raises:
        ValueError: it is not called, reads NaN or Inf, or its hidden units are not what :mod:`.feedforward` takes them
            for.
    """
    seen: dict[str, Tensor] = {}

    def watch(group: str, x: Tensor) -> None:
        seen[group] = x.reshape(-1, x.shape[-1])

    first, xs = network.up[0], []
    block.observe(0, block.hidden[0], [first, network.down], watch)
    if len(seen) < 2:
        raise ValueError(f"calibrate: {network.name}: expected the block to call it, but it was not reached")
    difference = hidden_differs(network, seen[first.input_group], seen[network.down.input_group])
    if not difference < 0.05:  # bf16 rounds each factor by 2^-9
        raise ValueError(
            f"calibrate: {network.name}: expected hidden units act(up(x)), or act(gate(x)) up(x), got others "
            f"(relative difference {difference:.2g})"
        )
    for index in range(len(block.hidden)):
        block.observe(index, block.hidden[index], [first], watch)
        xs.append(seen[first.input_group])
    if not all(bool(x.isfinite().all()) for x in xs):
        raise ValueError(f"calibrate: {network.name}: expected finite activations, got NaN or Inf")
    return xs


@torch.no_grad()
def perplexity(model: nn.Module, batches: Sequence[Tensor]) -> float | None:
    """Per token, first tokens not scored; None for a model that is no decoder, or without batches."""
    if not batches or not is_decoder(model):
        return None
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        logits = model(batch, use_cache=False).logits[:, :-1]
        losses = cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="none")
        total, count = total + losses.double().sum(), count + losses.numel()
    return math.exp(min(700.0, float(total) / count))


def drift(before: Sequence[Tensor], after: Sequence[Tensor]) -> float | None:
    """``|y - y'| / |y|`` over all batches; None without any."""
    if not before:
        return None
    wrong = sum(float((a - b).double().square().sum()) for a, b in zip(before, after, strict=True))
    return math.sqrt(wrong / sum(float(a.double().square().sum()) for a in before))
