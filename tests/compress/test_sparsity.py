"""Statistics of sparsity and the cost model: fixtures of the specification, and brute force."""

from __future__ import annotations

import pytest
import torch

import effk
from effk.compress.cost_model import Ffn, model_speedup, speculative_over_plain, speculative_over_speculative
from effk.compress.passes.relufy import Relufy
from effk.compress.sparsity import aggregated_sparsity, measure, predict
from effk.nn.relu_ffn import Density, sparse_ffns
from small_models import small_model, token_batches


def sets(*members: set[int], f: int = 10) -> torch.Tensor:
    return torch.tensor([[i in active for i in range(f)] for active in members])


def test_aggregated_fixture() -> None:
    curve = aggregated_sparsity(sets({0, 1, 2}, {1, 3}, {1, 2}, {7}))
    torch.testing.assert_close(curve, torch.tensor([0.7, 0.6, 0.6, 0.5]))


def test_predictions_fixture() -> None:
    true, predicted = sets({0, 1, 2, 3}, {5}), sets({0, 1, 7}, {5, 6})
    found = predict(predicted, true)
    assert (found.recall, found.precision, found.density) == pytest.approx((0.6, 0.6, 0.25))
    assert found.missed_mass == pytest.approx(0.4)
    mass = torch.ones(2, 10)
    mass[0, 2] = 6.0
    mass[0, 9] = 100.0  # not active: does not count
    assert predict(predicted, true, mass).missed_mass == pytest.approx(0.7)


def test_density() -> None:
    report = Density.of(torch.linspace(0, 1, 101))
    assert (report.tokens, report.mean, report.p50, report.p95, report.max) == pytest.approx((101, 0.5, 0.5, 0.95, 1.0))


@pytest.mark.parametrize("name", ["opt", "gpt2"])  # OPT hands the tokens of a batch on as one list
def test_against_brute_force(name: str) -> None:
    """Every figure from the hidden units that the dense model really computes; padding left out."""
    model = small_model(name)
    if name == "gpt2":
        for block in model.transformer.h:
            block.mlp.act = torch.nn.ReLU()
    ids = torch.cat(token_batches(4))
    mask = torch.ones_like(ids)
    mask[2, 11:] = 0
    seen: dict[str, torch.Tensor] = {}
    downs = {n: m for n, m in model.named_modules() if n.endswith(("fc2", "mlp.c_proj"))}
    hooks = [
        m.register_forward_pre_hook(lambda m, a, n=n: seen.update({n: a[0].reshape(*ids.shape, -1)}))
        for n, m in downs.items()
    ]
    with torch.no_grad():
        model(ids, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    effk.compress(model, Relufy())
    found, _ = measure(model, [ids], [mask])
    assert len(found) == 3 == len(seen)
    for got, h in zip(found.values(), seen.values(), strict=True):
        active = h > 0
        tokens = active[mask.bool()]
        shares = tokens.double().mean(-1)
        assert got.density == Density.of(shares)
        assert got.density.tokens == mask.sum() and got.dead == pytest.approx(float((~tokens.any(0)).float().mean()))
        assert got.aggregated[0] == pytest.approx(1 - float(active[:, 0].float().mean()), abs=1e-6)
        assert all(a >= b for a, b in zip(got.aggregated[:11], got.aggregated[1:11], strict=False)), "non-increasing"
        unused = 1 - active[:, :11].any(1).float().mean()
        assert got.aggregated[10] == pytest.approx(float(unused), abs=1e-6)
        p = tokens.double().mean(0)
        assert got.random[2] == pytest.approx(float((1 - p).pow(3).mean()), abs=1e-6)
        places = [torch.linspace(0, n - 1, 8).long() for n in mask.sum(1).tolist()]
        picked = torch.stack([row[place] for row, place in zip(active, places, strict=True)])
        assert got.union[8] == pytest.approx(float(picked.any(0).float().mean()), abs=1e-6)
        assert got.union[1] == pytest.approx(float(picked.float().mean()), abs=1e-6) and set(got.union) == {1, 2, 4, 8}


def test_counting_agrees_with_the_kernel() -> None:
    model, ids = small_model("opt"), token_batches(1)[0][:1, :5]
    effk.compress(model, Relufy())
    for ffn in sparse_ffns(model).values():
        ffn.counting = True
    with torch.no_grad():
        model(ids)
    counted = [ffn.density_report() for ffn in sparse_ffns(model).values()]
    for ffn in sparse_ffns(model).values():
        ffn.counting = False
    found, _ = measure(model, [ids])
    assert counted == [s.density for s in found.values()]


def test_cost_model_fixtures() -> None:
    """Specification, sections 4 and 3.7."""
    llama = Ffn(4096, 11008)
    plain, scattered = [2.73, 2.50, 2.14, 1.81, 1.67, 1.50], [2.65, 2.38, 1.97, 1.62, 1.47, 1.30]
    densities = (0.05, 0.1, 0.2, 0.33, 0.4, 0.5)
    assert [llama.speedup(rho) for rho in densities] == pytest.approx(plain, abs=0.01)
    assert [llama.speedup(rho, 1.3) for rho in densities] == pytest.approx(scattered, abs=0.01)
    whole = [1.71, 1.65, 1.54, 1.41, 1.36, 1.28]
    assert [model_speedup(0.655, llama.speedup(rho)) for rho in densities] == pytest.approx(whole, abs=0.01)
    assert [llama.break_even(kappa) for kappa in (1, 1.3, 2)] == pytest.approx([0.80, 0.62, 0.40], abs=0.01)
    assert llama.largest_rank(0.1, 0.2) == pytest.approx(1791, abs=1)
    # 4 bits in groups of 32 with fp16 scales: 0.5625 bytes a weight.
    small = Ffn(4096, 11008, weight_bytes=0.5625)
    assert [small.largest_rank(0.1, 0.2, b) for b in (2, 1)] == pytest.approx([504, 1007], abs=1)
    assert llama.predicted_bytes(0.2, 1791) == pytest.approx(llama.gate_first_bytes(0.1), rel=1e-3)
    assert llama.sign_bytes(0.1) == pytest.approx(4096 * 11008 * (1 / 8 + 0.6))
    opt = Ffn(4096, 16384, gated=False)
    assert opt.speedup(0.0) == 2 and opt.speedup(1.0) == 1 == llama.speedup(1.0)
    attention = 4 * 4096**2 * 32 + 32000 * 4096
    assert (32 * llama.macs() + attention) / 1e9 == pytest.approx(6.607, abs=1e-3)
    assert (32 * llama.macs(0.38) + attention) / 1e9 == pytest.approx(4.82, abs=0.01)
    assert speculative_over_speculative(0.02, 16, 0.28) == pytest.approx(1.2692, abs=1e-4)
    assert speculative_over_speculative(0.02, 16, 0.22) == pytest.approx(1.2, abs=1e-4)
    assert speculative_over_plain(0.05, 4, 0.3, 0.8) == pytest.approx(3.7351, abs=1e-4)
    assert speculative_over_plain(0.05, 4, 0.0, 0.8) == pytest.approx(2.8013, abs=1e-4)
