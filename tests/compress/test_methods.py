"""The methods on small models: plans, budgets, options, and, on a model that has learnt something, the order of methods."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from effk.compress import Plan, compress, make_plan
from effk.compress.layers import find_layers
from effk.compress.passes.finequant import FineQuant, choose_group_size, gaussian_ratio, range_ratio
from effk.compress.passes.llm_mq import LlmMq, choices_of, reallocate
from effk.compress.passes.rtn import Rtn
from effk.compress.sensitivity import SCORES
from effk.compress.solvers.knapsack import InfeasibleBudget
from effk.compress.solvers.rtn import MODES, decode, round_to_nearest
from golden_matrices import golden_matrix
from small_models import small_model, token_batches


def nominal_bits(plan: Plan, model: nn.Module) -> float:
    return plan.nominal_bits(find_layers(model)[0])


# Round to nearest and FineQuant


@pytest.mark.parametrize("mode", MODES)
def test_rtn_stores_what_it_plans(mode: str) -> None:
    report = compress(small_model("llama"), Rtn(bits=4, group_size=32, mode=mode))
    formats = {entry.format for entry in report.plan.layers.values()}
    assert formats == {"asym" if mode in ("asym", "mse_asym") else "sym"}
    assert all(entry.bytes_after == report.plan.layers[name].bytes_after for name, entry in report.layers.items())


def test_weighted_rtn_lowers_the_output_error_of_the_first_layer() -> None:
    batches, name = token_batches(4), "model.layers.0.mlp.down_proj"
    errors = []
    for weighted in (False, True):
        model = small_model("llama")
        x: list[Tensor] = []
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, x=x: x.append(args[0].flatten(0, -2)))
        with torch.no_grad():
            for batch in batches:
                model(batch)
        inputs, before = torch.cat(x), model.get_submodule(name).weight.detach().clone()
        # Only this layer, so that its inputs stay what they were.
        others = tuple(n for n, _ in model.named_modules() if n != name)
        compress(model, Rtn(bits=2, group_size=0, weighted=weighted, ignore=others), batches)
        change = model.get_submodule(name).to_weight().dequantize() - before
        errors.append(float((inputs.square().mean(0) * change.square()).sum()))
    assert errors[1] < errors[0]


def test_second_order_rtn_lowers_the_output_error() -> None:
    batches, name = token_batches(4), "model.layers.0.self_attn.v_proj"
    errors = []
    for second in (False, True):
        model, x = small_model("llama"), []
        hook = model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, x=x: x.append(args[0].flatten(0, -2))
        )
        with torch.no_grad():
            for batch in batches:
                model(batch)
        hook.remove()
        inputs, before = torch.cat(x), model.get_submodule(name).weight.detach().clone()
        report = compress(model, Rtn(bits=2, group_size=32, mode="clip", second_order=second), batches)
        assert (report.layers[name].output_error is not None) == second
        change = model.get_submodule(name).to_weight().dequantize() - before
        errors.append(float((inputs @ change.t()).norm()))
    assert errors[1] < 0.8 * errors[0]
    report = compress(small_model("mistral"), Rtn(bits=4, second_order=True, ignore=()), batches)
    assert report.layers["lm_head"].output_error is None, "no inputs are collected there"


@pytest.mark.parametrize(
    ("kind", "expected"), [("gauss", (0.939, 0.932, 0.922, 0.908)), ("struct", (0.836, 0.776, 0.791, 0.810))]
)
def test_finequant_golden_ratios(kind: str, expected: tuple[float, ...]) -> None:
    weight = golden_matrix(kind)
    for size, ratio in zip((512, 256, 128, 64), expected, strict=True):
        assert range_ratio(weight, size) == pytest.approx(ratio, abs=1e-3)


def test_finequant_halves_where_it_pays() -> None:
    assert choose_group_size(golden_matrix("gauss"), FineQuant())[0] == 0
    assert choose_group_size(golden_matrix("struct"), FineQuant())[0] == 32
    assert choose_group_size(golden_matrix("struct"), FineQuant(min_group=128))[0] == 128
    assert choose_group_size(golden_matrix("struct"), FineQuant(rule="excess"))[0] == 32
    assert choose_group_size(golden_matrix("gauss"), FineQuant(rule="excess"))[0] == 0


def test_finequant_error_gate_for_rare_extremes() -> None:
    """Two large elements in an eighth of the rows: the ratio stays near a Gaussian's, the error does not."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 512, generator=generator) * 0.02
    for row in range(64):
        weight[row, torch.randperm(512, generator=generator)[:2]] *= 20
    assert choose_group_size(weight, FineQuant(bits=3))[0] == 0
    size = choose_group_size(weight, FineQuant(bits=3, max_error=0.3))[0]
    codes, grid = round_to_nearest(weight, 3, size, "mse")
    assert size != 0
    assert float((decode(codes, grid, 3, size) - weight).norm() / weight.norm()) <= 0.3
    assert choose_group_size(weight, FineQuant(bits=3, max_error=0.01))[0] == 32


