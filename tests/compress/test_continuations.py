"""Generations of approximate models beside the original's: against transformers' own, and what perplexity cannot see."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

import effk
from effk.compress.continuations import compare, decode, observe
from effk.compress.passes.cats import Cats
from effk.compress.passes.moefy import Moefy
from effk.compress.passes.relufy import Relufy
from effk.compress.passes.reuse import Reuse
from effk.nn.neuron_selector import ActiveSetReuse
from small_models import small_model, token_batches

CALIB = token_batches(16)
PROMPT, COUNT = CALIB[0][0, :9], 7


@pytest.mark.parametrize("name", ["opt", "llama", "gpt2"])
def test_decoding_is_that_of_transformers(name: str) -> None:
    model = small_model(name)
    wanted = model.generate(PROMPT[None], max_new_tokens=COUNT, do_sample=False, pad_token_id=0, eos_token_id=None)
    chosen, _ = decode(model, PROMPT, COUNT)
    assert chosen.tolist() == wanted[0, len(PROMPT) :].tolist()
    text = CALIB[1][0, :COUNT]
    with torch.no_grad():
        logits = model(torch.cat([PROMPT, text])[None]).logits[0, len(PROMPT) - 1 : -1]
    forced, loss = decode(model, PROMPT, COUNT, text)
    assert forced.tolist() == logits.argmax(-1).tolist()
    assert loss == pytest.approx(float(cross_entropy(logits, text)), rel=1e-5)


def test_counting() -> None:
    """Another model in the place of the compressed one: figures from the lists of tokens."""
    model, other = small_model("llama"), small_model("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    original = observe(model, CALIB, 6)
    found = compare(other, original)
    same, first, forced = [], [], []
    for prompt in original.prompts:
        pairs = list(zip(decode(model, prompt, 6)[0].tolist(), decode(other, prompt, 6)[0].tolist(), strict=True))
        same += [a == b for a, b in pairs]
        first.append(next((i for i, (a, b) in enumerate(pairs) if a != b), 6))
        whole = torch.cat([prompt, decode(model, prompt, 6)[0]])
        with torch.no_grad():
            choices = other(whole[None]).logits[0, len(prompt) - 1 : -1].argmax(-1)
        forced += (choices == whole[len(prompt) :]).tolist()
    assert (found.prompts, found.tokens, found.divergence) == (4, 6, tuple(first))
    assert found.agreement == pytest.approx(sum(same) / len(same)) and found.agreement < 1
    assert (
        found.forced_agreement == pytest.approx(sum(forced) / len(forced)) and found.forced_agreement != found.agreement
    )
    assert found.loss_after != pytest.approx(found.loss_before, rel=1e-6)


def test_nothing_left_out_changes_nothing() -> None:
    found = effk.compress(small_model("opt"), Moefy(size=8, steps=20, tau=1.0), CALIB).continuations
    assert found.agreement == found.forced_agreement == 1 and set(found.divergence) == {found.tokens}
    assert found.loss_after == pytest.approx(found.loss_before, rel=1e-5)


def test_reuse_shows_in_generations_only() -> None:
    """Prompts are computed as they are, so perplexity cannot tell; and no state is left behind."""
    model = small_model("opt")
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.fc1.weight.mul_(30)  # networks that matter
            layer.fc2.weight.mul_(30)
    report = effk.compress(model, Reuse(gamma=1), CALIB)
    assert report.perplexity_after == pytest.approx(report.perplexity_before, rel=1e-5)
    assert report.continuations.loss_after != pytest.approx(report.continuations.loss_before, rel=1e-4)
    states = [m for m in model.modules() if isinstance(m, ActiveSetReuse)]
    assert len(states) == 3 and all(m.batch is None and m.kept is None for m in states)
    assert "reading the original's" in str(report)


def test_when_there_are_none() -> None:
    assert effk.compress(small_model("opt"), Relufy(), CALIB).continuations is None, "exact"
    report = effk.compress(small_model("llama"), Cats(continuation=0), CALIB)
    assert report.continuations is None and "continuations not measured" in str(report)
    assert report.to_json()["continuations"] is None
    with pytest.raises(ValueError, match="continuation: expected 0 or more tokens, got -1"):
        Cats(continuation=-1)
    assert observe(small_model("bert"), CALIB, 4) is None and observe(small_model("opt"), CALIB, 0) is None
    assert observe(small_model("opt"), [CALIB[0][:, :3]], 4) is None, "too short"
    assert observe(small_model("opt"), [CALIB[0][:, :5]], 4).greedy[0].shape == (2,)
