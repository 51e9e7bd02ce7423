"""The recipe `quik` on models of several shapes: what is planned, logged and computed; the order of its settings."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from dense_twin import assert_equals_dequantised
from effk.compress import Plan, compress, make_plan, plan_from_json, recipe_from_json
from effk.compress.calibrate import stream_blocks
from effk.compress.layers import find_layers
from effk.compress.passes.quik import Quik, outlier_columns
from effk.compress.solvers.hadamard import rotate_model
from effk.formats.quik import weight_bytes
from effk.nn import QuikLinear
from small_models import FEEDFORWARDS, MODELS, small_model, token_batches

IDS = token_batches(1)[0]
DOWN = {"llama": "down_proj", "qwen2": "down_proj", "mistral": "down_proj", "opt": "fc2", "gpt2": "mlp.c_proj",
        "gpt_neox": "dense_4h_to_h", "bert": "output.dense"}  # fmt: skip


@torch.no_grad()
def output(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    out = model(ids)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


@pytest.mark.parametrize("name", FEEDFORWARDS)
def test_every_shape(name: str) -> None:
    """Layers inside blocks, each with the outlier columns that plan, report and module agree on; kept ones with a reason."""
    model = small_model(name)
    before = output(model)
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    report = compress(model, Quik(bits_a=8), token_batches(4))
    assert set(linear) == set(report.layers) | set(report.skipped)
    assert float((output(model) - before).norm() / before.norm()) < 0.3
    gated = name in ("llama", "qwen2", "mistral")
    for layer, entry in report.layers.items():
        module, planned = model.get_submodule(layer), report.plan.layers[layer]
        down = layer.endswith(DOWN[name]) and "attention.output" not in layer
        columns = planned.options["outlier_columns"]
        assert type(module) is QuikLinear
        assert (module.outliers, entry.outlier_columns, columns) == (columns,) * 3
        assert columns == (24 if down and gated else 16), "104 / 72 of 16, in pairs"
        assert (entry.bits, entry.bits_a, module.bits_a) == (8 if down and gated else 4, 8, 8)
        assert (
            entry.bytes_after
            == planned.bytes_after
            == weight_bytes(module.out_features, module.in_features, entry.bits, columns)
        )
        assert entry.output_error is not None
    assert f"W4A8, 16 outlier columns: {sum(e.outlier_columns == 16 for e in report.layers.values())} layers" in str(
        report
    )


@pytest.mark.parametrize("fields", [{}, {"rotate": True}, {"pattern": "2:4"}])
def test_logits_equal_the_dequantised_model(fields: dict[str, Any]) -> None:
    """With activations as they come: every column, index and rotation is where the stored weight says."""
    for name in ("llama", "qwen2") if "rotate" in fields else MODELS:
        model = small_model(name)
        compress(model, Quik(bits_a=16, **fields), token_batches(4))
        assert_equals_dequantised(model, IDS)


def test_eight_bits_everywhere_are_close() -> None:
    model = small_model("llama")
    before = output(model)
    report = compress(model, Quik(bits=8, bits_a=8), token_batches(4))
    assert float((output(model) - before).norm() / before.norm()) < 0.03
    assert report.nominal_bits == 8


def test_the_four_counts_of_the_down_projection_are_a_parameter() -> None:
    def columns(**fields: Any) -> set[tuple[bool, int]]:
        plan = make_plan(small_model("llama"), Quik(**fields), token_batches())
        return {(name.endswith("down_proj"), e.options["outlier_columns"]) for name, e in plan.layers.items()}

    assert columns(outliers=18) == {(False, 18), (True, 26)}, "104 / 72 times as many"
    assert columns(outliers=18, down_outliers=40) == {(False, 18), (True, 40)}
    assert columns(outliers=18, down_outliers=0) == {(False, 18), (True, 0)}
    assert columns(outliers=7) == {(False, 8), (True, 10)}, "an odd number of base columns cannot be packed"
    assert columns(outliers=0) == {(False, 0), (True, 0)}
    assert columns(outliers=10**6) == {(False, 70), (True, 102)}
    assert columns(outliers=9, pattern="2:4") == {(False, 12), (True, 16)}, "whole units of four"
    opt = make_plan(small_model("opt"), Quik(), token_batches())
    assert {(e.bits, e.options["outlier_columns"]) for e in opt.layers.values()} == {(4, 16)}, "nothing is gated there"


def test_outliers_are_the_largest_inputs_and_shared_inputs_share_them() -> None:
    model = small_model("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[[3, 50]] *= 40
        model.model.layers[0].input_layernorm.weight[[7, 8]] *= 20
    layers, batches = find_layers(model)[0], token_batches(4)
    first = next(iter(stream_blocks(model, layers, batches)))
    seen = first.statistics([a for a in layers if a.block == first.name], frozenset({"max_abs"}))
    report = compress(model, Quik(outliers=4), batches)
    for leaf in ("q_proj", "k_proj", "v_proj"):
        module = model.get_submodule(f"model.layers.0.self_attn.{leaf}")
        assert module.to_weight().fp_idx.tolist() == [3, 7, 8, 50]
    down = model.model.layers[0].mlp.down_proj.to_weight()
    order = seen["model.layers.0.mlp.down_proj"].max_abs.argsort(stable=True)
    assert down.fp_idx.tolist() == sorted(order[-down.outliers :].tolist())
    assert len(report.fused) == 6 and all(len(names) >= 2 for names in report.fused.values())


def test_ties_take_the_later_columns() -> None:
    values = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0])
    assert outlier_columns(values, 5, 2).tolist() == [2, 3]
    assert outlier_columns(None, 5, 0).tolist() == []
    with pytest.raises(ValueError, match="largest inputs of 5 columns"):
        outlier_columns(None, 5, 1)


def test_zero_outlier_threshold() -> None:
    batches = token_batches(4)
    plan = make_plan(small_model("llama"), Quik(), batches)
    peaks = plan.notes["max_abs"]
    median = sorted(peaks.values())[len(peaks) // 2]
    for some in (peaks["model.layers.1.mlp.down_proj"] / 1.5, median):
        below = make_plan(small_model("llama"), Quik(threshold=some), batches)
        for name, entry in below.layers.items():
            limit = 2 * some if name.endswith("down_proj") else some
            assert (entry.options["outlier_columns"] == 0) == (peaks[name] <= limit), name
    low = make_plan(small_model("llama"), Quik(threshold=median, down_bits=4, bits_a=8), batches)
    for name, entry in low.layers.items():
        assert (entry.options["outlier_columns"] == 0) == (peaks[name] <= median), "twice only for 8 bits"
    counts = below.notes["layers_by_outlier_columns"]
    assert 0 < counts["0"] < len(peaks) and sum(counts.values()) == len(peaks)
    report = compress(small_model("llama"), Quik(threshold=1e9), batches)
    assert {entry.outlier_columns for entry in report.layers.values()} == {0}


def test_activations_are_not_rounded_while_weights_are_calibrated() -> None:
    """So the weights do not depend on bits_a or the quantiser, and what is measured at several widths is one model."""
    states = []
    for bits_a, quantizer in ((4, "kernel"), (8, "sim"), (16, "sim")):
        model = small_model("llama")
        compress(model, Quik(bits_a=bits_a, down_bits=4, down_bits_a=bits_a, quantizer=quantizer), token_batches(4))
        assert {m.bits_a for m in model.modules() if isinstance(m, QuikLinear)} == {bits_a}
        states.append({name: t for name, t in model.state_dict().items() if t is not None})
    for other in states[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in states[0].items())


def test_rotation() -> None:
    model = small_model("llama")
    with torch.no_grad():  # one channel that ruins the rest
        for block in model.model.layers:
            block.input_layernorm.weight[5] *= 60
            block.post_attention_layernorm.weight[5] *= 60
    before, errors = output(model), {}
    for name, fields in {"none": {"outliers": 0}, "rotate": {"rotate": True}}.items():
        other = copy.deepcopy(model)
        report = compress(other, Quik(quantizer="sim", **fields), token_batches(4))
        errors[name] = float((output(other) - before).norm() / before.norm())
        assert {e.outlier_columns for e in report.layers.values()} == {0}
        rotated = {n for n, m in other.named_modules() if isinstance(m, QuikLinear) and m.rotated}
        assert rotated == ({n for n in report.layers if n.endswith("down_proj")} if name == "rotate" else set())
    assert errors["rotate"] < 0.85 * errors["none"], errors


def test_a_rotated_model_is_rotated_once() -> None:
    recipe, batches, model = Quik(rotate=True, bits_a=8), token_batches(4), small_model("llama")
    plan = make_plan(model, recipe, batches)
    compress(model, recipe, batches, plan)
    straight = small_model("llama")
    compress(straight, recipe, batches)
    assert torch.equal(output(model), output(straight))


@pytest.mark.parametrize("pattern", ["2:4", "pair4:8"])
def test_pruned_while_rounded(pattern: str) -> None:
    model = small_model("llama")
    compress(model, Quik(pattern=pattern, bits_a=16, outliers=8), token_batches(4))
    unit = {"2:4": 4, "pair4:8": 8}[pattern]
    for name, module in model.named_modules():
        if isinstance(module, QuikLinear):
            codes = module.to_weight().base.codes().to(torch.int16) - (1 << (module.bits - 1))
            there = (codes != 0).reshape(module.out_features, -1, unit)
            there = there.reshape(*there.shape[:2], 4, 2).any(-1) if pattern == "pair4:8" else there
            assert int(there.sum(-1).max()) == 2, name
            compressed = torch.ops.effk.sp24_compress(codes.to(torch.int8), pattern)
            assert torch.equal(torch.ops.effk.sp24_decompress(*compressed, codes.shape[1], pattern).short(), codes)


def test_plans_can_be_edited() -> None:
    batches, name = token_batches(), "model.layers.1.mlp.up_proj"
    plan = make_plan(small_model("llama"), Quik(), batches)
    assert plan_from_json(plan.to_json()).to_json() == plan.to_json()
    options = plan.layers[name].options
    edited = plan.edit(name, bits=8, options={**options, "outlier_columns": 30, "bits_a": 16})
    report = compress(small_model("llama"), Quik(), batches, Plan.from_json(edited.to_json()))
    entry = report.layers[name]
    assert (entry.bits, entry.outlier_columns, entry.bits_a) == (8, 30, 16)
    assert (
        report.fused["model.layers.0.mlp.gate_proj+up_proj"]
        and "model.layers.1.mlp.gate_proj+up_proj" not in report.fused
    )
    for change, message in (
        ({"bits": 3}, "bits: expected 4 or 8 for 'quik'"),
        ({"format": "sym"}, "format: expected 'quik'"),
        ({"options": {}}, "outlier_columns"),
        ({"options": {**options, "outlier_columns": 31}}, "even number of base columns"),
        ({"options": {**options, "outlier_columns": 72}}, "expected 0 to 71 of 72 columns"),
        ({"options": {**options, "bits_a": 3}}, "bits_a: expected at least 4"),
        ({"options": {**options, "rotated": True}}, "outlier_columns: expected 0 for rotated"),
        ({"options": {**options, "quantizer": "paper"}}, "quantizer: expected one of"),
    ):
        model = small_model("llama")
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=message):
            compress(model, Quik(), batches, plan=plan.edit(name, **change))
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "fields",
    [{"bits": 3}, {"bits_a": 2}, {"bits": 8, "bits_a": 4}, {"outliers": -1}, {"down_bits": 2}, {"down_bits_a": 5},
     {"threshold": -1.0}, {"quantizer": "paper"}, {"damping": 0.0}, {"pattern": "1:2"}, {"rotate": 1}, {"clip": "no"},
     {"compute": "int8"}, {"down_outliers": 1.5}],
)  # fmt: skip
def test_bad_recipes(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=list(fields)[-1]):
        Quik(**fields)


def test_fields_that_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="outliers: expected none with rotate, got 8"):
        Quik(rotate=True, outliers=8)
    with pytest.raises(ValueError, match="pattern: expected None without second_order"):
        Quik(pattern="2:4", second_order=False)
    with pytest.raises(ValueError, match=r"fields among .*got \['rotate'\]"):
        Quik(per_layer={"*": {"rotate": True}})
    with pytest.raises(ValueError, match="expected one of Llama's shape"):
        compress(small_model("opt"), Quik(rotate=True), token_batches())


def test_recipes_are_json() -> None:
    recipe = Quik(bits_a=8, outliers=32, per_layer={"*.o_proj": {"bits": 8}}, pattern="2:4")
    assert recipe_from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    report = compress(small_model("llama"), recipe, token_batches())
    assert {e.bits for name, e in report.layers.items() if name.endswith("o_proj")} == {8}


def test_calibration_is_asked_for_only_where_needed() -> None:
    plain = Quik(outliers=0, second_order=False)
    report = compress(small_model("llama"), plain)
    assert {entry.output_error for entry in report.layers.values()} == {None}
    compress(small_model("llama"), Quik(rotate=True, second_order=False))
    for recipe in (
        Quik(),
        Quik(second_order=False),
        Quik(outliers=0),
        Quik(outliers=0, second_order=False, down_outliers=8),
    ):
        with pytest.raises(ValueError, match="calib"):
            compress(small_model("llama"), recipe)
    plan = make_plan(small_model("llama"), plain)
    name = next(iter(plan.layers))
    wants = plan.edit(name, options={**plan.layers[name].options, "outlier_columns": 8})
    with pytest.raises(ValueError, match="calib"):
        compress(small_model("llama"), plain, plan=wants)


# Quality, on a random model whose blocks matter and whose inputs have large channels


@pytest.fixture(scope="module")
def teacher() -> tuple[nn.Module, list[Tensor], Tensor]:
    """A model with large random weights in which a few channels of every norm stand out (their readers make up for it),
    calibration batches sampled from it (so that it fits them), and test ids."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.12,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for block in model.model.layers:
            for norm, readers in (
                (block.input_layernorm, (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)),
                (block.post_attention_layernorm, (block.mlp.gate_proj, block.mlp.up_proj)),
            ):
                scale = torch.ones(64)
                scale[torch.randperm(64)[:6]] = torch.tensor([40.0, 30.0, 20.0, 15.0, 10.0, 8.0])
                norm.weight.mul_(scale)
                for reader in readers:
                    reader.weight.div_(scale.sqrt())
    ids = torch.randint(3, 97, (64, 1))
    with torch.no_grad():
        for _ in range(31):
            ids = torch.cat([ids, torch.multinomial(model(ids).logits[:, -1].softmax(-1), 1)], dim=1)
    return model, list(ids[:48].split(16)), ids[48:]


