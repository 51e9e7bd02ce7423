"""Every method on every architecture: compressed, saved, loaded again, and trainable on top."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import effk
from effk.compress import FilterRecipe, NetworkRecipe, make_plan, recipe_types
from effk.compress.passes.moqe import MoQE
from effk.nn import WqLinear
from small_models import MODELS, Nearest, small_model, token_batches

# The test's own, those that leave single weights alone, and the one of experts, which these models have none of.
_OTHERS = (Nearest, FilterRecipe, NetworkRecipe, MoQE)
METHODS = sorted(name for name, kind in recipe_types().items() if not issubclass(kind, _OTHERS))
# Bits of a code, and of a weight with scales and all, at most. quik: 8-bit down projections behind a gate, and 16 of 72
# columns in 16 bits. sparse: half of the codes of 8 bits, and a bit a weight in columns padded from 72 to 128.
BITS = {"quik": (5, 8), "sparse": (8, 6.5)}
IDS = token_batches(1)[0]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_compress_save_load(method: str, name: str, tmp_path: Path) -> None:
    model = small_model(name)
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    report = effk.compress(model, recipe_types()[method](), calib=token_batches(4))
    assert linear == set(report.layers) | set(report.skipped)
    nominal, true = BITS.get(method, (4, 5))
    assert 2 <= report.nominal_bits <= nominal and 4 < report.true_bits < true
    with torch.no_grad():
        expected = model(IDS).logits
        effk.save(model, tmp_path)
        assert torch.equal(effk.load(tmp_path)(IDS).logits, expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_made_first_and_applied_later_gives_the_same_model(method: str) -> None:
    """Plan on one object, print and read it, apply it to a fresh one: the road of a user who edits plans."""
    recipe, batches = recipe_types()[method](), token_batches(4)
    at_once, later = small_model("llama"), small_model("llama")
    effk.compress(at_once, recipe, calib=batches)
    plan = make_plan(copy.deepcopy(later), recipe, calib=batches)
    effk.compress(later, recipe, calib=batches, plan=type(plan).from_json(plan.to_json()))
    with torch.no_grad():
        assert torch.equal(later(IDS).logits, at_once(IDS).logits)


def test_adapters_train_on_top() -> None:
    """A low-rank pair around every down projection, trained for a few steps, lowers the loss; the weights stay."""

    class Adapter(nn.Module):
        def __init__(self, layer: WqLinear) -> None:
            super().__init__()
            self.layer = layer
            self.down = nn.Parameter(0.1 * torch.randn(4, layer.in_features))
            self.up = nn.Parameter(torch.zeros(layer.out_features, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) + x @ self.down.t() @ self.up.t()

    model = small_model("llama")
    effk.compress(model, Nearest(bits=4, embedding_bits=8))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    torch.manual_seed(0)
    adapters = []
    for block in model.model.layers:
        block.mlp.down_proj = Adapter(block.mlp.down_proj)
        adapters += [block.mlp.down_proj.down, block.mlp.down_proj.up]
    frozen = {name: buffer.clone() for name, buffer in model.named_buffers()}
    optimizer, losses = torch.optim.Adam(adapters, lr=0.02), []
    for _ in range(20):
        loss = model(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(buffer, frozen[name]) for name, buffer in model.named_buffers())


def test_replaced_weights_are_freed_as_the_work_goes_on() -> None:
    """Peak memory is the model plus one block: when the last layer is done, the weights of earlier blocks are gone."""
    model = small_model("llama")
    weights = {name: weakref.ref(parameter) for name, parameter in model.named_parameters() if "layers.0" in name}
    alive: list[list[str]] = []

    def watch(stage: str, done: int, total: int) -> None:
        if stage == "apply" and done == total:
            alive.append([name for name, ref in weights.items() if ref() is not None and "proj" in name])

    effk.compress(model, Nearest(bits=4, hessian=True), calib=token_batches(), progress=watch)
    assert alive == [[]]
