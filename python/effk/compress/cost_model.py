"""What skipping neurons can gain: bytes, multiply-accumulates, and speculative decoding over sparse layers.

Decoding is bound by the bytes of weights read. ``rho`` is the density, ``kappa`` >= 1 how much longer a byte of
scattered rows takes than one of a stream, ``weight_bytes`` those of one weight with its share of scales; ``d``
inputs, ``f`` neurons.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Ffn:
    """A feed-forward network."""

    d: int
    f: int
    gated: bool = True
    weight_bytes: float = 2.0

    @property
    def _matrix(self) -> float:
        return self.d * self.f * self.weight_bytes

    def dense_bytes(self) -> float:
        """All matrices."""
        return (3 if self.gated else 2) * self._matrix

    def gate_first_bytes(self, rho: float, kappa: float = 1.0) -> float:
        """The first matrix as a whole, the others in proportion: exact."""
        return self._matrix * (1 + (2 if self.gated else 1) * rho * kappa)

    def predicted_bytes(self, rho: float, rank: int, predictor_bytes: float = 2.0, kappa: float = 1.0) -> float:
        """A predictor of ``rank``, then all matrices in proportion to the predicted density."""
        return rank * (self.d + self.f) * predictor_bytes + (3 if self.gated else 2) * rho * kappa * self._matrix

    def sign_bytes(self, rho: float, kappa: float = 1.0) -> float:
        """One bit a gate weight, then all matrices in proportion."""
        return self.d * self.f / 8 + (3 if self.gated else 2) * rho * kappa * self._matrix

    def speedup(self, rho: float, kappa: float = 1.0) -> float:
        """Of the exact path over the dense one: below 3 (without a gate matrix 2) whatever rho is."""
        return self.dense_bytes() / self.gate_first_bytes(rho, kappa)

    def break_even(self, kappa: float = 1.0, margin: float = 0.15) -> float:
        """The density from which reading everything is faster, with a margin for the sparse path."""
        n = 3 if self.gated else 2
        return (n / (1 + margin) - 1) / ((n - 1) * kappa)

    def largest_rank(self, rho: float, predicted: float, predictor_bytes: float = 2.0, kappa: float = 1.0) -> float:
        """Ranks below it make a predictor with density ``predicted`` pay over the exact path."""
        n = 3 if self.gated else 2
        saved = self._matrix * (1 + (n - 1) * rho * kappa - n * predicted * kappa)
        return saved / ((self.d + self.f) * predictor_bytes)

    def macs(self, rho: float = 1.0) -> float:
        """Multiply-accumulates a token: the gate (or the only first matrix) dense, the rest in proportion."""
        return self.d * self.f * (1 + (2 if self.gated else 1) * rho)


def model_speedup(phi: float, ffn_speedup: float) -> float:
    """Of a model whose feed-forward share of the bytes is ``phi``."""
    return 1 / (1 - phi + phi / ffn_speedup)


def speculative_over_speculative(cost: float, gamma: int, skipped: float) -> float:
    """Speculative decoding whose verification skips ``skipped`` of the whole model's cost, over the ordinary one.

    ``cost`` of a draft step relative to one of the target, ``gamma`` drafted tokens (Mirzadeh et al., 2310.04564,
    section 5.2).
    """
    return (cost * gamma + 1) / (cost * gamma + 1 - skipped)


def speculative_over_plain(cost: float, gamma: int, skipped: float, acceptance: float) -> float:
    """The same over decoding token by token."""
    return (1 - acceptance ** (gamma + 1)) / ((cost * gamma + 1 - skipped) * (1 - acceptance))


def decoding_bytes(model: nn.Module) -> int:
    """Bytes of weights that one token reads: all but the embedding table, which is read by row unless the head is tied
    to it."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    table = getattr(model, "get_input_embeddings", lambda: None)()
    skip = {id(table.weight)} if table is not None and hasattr(table, "weight") else set()
    skip -= {id(head.weight)} if head is not None and hasattr(head, "weight") else set()
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors if id(t) not in skip}.values())
