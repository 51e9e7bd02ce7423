"""The automatic search: what it chooses, that it stops early, and that nothing finished is done twice, also after kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import effk
from cli.tiny import byte_tokenizer
from effk.compress import auto as package_auto
from effk.compress.apply import model_bytes
from effk.compress.auto import ALGORITHMS, Trial, algorithms_for, auto, candidates, estimate, key_of, search
from effk.compress.passes.rtn import Rtn
from effk.compress.passes.sparse import Sparse
from effk.nn import WqGroupedLinear, WqLinear
from mixtures import small_mixture
from small_models import small_model, token_batches

RECIPES = [Rtn(bits=bits, group_size=group) for bits in (4, 8, 2, 3) for group in (64, 32)]
IDS = token_batches(1)[0]


def error_of(plain: nn.Module) -> Callable[[nn.Module], float]:
    """A score that rises with the rounding: 1 for the plain model, 1 + the error of its logits for others."""
    with torch.no_grad():
        expected = plain(IDS).logits

    def score(form: nn.Module) -> float:
        with torch.no_grad():
            return 1 + float((form(IDS).logits - expected).norm() / expected.norm())

    return score


class Counted:
    """A score that keeps what it gave."""

    def __init__(self, score: Callable[[nn.Module], float]) -> None:
        self.score, self.given = score, []

    def __call__(self, model: nn.Module) -> float:
        self.given.append(self.score(model))
        return self.given[-1]


def everything(model: nn.Module) -> list[Trial]:
    return [trial for _, trial in search(model, RECIPES, error_of(model), target_loss=-1)]


def test_the_cheapest_that_is_good_enough_is_taken() -> None:
    trials = everything(small_model("llama"))
    assert len(trials) == len(RECIPES)
    assert [t.bytes for t in trials] == sorted(t.bytes for t in trials)
    for target in sorted({round(t.loss, 3) + 0.001 for t in trials}):
        model = small_model("llama")
        score = Counted(error_of(model))
        found = auto(model, target, score=score, recipes=RECIPES)
        expected = min((t for t in trials if t.loss <= target), key=lambda t: t.bytes)
        assert found.recipe.to_json() == expected.recipe and found.base == 1.0
        assert len(score.given) == 1 + len(found.trials) and [t.accepted for t in found.trials].count(True) == 1
        assert found.trials[-1].recipe == expected.recipe  # the search stopped there
        assert model_bytes(model) == expected.bytes == found.report.model_bytes_after
        assert score(model) == found.trials[-1].score
        assert [row[4] for row in found.table()[2:]].count("chosen") == 1


def test_nothing_good_enough_leaves_the_model_alone() -> None:
    model = small_model("llama")
    found = auto(model, 1e-9, score=error_of(model), recipes=RECIPES)
    assert found.recipe is None and found.report is None and len(found.trials) == len(RECIPES)
    assert not any(isinstance(m, WqLinear) for m in model.modules()) and error_of(small_model("llama"))(model) == 1.0


def test_a_budget() -> None:
    """The least loss among those that fit; the search goes down from the largest and ends at one within the target."""
    trials = everything(small_model("llama"))
    sizes = sorted(t.bytes for t in trials)
    for budget in (sizes[0], sizes[3], sizes[5] - 1, sizes[-1] + 1):
        model = small_model("llama")
        found = auto(model, 0.0, budget, score=error_of(model), recipes=RECIPES)
        expected = min((t for t in trials if t.bytes <= budget), key=lambda t: t.loss)
        assert found.recipe.to_json() == expected.recipe and model_bytes(model) <= budget
    easy = auto(small_model("llama"), 10.0, sizes[4], score=error_of(small_model("llama")), recipes=RECIPES)
    assert [t.accepted for t in easy.trials][-1] and len(easy.trials) < len(RECIPES) - 2
    none = auto(small_model("llama"), 0.1, sizes[0] // 2, score=error_of(small_model("llama")), recipes=RECIPES)
    assert none.recipe is None


def test_higher_may_be_better() -> None:
    model = small_model("llama")
    score = error_of(model)
    down = auto(small_model("llama"), 0.05, score=score, recipes=RECIPES)
    up = auto(small_model("llama"), 0.05, score=lambda m: 2 - score(m), higher_is_better=True, recipes=RECIPES)
    assert up.recipe == down.recipe and up.trials[0].loss == pytest.approx(down.trials[0].loss)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_estimates_are_near(algorithm: str) -> None:
    make = (lambda: small_mixture("mixtral")) if algorithm == "moqe" else (lambda: small_model("llama"))
    model = make()
    for bits in (2, 3, 4, 8):
        (recipe,) = candidates([algorithm], [bits], [32])
        report = effk.compress(make(), recipe, token_batches(2))
        guess, size = estimate(model, recipe), report.model_bytes_after
        if algorithm == "finequant":  # it may choose larger groups than those allowed
            assert 0.8 * guess <= size <= guess, bits
        else:
            assert guess == pytest.approx(size, rel=0.1), bits


def test_pruned_candidates() -> None:
    """They are not among the default ones, which are smaller and better, but a caller may bring some."""
    model = small_model("llama")
    pruned = [Sparse(sparsity=s, method="magnitude") for s in (0.5, 0.75)] + [Sparse(pattern="2:4", method="magnitude")]
    for recipe in pruned:
        size = effk.compress(small_model("llama"), recipe).model_bytes_after
        assert estimate(model, recipe) == pytest.approx(size, rel=0.1)
    found = auto(model, 1e9, score=error_of(model), recipes=pruned)
    assert found.recipe == pruned[1] and found.table()[2][0] == "sparse, 75% zeros, int8, float"


def test_mixtures_of_experts() -> None:
    """Experts are only touched by moqe, which other models do not get."""
    assert "moqe" in algorithms_for(small_mixture("qwen2_moe")) and "moqe" not in algorithms_for(small_model("llama"))
    model = small_mixture("mixtral")
    recipes = candidates(algorithms_for(model), [8], [32])
    found = auto(model, 0.5, score=error_of(model), recipes=recipes, calib=token_batches(2))
    assert found.recipe.name == "moqe" and len(found.trials) == 1, "the smallest: most of the model is experts"
    assert any(isinstance(module, WqGroupedLinear) for module in model.modules())


def test_perplexity_and_calibration_by_default(tmp_path: Path) -> None:
    recipes = candidates(["rtn", "gptq", "llm-mq"], [4], [32], compute="int8")
    effk_tiny = byte_model()
    found = effk.auto(
        effk_tiny,
        0.5,
        tokenizer=byte_tokenizer(),
        recipes=recipes,
        context=32,
        windows=2,
        log=tmp_path / "a" / "log.json",
    )
    assert found.recipe is not None and found.base > 1
    record = json.loads((tmp_path / "a" / "log.json").read_text())
    assert record["key"]["score"].endswith("2 x 32") and len(record["trials"]) == len(found.trials)
    assert json.dumps(found.to_json())


def byte_model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_a_search_goes_on_where_it_stopped(tmp_path: Path) -> None:
    log = tmp_path / "log.json"
    model = small_model("llama")
    whole = auto(model, 0.01, score=error_of(model), recipes=RECIPES)
    model = small_model("llama")
    score = Counted(error_of(model))

    def stop(trial: Trial) -> None:
        if len(score.given) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        auto(model, 0.01, score=score, recipes=RECIPES, log=log, on_trial=stop)
    assert len(json.loads(log.read_text())["trials"]) == 3
    again = auto(model, 0.01, score=score, recipes=RECIPES, log=log)
    assert len(score.given) == 1 + len(whole.trials)
    # Times differ; everything else is the same.
    assert [(t.recipe, t.bytes, t.score, t.accepted) for t in again.trials] == [
        (t.recipe, t.bytes, t.score, t.accepted) for t in whole.trials
    ]
    assert again.recipe == whole.recipe
    looser = auto(small_model("llama"), 10.0, score=score, recipes=RECIPES, log=log)  # another target, same trials
    assert len(looser.trials) == 1 and len(score.given) == 1 + len(whole.trials)


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
sys.path[:0] = {paths!r}
from compress.test_auto import RECIPES, error_of
from effk.compress.auto import auto
from small_models import small_model
model = small_model("llama")
inner, calls = error_of(model), 0
def score(form):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(form)
found = auto(model, 0.01, score=score, recipes=RECIPES, log=sys.argv[1])
print(calls, len(found.trials), found.recipe.bits, found.recipe.group_size)
"""


