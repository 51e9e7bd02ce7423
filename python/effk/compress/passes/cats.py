"""CATS: the SiLU of a gate counts as zero where it is small; no training.

Lee et al., "CATS: Contextually-Aware Thresholding for Sparsity in LLMs", 2024 (arXiv:2404.08763): one threshold a
network, the quantile of ``|SiLU(g)|`` over calibration text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...nn.relu_ffn import SparseFFN
from ..activation import ActivationHandler, ActivationRecipe, Session, pack_network
from ..registry import register
from ..sparse_networks import SparseNetwork

_SAMPLE = 1 << 22  # values that the quantile is taken of


@dataclass(frozen=True, kw_only=True)
class Cats(ActivationRecipe):
    """Thresholds on SiLU gates.

    Attributes:
        sparsity: the share of gates that becomes zero on calibration text.
    """

    name: ClassVar[str] = "cats"
    version: ClassVar[int] = 1

    sparsity: float = 0.5

    def check(self) -> None:
        super().check()
        self._expect("sparsity", 0 <= self.sparsity < 1, "a share in [0, 1)")
        self._expect("model_steps", self.model_steps == 0, "0: the method trains nothing")


@register(Cats)
class CatsHandler(ActivationHandler):
    reads_inputs = True
    own_options = ("sparsity",)

    def exact(self, recipe: Cats) -> str:
        return "small values of SiLU count as zero"

    def refuses(self, network: SparseNetwork, recipe: Cats) -> str:
        return "" if network.kind == "silu" else f"its activation is {network.kind}, not SiLU"

    def options(self, network: SparseNetwork, recipe: Cats) -> dict[str, Any]:
        return super().options(network, recipe) | {"sparsity": recipe.sparsity}

    def check(self, network: SparseNetwork, options: Mapping[str, Any]) -> None:
        super().check(network, options)
        share = options["sparsity"]
        if not (isinstance(share, (int, float)) and 0 <= share < 1):
            raise ValueError(f"plan: {network.name}: sparsity: expected a share in [0, 1), got {share!r}")

    def convert(
        self, session: Session, network: SparseNetwork, options: Mapping[str, Any], x: Tensor | None
    ) -> SparseFFN:
        gate, up, _ = network.weights()
        bias = network.biases()[0 if network.gated else 1]
        a = nn.functional.silu(nn.functional.linear(x.float(), up if gate is None else gate, bias))
        threshold = magnitude_quantile(a, options["sparsity"])
        session.notes.setdefault("thresholds", {})[network.name] = float(threshold)
        return pack_network(network, options, "silu_threshold", threshold)


def magnitude_quantile(x: Tensor, share: float) -> Tensor:
    """The value below which ``share`` of ``|x|`` lies, ``[1]``."""
    flat = x.detach().float().abs().flatten()
    flat = flat[:: -(-flat.numel() // _SAMPLE)]
    rank = round(share * flat.numel())
    return flat.kthvalue(rank).values.reshape(1) if rank else torch.zeros(1)
