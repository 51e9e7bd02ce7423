"""The quality study's arithmetic: random allocations of the right size, rises and ratios, bars that can be missed."""

from __future__ import annotations

import math

import pytest

from bench.quality import BUDGETS, RANDOM_BUDGETS, SEEDS, bars, finish, random_bits
from effk.compress.layers import find_layers
from small_models import small_model


@pytest.mark.parametrize("average", [2.0, 2.6, 3.0, 4.0])
@pytest.mark.parametrize("seed", range(5))
def test_random_allocations_fill_the_budget(average: float, seed: int) -> None:
    layers = [layer for layer in find_layers(small_model("llama"))[0] if layer.block]
    bits = random_bits(layers, (2, 3, 4), average, seed)
    assert set(bits.values()) <= {2, 3, 4}
    total = sum(layer.n * layer.k for layer in layers)
    used = sum(bits[layer.name] * layer.n * layer.k for layer in layers)
    smallest = min(layer.n * layer.k for layer in layers)
    assert average * total - used < smallest or average == 4.0
    assert used <= average * total
    assert bits == random_bits(layers, (2, 3, 4), average, seed)


def fake_rows() -> dict[str, dict[str, float]]:
    rows = {"fp32": {"perplexity": 40.0}}
    for bits, value in ((3, 160.0), (4, 60.0)):
        rows[f"rtn{bits}"] = {"perplexity": value, "nominal_bits": bits, "true_bits": bits + 0.375}
    for i, budget in enumerate(BUDGETS):
        row = {"perplexity": 100.0 - 5 * i, "nominal_bits": budget, "true_bits": budget + 0.4}
        rows[f"llm-mq-{budget}"], rows[f"static-{budget}"] = dict(row), dict(row)
    for budget in RANDOM_BUDGETS:
        for seed in SEEDS:
            rows[f"static-random-{budget}-{seed}"] = {
                "perplexity": 90.0 + seed,
                "nominal_bits": budget,
                "true_bits": 3.4,
            }
    return rows


def test_rise_and_ratio() -> None:
    rows = fake_rows()
    finish(rows)
    assert rows["rtn3"]["rise"] == pytest.approx(math.log(4))
    assert rows["llm-mq-3.0"]["ratio"] == pytest.approx(math.log(75 / 40) / math.log(4))
    assert rows["llm-mq-4.0"]["ratio"] == pytest.approx(math.log(50 / 40) / math.log(1.5))


def test_every_bar_can_be_met_and_missed() -> None:
    rows = fake_rows()
    rows["llm-mq-3.0"]["perplexity"] = rows["llm-mq-2.8"]["perplexity"] - 20  # 60: the ratio at 3 bits is 29 %
    for budget in BUDGETS:
        if budget > 3.0:
            rows[f"llm-mq-{budget}"]["perplexity"] = 60.0 - 10 * (budget - 3)
    rows["llm-mq-4.0"]["perplexity"] = 45.0
    finish(rows)
    assert len(bars(rows)) == 8
    assert all(met for _, _, met in bars(rows)), bars(rows)
    spoiled = {
        "llm-mq-3.4": 70.0,  # not monotone
        "static-2.4": 200.0,
        "llm-mq-3.0": 150.0,
        "llm-mq-4.0": 59.0,
        "static-random-3.0-0": 1.0,
    }
    for name, value in spoiled.items():
        worse = {key: dict(row) for key, row in rows.items()}
        worse[name]["perplexity"] = value
        if "random" in name:
            for seed in SEEDS:
                worse[f"static-random-3.0-{seed}"]["perplexity"] = value
        finish(worse)
        assert not all(met for _, _, met in bars(worse)), name
    heavy = {key: dict(row) for key, row in rows.items()}
    heavy["llm-mq-3.0"]["true_bits"] = 3.8
    assert not all(met for _, _, met in bars(heavy))