def test_kill_minus_nine(tmp_path: Path) -> None:
    """Killed while the fourth candidate is scored: three are in the log, and the next run scores only the others."""
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")])

    def run(kill_at: int) -> subprocess.CompletedProcess[str]:
        script = KILLED.format(paths=[str(tests)])
        command = [sys.executable, "-c", script, str(tmp_path / "log.json"), str(kill_at)]
        return subprocess.run(
            command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=200
        )

    killed = run(5)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(json.loads((tmp_path / "log.json").read_text())["trials"]) == 3
    done = run(0)
    assert done.returncode == 0, done.stderr
    model = small_model("llama")
    whole = auto(model, 0.01, score=error_of(model), recipes=RECIPES)
    assert done.stdout.split() == [
        str(len(whole.trials) - 3), str(len(whole.trials)), str(whole.recipe.bits), str(whole.recipe.group_size)
    ]  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["log.json"]


def test_logs_of_other_searches_are_refused(tmp_path: Path) -> None:
    log = tmp_path / "log.json"
    model = small_model("llama")
    auto(model, 10.0, score=error_of(model), recipes=RECIPES, log=log)
    fresh = small_model("llama")
    with pytest.raises(ValueError, match="got another score"):
        auto(fresh, score=error_of(fresh), score_name="other", recipes=RECIPES, log=log)
    fresh.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match="got another model"):
        auto(fresh, score=error_of(fresh), recipes=RECIPES, log=log)
    for text in ("", "{}", '{"effk_auto": 2}', "[1]"):
        log.write_text(text)
        with pytest.raises(ValueError, match="auto: log: .*expected a log of version 1"):
            auto(small_model("llama"), score=error_of(fresh), recipes=RECIPES, log=log)


def test_refusals() -> None:
    model = small_model("llama")
    with pytest.raises(ValueError, match="target_loss: expected 0 or more"):
        auto(model, -0.1, score=error_of(model))
    with pytest.raises(ValueError, match="budget: expected a positive"):
        auto(model, budget=0, score=error_of(model))
    with pytest.raises(ValueError, match="tokenizer: expected one"):
        auto(model)
    with pytest.raises(ValueError, match="calib: expected batches"):
        auto(model, score=error_of(model))
    with pytest.raises(ValueError, match="candidates: expected at least one"):
        auto(model, score=error_of(model), recipes=[])
    with pytest.raises(ValueError, match="score: expected a finite number, got nan"):
        auto(model, score=lambda m: float("nan"), recipes=RECIPES)
    with pytest.raises(ValueError, match="algorithms: expected some of"):
        candidates(["magic"])
    assert len({key_of(recipe) for recipe in candidates()}) == len(candidates())
    assert package_auto.auto is effk.auto
