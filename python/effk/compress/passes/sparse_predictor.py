"""Predictors: who will be active is guessed before the gate is read. False positives cost time, false negatives
accuracy.

"lowrank" (Deja Vu, Liu et al., 2310.17157) trains two matrices on calibration text; "sign" (SparseInfer, Shin et al.,
2411.12692) needs no training. :meth:`effk.compress.cost_model.Ffn.largest_rank` tells whether a rank can pay at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from ...nn.neuron_selector import LowRankPredictor, Selector, SignPredictor
from ...nn.relu_ffn import SparseFFN
from ...ops.relu_ffn import APPROXIMATE, GATES
from ..activation import ActivationHandler, ActivationRecipe, Session, pack_network
from ..registry import register
from ..sparse_networks import SparseNetwork

KINDS = ("lowrank", "sign")
_BATCH = 1024


@dataclass(frozen=True, kw_only=True)
class SparsePredictor(ActivationRecipe):
    """A predictor before every gate.

    Attributes:
        kind: "lowrank" or "sign".
        rank: of "lowrank".
        recall: the threshold (or alpha of "sign") is set so that at least this share of active neurons is kept on
            calibration text.
        epochs: at most; training ends earlier where the held-out recall passes 0.99.
        rate: of AdamW.
    """

    name: ClassVar[str] = "sparse-predictor"
    version: ClassVar[int] = 1

    kind: str = "lowrank"
    rank: int = 64
    recall: float = 0.95
    epochs: int = 20
    rate: float = 1e-3

    def check(self) -> None:
        super().check()
        self._expect("kind", self.kind in KINDS, f"one of {KINDS}")
        self._expect("rank", type(self.rank) is int and self.rank >= 1, "at least 1")
        self._expect("recall", 0 < self.recall <= 1, "a share in (0, 1]")
        self._expect("epochs", type(self.epochs) is int and self.epochs >= 1, "at least 1")
        self._expect("rate", self.rate > 0, "a positive number")
        self._expect("model_steps", self.model_steps == 0, "0: the model itself is not trained")


@register(SparsePredictor)
class SparsePredictorHandler(ActivationHandler):
    reads_inputs = True
    own_options = ("kind", "rank", "recall")

    def exact(self, recipe: SparsePredictor) -> str:
        return "active neurons that the predictor misses are left out"

    def refuses(self, network: SparseNetwork, recipe: SparsePredictor) -> str:
        fits = network.kind in GATES and network.kind not in (*APPROXIMATE, "top_k")
        return "" if fits else f"its activation {network.kind} has no zeros to predict: relufy first"

    def options(self, network: SparseNetwork, recipe: SparsePredictor) -> dict[str, Any]:
        return super().options(network, recipe) | {name: getattr(recipe, name) for name in self.own_options}

    def check(self, network: SparseNetwork, options: Mapping[str, Any]) -> None:
        super().check(network, options)
        SparsePredictor(**{name: options[name] for name in self.own_options})

    def convert(
        self, session: Session, network: SparseNetwork, options: Mapping[str, Any], x: Tensor | None
    ) -> SparseFFN:
        ffn = pack_network(network, options)
        x = x.float()
        active = ffn.activity(x)
        fitted, held = slice(0, max(1, len(x) * 19 // 20)), slice(len(x) * 19 // 20, None)
        if options["kind"] == "sign":
            gate, up, _ = network.weights()
            selector: Selector = SignPredictor.from_gate(up if gate is None else gate)
            negative = selector.negatives(x[fitted])
            selector.alpha = float(
                quantile_of_active(negative / (ffn.d - negative).clamp_min(1), active[fitted], options["recall"])
            )
        else:
            selector = LowRankPredictor(ffn.d, ffn.f, min(options["rank"], ffn.d))
            train_lowrank(selector, x[fitted], active[fitted], x[held], active[held], session.recipe)
            with torch.no_grad():
                logits = selector.logits(x[fitted])
            selector.threshold = -float(quantile_of_active(-logits, active[fitted], options["recall"]))
        ffn.selector = selector.requires_grad_(False)
        return ffn


def quantile_of_active(score: Tensor, active: Tensor, recall: float) -> Tensor:
    """The score that ``recall`` of the active entries do not exceed."""
    scores = score[active].float()
    return scores.kthvalue(max(1, -int(-recall * scores.numel() // 1))).values if scores.numel() else torch.zeros(())


def train_lowrank(
    selector: LowRankPredictor, x: Tensor, active: Tensor, held_x: Tensor, held: Tensor, recipe: SparsePredictor
) -> None:
    """Weighted cross entropy, as published: labels ``a > 0``, weight ``y (1 - w) + w`` with ``w = mean(y) + 0.005``."""
    generator = torch.Generator().manual_seed(recipe.seed)
    with torch.no_grad():
        for parameter in selector.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    optimizer = torch.optim.AdamW(selector.parameters(), lr=recipe.rate, weight_decay=0.01)
    share = active.float().mean() + 0.005
    for _ in range(recipe.epochs):
        for rows in torch.randperm(len(x), generator=generator).split(_BATCH):
            with torch.enable_grad():
                label = active[rows].float()
                loss = binary_cross_entropy_with_logits(selector.logits(x[rows]), label, label * (1 - share) + share)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
        if len(held_x) and bool(held.any()):
            with torch.no_grad():
                kept = selector.logits(held_x) >= 0
            if float((kept & held).sum() / held.sum()) > 0.99:
                break