def divergence(teacher: tuple[nn.Module, list[Tensor], Tensor], **fields: Any) -> float:
    """Mean Kullback-Leibler divergence, in nats per token, of the compressed model on unseen ids."""
    model, calib, test = teacher
    copied = copy.deepcopy(model)
    compress(copied, Quik(quantizer="sim", **fields), calib)
    with torch.no_grad():
        before, after = (m(test).logits.double().log_softmax(-1).flatten(0, 1) for m in (model, copied))
    return float(kl_div(after, before, reduction="batchmean", log_target=True))


def test_the_order_of_the_papers_tables(teacher: tuple[nn.Module, list[Tensor], Tensor]) -> None:
    """Outlier counts (10.3) and the down projection (10.4); only margins that chance does not reach."""
    none, few, many = (divergence(teacher, outliers=count, down_outliers=0) for count in (0, 2, 6))
    assert many < 0.7 * few < 0.7 * none, (none, few, many)
    a4, a8, a16 = (divergence(teacher, outliers=6, down_bits=4, down_bits_a=a) for a in (4, 8, 16))
    eight = divergence(teacher, outliers=6, down_bits=8)
    assert eight < a8 < a4, (a4, a8, eight)
    assert abs(a8 - a16) < 0.2 * a16, "what hurts is the activations' four bits"
    assert divergence(teacher, outliers=6, bits_a=8) < 0.7 * divergence(teacher, outliers=6)


