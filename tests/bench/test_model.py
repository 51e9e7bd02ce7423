"""Whole-model figures compare a compressed model with the model that its own weights describe."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import effk
from bench import model as runtime
from effk.compress.passes.rtn import Rtn
from effk.nn import WqLinear
from small_models import VOCABULARY, small_model


@pytest.fixture
def ids(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """A short prompt, compared at two positions."""
    monkeypatch.setattr(runtime, "POSITIONS", (3, 15))
    return torch.randint(3, VOCABULARY, (1, 16), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("embedding_bits", [None, 8])
def test_the_dense_copy_holds_the_same_weights_in_plain_layers(embedding_bits: int | None, ids: torch.Tensor) -> None:
    model = small_model("llama")
    original = copy.deepcopy(model)
    effk.compress(model, Rtn(bits=4, group_size=32, compute="float", embedding_bits=embedding_bits))
    dense = runtime.dense_copy(model)
    assert not any(isinstance(m, WqLinear) for m in dense.modules())
    assert any(isinstance(m, WqLinear) for m in model.modules())  # the model itself is untouched
    wanted = runtime.logits(dense, ids)
    same = runtime.divergence(wanted, runtime.logits(model, ids))
    other = runtime.divergence(wanted, runtime.logits(original, ids))
    assert 0 <= same + 1e-12 and same < 1e-3 * other


def test_divergence() -> None:
    p, q = torch.tensor([[0.25, 0.75]]).double().log(), torch.tensor([[0.5, 0.5]]).double().log()
    assert runtime.divergence(p, p) == pytest.approx(0, abs=1e-15)
    assert runtime.divergence(p, q) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert runtime.divergence(p, q + math.nan) == math.inf
