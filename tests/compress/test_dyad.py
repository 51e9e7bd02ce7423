"""The recipe ``dyad`` on small models of every architecture: exact where it must be, honest where it cannot."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effk
from effk.compress import NetworkPlan, make_plan, plan_from_json
from effk.compress.convert import hold_out
from effk.compress.feedforward import find_feedforwards
from effk.compress.passes.dyad import Dyad, DyadHandler, convert_dense_to_dyad, init_dyad
from effk.compress.solvers.dyad import mask
from effk.nn import DyadLinear, DyadLowRank, DyadWqLinear
from small_models import FEEDFORWARDS, small_model, token_batches

IDS = token_batches(1)[0]
CALIB = token_batches(16)


@torch.no_grad()
def output(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    out = model(ids)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def dense(module: nn.Module) -> Tensor:
    """What a converted layer multiplies its input with, seen from outside: the images of the unit vectors."""
    with torch.no_grad():
        inner = module.dyad if isinstance(module, DyadLowRank) else module
        zero = torch.zeros(1, inner.in_features, dtype=inner.wl.dtype)
        return (module(torch.eye(inner.in_features, dtype=inner.wl.dtype)) - module(zero)).t()


@pytest.mark.parametrize("name", FEEDFORWARDS)
def test_networks_are_found_and_understood(name: str) -> None:
    """One network per block, whose output on the way through the model is what ``run`` computes."""
    model = small_model(name)
    networks, refused = find_feedforwards(model)
    assert [network.block.rpartition(".")[2] for network in networks] == ["0", "1", "2"] and not refused
    for network in networks:
        seen: dict[str, Tensor] = {}
        hooks = [
            network.up[0].module.register_forward_pre_hook(lambda m, args, seen=seen: seen.update(x=args[0])),
            network.down.module.register_forward_hook(lambda m, args, out, seen=seen: seen.update(y=out)),
        ]
        expected = output(model)
        for hook in hooks:
            hook.remove()
        assert expected.isfinite().all()
        with torch.no_grad():
            got = network.run([layer.module for layer in network.layers], seen["x"])
        torch.testing.assert_close(got, seen["y"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", ["it", "ot", "dt"])
@pytest.mark.parametrize("name", FEEDFORWARDS)
def test_a_remainder_of_full_rank_changes_nothing(name: str, variant: str) -> None:
    """So order of hidden units, transposed weights, gates, biases and placement are all right."""
    model = small_model(name)
    expected = output(model)
    report = effk.compress(model, Dyad(n=4, variant=variant, rank=72, ridge=1e-3), CALIB)
    assert all(
        isinstance(model.get_submodule(layer), DyadLowRank) for e in report.networks.values() for layer in e.layers
    )
    # fp32 weights of a few units, Gram matrices of condition 1e3 and sums of 72 to 288 terms, three blocks deep.
    assert float((output(model) - expected).norm() / expected.norm()) < 1e-4
    assert report.output_error < 1e-4 and all(e.error < 1e-3 for e in report.networks.values())


@pytest.mark.parametrize("name", FEEDFORWARDS)
def test_one_block_is_the_dense_model(name: str) -> None:
    model = small_model(name)
    expected = output(model)
    effk.compress(model, Dyad(n=1), CALIB)
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FEEDFORWARDS)
def test_the_report_is_true(name: str) -> None:
    model, n = small_model(name), 4
    before, old = copy.deepcopy(model), output(small_model(name), torch.cat(hold_out(CALIB)[1]))
    report = effk.compress(model, Dyad(n=n), CALIB)
    networks, _ = find_feedforwards(before)
    assert list(report.networks) == [network.name for network in networks]
    for network in networks:
        entry = report.networks[network.name]
        assert set(entry.layers) == {layer.name for layer in network.layers}
        weights = sum(layer.n * layer.k for layer in network.layers)
        biases = sum(layer.n for layer in network.layers)
        assert entry.parameters_after == 2 * weights // n + biases and entry.bytes_after == 4 * entry.parameters_after
        assert entry.parameters_before == sum(p.numel() for la in network.layers for p in la.module.parameters())
        assert all(0 < error < 1 for error in entry.layers.values()) and entry.error > 0
        assert entry.recovered_error is None
    saved = sum(e.bytes_before - e.bytes_after for e in report.networks.values())
    assert report.model_bytes_before - report.model_bytes_after == saved > 0
    assert report.held_out == 4
    if name == "bert":
        assert report.perplexity_before is report.perplexity_after is None
        held = torch.cat(hold_out(CALIB)[1])
        assert report.output_error == pytest.approx(float((output(model, held) - old).norm() / old.norm()), rel=1e-4)
    else:
        losses = [loss(m, torch.cat(hold_out(CALIB)[1])) for m in (before, model)]
        assert report.perplexity_before == pytest.approx(math.exp(losses[0]), rel=1e-4)
        assert report.perplexity_after == report.perplexity_converted == pytest.approx(math.exp(losses[1]), rel=1e-4)
    record = json.loads(json.dumps(report.to_json()))
    assert record["networks"].keys() == report.networks.keys() and "perplexity_after" in record
    assert networks[0].name in str(report)


def loss(model: nn.Module, ids: Tensor) -> float:
    logits = output(model, ids)[:, :-1].flatten(0, 1)
    return float(nn.functional.cross_entropy(logits, ids[:, 1:].flatten()))


@pytest.mark.parametrize("name", ["opt", "llama", "gpt2", "bert"])
def test_conversion_beats_masking(name: str) -> None:
    """Over all networks, each on the inputs of the unconverted model; and the order of hidden units helps on top."""
    handler, errors = DyadHandler(), {"mask": 0.0, "fixed": 0.0, "ordered": 0.0}
    model = small_model(name)
    for network in find_feedforwards(model)[0]:
        xs: list[Tensor] = []
        hook = network.up[0].module.register_forward_pre_hook(
            lambda m, args, xs=xs: xs.append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for batch in token_batches(100):
            output(model, batch)
        hook.remove()
        masked = [copy.deepcopy(layer.module) for layer in network.layers]
        for layer, module in zip(network.layers, masked, strict=True):
            kept = mask(layer.weight(), 4, "it")
            module.weight.data = kept.t().contiguous() if layer.transposed else kept
        fitted, held = xs[:80], torch.cat(xs[80:])
        with torch.no_grad():
            wanted = network.run([layer.module for layer in network.layers], held)
            difference = network.run(masked, held) - wanted
        errors["mask"] += float(difference.norm() / (wanted - wanted.mean(0)).norm())
        for kind, recipe in (("fixed", Dyad(permute=False)), ("ordered", Dyad())):
            _, entry = handler.build(network, handler.options(network, recipe), recipe, fitted, [held])
            errors[kind] += entry.error
    assert errors["ordered"] < errors["fixed"] < 0.9 * errors["mask"]


def test_later_blocks_are_calibrated_on_what_converted_ones_produce(monkeypatch: pytest.MonkeyPatch) -> None:
    build, seen = DyadHandler.build, {}

    def watched(
        self: DyadHandler, network: Any, options: Any, recipe: Any, xs: list[Tensor], held: list[Tensor]
    ) -> Any:
        seen[network.name] = [x.clone() for x in xs]
        return build(self, network, options, recipe, xs, held)

    monkeypatch.setattr(DyadHandler, "build", watched)
    model = small_model("opt")
    effk.compress(model, Dyad(), CALIB)
    first, read = hold_out(CALIB)[0][0], []
    model.model.decoder.layers[2].fc1.register_forward_pre_hook(lambda m, args: read.append(args[0].flatten(0, -2)))
    output(model, first)
    torch.testing.assert_close(seen["model.decoder.layers.2"][0], read[0], rtol=1e-4, atol=1e-5)


def test_recovery_of_networks_helps_and_is_taken_back_where_it_does_not() -> None:
    errors = {}
    for rate in (1e-3, 1e3):
        model = small_model("opt")
        report = effk.compress(model, Dyad(steps=150, rate=rate, variant="ot"), token_batches(100))
        errors[rate] = [(e.error, e.recovered_error) for e in report.networks.values()]
        assert output(model).isfinite().all()
    assert all(after < before for before, after in errors[1e-3])
    assert all(after == before for before, after in errors[1e3])


def loud(name: str) -> nn.Module:
    """A model whose feed-forward networks and head matter: random ones are nearly silent."""
    model = small_model(name)
    with torch.no_grad():
        for layer in (layer for network in find_feedforwards(model)[0] for layer in network.layers):
            layer.module.weight.mul_(4)
        if name == "opt":
            model.lm_head.weight.mul_(20)
    return model


@pytest.mark.parametrize("name", ["opt", "bert"])
def test_recovery_of_the_model_brings_it_closer_and_trains_nothing_else(name: str) -> None:
    original, distances, models = loud(name), [], []
    held, calib = torch.cat(token_batches(20, seed=1)), token_batches(100)
    for steps in (0, 100):
        model = loud(name)
        report = effk.compress(model, Dyad(n=4, model_steps=steps, model_rate=1e-3), calib)
        a, b = output(original, held), output(model, held)
        if name == "opt":
            a, b = a.log_softmax(-1), b.log_softmax(-1)
            distances.append(float((a.exp() * (a - b)).sum()))
            assert report.perplexity_converted != report.perplexity_after or not steps
        else:
            distances.append(float((a - b).square().sum()))
        models.append(model)
    assert distances[1] < 0.9 * distances[0]
    before = dict(original.named_parameters())
    converted = {layer for entry in report.networks.values() for layer in entry.layers}
    for key, parameter in models[1].named_parameters():
        assert parameter.requires_grad and parameter.grad is None
        if key.rpartition(".")[0] not in converted:
            assert torch.equal(parameter, before[key]), key
        else:
            assert not torch.equal(parameter, models[0].get_parameter(key)), key


@pytest.mark.parametrize("name", FEEDFORWARDS)
def test_random_layers_for_training_from_scratch(name: str) -> None:
    model = small_model(name).train()
    biases = {la.name: la.module.bias is not None for net in find_feedforwards(model)[0] for la in net.layers}
    report = init_dyad(model, n=4, variant="dt", ignore=("*.2*",))
    assert len(report.networks) == 2 and len(report.skipped) == 1 and model.training
    made = {key: module for key, module in model.named_modules() if isinstance(module, DyadLinear)}
    assert len(made) == sum(".2" not in key for key in biases)
    for key, module in made.items():
        k = 1 / math.sqrt(module.in_features)
        assert (module.bias is not None) == biases[key] and module.variant == "dt" and module.n_dyad == 4
        for w in (module.wl, module.wu):
            assert float(w.detach().abs().max()) <= k and float(w.detach().std()) == pytest.approx(
                k / math.sqrt(3), rel=0.1
            )
    model(IDS)[0].square().mean().backward()
    assert all(float(p.grad.abs().sum()) > 0 for module in made.values() for p in module.parameters())


def test_the_other_initialisation_has_the_variance_of_dense_layers() -> None:
    model = small_model("opt")
    effk.compress(model, Dyad(start="random", init="dense_var", n=8, ignore=("*.0",)))
    w = model.model.decoder.layers[1].fc1.wl
    assert float(w.detach().std()) == pytest.approx(math.sqrt(8 / 2 / 3 / 72), rel=0.1)


def test_plans_are_edited_and_give_the_same_model() -> None:
    recipe = Dyad(n=4, per_layer={"*.1.*": {"n": 8, "rank": 2}}, ignore=("*.2.*",))
    at_once, later = small_model("llama"), small_model("llama")
    effk.compress(at_once, recipe, CALIB)
    plan = make_plan(later, recipe)
    assert plan.networks == {
        "model.layers.0.mlp": {"n": 4, "variant": "it", "rank": 0, "bits": 0},
        "model.layers.1.mlp": {"n": 8, "variant": "it", "rank": 2, "bits": 0},
    }
    assert plan.skipped == {"model.layers.2.mlp": "ignored by the recipe"}
    read = plan_from_json(plan.to_json())
    assert read == plan and "model.layers.1.mlp" in str(plan.table())
    effk.compress(later, recipe, CALIB, plan=read)
    assert torch.equal(output(later), output(at_once))
    edited = dataclasses.replace(
        plan, networks={"model.layers.2.mlp": {"n": 2, "variant": "dt", "rank": 0, "bits": 0}}, skipped={}
    )
    model = small_model("llama")
    report = effk.compress(model, recipe, CALIB, plan=edited)
    assert list(report.networks) == ["model.layers.2.mlp"] and model.model.layers[2].mlp.up_proj.variant == "dt"
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


def wide(name: str = "llama") -> nn.Module:
    """A model whose blocks have a multiple of 16 outputs at n = 2."""
    torch.manual_seed(0)
    config = type(small_model(name).config)(
        **small_model(name).config.to_dict() | {"hidden_size": 96, "intermediate_size": 160}
    )
    return type(small_model(name))(config).eval()


@pytest.mark.parametrize("variant", ["it", "ot", "dt"])
@pytest.mark.parametrize(("compute", "rank"), [("float", 0), ("int8", 0), ("float", 3)])
def test_quantised_blocks_are_the_rounded_ones(variant: str, compute: str, rank: int) -> None:
    plain, small = wide(), wide()
    effk.compress(plain, Dyad(n=2, variant=variant, rank=rank), CALIB)
    report = effk.compress(small, Dyad(n=2, variant=variant, rank=rank, bits=8, group_size=32, compute=compute), CALIB)
    for entry in report.networks.values():
        for layer in entry.layers:
            a, b = plain.get_submodule(layer), small.get_submodule(layer)
            a, b = (a.dyad, b.dyad) if rank else (a, b)
            assert isinstance(b, DyadWqLinear) and (b.bits, b.compute, b.variant) == (8, compute, variant)
            for w, rounded in zip((a.wl, a.wu), b.dequantize(), strict=True):
                assert (
                    0 < float((w.detach() - rounded).norm() / w.detach().norm()) < 0.01
                )  # half a step of 2 max / 255 in each group
        assert entry.bytes_after < 0.45 * entry.bytes_before  # half the weights, in a quarter of the bytes, and scales
    # 8-bit weights err by less than 1 %, int8 activations by about as much; three blocks, a residual path around each.
    assert float((output(small) - output(plain)).norm() / output(plain).norm()) < 0.03


def test_half_precision_models_keep_their_dtype() -> None:
    model = small_model("gpt2", torch.bfloat16)
    expected = output(small_model("gpt2")).float()
    report = effk.compress(model, Dyad(n=2), CALIB)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert float((output(model).float() - expected).norm() / expected.norm()) < 0.5
    assert all(entry.error < 1 for entry in report.networks.values())


def test_replaced_weights_are_freed_as_the_work_goes_on() -> None:
    model = small_model("llama")
    weights = {name: weakref.ref(p) for name, p in model.named_parameters() if "layers.0.mlp" in name}
    alive: list[list[str]] = []

    def watch(stage: str, done: int, total: int) -> None:
        if stage == "apply" and done == total:
            alive.append([name for name, ref in weights.items() if ref() is not None])

    effk.compress(model, Dyad(), CALIB, progress=watch)
    assert alive == [[]]


def test_sequences_are_held_out_from_the_end() -> None:
    batches = [torch.arange(12).reshape(6, 2) + 100 * i for i in range(3)]
    kept, held = hold_out(batches)
    assert [len(b) for b in kept] == [6, 6, 4] and [len(b) for b in held] == [2]
    assert torch.equal(held[0], batches[2][4:]) and torch.equal(kept[2], batches[2][:4])
    kept, held = hold_out([torch.zeros(1, 2)] * 17)
    assert len(kept) == 15 and len(held) == 2
    assert hold_out([torch.zeros(7, 2)])[1] == []


def unchanged(message: str, model: nn.Module, recipe: Dyad, **arguments: Any) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        effk.compress(model, recipe, **arguments)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(
        torch.equal(before[k].nan_to_num(), after[k].nan_to_num()) for k in after
    )


def test_refusals_come_before_any_work() -> None:
    model, calib = small_model("opt"), {"calib": CALIB}
    unchanged("calib: expected token ids for recipe dyad, got none", model, Dyad())
    unchanged(
        r"layers.0.fc1: dyad: n: expected a divisor of both 104 outputs and 72 inputs, got 7", model, Dyad(n=7), **calib
    )
    unchanged(r"layers.0.fc1: rank: expected 0\.\.72, got 73", model, Dyad(rank=73), **calib)
    unchanged(
        r"expected patterns that match networks, got \['\*.mlp'\]", model, Dyad(per_layer={"*.mlp": {"n": 8}}), **calib
    )
    unchanged("expected at least one feed-forward network", model, Dyad(ignore=("*",)), **calib)
    unchanged(r"expected ids in \[0, 97\)", model, Dyad(), calib=[torch.full((1, 4), 200)])
    unchanged("expected at least one feed-forward", nn.Sequential(nn.Linear(8, 8)), Dyad(), **calib)
    plan = make_plan(model, Dyad())
    for change, message in (
        (
            {"model.decoder.layers.9": {"n": 4, "variant": "it", "rank": 0, "bits": 0}},
            "expected networks of the model, got",
        ),
        ({"model.decoder.layers.0": {"n": 4, "variant": "ti", "rank": 0, "bits": 0}}, "variant: expected one of"),
        (
            {"model.decoder.layers.0": {"n": 4.0, "variant": "it", "rank": 0, "bits": 0}},
            "expected n, variant, rank and bits",
        ),
        (
            {"model.decoder.layers.0": {"n": 4, "variant": "it", "rank": 0, "bits": 5}},
            "expected n, variant, rank and bits",
        ),
        (
            {"model.decoder.layers.0": {"n": 4, "variant": "it", "rank": 0, "bits": 4}},
            "a multiple of 16 outputs, got 4 with 26",
        ),
        ({"model.decoder.layers.0": {"n": 4}}, "expected n, variant, rank and bits"),
    ):
        unchanged(message, model, Dyad(), plan=dataclasses.replace(plan, networks=change), **calib)
    damaged = small_model("opt")
    damaged.model.decoder.layers[2].fc2.weight.data[3, 4] = float("nan")
    unchanged("layers.2.fc2.weight: expected finite values", damaged, Dyad(), **calib)
    for text in (
        "{",
        "[1]",
        plan.to_json().replace('"networks"', '"nets"'),
        plan.to_json().replace('"version": 1', '"version": 2'),
    ):
        with pytest.raises(ValueError, match="plan: expected"):
            NetworkPlan.from_json(text)


def test_networks_of_another_kind_are_noticed() -> None:
    """Same names, other function: a dropout that is always on stands for whatever a model may do in between."""
    model = small_model("opt")
    block = model.model.decoder.layers[1]
    block.fc1.register_forward_hook(lambda module, args, out: 2 * out + 1)
    block.activation_fn.register_forward_hook(lambda module, args, out: out + 3)
    block.fc2.register_forward_pre_hook(lambda module, args: (args[0] - 2,))
    with pytest.raises(ValueError, match=r"layers.1: expected hidden units act\(up\(x\)\)"):
        effk.compress(model, Dyad(), CALIB)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 0}, "n: expected at least 1"),
        ({"n": 4.0}, "n: expected at least 1"),
        ({"variant": "cat"}, "variant: expected one of"),
        ({"start": "scratch"}, "start: expected one of"),
        ({"init": "zero"}, "init: expected one of"),
        ({"ridge": 0}, "ridge: expected a positive number"),
        ({"rank": -1}, "rank: expected 0 or more"),
        ({"tokens": 0}, "tokens: expected at least 1"),
        ({"rate": math.nan}, "rate: expected a positive number"),
        ({"steps": 5, "start": "random"}, "steps: expected 0 for random weights"),
        ({"bits": 5}, "bits: expected 0 or one of"),
        ({"compute": "int8"}, "compute: expected 'float' for weights in floating point"),
        ({"bits": 4, "start": "random"}, "bits: expected 0 for random weights"),
        ({"bits": 4, "group_size": 48}, "group_size: expected one of"),
        ({"model_steps": -1}, "model_steps: expected 0 or more"),
        ({"embedding_bits": 8}, "embedding_bits: expected None for a method of feed-forward networks"),
    ],
)
def test_illegal_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Dyad(**fields)


@pytest.mark.parametrize("variant", ["it", "ot", "dt"])
def test_single_layers(variant: str) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(32, 24), torch.randn(500, 32) @ torch.randn(32, 32) + 3
    masked = convert_dense_to_dyad(linear, 4, variant)
    assert isinstance(masked, DyadLinear) and torch.equal(masked.bias, linear.bias)
    torch.testing.assert_close(dense(masked), mask(linear.weight.detach(), 4, variant))
    gram, mean = x.t() @ x / len(x), x.mean(0)
    with torch.no_grad():
        errors = [
            float((convert_dense_to_dyad(linear, 4, variant, *given)(x) - linear(x)).norm())
            for given in ((), (gram,), (gram, mean))
        ]
        assert errors[2] < errors[1] < errors[0]
        exact = convert_dense_to_dyad(linear, 4, variant, gram, mean, rank=24)
        torch.testing.assert_close(exact(x), linear(x), rtol=1e-4, atol=1e-3)
        fitted = convert_dense_to_dyad(linear, 4, variant, gram, mean)
        torch.testing.assert_close(fitted(x).mean(0), linear(x).mean(0), rtol=1e-4, atol=1e-4)
    without = nn.Linear(32, 24, bias=False)
    assert convert_dense_to_dyad(without, 4, variant).bias is None
    assert convert_dense_to_dyad(without, 4, variant, gram, mean).bias is not None
    with pytest.raises(ValueError, match="gram: expected one beside a mean"):
        convert_dense_to_dyad(linear, 4, mean=mean)
    with pytest.raises(ValueError, match=r"expected gram \[32, 32\]"):
        convert_dense_to_dyad(linear, 4, gram=gram[:5])
