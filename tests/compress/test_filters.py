"""Shorter and band-limited filters of a small long-convolution model, within each kind of budget."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import effk
from effk.compress import FilterPlan, make_plan, recipe_from_json
from effk.compress.filters import find_filters
from effk.compress.passes.frequency_sparse import FrequencySparse
from effk.compress.passes.partial import Partial, PartialHandler, operations
from effk.nn import BandLimitedFilter, ExplicitFilter, FFTConv

L, CHANNELS, VOCABULARY = 96, 6, 11


class Mixer(nn.Module):
    """The least owner of a filter."""

    def __init__(self, decay: float) -> None:
        super().__init__()
        k = torch.randn(CHANNELS, L) * torch.exp(-decay * torch.arange(L))
        self.filter, self.conv = ExplicitFilter(k), FFTConv()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x.mT.contiguous(), self.filter(x.shape[1])).mT


class Model(nn.Module):
    """Two owners: one whose filter decays fast, one whose filter hardly does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, CHANNELS)
        self.layers = nn.Sequential(Mixer(0.5), Mixer(0.02))

    def forward(self, ids: Tensor) -> Tensor:
        return self.layers(self.embedding(ids)) @ self.embedding.weight.T


@pytest.fixture
def model() -> Model:
    return Model().requires_grad_(False)


@pytest.fixture(scope="module")
def calib() -> list[Tensor]:
    return list(torch.randint(VOCABULARY, (4, L), generator=torch.Generator().manual_seed(1)).split(2))


FAST, SLOW = "layers.0.filter", "layers.1.filter"


def output_error(before: nn.Module, after: nn.Module, x: Tensor) -> float:
    y = before(x)
    return float((after(x) - y).norm() / y.norm())


@pytest.mark.parametrize("kind", [Partial, FrequencySparse])
def test_an_error_is_kept_with_the_smallest_size(kind: type, model: Model, calib: list[Tensor]) -> None:
    dense = copy.deepcopy(model)
    report = effk.compress(model, kind(budget="error", amount=0.05), calib)
    inputs = [dense.embedding(batch) for batch in calib]
    for name, owner, x in (
        (FAST, 0, torch.cat(inputs)),
        (SLOW, 1, torch.cat([dense.layers[0](x) for x in inputs])),
    ):
        entry = report.filters[name]
        assert entry.error <= 0.05
        assert output_error(dense.layers[owner], model.layers[owner], x) == pytest.approx(
            entry.error, rel=1e-3, abs=1e-6
        )
        assert entry.bytes_dense == 4 * CHANNELS * L and entry.measured_speed > 0
    if kind is Partial:
        assert report.filters[FAST].size < report.filters[SLOW].size
        assert model.layers[0].filter.taps.shape == (CHANNELS, report.filters[FAST].size)
        assert report.filters[FAST].bytes_after == 4 * CHANNELS * report.filters[FAST].size
        # One step down the error would be too large.
        sizes = PartialHandler().sizes(L)
        smaller = sizes[sizes.index(report.filters[SLOW].size) - 1]
        again = effk.compress(dense, Partial(budget="size", amount=smaller), calib)
        assert again.filters[SLOW].error > 0.05
    else:
        assert isinstance(model.layers[0].filter, BandLimitedFilter)
        assert report.filters[FAST].estimated_speed == 1.0
        assert report.filters[FAST].bytes_after == 8 * CHANNELS * report.filters[FAST].size
    assert report.loss_before is not None and str(report).count("\n") == 2
    assert json.dumps(report.to_json())


