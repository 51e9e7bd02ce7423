"""Channel scales: the search finds gains, folding never changes the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from effk.compress.calibrate import stream_blocks
from effk.compress.folding import find_folds, fold_block
from effk.compress.layers import find_layers
from effk.compress.solvers.awq import channel_scale, search_scaling
from small_models import small_model, token_batches


def grouped_query_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def test_folding_keeps_the_function() -> None:
    model, batches = grouped_query_llama(), token_batches(2)
    layers = [layer for layer in find_layers(model)[0] if layer.block]
    with torch.no_grad():
        before = [model(ids).logits for ids in batches]
    folds = find_folds(model, layers)
    assert [fold.name.removeprefix("model.layers.0.") for fold in folds[:4]] == [
        "input_layernorm", "post_attention_layernorm", "mlp.up_proj", "self_attn.v_proj",
    ]  # fmt: skip
    assert len(folds) == 8
    assert (folds[3].repeat, folds[3].width) == (3, 8)
    generator, weights = torch.Generator().manual_seed(1), [layer.weight().clone() for layer in layers]
    for block in stream_blocks(model, layers, batches):
        here = [fold for fold in folds if fold.consumers[0].block == block.name]
        scales = [fold.shared(torch.rand(fold.consumers[0].k, generator=generator) * 4 + 0.25) for fold in here]
        assert fold_block(block, here, scales)
    assert all(not torch.equal(old, layer.weight()) for old, layer in zip(weights, layers, strict=True))
    with torch.no_grad():
        for ids, logits in zip(batches, before, strict=True):
            # Scaling and unscaling round each weight twice; the bound is that of the products' own summation order.
            torch.testing.assert_close(model(ids).logits, logits, rtol=1e-4, atol=1e-4 * float(logits.abs().max()))


def test_a_fold_that_would_change_the_function_is_taken_back() -> None:
    """A norm that something else reads as well, as in models whose attention and feed-forward run in parallel."""
    model, batches = grouped_query_llama(), token_batches()
    layers, _ = find_layers(model)
    folds = [fold for fold in find_folds(model, layers) if fold.name.endswith("layers.0.post_attention_layernorm")]
    wrong = [type(fold)(fold.name, fold.producer, fold.consumers[:1]) for fold in folds]  # forgets up_proj
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    block = next(stream_blocks(model, layers, batches))
    assert not fold_block(block, wrong, [torch.linspace(0.5, 2, 48)])
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-6, atol=0)


def test_no_folds_where_names_mean_something_else() -> None:
    for name in ("gpt2", "opt"):
        model = small_model(name)
        assert find_folds(model, find_layers(model)[0]) == []
    model = small_model("llama")
    del model.model.layers[0].mlp.gate_proj  # then an activation lies between up and down
    names = [fold.name for fold in find_folds(model, find_layers(model)[0])]
    assert "model.layers.0.mlp.up_proj" not in names
    assert "model.layers.1.mlp.up_proj" in names


def test_shared_heads_get_one_scale() -> None:
    fold = find_folds(grouped_query_llama(), find_layers(grouped_query_llama())[0])[3]
    scale = fold.shared(torch.rand(48, generator=torch.Generator().manual_seed(2)))
    heads = scale.reshape(2, 3, 8)
    assert torch.equal(heads[:, 0], heads[:, 1])
    assert torch.equal(heads[:, 0], heads[:, 2])


def test_search_scales_up_the_columns_that_meet_large_inputs() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(500, 64, generator=generator)
    x[:, :4] *= 20
    weight = torch.randn(128, 64, generator=generator) * 0.02
    found = search_scaling([weight], x.abs().mean(0), x.t() @ x, 3, 32)
    assert 0 < found.alpha < 1
    assert found.gain < 0.9
    assert float(found.scale[:4].min()) > float(found.scale[4:].max())
    assert float((found.scale.max() * found.scale.min()).sqrt()) == pytest.approx(1, rel=1e-5)


def test_even_inputs_need_no_scaling() -> None:
    x = torch.eye(64).repeat(4, 1)
    found = search_scaling([torch.randn(32, 64)], x.abs().mean(0), x.t() @ x, 4, 32)
    assert (found.alpha, found.gain) == (0.0, 1.0)
    assert torch.equal(channel_scale(torch.zeros(8), 0.5), torch.ones(8))


def test_shapes_must_fit() -> None:
    with pytest.raises(ValueError, match=r"weights \[N, 8\]"):
        search_scaling([torch.zeros(4, 9)], torch.ones(8), torch.eye(8), 4, 0)
