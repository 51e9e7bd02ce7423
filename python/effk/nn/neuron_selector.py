"""Who may be active, decided before any gate is computed: selectors of :class:`effk.nn.SparseFFN`.

``selector(x, ffn)`` returns a mask for the kernel, uint8 ``[1 or tokens, bytes]`` with a bit for ``group``
neighbouring neurons, or None: all. Neurons outside are not read and count as zero, so every selector makes its layer
approximate; what is inside still passes through the true gate.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .relu_ffn import SparseFFN, pack_mask

RULES = ("dynk", "dynk_max")
REUSES = ("window", "griffin")


class Selector(nn.Module):
    """A selector that is saved with its layer: ``fields`` build it again, its tensors are stored."""

    kind: ClassVar[str]
    group: int = 1

    def fields(self) -> dict[str, Any]:
        """Arguments of the constructor, JSON values."""
        raise NotImplementedError

    def allowed(self, x: Tensor) -> Tensor:
        """bool ``[tokens, groups]`` for x ``[tokens, d]``."""
        raise NotImplementedError

    def forward(self, x: Tensor, ffn: SparseFFN) -> Tensor | None:
        return pack_mask(self.allowed(x.detach().reshape(-1, x.shape[-1])))


class LowRankPredictor(Selector):
    """Active where ``W2 (W1 x) >= threshold`` (Deja Vu, Liu et al., 2310.17157): two matrices without bias or
    nonlinearity."""

    kind = "lowrank"

    def __init__(self, d: int, f: int, rank: int, threshold: float = 0.0) -> None:
        super().__init__()
        self.d, self.f, self.rank, self.threshold = d, f, rank, threshold
        self.w1 = nn.Parameter(torch.randn(rank, d) / d**0.5)
        self.w2 = nn.Parameter(torch.randn(f, rank) / rank**0.5)

    def fields(self) -> dict[str, Any]:
        return {"d": self.d, "f": self.f, "rank": self.rank, "threshold": self.threshold}

    def logits(self, x: Tensor) -> Tensor:
        """``[tokens, f]``."""
        return (x.to(self.w1.dtype) @ self.w1.t()) @ self.w2.t()

    def allowed(self, x: Tensor) -> Tensor:
        return self.logits(x) >= self.threshold


class SignPredictor(Selector):
    """Skipped where more of the products ``x_j w_ij`` are negative than ``alpha`` times the others, told by signs
    alone.

    SparseInfer (Shin et al., 2411.12692): no training, one bit a gate weight. ``bits`` uint8 ``[f, ceil(d / 8)]``, 1
    for a negative weight. Zeros count as positive. A larger alpha keeps more.
    """

    kind = "sign"

    def __init__(self, d: int, f: int, alpha: float = 1.0) -> None:
        super().__init__()
        self.d, self.f, self.alpha = d, f, alpha
        self.register_buffer("bits", torch.zeros(f, -(-d // 8), dtype=torch.uint8))

    @classmethod
    def from_gate(cls, gate: Tensor, alpha: float = 1.0) -> SignPredictor:
        """For gate weights ``[f, d]``."""
        module = cls(gate.shape[1], gate.shape[0], alpha)
        module.bits = pack_mask(gate < 0)
        return module

    def fields(self) -> dict[str, Any]:
        return {"d": self.d, "f": self.f, "alpha": self.alpha}

    def negatives(self, x: Tensor) -> Tensor:
        """Number of products below zero, ``[tokens, f]``: half of ``d - sum_j s(x_j) s(w_ij)``."""
        shifts = torch.arange(8, dtype=torch.uint8)
        ones = ((self.bits[:, :, None] >> shifts) & 1).flatten(1)[:, : self.d]
        signs = 1.0 - 2.0 * ones.float()
        return ((self.d - (1.0 - 2.0 * (x < 0).float()) @ signs.t()) / 2).round()

    def allowed(self, x: Tensor) -> Tensor:
        negative = self.negatives(x)
        return ~(negative > self.alpha * (self.d - negative))


class ExpertRouter(Selector):
    """Experts (``group`` neighbouring neurons each) by their predicted output norm (D2DMoE, Szatkowski et al.,
    2310.04361).

    Norms ``r = |W2 relu(W1 x)|``; ``dynk_max``: those with ``r_i >= (1 - tau) max r``; ``dynk``: the fewest, largest
    first, whose shares of ``sum r`` reach tau.
    """

    kind = "experts"

    def __init__(
        self, d: int, experts: int, group: int, width: int = 128, rule: str = "dynk_max", tau: float = 0.5
    ) -> None:
        super().__init__()
        if rule not in RULES:
            raise ValueError(f"ExpertRouter: rule: expected one of {RULES}, got {rule!r}")
        self.d, self.experts, self.group, self.width, self.rule, self.tau = d, experts, group, width, rule, tau
        self.w1 = nn.Parameter(torch.randn(width, d) / d**0.5)
        self.w2 = nn.Parameter(torch.randn(experts, width) / width**0.5)

    def fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("d", "experts", "group", "width", "rule", "tau")}

    def norms(self, x: Tensor) -> Tensor:
        """``[tokens, experts]``, at least 0."""
        return ((x.to(self.w1.dtype) @ self.w1.t()).relu() @ self.w2.t()).abs()

    def allowed(self, x: Tensor) -> Tensor:
        return choose_experts(self.norms(x), self.rule, self.tau)


def choose_experts(r: Tensor, rule: str, tau: float) -> Tensor:
    """bool ``[tokens, experts]`` from norms; sums in fp32 in sorted order, ties to the lower index, at least one
    expert."""
    r = r.float()
    if rule == "dynk_max":
        return r >= (1 - tau) * r.amax(-1, keepdim=True)
    order = r.sort(dim=-1, descending=True, stable=True)
    total = r.sum(-1, keepdim=True)
    shares = torch.where(total > 0, order.values / total, 1.0)  # without any norm the first takes all
    before = shares.cumsum(-1).roll(1, -1)  # the share of all larger ones
    before[..., 0] = -1.0
    return torch.zeros_like(r, dtype=torch.bool).scatter(-1, order.indices, before < tau)


class ActiveSetReuse(Selector):
    """Neurons that earlier tokens used. Holds the state of one generation; a call with more than one token a sequence
    starts anew.

    window   gamma tokens are computed exactly and the union of their active sets noted, the next gamma use only
             that, and so on (Mirzadeh et al., 2310.04564, gamma intervals)
    griffin  from the prompt, the ``share`` of neurons with the largest norm over its tokens of h / |h|, for the
             whole generation (Dong et al., 2404.01365)

    Prompts themselves are computed as they are. State is not saved. Models that hand on the tokens of a batch as one
    list (OPT) are taken to run one sequence: several at once are computed exactly.
    """

    kind = "reuse"

    def __init__(self, method: str = "window", gamma: int = 8, share: float = 0.5) -> None:
        super().__init__()
        if method not in REUSES:
            raise ValueError(f"ActiveSetReuse: method: expected one of {REUSES}, got {method!r}")
        self.method, self.gamma, self.share = method, gamma, share
        self.reset()

    def reset(self) -> None:
        """Forget the sequence."""
        self.step, self.batch, self.kept = 0, None, None

    def fields(self) -> dict[str, Any]:
        return {"method": self.method, "gamma": self.gamma, "share": self.share}

    def forward(self, x: Tensor, ffn: SparseFFN) -> Tensor | None:
        rows, length = x.reshape(-1, ffn.d).shape[0], x.shape[-2] if x.dim() > 1 else 1
        if length > 1:
            self.reset()
            self.batch = rows // length
            if self.method == "griffin":
                h = ffn.hidden(x.detach())[0].float().reshape(self.batch, length, ffn.f)
                best = griffin_statistic(h).topk(max(1, round(self.share * ffn.f)), -1).indices
                self.kept = torch.zeros(self.batch, ffn.f, dtype=torch.bool).scatter(-1, best, True)
            return None
        if self.batch not in (None, rows):
            raise RuntimeError(
                f"ActiveSetReuse: expected {self.batch} sequences as before, got {rows}: call reset() between generations"
            )
        self.batch = rows
        if self.method == "griffin":
            return None if self.kept is None else pack_mask(self.kept)
        phase, self.step = self.step % (2 * self.gamma), self.step + 1
        if phase >= self.gamma:
            return pack_mask(self.kept)
        active = ffn.activity(x.detach()).reshape(rows, ffn.f)
        self.kept = active if phase == 0 else self.kept | active
        return pack_mask(active)  # exactly the active ones: the gate is not read again for the others


def griffin_statistic(h: Tensor) -> Tensor:
    """``s_i``: over the tokens, the norm of neuron i's value in h normalised token by token; h ``[..., tokens, f]``."""
    return (h / h.norm(dim=-1, keepdim=True).clamp_min(1e-30)).norm(dim=-2)


SELECTORS: dict[str, type[Selector]] = {
    selector.kind: selector for selector in (LowRankPredictor, SignPredictor, ExpertRouter, ActiveSetReuse)
}
