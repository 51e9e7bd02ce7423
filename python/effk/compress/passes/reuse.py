"""Neurons of earlier tokens again: gamma intervals ("window") and sets fixed by the prompt ("griffin"); no training.

Mirzadeh et al., 2310.04564, section 5.1 (details of the windows recalled, curves are figures only); Dong et al.,
"GRIFFIN", 2404.01365.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ...nn.neuron_selector import REUSES, ActiveSetReuse
from ...nn.relu_ffn import SparseFFN
from ...ops.relu_ffn import GATES
from ..activation import ActivationHandler, ActivationRecipe, Session, pack_network
from ..registry import register
from ..sparse_networks import SparseNetwork


@dataclass(frozen=True, kw_only=True)
class Reuse(ActivationRecipe):
    """Reuse of active sets while generating; prompts are computed as they are.

    Attributes:
        method: "window": gamma tokens exact, the next gamma on the union of their neurons; "griffin": the strongest
        neurons of the
            prompt for the whole generation.
        gamma: tokens of a window; ``per_layer`` gives each network its own.
        share: of neurons that "griffin" keeps.
    """

    name: ClassVar[str] = "reuse"
    version: ClassVar[int] = 1

    method: str = "window"
    gamma: int = 8
    share: float = 0.5

    def check(self) -> None:
        super().check()
        self._expect("method", self.method in REUSES, f"one of {REUSES}")
        self._expect("gamma", type(self.gamma) is int and self.gamma >= 1, "at least 1")
        self._expect("share", 0 < self.share <= 1, "a share in (0, 1]")
        self._expect("model_steps", self.model_steps == 0, "0: the model itself is not trained")


@register(Reuse)
class ReuseHandler(ActivationHandler):
    own_options = ("method", "gamma", "share")

    def exact(self, recipe: Reuse) -> str:
        if recipe.method == "griffin":
            return "neurons that the prompt used little are left out of the answer"
        return "every second window of tokens uses only the neurons of the one before"

    def refuses(self, network: SparseNetwork, recipe: Reuse) -> str:
        smooth = recipe.method == "griffin" and network.kind == "silu"  # a threshold of 0 keeps every value
        return "" if network.kind in GATES or smooth else f"its activation {network.kind} has no zeros: relufy first"

    def options(self, network: SparseNetwork, recipe: Reuse) -> dict[str, Any]:
        return super().options(network, recipe) | {name: getattr(recipe, name) for name in self.own_options}

    def check(self, network: SparseNetwork, options: Mapping[str, Any]) -> None:
        super().check(network, options)
        Reuse(**{name: options[name] for name in self.own_options})

    def convert(
        self, session: Session, network: SparseNetwork, options: Mapping[str, Any], x: Tensor | None
    ) -> SparseFFN:
        smooth = network.kind == "silu"
        ffn = pack_network(network, options, *(("silu_threshold", 0.0) if smooth else (None, None)))
        ffn.selector = ActiveSetReuse(options["method"], options["gamma"], options["share"])
        return ffn