def test_gaussian_ratio_is_that_of_a_gaussian_matrix() -> None:
    weight = torch.randn(2048, 512, generator=torch.Generator().manual_seed(1))
    for size in (512, 128, 64):
        assert range_ratio(weight, size) == pytest.approx(gaussian_ratio(size), abs=3e-3)


def test_range_ratio_of_odd_sizes_and_zeros() -> None:
    assert range_ratio(torch.tensor([[1.0, 2.0, 4.0]]), 3) == (2 / 4 + 4 / 4) / 2  # halves of two columns and of one
    assert range_ratio(torch.zeros(3, 64), 64) == 1.0


def test_edited_plans() -> None:
    """A format may be edited to its twin; what a method cannot do is refused before any work."""
    batches, name = token_batches(), "model.layers.1.mlp.up_proj"
    for recipe in (Rtn(bits=4), FineQuant(bits=4), LlmMq(bits=3.0)):
        plan = make_plan(small_model("llama"), recipe, batches)
        report = compress(small_model("llama"), recipe, batches, plan=plan.edit(name, format="asym", bits=3))
        assert (report.layers[name].bits, report.plan.layers[name].format) == (3, "asym")
        for change, message in (
            ({"format": "nf4", "bits": 4}, "format: expected 'sym' or 'asym'"),
            ({"options": {}}, "options: expected a 'mode'"),
            ({"scale_bytes": 4}, "scale_bytes: expected 2"),
        ):
            model = small_model("llama")
            before = copy.deepcopy(model.state_dict())
            with pytest.raises(ValueError, match=message):
                compress(model, recipe, batches, plan=plan.edit(name, **change))
            assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    plan = make_plan(small_model("llama"), Rtn(bits=4))
    with pytest.raises(ValueError, match="outliers: expected none for rtn"):
        compress(small_model("llama"), Rtn(bits=4), plan=plan.edit(name, outliers=0.01))


def test_layers_outside_the_blocks_are_refused_or_skipped() -> None:
    recipe, batches = LlmMq(bits=3.0, ignore=()), token_batches()
    report = compress(small_model("mistral"), recipe, batches)
    assert "outside the transformer blocks" in report.skipped["lm_head"]
    plan = report.plan
    entry = next(iter(plan.layers.values()))
    moved = Plan(plan.recipe, {**plan.layers, "lm_head": entry}, {}, plan.notes)
    with pytest.raises(ValueError, match=r"inside transformer blocks.*lm_head"):
        compress(small_model("mistral"), recipe, batches, plan=moved)


# LLM-MQ


@pytest.mark.parametrize("budget", ["nominal", "true"])
@pytest.mark.parametrize("bits", [2.6, 3.0, 3.5])
def test_budget_is_kept(budget: str, bits: float) -> None:
    model, batches = small_model("llama"), token_batches(4)
    bits += 0.7 if budget == "true" else 0.0  # scales and outliers count too
    report = compress(model, LlmMq(bits=bits, budget=budget, group_size=32, outlier_variants=True), batches)
    weights = sum(entry.weights for entry in report.layers.values())
    nominal = sum(entry.bits * entry.weights for entry in report.layers.values()) / weights
    true = 8 * sum(entry.bytes_after for entry in report.layers.values()) / weights
    assert (nominal if budget == "nominal" else true) <= bits + 1e-9
    assert report.plan.notes["nominal_bits"] == pytest.approx(nominal)
    assert report.plan.notes["true_bits"] == pytest.approx(true)


