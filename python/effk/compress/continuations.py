"""How an approximate model generates, beside the original: what perplexity on whole texts does not show.

Perplexity reads a text at once, as a prompt. What is approximate may act while generating only (reused neurons), and
an error there is read again by every later token. So prompts, the first parts of held-out sequences, are continued
token by token through the cache, one sequence at a time, as in decoding:

    own        greedily, by the original and by the compressed model
    forced     the compressed model reads the original's greedy continuation
    text       both read what really follows in the text

This is no reasoning task: a loss of half of GSM8K has come with classification scores that hardly moved (Sirius, Zhou
et al., 2409.03856).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..nn.neuron_selector import ActiveSetReuse
from .recover import is_decoder

PROMPTS = 4


@dataclass(frozen=True)
class Continuations:
    """The compressed model against the original.

    Attributes:
        prompts, tokens: how many, and tokens of each continuation.
        agreement: share of equal tokens, place by place, in the two greedy continuations.
        divergence: for each prompt, the first place where they differ; ``tokens`` if they do not.
        forced_agreement: share of next tokens chosen alike where both read the original's continuation.
        loss_before, loss_after: nats per token of what really follows, read token by token.
    """

    prompts: int
    tokens: int
    agreement: float
    divergence: tuple[int, ...]
    forced_agreement: float
    loss_before: float
    loss_after: float

    def __str__(self) -> str:
        return (
            f"{self.prompts} greedy continuations of {self.tokens} tokens: {self.agreement:.1%} of the tokens are the "
            f"original's, first difference after {statistics.median(self.divergence):g} (median; earliest "
            f"{min(self.divergence)}), {self.forced_agreement:.1%} reading the original's; the text's own continuation "
            f"{self.loss_before:.3f} -> {self.loss_after:.3f} nats per token"
        )


@dataclass(frozen=True)
class Original:
    """What the original model did, to be compared with later: prompt, its greedy continuation, the text's, its loss."""

    prompts: list[Tensor]
    greedy: list[Tensor]
    texts: list[Tensor]
    loss: float


@torch.no_grad()
def decode(model: nn.Module, prompt: Tensor, count: int, ids: Tensor | None = None) -> tuple[Tensor, float]:
    """``count`` tokens after ``prompt`` ``[length]``, one at a time: the likeliest token at every place ``[count]``, and
    the nats per token of those that were fed: ``ids``, or the likeliest ones."""
    out = model(prompt[None], use_cache=True)
    chosen, losses = [], []
    for place in range(count):
        logits = out.logits[0, -1].float()
        chosen.append(logits.argmax())
        token = chosen[-1] if ids is None else ids[place]
        losses.append(cross_entropy(logits[None], token[None]).double())
        if place + 1 < count:
            out = model(token.reshape(1, 1), past_key_values=out.past_key_values, use_cache=True)
    return torch.stack(chosen), float(torch.stack(losses).mean())


def observe(model: nn.Module, batches: Sequence[Tensor], tokens: int) -> Original | None:
    """Continue the first sequences of ``batches`` by ``tokens``, or by their second half where that is shorter; None for
    a model that is no decoder, and where there is nothing to continue."""
    sequences = [row for batch in batches for row in batch if len(row) >= 4][:PROMPTS]  # prompts of two tokens or more
    if not sequences or not tokens or not is_decoder(model):
        return None
    tokens = min(tokens, min(map(len, sequences)) // 2)
    prompts, texts = [row[:-tokens] for row in sequences], [row[-tokens:] for row in sequences]
    greedy = [decode(model, prompt, tokens)[0] for prompt in prompts]
    losses = [decode(model, prompt, tokens, text)[1] for prompt, text in zip(prompts, texts, strict=True)]
    return Original(prompts, greedy, texts, statistics.fmean(losses))


def compare(model: nn.Module, original: Original) -> Continuations:
    """``model``, compressed by now, against what it was."""
    same, first, forced, losses = [], [], [], []
    for prompt, wanted, text in zip(original.prompts, original.greedy, original.texts, strict=True):
        equal = decode(model, prompt, len(wanted))[0] == wanted
        same.append(float(equal.double().mean()))
        first.append(len(wanted) if bool(equal.all()) else int(equal.long().argmin()))
        forced.append(float((decode(model, prompt, len(wanted), wanted)[0] == wanted).double().mean()))
        losses.append(decode(model, prompt, len(text), text)[1])
    for module in model.modules():
        if isinstance(module, ActiveSetReuse):
            module.reset()  # the next generation may have another batch
    return Continuations(
        prompts=len(same),
        tokens=len(original.greedy[0]),
        agreement=statistics.fmean(same),
        divergence=tuple(first),
        forced_agreement=statistics.fmean(forced),
        loss_before=original.loss,
        loss_after=statistics.fmean(losses),
    )
