"""The examples of activation sparsity at sizes that take seconds, and the recipe on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import effk as package
from cli.tiny import byte_tokenizer
from effk.demo import gemma3n_ffn, relu_training, relufication, sparse_runtime
from effk.demo.dyad_training import Settings
from effk.nn.relu_ffn import sparse_ffns
from small_models import small_model

TINY = Settings(width=32, hidden=256, blocks=2, heads=4, length=32, batch=4, steps=30, windows=4)


def test_training_with_and_without_deft(tmp_path: Path) -> None:
    outcome = relu_training.run(TINY, out=tmp_path, say=lambda text: None)
    plain, deft = outcome.versions.values()
    assert plain.losses[0] == deft.losses[0] == pytest.approx(5.545, abs=0.05), "the same start"
    assert deft.losses[-1] < deft.losses[0] - 0.1 and deft.speed.density < 0.8 * plain.speed.density
    for version in (plain, deft):
        assert version.speed.largest_error < 1e-4 and min(version.speed.tokens_per_second.values()) > 0
    sizes = [size for _, size in outcome.combined.values()]
    assert len(sizes) == 6 and sizes[:4] == sorted(sizes[:4], reverse=True) and sizes[5] == min(sizes)
    losses = [loss for loss, _ in outcome.combined.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and all(0 < loss < 6 for loss in losses)
    lines = "\n".join(relu_training.table(outcome))
    assert "| ReLU with DEFT |" in lines and (tmp_path / "deft.png").is_file() and (tmp_path / "relu.json").is_file()


@pytest.mark.parametrize("loss", relufication.LOSSES)
def test_relufication(loss: str, tmp_path: Path) -> None:
    model = small_model("llama")
    model.resize_token_embeddings(257)
    how = relufication.Training(12, 32, 2, 1e-3, 0.0, loss, narrow=loss == "distil")
    outcome = relufication.run(model, byte_tokenizer(), how, 8, tmp_path, say=lambda text: None)
    assert [tokens for tokens, _, _ in outcome.points] == [0, 128, 256, 384, 512, 640, 768]
    if loss == "text":
        assert outcome.points[-1][1] < outcome.points[0][1], "it learns"
    assert len(outcome.density) == 3 and outcome.speed.largest_error < 1e-4
    assert "| 768 |" in "\n".join(relufication.table(outcome))
    ids = torch.arange(1, 20)[None]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()  # transformers alone
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, model(ids).logits, atol=1e-4)


def test_distillation_is_nothing_between_equals() -> None:
    model = small_model("llama")
    ids = torch.arange(1, 20)[None]
    assert float(relufication.objective(model, model, ids, False).detach()) == pytest.approx(0, abs=1e-6)


def test_windows_are_cut_elsewhere_every_time() -> None:
    how = relufication.Training(steps=9000, length=32, batch=1)
    windows = torch.cat(relufication.windows_of(byte_tokenizer(), how))
    assert windows.shape == (9000, 32) and len({tuple(w.tolist()) for w in windows}) > 8500, (
        "of 8423 that fit side by side"
    )


def test_decoding_in_several_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every form decodes and is compressed once; skipping in bf16 has the dense model's perplexity, few bits another."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, hidden_act="relu",
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    quality = sparse_runtime.prepare(tmp_path / "model", tmp_path, windows=2, length=48)
    dense, skipping, *few = quality.values()
    assert skipping == pytest.approx(dense, rel=1e-2) and all(v != dense for v in few), "bf16 rounds elsewhere"
    monkeypatch.setattr(sparse_runtime, "compress", None)
    assert sparse_runtime.prepare(tmp_path / "model", tmp_path) == quality
    speeds = sparse_runtime.measure(tmp_path, torch.arange(1, 9), 1)
    assert list(speeds) == list(sparse_runtime.FORMS) and min(speeds.values()) > 0
    assert "| 1.00 × |" in sparse_runtime.table(speeds, quality)[2]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2.0**-6)])
def test_gemma3n(dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemma3n_ffn, "_CACHE", 0)
    rows = ("fp32",) if dtype == torch.float32 else ("bf16", "int8")
    row = gemma3n_ffn.measure("tiny", dtype, rows, 2, sizes=(64, 512))
    assert row.error < bound and row.density == pytest.approx(0.05, abs=0.02)
    assert len(row.us) == 1 + 2 * len(rows) and "skipping over PyTorch" in gemma3n_ffn.table([row])[0]


def test_the_recipe_on_the_command_line(tiny: Path, effk: Callable, tmp_path: Path) -> None:
    out = tmp_path / "model"
    options = ("--recipe", "cats", "--set", "sparsity=0.7", "--calib-length", 32, "--calib-sequences", 8)
    ran = effk("compress", tiny, "--out", out, "--json", *options)
    assert ran.status == 0, ran.stderr
    report = ran.json["report"]
    assert report["statement"].startswith("approximate") and (out / "report.png").is_file()
    assert json.loads((out / "report.json").read_text()) == report
    model = package.load(out)
    assert all(ffn.gate == "silu_threshold" and ffn.rows == "bf16" for ffn in sparse_ffns(model).values()), "as on disk"
    assert len(sparse_ffns(model)) == 2 and effk("eval", out, "--context", 32, "--windows", 2).status == 0
    planned = effk("compress", tiny, "--recipe", "relufy", "--plan-only", "--out", tmp_path / "plan")
    assert planned.status == 0 and "model.layers.1.mlp" in (tmp_path / "plan" / "plan.json").read_text()
    reused = effk(
        "compress", tiny, "--recipe", "reuse", "--set", "method=griffin", "--out", tmp_path / "c", *options[4:]
    )
    assert reused.status == 0 and "greedy continuations of 16 tokens" in reused.stdout, (
        "measured, although it fits nothing"
    )
    text = effk("compress", tiny, "--recipe", "relufy", "--set", "rows=int8", "--out", tmp_path / "b")
    assert text.status == 0 and "exact: what is skipped is zero" in text.stdout
