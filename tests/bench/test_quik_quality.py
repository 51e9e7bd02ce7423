"""The QUIK study's arithmetic: its simulation is what the layers compute, its orderings can fail."""

from __future__ import annotations

import pytest
import torch

from bench.quik_quality import COMPRESSIONS, ORDERINGS, judge, rounded, set_widths, simulate, widths
from effk.compress import compress
from effk.compress.passes.quik import Quik
from effk.ops.quik_linear import act_quant
from small_models import small_model, token_batches


@pytest.mark.parametrize("quantizer", ["kernel", "sim"])
@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_is_the_definition(bits: int, quantizer: str) -> None:
    x = torch.randn(50, 64) * torch.logspace(-3, 3, 50)[:, None]
    x[0], x[1], x[2] = 0.0, 3.0, x[2].abs()
    codes, scale, zero = act_quant(x, bits, quantizer)
    expected = scale[:, None] * (codes + 2 ** (bits - 1)) + zero[:, None]
    off = (rounded(x, bits, quantizer).double() - expected).abs()
    step = scale[:, None].expand_as(off)
    # fp32 decides a quotient next to a half differently: one step off there, else rounding of values up to 2^bits steps.
    assert float((off > 1e-4 * step).double().mean()) < 1e-3 and bool((off < 1.001 * step).all())


@pytest.mark.parametrize("fields", [{}, {"rotate": True}, {"quantizer": "sim", "outliers": 4}])
def test_the_simulation_is_the_kernels(fields: dict) -> None:
    model, ids = small_model("llama"), token_batches(1)[0]
    with torch.no_grad():
        plain = model(ids).logits
        compress(model, Quik(bits_a=4, **fields), token_batches(4))
        for bits_a, down in ((4, 8), (8, 8), (16, 16)):
            set_widths(model, bits_a, down, {f"model.layers.{i}.mlp.down_proj" for i in range(3)})
            kernels = model(ids).logits
            if bits_a == 4:
                lost = (kernels - plain).norm()
            assert float((simulate(small_copy(model))(ids).logits - kernels).norm()) < 0.05 * float(lost)


def small_copy(model: torch.nn.Module) -> torch.nn.Module:
    """A copy whose layers share no calls, like the simulated ones."""
    import copy

    other = copy.deepcopy(model)
    for module in other.modules():
        if hasattr(module, "_shared"):
            object.__setattr__(module, "_shared", None)
    return other


def test_every_ordering_names_rows_that_are_measured() -> None:
    names = {f"{name}-a{a}" + (f"-down{d}" if d != a else "") for name in COMPRESSIONS for a, d in widths(name)}
    assert {row for _, _, *pair in ORDERINGS for row in pair} <= names
    for fields in COMPRESSIONS.values():
        Quik(quantizer="sim", **fields)


def test_orderings_can_fail() -> None:
    good, bad = {"perplexity": 50.0}, {"perplexity": 60.0}
    pair = {ORDERINGS[0][2]: good, ORDERINGS[0][3]: bad}
    assert [entry["holds"] for entry in judge(pair)] == [True]
    assert [entry["holds"] for entry in judge({ORDERINGS[0][2]: bad, ORDERINGS[0][3]: good})] == [False]
    high, low = {"cosine": 0.9}, {"cosine": 0.5}
    assert [entry["holds"] for entry in judge({ORDERINGS[0][2]: high, ORDERINGS[0][3]: low})] == [True]
    assert judge({ORDERINGS[0][2]: good}) == []