@pytest.fixture(scope="module")
def repeating() -> tuple[Model, list[Tensor]]:
    """A model that has learnt to look half a sequence back, and sequences whose second half repeats the first."""
    model = Model()
    for layer in model.layers:
        layer.filter.taps.requires_grad_(True)
    half = torch.randint(VOCABULARY, (32, L // 2), generator=torch.Generator().manual_seed(3))
    ids = torch.cat([half, half], 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(80):
        loss = cross_entropy(model(ids)[:, L // 2 : -1].flatten(0, 1), ids[:, L // 2 + 1 :].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 1.5 < math.log(VOCABULARY)
    return model.requires_grad_(False), list(ids.split(8))


@pytest.mark.parametrize("kind", [Partial, FrequencySparse])
def test_a_rise_of_the_loss_is_kept_and_used(kind: type, repeating: tuple[Model, list[Tensor]]) -> None:
    sizes, (model, calib) = [], repeating
    for amount in (1e-4, 0.5):
        other = copy.deepcopy(model)
        report = effk.compress(other, kind(budget="loss", amount=amount), calib)
        assert report.loss_after - report.loss_before <= amount + 1e-6
        sizes.append([entry.size for entry in report.filters.values()])
    assert sum(sizes[1]) < sum(sizes[0])
    assert kind is FrequencySparse or max(sizes[0]) >= L // 2, "what it has learnt to see is that far away"


def test_without_calibration_errors_are_those_of_the_taps(model: Model) -> None:
    taps = model.layers[1].filter.taps.clone()
    report = effk.compress(model, Partial(budget="size", amount=64, length=L))
    expected = float(taps[:, 64:].norm() / taps.norm())
    assert report.filters[SLOW].error == pytest.approx(expected, rel=1e-5)
    assert report.loss_before is None and report.filters[FAST].size == 64


def test_overrides_ignoring_and_plans(model: Model, calib: list[Tensor]) -> None:
    recipe = Partial(
        budget="error", amount=0.1, per_layer={"*.1.*": {"budget": "size", "amount": 5}}, ignore=("*.0.*",)
    )
    assert recipe_from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    plan = make_plan(model, recipe, calib)
    assert plan.sizes == {SLOW: 5} and FAST in plan.skipped
    edited = FilterPlan.from_json(plan.to_json().replace('"layers.1.filter": 5', '"layers.1.filter": 7'))
    report = effk.compress(model, recipe, calib, edited)
    assert model.layers[1].filter.taps.shape[1] == 7 and report.filters.keys() == {SLOW}
    assert report.skipped == {FAST: "ignored by the recipe"}
    assert find_filters(model).keys() == {FAST, SLOW}


def test_the_compressed_model_is_still_causal(model: Model) -> None:
    ids = torch.randint(VOCABULARY, (1, L), generator=torch.Generator().manual_seed(2))
    effk.compress(model, FrequencySparse(budget="size", amount=10, length=L))
    changed = ids.clone()
    changed[0, 50:] = (ids[0, 50:] + 1) % VOCABULARY
    y, z = model(ids), model(changed)
    torch.testing.assert_close(y[:, :50], z[:, :50], rtol=0, atol=1e-4 * float(y.abs().max()))
    assert not torch.allclose(y[:, 50:], z[:, 50:], atol=1e-2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m, c: Partial(budget="bytes"), "budget: expected one of"),
        (lambda m, c: Partial(amount=0), "amount: expected a positive number"),
        (lambda m, c: Partial(amount=1.5), "amount: expected an error below 1"),
        (lambda m, c: Partial(budget="size", amount=1.5), "amount: expected a whole number"),
        (lambda m, c: Partial(compute="int8"), "compute: expected 'float'"),
        (lambda m, c: Partial(embedding_bits=8), "embedding_bits: expected None"),
        (lambda m, c: effk.compress(m, Partial()), "length: expected one, or calibration text, got neither"),
        (lambda m, c: effk.compress(m, Partial(budget="loss", length=L)), "calib: expected token ids"),
        (lambda m, c: effk.compress(m, Partial(length=8), c), "calib: expected at most length = 8 tokens, got 96"),
        (lambda m, c: effk.compress(nn.Linear(2, 2), Partial(length=8)), "at least one effk.nn.LongFilter"),
        (lambda m, c: effk.compress(m, Partial(per_layer={"x": {}}), c), "per_layer: expected patterns that match"),
        (
            lambda m, c: effk.compress(m, Partial(), c, FilterPlan({"name": "partial"}, L, {"nothing": 3})),
            r"plan: expected filters of the model, got \['nothing'\]",
        ),
        (
            lambda m, c: effk.compress(m, Partial(), c, FilterPlan({"name": "frequency-sparse"}, L, {})),
            "plan: expected one of recipe 'partial'",
        ),
        (lambda m, c: FilterPlan.from_json('{"version": 2}'), "plan: expected a plan of long filters"),
    ],
)
def test_bad_input_is_named(make: object, message: str, model: Model, calib: list[Tensor]) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        make(model, calib)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_operations() -> None:
    assert operations(1024, 64) == 128
    assert operations(8192, 128) < operations(8192, 1024) < operations(8192, 8192)
    sizes = PartialHandler().sizes(100)
    assert sizes == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 100]