def test_infeasible_budget_leaves_the_model_alone() -> None:
    model = small_model("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InfeasibleBudget, match="expected at least"):
        compress(model, LlmMq(bits=1.9), token_batches())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_ends_of_the_range_are_uniform() -> None:
    for bits in (2, 4):
        plan = make_plan(small_model("llama"), LlmMq(bits=bits), token_batches(4))
        assert {entry.bits for entry in plan.layers.values()} == {bits}


def test_tied_layers_share_their_bits() -> None:
    plan = make_plan(small_model("llama"), LlmMq(bits=3.0, tie=True), token_batches(4))
    for layer in range(3):
        for group in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({plan.layers[f"model.layers.{layer}.{name}"].bits for name in group}) == 1


def test_a_plan_reallocated_is_the_plan_made() -> None:
    """Scores do not depend on the budget, so one scoring pass serves all."""
    batches = token_batches(4)
    plan = make_plan(small_model("llama"), LlmMq(bits=3.0), batches)
    recipe = LlmMq(bits=2.5)
    again = reallocate(plan, recipe, find_layers(small_model("llama"))[0])
    assert again.diff(make_plan(small_model("llama"), recipe, batches)) == {}
    assert again.to_json() == Plan.from_json(again.to_json()).to_json()
    with pytest.raises(ValueError, match="expected 6 scores, got 3"):
        reallocate(
            plan, LlmMq(bits=3.0, outlier_variants=True, outlier_bits=(2, 3, 4)), find_layers(small_model("llama"))[0]
        )


def test_plan_then_compress_equals_compress() -> None:
    """Also with scaling: a model that the plan scaled is not scaled again, and a fresh one is scaled as the plan says."""
    recipe, batches = LlmMq(bits=3.0, scaling=True), token_batches(4)
    ids = token_batches(1, seed=5)[0]

    def logits(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(ids).logits

    straight = small_model("llama")
    plan = compress(straight, recipe, batches).plan
    assert any(alpha > 0 for alpha in plan.notes["scaling"].values())
    fresh = small_model("llama")
    compress(fresh, recipe, batches, plan=Plan.from_json(plan.to_json()))
    same = small_model("llama")
    compress(same, recipe, batches, plan=make_plan(same, recipe, batches))
    assert torch.equal(logits(straight), logits(fresh))
    assert torch.equal(logits(straight), logits(same))


@pytest.mark.parametrize("changes", [{"score": name} for name in SCORES] + [
    {"outlier_by": "magnitude"}, {"outlier_by": "fisher"}, {"outliers": 0.0}, {"mode": "mse_asym"}, {"mode": "asym"},
    {"second_order": False, "sweeps": 0}, {"drift": 0.0}, {"group_size": -1}, {"compute": "int8"}, {"choices": [2, 3, 4, 8]},
    {"per_layer": {"*.down_proj": {"choices": (4,)}}},
])  # fmt: skip
def test_options_work(changes: dict) -> None:
    recipe = LlmMq(bits=3.2, **changes)
    assert LlmMq.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    report = compress(small_model("llama"), recipe, token_batches(4))
    if "per_layer" in changes:
        assert {e.bits for name, e in report.layers.items() if name.endswith("down_proj")} == {4}
    for name, entry in report.layers.items():
        expected = int(recipe.outliers * entry.weights) if entry.bits in recipe.outlier_bits else 0
        assert entry.outliers == expected, name


def test_paper_settings() -> None:
    recipe = LlmMq.paper(2.6)
    assert (recipe.score, recipe.outlier_by, recipe.group_size, recipe.second_order) == (
        "first_order",
        "magnitude",
        128,
        False,
    )
    report = compress(small_model("llama"), recipe, token_batches(4))
    assert {entry.bits for entry in report.layers.values()} <= {2, 3, 4}


@pytest.mark.parametrize("name", ["gpt2", "opt", "qwen2", "mistral"])
def test_other_architectures(name: str) -> None:
    report = compress(small_model(name), LlmMq(bits=3.0), token_batches(4))
    assert report.plan.notes["nominal_bits"] <= 3.0
    assert len(report.layers) >= 12


def test_choices_by_rising_size() -> None:
    found = choices_of(LlmMq(outlier_variants=True))
    assert found == [(2, 0.0), (2, 0.005), (3, 0.0), (3, 0.005), (4, 0.0)]


@pytest.mark.parametrize(
    "changes",
    [{"bits": 0}, {"choices": ()}, {"choices": (5,)}, {"budget": "exact"}, {"score": "best"}, {"outliers": 0.5},
     {"drift": 2.0}, {"damping": 0.0}, {"sweeps": -1}, {"outlier_by": "luck"}, {"group_size": 48}, {"mode": "max"}],
)  # fmt: skip
def test_bad_recipes(changes: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changes))}"):
        LlmMq(**changes)


