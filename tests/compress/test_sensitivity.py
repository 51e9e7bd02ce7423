"""Scores against closed forms and against gradients of the whole model."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from effk.compress.layers import find_layers
from effk.compress.sensitivity import SCORES, Probe, make_monotone, score, stream_gradients
from small_models import small_model, token_batches


def random_probe(sequences: int = 3, length: int = 5, n: int = 4, k: int = 6) -> tuple[Probe, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sequences, length, k, generator=generator)
    dy = torch.randn(sequences, length, n, generator=generator)
    return Probe(x, dy), torch.randn(n, k, generator=generator) * 0.1


def test_scores_equal_their_sums_written_out() -> None:
    probe, change = random_probe()
    x, dy, d = probe.x.double(), probe.dy.double(), change.double()
    tokens = x.shape[0] * x.shape[1]
    gradients = torch.einsum("sln,slk->snk", dy, x)
    expected = {
        "first_order": abs(float((gradients.sum(0) * d).sum())),
        "abs": float((gradients.sum(0) * d).abs().sum()),
        "fisher": 0.5 * sum(float((g * d).square().sum()) for g in gradients),
        "hdiag": sum(float((x[s, t] ** 2 * d**2).sum()) for s in range(3) for t in range(5)),
        "output_fisher": 0.5
        * sum(float((dy[s, t, n] * (d[n] @ x[s, t])) ** 2) for s in range(3) for t in range(5) for n in range(4)),
    }
    assert set(expected) == set(SCORES)
    for name, value in expected.items():
        assert score(name, probe, change) == pytest.approx(value / tokens, rel=1e-5), name


def test_scaling_the_loss_scales_every_layer_alike() -> None:
    probe, change = random_probe()
    louder = Probe(probe.x, probe.dy * 4)
    factors = {"first_order": 4, "abs": 4, "fisher": 16, "hdiag": 1, "output_fisher": 16}
    for name, factor in factors.items():
        assert score(name, louder, change) == pytest.approx(factor * score(name, probe, change), rel=1e-5)


def test_no_change_has_no_score() -> None:
    probe, change = random_probe()
    assert all(score(name, probe, torch.zeros_like(change)) == 0 for name in SCORES)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_streamed_gradients_are_those_of_the_whole_model(name: str) -> None:
    model, batches = small_model(name), token_batches(2)
    layers, _ = find_layers(model)
    inside = [layer for layer in layers if layer.block]
    loss = sum(
        cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") for ids in batches
    )
    whole = torch.autograd.grad(loss, [layer.module.weight for layer in inside])
    streamed: dict[str, torch.Tensor] = {}
    for probes in stream_gradients(model, inside, batches):
        streamed |= {layer: probe.gradients().sum(0) for layer, probe in probes.items()}
    assert set(streamed) == {layer.name for layer in inside}
    for layer, expected in zip(inside, whole, strict=True):
        expected = expected.t() if layer.transposed else expected
        # The same products in another order of summation: the error is relative to the largest gradients.
        torch.testing.assert_close(streamed[layer.name], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_blocks_come_last_first_and_the_model_is_untouched() -> None:
    model, batches = small_model("llama"), token_batches()
    layers, _ = find_layers(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    order = [
        next(iter(probes)).split(".")[2] for probes in stream_gradients(model, [x for x in layers if x.block], batches)
    ]
    assert order == sorted(order, key=int, reverse=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not [module for module in model.modules() if "forward" in module.__dict__]


def test_first_order_predicts_a_small_change_of_the_loss() -> None:
    model, batches = small_model("llama"), token_batches(2)
    layers, _ = find_layers(model)
    inside = [layer for layer in layers if layer.block]
    probes = {name: p for block in stream_gradients(model, inside, batches) for name, p in block.items()}
    layer = inside[3]
    probe = probes[layer.name]
    change = 1e-4 * probe.gradients().sum(0) / probe.gradients().sum(0).norm()

    def loss() -> float:
        with torch.no_grad():
            return sum(
                float(
                    cross_entropy(
                        model(ids).logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten(), reduction="sum"
                    )
                )
                for ids in batches
            )

    before = loss()
    layer.module.weight.data += change
    risen = loss() - before
    assert risen == pytest.approx(score("first_order", probe, change) * probe.tokens, rel=0.05)


def test_monotone_raises_lower_precisions_only() -> None:
    assert make_monotone([1.0, 5.0, 2.0, 3.0]) == [5.0, 5.0, 3.0, 3.0]
    assert make_monotone([3.0, 2.0, 1.0]) == [3.0, 2.0, 1.0]
    assert make_monotone([]) == []


def test_bad_arguments() -> None:
    probe, change = random_probe()
    with pytest.raises(ValueError, match="name: expected one of"):
        score("hessian_trace", probe, change)
    with pytest.raises(ValueError, match=r"change: expected \[4, 6\], got \[6, 4\]"):
        score("abs", probe, change.t())
    model = small_model("llama")
    layers = [layer for layer in find_layers(model)[0] if layer.block]
    ragged = [torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 9, dtype=torch.int64)]
    with pytest.raises(ValueError, match="expected one length"):
        next(stream_gradients(model, layers, ragged))