def test_second_order_pays(teacher: tuple[nn.Module, list[Tensor], Tensor]) -> None:
    """Weights alone, where nothing else is lost."""
    fields = {"outliers": 6, "bits_a": 16, "down_bits": 4}
    assert divergence(teacher, **fields) < 0.8 * divergence(teacher, second_order=False, **fields)


def test_second_order_sees_rotated_inputs(teacher: tuple[nn.Module, list[Tensor], Tensor]) -> None:
    """Output error of the first down projection alone; with the Hessian of unrotated inputs it would not fall."""
    model, calib, _ = teacher
    name, inputs = "model.layers.0.mlp.down_proj", []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in calib:
            model(batch)
    hook.remove()
    turned, errors = copy.deepcopy(model), []
    rotate_model(turned)
    for second_order in (True, False):
        other = copy.deepcopy(model)
        ignore = ("lm_head", "*self_attn*", "*gate_proj", "*up_proj")
        compress(other, Quik(rotate=True, bits_a=16, down_bits=4, second_order=second_order, ignore=ignore), calib)
        change = other.get_submodule(name).dequantize() - turned.get_submodule(name).weight.detach()
        errors.append(float((torch.cat(inputs) @ change.t()).norm()))
    assert errors[0] < 0.9 * errors[1], errors
