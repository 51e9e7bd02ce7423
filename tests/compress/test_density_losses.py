"""Density losses: fixtures of the specification, padding, whose gradients, and that they work."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from effk.compress.density_losses import DensityLoss, deft, hoyer, hoyer_below, l1, prosparse_schedule, sine_stage
from effk.compress.solvers.cett import cett, cett_threshold
from small_models import VOCABULARY, small_model, token_batches

IDS = token_batches(1)[0]


def test_fixtures() -> None:
    """Specification, section 8.3."""
    z = torch.tensor([0, 1e-4, 1, 0])
    assert float(deft(z)) == pytest.approx(0.2727272, abs=1e-6)
    assert float(deft(z, 20.0)) == pytest.approx(0.0119048, abs=1e-6)
    rows = torch.tensor([[0, 0, 3, 4], [1, 1, 1, 1.0]])
    assert [float(hoyer(row)) for row in rows] == pytest.approx([1.96, 4.0])
    assert float(hoyer(rows)) == pytest.approx(2.98) and float(l1(rows)) == pytest.approx(5.5)
    assert float(hoyer_below(torch.tensor([[-12.0, -10, -7, -6]]))) == pytest.approx(1.96)


def test_cett_fixture() -> None:
    down, h = torch.tensor([[3, 0, 0.4], [0, 0.3, 0]]), torch.ones(1, 3)
    assert float(cett(h, down, 0.35)) == pytest.approx(0.0879, abs=1e-4)
    assert float(cett(h, down, 0.45)) == pytest.approx(0.1465, abs=1e-4)
    assert cett_threshold(h, down, 0.1) == pytest.approx(0.4, rel=1e-5), "just below the next neuron's"
    assert cett_threshold(h, down, 0.2) == pytest.approx(3, rel=1e-5)


def test_schedule() -> None:
    wanted = [1e-3, 1.586e-3, 3e-3, 4.414e-3, 5e-3]
    assert [sine_stage(1e-3, 5e-3, p) for p in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx(wanted, abs=1e-6)
    weight = prosparse_schedule(1e-3, [(4, 5e-3), (2, 1e-2)], warm_steps=3)
    assert [weight(step) for step in (0, 2, 3, 5, 7, 8, 9, 99)] == pytest.approx(
        [1e-3, 1e-3, 1e-3, 3e-3, 5e-3, 7.5e-3, 1e-2, 1e-2], abs=1e-6
    )


def values(model: nn.Module, kind: str, **inputs: Tensor) -> float:
    with DensityLoss(model, kind) as loss:
        model(**inputs)
        return float(loss.value().detach())


@pytest.mark.parametrize("kind", ["deft", "l1", "hoyer"])
@pytest.mark.parametrize("name", ["opt", "llama", "gpt2"])
def test_padding_does_not_count(name: str, kind: str) -> None:
    """A row and its padded form give the loss of the row; without the mask another."""
    model, row = small_model(name), IDS[:1, :9]
    padded = torch.cat([row, torch.zeros(1, 7, dtype=torch.int64)], 1)
    mask = (torch.arange(16) < 9).long()[None]
    alone = values(model, kind, input_ids=row)
    assert values(model, kind, input_ids=padded, attention_mask=mask) == pytest.approx(alone, rel=1e-5)
    assert values(model, kind, input_ids=padded) != pytest.approx(alone, rel=1e-5)


def test_the_models_own_loss_carries_it() -> None:
    """What a trainer reads is the task's loss plus the weighted density loss; in evaluation only the task's."""
    model = small_model("llama").train()  # has no dropout
    plain = float(model(IDS, labels=IDS).loss.detach())
    with DensityLoss(model, "l1", weight=lambda step: 0.5 + step) as loss:
        for weight in (0.5, 1.5):
            assert float(model(IDS, labels=IDS).loss.detach()) == pytest.approx(
                plain + weight * float(loss.last.detach()), rel=1e-5
            )
        assert 0.9 < loss.density <= 1, "SiLU has no zeros"
        model.eval()
        assert float(model(IDS, labels=IDS).loss.detach()) == pytest.approx(plain, rel=1e-6)
    assert float(model.train()(IDS, labels=IDS).loss) == pytest.approx(plain, rel=1e-6), "hooks are gone"


class Adapter(nn.Module):
    """A low-rank adapter beside a frozen layer, as PEFT puts it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(4, base.in_features) / base.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.t() @ self.b.t()


@pytest.mark.parametrize("kind", ["deft", "l1", "hoyer"])
def test_density_falls_and_only_adapters_move(kind: str) -> None:
    model = small_model("opt").requires_grad_(False).train()
    for layer in model.model.decoder.layers:
        layer.fc1 = Adapter(layer.fc1)
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    weight = {"deft": 1.0, "l1": 0.1, "hoyer": 0.1}[kind]
    with DensityLoss(model, kind, weight, eps=1e-3) as loss:
        first = None
        for ids in token_batches(200):
            total = model(ids, labels=ids).loss
            total.backward()
            assert math.isfinite(float(total.detach()))
            optimizer.step()
            optimizer.zero_grad()
            first = loss.density if first is None else first
    assert len(trained) == 6 and loss.density < 0.7 * first
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_a_loss_that_would_be_missing_is_an_error() -> None:
    """A wrapper that calls ``forward`` instead of the model runs past the hooks."""
    model = small_model("opt").train()
    with DensityLoss(model), pytest.raises(RuntimeError, match="calls of a part of it"):
        for _ in range(3):
            model.forward(IDS, labels=IDS)


def test_bad_arguments() -> None:
    model = small_model("opt")
    for change, message in (({"kind": "l0"}, "kind"), ({"eps": 0.0}, "eps")):
        with pytest.raises(ValueError, match=message):
            DensityLoss(model, **change)
    with pytest.raises(ValueError, match="feed-forward networks"):
        DensityLoss(nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="forward pass"):
        DensityLoss(model).attach().value()
    assert VOCABULARY > int(IDS.max())
