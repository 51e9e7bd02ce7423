"""Streaming calibration: the right inputs, in the right order, without holding more than one depth."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from effk.compress.calibrate import STATISTICS, LayerStats, stream_blocks
from effk.compress.layers import find_layers, input_group
from small_models import MODELS, small_model, token_batches

PLAIN = frozenset(STATISTICS) - {"drift"}


def collect(model: nn.Module, batches: list[torch.Tensor]) -> dict[str, LayerStats]:
    layers, _ = find_layers(model)
    stats: dict[str, LayerStats] = {}
    for block in stream_blocks(model, layers, batches):
        members = [layer for layer in layers if layer.block == block.name]
        stats |= block.statistics(members, PLAIN)
    return stats


@pytest.mark.parametrize("name", MODELS)
def test_statistics_are_those_of_the_whole_model(name: str) -> None:
    """Against inputs gathered by hooks during ordinary forward passes."""
    model, batches = small_model(name), token_batches(3)
    layers, _ = find_layers(model)
    seen: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in layers}
    hooks = [
        layer.module.register_forward_pre_hook(
            lambda _, args, name=layer.name: seen[name].append(args[0].flatten(0, -2))
        )
        for layer in layers
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    stats = collect(model, batches)
    assert stats.keys() == {layer.name for layer in layers if layer.block is not None}
    for layer, got in stats.items():
        x = torch.cat(seen[layer]).double()
        assert got.rows == len(x) == 96
        torch.testing.assert_close(got.hessian.double(), x.t() @ x, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(got.mean_abs.double(), x.abs().mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got.mean_sq.double(), x.square().mean(0), rtol=1e-5, atol=1e-6)
        assert torch.equal(got.max_abs, x.abs().amax(0).float())


@pytest.mark.parametrize("name", MODELS)
def test_streaming_ends_where_the_model_ends(name: str) -> None:
    model, batches = small_model(name), token_batches()
    layers, _ = find_layers(model)
    final: list[torch.Tensor] = []
    stack = next(layer.block for layer in layers if layer.block).rpartition(".")[0]
    last = list(model.get_submodule(stack))[-1]
    hook = last.register_forward_hook(lambda _, args, out: final.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    hook.remove()
    for block in stream_blocks(model, layers, batches):
        outputs = [block.run(index) for index in range(len(batches))]
    assert all(torch.equal(a, b) for a, b in zip(outputs, final, strict=True))


def test_later_blocks_see_what_was_changed_before_them() -> None:
    model, batches = small_model("llama"), token_batches()
    layers, _ = find_layers(model)
    plain = collect(model, batches)
    changed: dict[str, LayerStats] = {}
    for block in stream_blocks(model, layers, batches):
        members = [layer for layer in layers if layer.block == block.name]
        changed |= block.statistics(members, PLAIN)
        if block.name.endswith(".0"):
            block.module.mlp.down_proj.weight.data.zero_()
    first, second = "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"
    assert torch.equal(plain[first].hessian, changed[first].hessian)
    assert not torch.allclose(plain[second].hessian, changed[second].hessian)


def test_drift_compares_with_the_untouched_stream() -> None:
    """Zero without changes; after one, the closed form from inputs gathered in two whole models."""
    batches, second = token_batches(), "model.layers.1.self_attn.q_proj"

    def run(change: bool) -> LayerStats:
        model = small_model("llama")
        layers, _ = find_layers(model)
        for block in stream_blocks(model, layers, batches, reference=True):
            members = [layer for layer in layers if layer.block == block.name]
            stats = block.statistics(members, frozenset({"hessian", "drift"}))
            if block.name.endswith(".1"):
                return stats[second]
            if change:
                block.module.mlp.down_proj.weight.data.mul_(0.5)
        raise AssertionError("no second block")

    def inputs(change: bool) -> torch.Tensor:
        model, seen = small_model("llama"), []
        if change:
            model.model.layers[0].mlp.down_proj.weight.data.mul_(0.5)
        model.get_submodule(second).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
        with torch.no_grad():
            for batch in batches:
                model(batch)
        return torch.cat(seen).double()

    assert not bool(run(change=False).drift.any())
    before, after = inputs(change=False), inputs(change=True)
    got = run(change=True)
    torch.testing.assert_close(got.drift.double(), (before - after).t() @ after, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(got.hessian.double(), after.t() @ after, rtol=1e-5, atol=1e-4)


def test_one_depth_is_held() -> None:
    """The hidden states of a depth are gone when the next block is at work."""
    model, batches = small_model("llama"), token_batches(4)
    layers, _ = find_layers(model)
    earlier: list[weakref.ref[torch.Tensor]] = []
    for block in stream_blocks(model, layers, batches):
        gc.collect()
        assert not [ref for ref in earlier if ref() is not None]
        earlier = [weakref.ref(hidden) for hidden in block.hidden]


def test_the_model_is_left_as_it_was() -> None:
    model = small_model("llama").train()
    layers, _ = find_layers(model)
    for _ in stream_blocks(model, layers, token_batches()):
        break
    gc.collect()
    assert model.training
    assert not [module for module in model.modules() if "forward" in module.__dict__]


def test_shared_inputs_share_statistics() -> None:
    stats = collect(small_model("llama"), token_batches())
    attention = "model.layers.0.self_attn."
    assert stats[attention + "q_proj"] is stats[attention + "v_proj"]
    assert stats[attention + "q_proj"] is not stats[attention + "o_proj"]
    assert input_group("decoder.layers.0.encoder_attn.q_proj") == "decoder.layers.0.encoder_attn.q_proj"


@pytest.mark.parametrize(
    ("calib", "message"),
    [
        ([], "expected at least one batch"),
        ([torch.zeros(2, 8)], r"calib\[0\]: expected non-empty int64 \[batch, length\], got torch.float32"),
        ([torch.zeros(8, dtype=torch.int64)], r"calib\[0\]: .* \[8\]"),
        (["text"], r"calib\[0\]: .* got str"),
        ([torch.zeros(0, 8, dtype=torch.int64)], r"calib\[0\]: expected non-empty"),
        ([torch.full((1, 8), 97)], r"calib\[0\]: expected ids in \[0, 97\), got 97..97"),
    ],
)
def test_bad_calibration_is_named(calib: list, message: str) -> None:
    model = small_model("llama")
    layers, _ = find_layers(model)
    with pytest.raises(ValueError, match=message):
        next(stream_blocks(model, layers, calib))


def test_models_without_one_stack_and_bad_numbers_are_refused() -> None:
    flat = nn.Sequential(nn.Linear(4, 4))
    layers, _ = find_layers(flat)
    with pytest.raises(ValueError, match="one stack of blocks, got none"):
        next(stream_blocks(flat, layers, [torch.zeros(1, 4, dtype=torch.int64)]))
    model = small_model("llama")
    model.model.embed_tokens.weight.data[5] = float("nan")
    with pytest.raises(ValueError, match=r"layers.0.self_attn.*expected finite activations"):
        collect(model, [torch.full((1, 8), 5)])
    layers, _ = find_layers(model)
    block = next(stream_blocks(model, layers, token_batches()))
    with pytest.raises(ValueError, match=r"statistics: expected among .* got \['median'\]"):
        block.statistics(layers[:1], frozenset({"median"}))
    with pytest.raises(ValueError, match="expected the reference stream for 'drift'"):
        block.statistics(layers[:1], frozenset({"drift"}))
