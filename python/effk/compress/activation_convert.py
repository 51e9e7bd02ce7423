"""Making a model's activations sparse: plan, conversion block by block where a method reads inputs, measurement,
report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.relu_ffn import SparseFFN, sparse_ffns
from .activation import ActivationHandler, ActivationRecipe, Session, SparsityReport
from .apply import model_bytes
from .calibrate import Block, check_calib, stream_blocks
from .continuations import compare, observe
from .convert import hold_out, perplexity
from .cost_model import Ffn, decoding_bytes
from .layers import replace_module
from .networks import NetworkPlan
from .recipe import matches
from .sparse_networks import SparseNetwork, find_sparse_networks
from .sparsity import NetworkSparsity, measure


def make_activation_plan(model: nn.Module, recipe: ActivationRecipe, handler: ActivationHandler) -> NetworkPlan:
    """What the recipe does to every network; errors as :func:`effk.compress`."""
    networks, skipped = find_sparse_networks(model)
    chosen = []
    for network in networks:
        own = recipe.for_layer(network.name)
        if own is None or matches(network.name, recipe.ignore):
            skipped[network.name] = "ignored by the recipe"
        elif reason := handler.refuses(network, own):
            skipped[network.name] = reason
        else:
            chosen.append((network, own))
    if not chosen:
        raise ValueError(
            f"compress: recipe {recipe.name}: model: expected at least one feed-forward network that it fits, got none; "
            f"kept: {dict(list(skipped.items())[:3]) or 'none found'}"
        )
    if missing := recipe.unmatched([network.name for network in networks]):
        raise ValueError(
            f"compress: recipe {recipe.name}: per_layer: expected patterns that match networks, got {missing}"
        )
    return NetworkPlan(recipe.to_json(), {n.name: handler.options(n, own) for n, own in chosen}, skipped)


def compress_activations(
    model: nn.Module,
    recipe: ActivationRecipe,
    handler: ActivationHandler,
    calib: Sequence[Tensor],
    plan: NetworkPlan | None,
    progress: Any,
) -> SparsityReport:
    """What :func:`effk.compress` does for these recipes; see there."""
    start = time.perf_counter()
    made = make_activation_plan(model, recipe, handler) if plan is None else plan
    by_name = {network.name: network for network in find_sparse_networks(model)[0]}
    if unknown := sorted(set(made.networks) - set(by_name)):
        raise ValueError(f"plan: expected networks of the model, got {unknown}; it has e.g. {list(by_name)[:3]}")
    for name, options in made.networks.items():
        handler.check(by_name[name], options)
    if not len(calib) and handler.needs_calibration(recipe):
        raise ValueError(f"compress: calib: expected token ids for recipe {recipe.name}, got none")
    if len(calib):
        check_calib(model, calib)
    networks = [network for name, network in by_name.items() if name in made.networks]
    for network in networks:
        for layer in network.layers:
            layer.weight()  # refuses NaN and Inf
    fitted, held = hold_out(calib)
    judged = held or fitted
    session = Session(model, recipe, networks, fitted, judged, progress)
    before, bytes_before, read_before = perplexity(model, judged), model_bytes(model), decoding_bytes(model)
    approximates = handler.exact(recipe)
    original = observe(model, judged, recipe.continuation) if approximates else None
    handler.prepare(session)
    converted = perplexity(model, judged)

    def convert(network: SparseNetwork, x: Tensor | None) -> None:
        module = handler.convert(session, network, made.networks[network.name], x)
        if module is not None:
            install_network(model, network, module)
        progress("apply", sum(isinstance(m, SparseFFN) for m in model.modules()), len(networks))

    if handler.reads_inputs:
        layers = [layer for network in networks for layer in network.layers]
        for block in stream_blocks(model, layers, fitted):
            for network in [network for network in networks if network.block == block.name]:
                convert(network, _inputs(block, network))
    else:
        for network in networks:
            convert(network, None)
    handler.finish(session)
    sparsity, inputs = measure(model, judged) if judged else ({}, {})
    return SparsityReport(
        plan=made,
        approximates=approximates,
        networks={name: sparsity.get(network.place) for name, network in by_name.items() if name in made.networks},
        inputs=inputs,
        perplexity_before=before,
        perplexity_prepared=converted,
        perplexity_after=perplexity(model, judged),
        continuations=None if original is None else compare(model, original),
        held_out=sum(len(batch) for batch in held),
        skipped=dict(made.skipped),
        model_bytes_before=bytes_before,
        model_bytes_after=model_bytes(model),
        costs=costs(model, sparsity, read_before),
        notes=session.notes,
        seconds=time.perf_counter() - start,
    )


def install_network(model: nn.Module, network: SparseNetwork, module: SparseFFN) -> None:
    """Put ``module`` in the place of ``network``."""
    module.silent = network.silent
    for name in network.silent:
        replace_module(model, name, nn.Identity())
    replace_module(model, network.place, module.eval())
    for layer in network.layers:
        layer.module = None


def costs(model: nn.Module, sparsity: Mapping[str, NetworkSparsity], read_before: int) -> dict[str, float]:
    """Of one token: bytes and multiply-accumulates of the networks, dense and as skipped; phi, their share of all bytes
    read."""
    dense = sparse = macs = all_macs = 0.0
    for name, ffn in sparse_ffns(model).items():
        if name not in sparsity:
            continue
        parts = [getattr(ffn, f"{part}_{what}") for part in ("gate", "up", "down") for what in ("rows", "scales")]
        size = sum(t.numel() * t.element_size() for t in parts if t is not None)
        matrices = 3 if ffn.gated else 2
        shape = Ffn(ffn.d, ffn.f, ffn.gated, size / (matrices * ffn.d * ffn.f))
        found = sparsity[name]
        dense, all_macs = dense + shape.dense_bytes(), all_macs + shape.macs()
        if found.prediction is None:
            sparse, macs = sparse + shape.gate_first_bytes(found.density.mean), macs + shape.macs(found.density.mean)
        else:
            selector = (
                0
                if ffn.selector is None
                else sum(t.numel() * t.element_size() for t in ffn.selector.state_dict().values())
            )
            share = found.prediction.density
            sparse, macs = sparse + selector + share * shape.dense_bytes(), macs + share * shape.macs()
    read = decoding_bytes(model)
    return {
        "ffn_bytes_dense": dense, "ffn_bytes": sparse, "ffn_macs_dense": all_macs, "ffn_macs": macs,
        "model_bytes_read_before": read_before, "phi": dense / max(1, read), "model_bytes_read": read - dense + sparse,
    }  # fmt: skip


@torch.no_grad()
def _inputs(block: Block, network: SparseNetwork) -> Tensor:
    """What the network reads from all batches, ``[tokens, d]``."""
    xs: list[Tensor] = []
    for index in range(len(block.hidden)):
        block.observe(
            index, block.hidden[index], [network.reading[0]], lambda _, x: xs.append(x.reshape(-1, x.shape[-1]))
        )
    x = torch.cat(xs) if xs else torch.zeros(0)
    if not len(x) or not bool(x.isfinite().all()):
        raise ValueError(
            f"calibrate: {network.name}: expected finite activations, got {'none' if not len(x) else 'others'}"
        )
    return x
