"""How sparse a model is on a text: density and its spread, neurons, aggregated sparsity, unions, predictors.

Activity is the gate's test (``relu_ffn``'s table), computed by PyTorch from the layer's own weights on the inputs it
really got.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.input_sparse_linear import InputSparseLinear
from ..nn.neuron_selector import ActiveSetReuse
from ..nn.relu_ffn import Density, SparseFFN, sparse_ffns
from ..ops.relu_ffn import expand_mask

HORIZON = 256  # tokens over which active sets are united
BATCHES = (1, 2, 4, 8, 16, 32)
_POSITIONS = 8  # of each sequence that unions over a batch are measured at


@dataclass(frozen=True)
class Prediction:
    """How a selector does against the true gate: of the active neurons it keeps ``recall``; ``precision`` of what it
    keeps is active; it keeps ``density``; ``missed_mass`` of the sum of |h_i| |W_down_i| is lost."""

    recall: float
    precision: float
    density: float
    missed_mass: float


@dataclass(frozen=True)
class NetworkSparsity:
    """One network.

    Attributes:
        density: share of active neurons over tokens.
        dead, hot: shares of neurons never active, and active on at least half of the tokens.
        aggregated: ``s_agg(t) = 1 - |A(1) u ... u A(t)| / f`` for t = 1..256, mean over sequences.
        random: the same if neurons were active independently: mean of ``(1 - p_i)^t``.
        union: sequences -> share of neurons that any of so many uses at the same position.
        prediction: of the selector, if there is one.
    """

    density: Density
    dead: float
    hot: float
    aggregated: tuple[float, ...]
    random: tuple[float, ...]
    union: Mapping[int, float] = field(default_factory=dict)
    prediction: Prediction | None = None


def aggregated_sparsity(active: Tensor) -> Tensor:
    """``s_agg(t)`` for bool ``[tokens, f]`` of one sequence."""
    return 1 - active.to(torch.uint8).cummax(0).values.float().mean(-1)


def predict(predicted: Tensor, true: Tensor, mass: Tensor | None = None) -> Prediction:
    """Compare two masks ``[tokens, f]``; ``mass`` is what each neuron adds (default: the same for all)."""
    mass = true.double() if mass is None else mass.double() * true
    hit, total = float((predicted & true).sum()), mass.sum().clamp_min(1e-300)
    return Prediction(
        recall=hit / max(1.0, float(true.sum())),
        precision=hit / max(1.0, float(predicted.sum())),
        density=float(predicted.float().mean()),
        missed_mass=float((mass * ~predicted).sum() / total),
    )


@torch.no_grad()
def measure(
    model: nn.Module, batches: Sequence[Tensor], attention_masks: Sequence[Tensor] | None = None
) -> tuple[dict[str, NetworkSparsity], dict[str, float]]:
    """Run ``model`` on token batches ``[sequences, length]``.

    ``attention_masks`` (1: a token, 0: padding on the right) leave padding out.

    Returns:
        Network name -> its sparsity, and name of an :class:`effk.nn.InputSparseLinear` -> share of its inputs that
        count.
    """
    networks = {name: _Collector(module) for name, module in sparse_ffns(model).items()}
    inputs: dict[str, list[float]] = {}
    current: list[tuple[tuple[int, int], Tensor | None]] = []
    with _hooks() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, SparseFFN):
                add = networks[name].add
                hooks.append(module.register_forward_pre_hook(lambda m, args, add=add: add(args[0], *current[-1])))
            elif isinstance(module, InputSparseLinear):
                seen = inputs[name] = []
                hooks.append(
                    module.register_forward_pre_hook(
                        lambda m, args, seen=seen: seen.append(float(m.kept(args[0]).float().mean()))
                    )
                )
        for index, batch in enumerate(batches):
            mask = None if attention_masks is None else attention_masks[index]
            current.append((tuple(batch.shape), mask))
            model(batch, **({} if mask is None else {"attention_mask": mask}))
    return (
        {name: collector.result() for name, collector in networks.items() if collector.shares},
        {name: sum(seen) / len(seen) for name, seen in inputs.items() if seen},
    )


class _Collector:
    """The counts of one layer."""

    def __init__(self, ffn: SparseFFN) -> None:
        self.ffn, self.shares = ffn, []
        self.used = torch.zeros(ffn.f, dtype=torch.float64)
        self.aggregated, self.lengths = torch.zeros(HORIZON, dtype=torch.float64), torch.zeros(HORIZON)
        self.positions: list[Tensor] = []
        self.predictions: list[tuple[int, Prediction]] = []
        self.norms = ffn.to_dense()[2].norm(dim=0) if ffn.selector is not None or ffn.mask is not None else None

    def add(self, x: Tensor, shape: tuple[int, int], mask: Tensor | None) -> None:
        for row, sequence in enumerate(x.reshape(*shape, -1)):  # some models hand the tokens of a batch on as one list
            if mask is not None:
                sequence = sequence[: int(mask[row].sum())]
            if not len(sequence):
                continue
            active = self.ffn.activity(sequence)
            self.shares.append(active.double().mean(-1))
            self.used += active.double().sum(0)
            curve = aggregated_sparsity(active[:HORIZON]).double()
            self.aggregated[: len(curve)] += curve
            self.lengths[: len(curve)] += 1
            if len(sequence) >= _POSITIONS:
                self.positions.append(active[torch.linspace(0, len(sequence) - 1, _POSITIONS).long()])
            self._compare(sequence, active)

    def _compare(self, x: Tensor, active: Tensor) -> None:
        ffn = self.ffn
        mask, group = ffn.mask, ffn.mask_group
        if ffn.selector is not None and not isinstance(ffn.selector, ActiveSetReuse):
            mask, group = ffn.selector(x, ffn), ffn.selector.group
        if mask is not None:
            mass = ffn.hidden(x)[0].float().abs() * self.norms
            self.predictions.append((len(x), predict(expand_mask(mask, group, ffn.f).expand_as(active), active, mass)))

    def result(self) -> NetworkSparsity:
        shares = torch.cat(self.shares)
        frequency = self.used / len(shares)
        length = int((self.lengths > 0).sum())
        steps = torch.arange(1, length + 1, dtype=torch.float64)
        positions = torch.stack(self.positions) if self.positions else torch.zeros(0, 0, self.ffn.f, dtype=torch.bool)
        union = {}
        for b in (b for b in BATCHES if b <= len(positions)):
            groups = positions[: len(positions) // b * b].reshape(-1, b, *positions.shape[1:])
            union[b] = float(groups.any(1).float().mean())
        prediction = None
        if self.predictions:
            weights = [n / sum(n for n, _ in self.predictions) for n, _ in self.predictions]
            prediction = Prediction(
                *(
                    sum(w * getattr(p, f.name) for w, (_, p) in zip(weights, self.predictions, strict=True))
                    for f in dataclasses.fields(Prediction)
                )
            )
        return NetworkSparsity(
            density=Density.of(shares),
            dead=float((frequency == 0).double().mean()),
            hot=float((frequency >= 0.5).double().mean()),
            aggregated=tuple((self.aggregated[:length] / self.lengths[:length]).tolist()),
            random=tuple(torch.stack([(1 - frequency).pow(t).mean() for t in steps]).tolist()),
            union=union,
            prediction=prediction,
        )


@contextmanager
def _hooks() -> Iterator[list[Any]]:
    handles: list[Any] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()