# Quality, on a random model whose blocks matter: the divergence of its predictions from its own before compression


@pytest.fixture(scope="module")
def teacher() -> tuple[nn.Module, list[Tensor], Tensor]:
    """A model with large random weights, calibration batches sampled from it (so that it fits them), and test ids."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.12,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 97, (64, 1))
    with torch.no_grad():
        for _ in range(31):
            ids = torch.cat([ids, torch.multinomial(model(ids).logits[:, -1].softmax(-1), 1)], dim=1)
    return model, list(ids[:48].split(16)), ids[48:]


def divergence(teacher: tuple[nn.Module, list[Tensor], Tensor], recipe, plan: Plan | None = None) -> float:
    """Mean Kullback-Leibler divergence, in nats per token, of the compressed model on unseen ids."""
    model, calib, test = teacher
    copied = copy.deepcopy(model)
    compress(copied, recipe, calib if isinstance(recipe, LlmMq) else None, plan)
    with torch.no_grad():
        before, after = (m(test).logits.double().log_softmax(-1).flatten(0, 1) for m in (model, copied))
    return float(kl_div(after, before, reduction="batchmean", log_target=True))


def test_methods_are_in_order(teacher: tuple[nn.Module, list[Tensor], Tensor]) -> None:
    """Only margins that chance does not reach; the same order as on the real model."""
    found = {}
    for bits in (2, 3):
        found[f"rtn{bits}"] = divergence(teacher, Rtn(bits=bits, group_size=32, mode="asym"))
        found[f"mq{bits}"] = divergence(teacher, LlmMq(bits=bits, group_size=32))
    assert 0 < found["mq3"] < 0.7 * found["rtn3"], found
    assert found["mq2"] < 0.7 * found["rtn2"], found
    assert found["mq3"] < 0.5 * found["mq2"], found


def test_more_budget_is_better(teacher: tuple[nn.Module, list[Tensor], Tensor]) -> None:
    model, calib, _ = teacher
    plan = make_plan(copy.deepcopy(model), LlmMq(bits=3.0, group_size=32), calib)
    found = []
    for bits in (2.0, 3.0, 4.0):
        recipe = LlmMq(bits=bits, group_size=32)
        found.append(divergence(teacher, recipe, reallocate(plan, recipe, find_layers(model)[0])))
    assert found[2] < found[1] < found[0], found


def test_scores_beat_the_inverse_allocation(teacher: tuple[nn.Module, list[Tensor], Tensor]) -> None:
    """Giving the bits to the layers that gain least by them must be worse, or the score means nothing."""
    model, calib, _ = teacher
    recipe = LlmMq(bits=3.0, group_size=32, choices=(2, 4))
    plan = make_plan(copy.deepcopy(model), recipe, calib)
    inverted = {name: [1 / (two - four), 0.0] for name, (two, four) in plan.notes["scores"].items()}
    worst = Plan(plan.recipe, plan.layers, plan.skipped, {**plan.notes, "scores": inverted})
    upside_down = reallocate(worst, recipe, find_layers(model)[0])
    assert divergence(teacher, recipe, plan) < divergence(teacher, recipe, upside_down)
