"""Density losses beside other people's trainers: PEFT's adapters and prompts, transformers' Trainer, the page's snippet."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

import effk
from effk.compress.density_losses import DensityLoss
from effk.compress.passes.relufy import Relufy
from effk.nn.relu_ffn import sparse_ffns
from small_models import small_model, token_batches

peft = pytest.importorskip("peft")

IDS = token_batches(1)[0]
PAGE = Path(__file__).parents[2] / "docs" / "activation-sparsity.md"
ADAPTERS = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=32, target_modules=["fc1"], task_type="CAUSAL_LM"),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=16, task_type="CAUSAL_LM"),
}


def rows(count: int, length: int = 16) -> list[dict[str, Tensor]]:
    """Sequences as a Trainer takes them."""
    ids = torch.cat(token_batches(-(-count // 2)))[:count, :length]
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]


def arguments(folder: Path, **fields: Any) -> TrainingArguments:
    return TrainingArguments(
        str(folder), use_cpu=True, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, seed=1,
        **{"max_steps": 40, "per_device_train_batch_size": 2, "learning_rate": 1e-2} | fields,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_kind_of_adapter(kind: str) -> None:
    """Gradients reach what PEFT trains and nothing else; padding does not count, virtual tokens do."""
    torch.manual_seed(1)
    model = peft.get_peft_model(small_model("opt"), ADAPTERS[kind]()).train()
    model.base_model.eval()  # no dropout
    row = IDS[:1, :9]
    padded = torch.cat([row, torch.zeros(1, 7, dtype=torch.int64)], 1)
    mask = (torch.arange(16) < 9).long()[None]
    with DensityLoss(model, "l1") as loss:
        values = []
        for ids, kept in ((row, torch.ones_like(row)), (padded, mask)):
            out = model(input_ids=ids, attention_mask=kept, labels=ids.masked_fill(kept == 0, -100))
            values.append((float(out.loss.detach()), float(loss.last.detach())))
        assert values[1] == pytest.approx(values[0], rel=1e-5)
        out.loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }


def test_lora_in_the_trainer(tmp_path: Path) -> None:
    """Density falls, only adapters move, and the merged model is skipped exactly."""
    model = peft.get_peft_model(small_model("opt"), ADAPTERS["lora"]())
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    seen = []
    with DensityLoss(model, "deft", eps=1e-3) as loss:
        trainer = Trainer(model, arguments(tmp_path), train_dataset=rows(16))
        step = trainer.training_step
        trainer.training_step = lambda *args: (step(*args), seen.append(loss.density))[0]
        trainer.train()
    assert len(seen) == 40 and seen[-1] < 0.8 * seen[0]
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    merged = model.merge_and_unload().eval()
    with torch.no_grad():
        expected = merged(IDS).logits
        report = effk.compress(merged, Relufy(), token_batches(8))
        torch.testing.assert_close(merged(IDS).logits, expected, atol=1e-5, rtol=1e-4)
    densities = [found.density.mean for found in report.measured.values()]
    assert sum(densities) / 3 == pytest.approx(seen[-1], abs=0.1) and len(sparse_ffns(merged)) == 3


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    """The four parts of a batch count once together, not once each."""
    data, gradients = rows(4), []
    for size in (4, 1):
        model = small_model("llama")  # has no dropout
        with DensityLoss(model, "l1", weight=0.1) as loss:
            fields = {"max_steps": 1, "per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
            trainer = Trainer(model, arguments(tmp_path, max_grad_norm=1e9, **fields), train_dataset=data)
            optimizer = trainer.create_optimizer()
            optimizer.register_step_pre_hook(
                lambda *_, model=model: gradients.append([p.grad.clone() for p in model.parameters()])
            )
            trainer.train()
            assert loss.step == 4 // size
    assert len(gradients) == 2
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = small_model("llama").train()
    plain = copy.deepcopy(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with DensityLoss(plain, "l1"):
        plain(IDS, labels=IDS).loss.backward()
    with DensityLoss(model, "l1"):
        if reentrant:
            with pytest.raises(RuntimeError, match="use_reentrant=False"):
                model(IDS, labels=IDS)
            return
        for _ in range(2):
            model.zero_grad()
            model(IDS, labels=IDS).loss.backward()
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-7, rtol=1e-4)


def test_the_snippet_of_the_page(tmp_path: Path) -> None:
    snippet = re.search(r"```python\n(from peft import.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL).group(1)
    names = {
        "model": small_model("opt"), "dataset": rows(8), "arguments": arguments(tmp_path, max_steps=2),
        "calib": token_batches(8),
    }  # fmt: skip
    exec(compile(snippet, str(PAGE), "exec"), names)
    assert str(names["report"]).startswith("3 networks, exact") and len(sparse_ffns(names["model"])) == 3
