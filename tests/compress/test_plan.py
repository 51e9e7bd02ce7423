"""Plans: text and back, edits, differences, sizes, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import effk
from effk.compress import LayerPlan, Plan, make_plan
from effk.compress.layers import find_layers
from small_models import Nearest, small_model

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture
def plan() -> Plan:
    return make_plan(small_model("llama"), Nearest(bits=4))


def test_text_round_trip_with_one_line_per_layer(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    text = plan.to_json()
    assert json.loads(text)["layers"][LAYER]["bits"] == 4
    assert sum(LAYER in line for line in text.splitlines()) == 1
    edited = plan.edit(LAYER, bits=2).to_json().splitlines()
    assert sum(a != b for a, b in zip(text.splitlines(), edited, strict=True)) == 1


def test_an_edited_plan_is_applied(plan: Plan) -> None:
    text = plan.to_json().replace(f'"{LAYER}": {{"bits": 4', f'"{LAYER}": {{"bits": 2')
    edited = Plan.from_json(text)
    assert edited.diff(plan) == {LAYER: {"bits": (2, 4)}}
    model = small_model("llama")
    report = effk.compress(model, Nearest(bits=4), plan=edited)
    assert report.layers[LAYER].bits == 2 and model.get_submodule(LAYER).bits == 2
    assert {layer.bits for name, layer in report.layers.items() if name != LAYER} == {4}
    assert report.plan.layers[LAYER].bytes_after < plan.layers[LAYER].bytes_after


def test_layers_left_out_stay_and_are_reported(plan: Plan) -> None:
    layers = {name: entry for name, entry in plan.layers.items() if name != LAYER}
    model = small_model("llama")
    report = effk.compress(model, Nearest(), plan=Plan(plan.recipe, layers, {}, {}))
    assert type(model.get_submodule(LAYER)) is torch.nn.Linear
    assert report.skipped[LAYER] == "not in the plan"
    assert report.skipped["lm_head"] == "shares its weight with model.embed_tokens"


def test_planned_bytes_are_the_bytes(plan: Plan) -> None:
    report = effk.compress(small_model("llama"), Nearest(bits=4, outliers=0.02))
    for name, entry in report.plan.layers.items():
        assert entry.bytes_after == report.layers[name].bytes_after, name
        assert entry.bytes_before == report.layers[name].bytes_before == 4 * report.layers[name].weights
    layers, _ = find_layers(small_model("llama"))
    assert report.plan.nominal_bits(layers) == report.nominal_bits == 4
    assert report.true_bits == pytest.approx(
        8 * report.plan.bytes_after / sum(r.weights for r in report.layers.values())
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, f"plan: {LAYER}: bits: expected one of"),
        ({"bits": True}, "bits: expected one of"),
        ({"group_size": 100}, f"plan: {LAYER}: group_size: expected one of"),
        ({"group_size": -1}, "group_size: expected 0 for one group per row"),
        ({"outliers": 0.5}, "outliers: expected a fraction in"),
        ({"format": "nf4", "bits": 3}, "bits: expected the bits of nf4"),
        ({"format": "fp5"}, "format: expected one of"),
        ({"format": "rows", "compute": "int8"}, "compute: expected 'float'"),
        ({"compute": "bf16"}, "compute: expected 'float' or 'int8'"),
        ({"scale_bytes": 1}, "scale_bytes: expected 2 or 4"),
        ({"score": float("nan")}, "score: expected a finite number"),
        ({"colour": "red"}, "expected fields of LayerPlan"),
    ],
)
def test_illegal_edits_are_named(plan: Plan, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan.edit(LAYER, **change)


def test_plans_for_other_models_are_refused(plan: Plan) -> None:
    with pytest.raises(ValueError, match="expected one of its 21 layers, got 'model.layers.9.x'"):
        plan.edit("model.layers.9.x", bits=2)
    model = small_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    alien = Plan(plan.recipe, {**plan.layers, "model.layers.9.x": LayerPlan(bits=4, group_size=32)})
    with pytest.raises(ValueError, match="expected layers of the model, got 'model.layers.9.x'"):
        effk.compress(model, Nearest(), plan=alien)
    both = Plan(plan.recipe, plan.layers, {LAYER: "by hand"})
    with pytest.raises(ValueError, match=f"{LAYER}: expected either a planned or a skipped layer"):
        effk.compress(model, Nearest(), plan=both)
    with pytest.raises(ValueError, match="expected one of recipe 'test-nearest', got 'other'"):
        effk.compress(model, Nearest(), plan=Plan({"name": "other"}, plan.layers))
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), "refused before any work"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON, got an error at line 1"),
        ("[]", "expected an object with"),
        ("{}", "expected an object with"),
        (
            '{"effk_plan": 9, "recipe": {}, "layers": {}, "skipped": {}, "notes": {}}',
            "effk_plan: expected version 1, got 9",
        ),
        (
            '{"effk_plan": 1, "recipe": {}, "layers": [], "skipped": {}, "notes": {}}',
            "layers: expected an object, got list",
        ),
        (
            '{"effk_plan": 1, "recipe": {}, "layers": {"a": {"bits": 4}}, "skipped": {}, "notes": {}}',
            "a: expected bits, group",
        ),
        (
            '{"effk_plan": 1, "recipe": {}, "layers": {"a": 4}, "skipped": {}, "notes": {}}',
            "a: expected bits, group_size",
        ),
        (
            '{"effk_plan": 1, "recipe": {}, "skipped": {}, "notes": {}, "layers": {"a": {"bits": 6, "group_size": 0}}}',
            "a: bits: expected one of",
        ),
    ],
)
def test_damaged_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan.from_json(text)
