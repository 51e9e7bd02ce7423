"""Dense to dynamic experts: neurons that fire together become experts, and a router runs as many as a token needs.

D2DMoE (Szatkowski et al., 2310.04361): equal clusters of normalised gate rows, a regression of every expert's output
norm, and selection relative to the largest norm or by a share of their sum. An expert is a run of neighbouring
neurons and a bit of a mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...nn.neuron_selector import RULES, ExpertRouter
from ...nn.relu_ffn import SparseFFN
from ...ops.relu_ffn import GATES
from ..activation import ActivationHandler, ActivationRecipe, Session, pack_network
from ..registry import register
from ..solvers.balanced_kmeans import balanced_kmeans
from ..sparse_networks import SparseNetwork

_BATCH = 256  # tokens of a step of the router


@dataclass(frozen=True, kw_only=True)
class Moefy(ActivationRecipe):
    """Neurons to experts with a router.

    Attributes:
        size: neurons of an expert; must divide their number.
        rule: "dynk_max": experts with a norm of at least (1 - tau) of the largest; "dynk": the fewest whose shares
            reach tau.
        tau: see ``rule``.
        width: of the router's hidden layer.
        steps, rate: of its training with Adam.
        iterations: of the clustering.
    """

    name: ClassVar[str] = "moefy"
    version: ClassVar[int] = 1

    size: int = 16
    rule: str = "dynk_max"
    tau: float = 0.9
    width: int = 128
    steps: int = 500
    rate: float = 2e-3
    iterations: int = 10

    def check(self) -> None:
        super().check()
        for name in ("size", "width", "steps", "iterations"):
            self._expect(name, type(getattr(self, name)) is int and getattr(self, name) >= 1, "at least 1")
        self._expect("rule", self.rule in RULES, f"one of {RULES}")
        self._expect("tau", 0 <= self.tau <= 1, "a number in [0, 1]")
        self._expect("rate", self.rate > 0, "a positive number")
        self._expect("model_steps", self.model_steps == 0, "0: the model itself is not trained")


@register(Moefy)
class MoefyHandler(ActivationHandler):
    reads_inputs = True
    own_options = ("size", "rule", "tau")

    def exact(self, recipe: Moefy) -> str:
        return "experts that the router leaves out count as zero"

    def refuses(self, network: SparseNetwork, recipe: Moefy) -> str:
        if network.kind not in GATES or network.kind in ("gelu_gauss", "top_k"):
            return f"its activation {network.kind} is not a gate of single neurons: relufy first"
        return f"{network.width} neurons do not come in experts of {recipe.size}" if network.width % recipe.size else ""

    def options(self, network: SparseNetwork, recipe: Moefy) -> dict[str, Any]:
        return super().options(network, recipe) | {name: getattr(recipe, name) for name in self.own_options}

    def check(self, network: SparseNetwork, options: Mapping[str, Any]) -> None:
        super().check(network, options)
        own = Moefy(**{name: options[name] for name in self.own_options})
        if network.width % own.size:
            raise ValueError(f"plan: {network.name}: size: expected a divisor of {network.width}, got {own.size}")

    def convert(
        self, session: Session, network: SparseNetwork, options: Mapping[str, Any], x: Tensor | None
    ) -> SparseFFN:
        recipe: Moefy = session.recipe
        gate, up, _ = network.weights()
        experts = network.width // options["size"]
        rows = nn.functional.normalize(up if gate is None else gate, dim=1)
        order = balanced_kmeans(rows, experts, recipe.iterations, recipe.seed).argsort(stable=True)
        param = network.param if network.param is None or network.param.numel() == 1 else network.param[order]
        ffn = pack_network(network, options, network.kind, param, order)
        router = ExpertRouter(ffn.d, experts, options["size"], recipe.width, options["rule"], options["tau"])
        x = x.float()
        target = expert_norms(ffn, x, options["size"])
        error = train_router(router, x, target, recipe)
        session.notes.setdefault("router_error", {})[network.name] = error
        ffn.selector = router.requires_grad_(False)
        return ffn


@torch.no_grad()
def expert_norms(ffn: SparseFFN, x: Tensor, size: int) -> Tensor:
    """``|sum_{i in expert} h_i down[:, i]|`` for every token and expert, through the Gram matrix of each expert's
    columns."""
    columns = ffn.to_dense()[2].t().reshape(-1, size, ffn.d)
    gram = columns @ columns.transpose(1, 2)
    norms = []
    for part in x.split(_BATCH):
        h = ffn.hidden(part)[0].float().reshape(len(part), -1, size).transpose(0, 1)
        norms.append(((h @ gram) * h).sum(-1).clamp_min(0).sqrt().t())
    return torch.cat(norms)


def train_router(router: ExpertRouter, x: Tensor, target: Tensor, recipe: Moefy) -> float:
    """Minimise the squared error of the norms; returns it, relative to the targets' variance, on the last batch."""
    generator = torch.Generator().manual_seed(recipe.seed)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
        router.w2.mul_(target.mean().clamp_min(1e-6))
    optimizer = torch.optim.Adam(router.parameters(), lr=recipe.rate)
    scale = 1 / target.var(correction=0).clamp_min(torch.finfo(torch.float32).tiny)
    error = torch.zeros(())
    with torch.enable_grad():
        for _ in range(recipe.steps):
            rows = torch.randint(len(x), (min(_BATCH, len(x)),), generator=generator)
            error = (router.norms(x[rows]) - target[rows]).square().mean() * scale
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
    return float(error.detach())
