"""Methods of activation sparsity: their recipes, handlers and reports; :mod:`.activation_convert` carries them out.

Every network becomes an :class:`effk.nn.SparseFFN`; methods differ in what they do to the activation before, in the
gate's parameter, and in who selects neurons. The report says whether skipping is exact, and measures it
(:mod:`.sparsity`).
"""

from __future__ import annotations

import copy
import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.neuron import DTYPES, check_rows
from ..nn.relu_ffn import SparseFFN
from .continuations import Continuations
from .networks import NetworkPlan, NetworkRecipe
from .sparse_networks import SparseNetwork
from .sparsity import NetworkSparsity


@dataclass(frozen=True, kw_only=True)
class ActivationRecipe(NetworkRecipe):
    """Fields common to methods of activation sparsity; patterns match names of networks.

    Attributes:
        rows: how neuron rows are stored: "fp32", "bf16", "fp16", "int8" or "int4"; None: in 16 bits where these hold
            the weights exactly, else in fp32.
        group: columns of a row that share a scale, 32, 64 or 128; 0: the row. Only for int8 and int4.
        continuation: tokens of each generation that an approximate method is checked by (:mod:`.continuations`); 0: none.
    """

    rows: str | None = None
    group: int = 0
    continuation: int = 64

    def check(self) -> None:
        super().check()
        try:
            check_rows(f"recipe {self.name}", self.rows or "fp32", self.group)
        except ValueError as error:
            raise ValueError(str(error)) from None
        self._expect("compute", self.compute == "float", "'float'")
        self._expect("continuation", type(self.continuation) is int and self.continuation >= 0, "0 or more tokens")


class ActivationHandler(ABC):
    """One method."""

    reads_inputs = False  # whether ``convert`` is given what the network reads from calibration text

    def needs_calibration(self, recipe: ActivationRecipe) -> bool:
        """Whether ``calib`` must be given."""
        return self.reads_inputs or recipe.model_steps > 0

    @abstractmethod
    def exact(self, recipe: ActivationRecipe) -> str:
        """Empty where skipping is exact, else what is approximated."""

    @abstractmethod
    def refuses(self, network: SparseNetwork, recipe: ActivationRecipe) -> str:
        """Why the method does not fit a network, or an empty string."""

    def options(self, network: SparseNetwork, recipe: ActivationRecipe) -> dict[str, Any]:
        """The plan's entry for a network, JSON values, from the recipe that applies to it."""
        return {"rows": recipe.rows, "group": recipe.group}

    def check(self, network: SparseNetwork, options: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` unless ``options``, perhaps edited, are legal for ``network``."""
        expected = {"rows", "group", *self.own_options}
        if set(options) != expected:
            raise ValueError(f"plan: {network.name}: expected {sorted(expected)}, got {dict(options)}")
        check_rows(f"plan: {network.name}", options["rows"] or "fp32", options["group"])

    own_options: tuple[str, ...] = ()

    def prepare(self, session: Session) -> None:  # noqa: B027  (optional)
        """Change activations or norms and train, before anything is converted."""

    @abstractmethod
    def convert(
        self, session: Session, network: SparseNetwork, options: Mapping[str, Any], x: Tensor | None
    ) -> SparseFFN | None:
        """The layer for a network, or None to leave it to ``finish``; ``x`` ``[tokens, d]`` is what it reads, where
        ``reads_inputs``."""

    def finish(self, session: Session) -> None:  # noqa: B027  (optional)
        """After all networks are converted."""


@dataclass
class Session:
    """One call: what a handler works on.

    Attributes:
        model, recipe, progress: as given to :func:`effk.compress`.
        networks: those to convert.
        fitted, held: calibration batches to fit to, and those that figures are measured on.
        notes: for the report, JSON values.
    """

    model: nn.Module
    recipe: ActivationRecipe
    networks: list[SparseNetwork]
    fitted: list[Tensor]
    held: list[Tensor]
    progress: Any
    notes: dict[str, Any] = field(default_factory=dict)


def pack_network(
    network: SparseNetwork,
    options: Mapping[str, Any],
    kind: str | None = None,
    param: Any = None,
    order: Tensor | None = None,
) -> SparseFFN:
    """The layer for a network as it is, with gate ``kind`` (default: its own activation) and neurons in ``order``."""
    kind, param = (network.kind, network.param) if kind is None else (kind, param)
    gate, up, down = network.weights()
    bg, bu, bd = network.biases()
    if order is not None:
        gate, up, down = None if gate is None else gate[order], up[order], down[:, order].contiguous()
        bg, bu = (None if b is None else b[order] for b in (bg, bu))
    if param is not None and network.gated and kind == "gelu_gauss":  # transformers rounds it to the activations' dtype
        param = param.to(network.down.module.weight.dtype).float()
    rows = options["rows"] or exact_rows(gate, up, down)
    return SparseFFN.from_weights(gate, up, down, (bg, bu, bd), kind, param, rows, options["group"])


def exact_rows(*weights: Tensor | None) -> str:
    """The smallest rows in floating point that hold all ``weights`` exactly."""
    given = [w for w in weights if w is not None]
    for rows in ("bf16", "fp16"):
        if all(torch.equal(w, w.to(DTYPES[rows]).to(w.dtype)) for w in given):
            return rows
    return "fp32"


@dataclass(frozen=True, kw_only=True)
class SparsityReport:
    """The outcome of :func:`effk.compress` with a recipe of activation sparsity.

    Attributes:
        plan: what was applied.
        approximates: empty where skipping is exact, else what is approximated.
        networks: network name -> :class:`effk.compress.sparsity.NetworkSparsity`; None without calibration text.
        inputs: linear layer -> share of its inputs that count, where only those are read.
        perplexity_before, perplexity_prepared, perplexity_after: on the held-out sequences: of the model as it came,
            after its activations were replaced and trained, and at the end; None for a model that is no decoder.
        held_out: sequences that the figures were measured on; 0: too few were given, and they are those of
            calibration.
        skipped: network name -> reason.
        continuations: generations beside the original's, of an approximate method on a decoder; else None.
        costs: bytes and multiply-accumulates of a token (:func:`.activation_convert.costs`).
        notes: the method's own figures.
    """

    plan: NetworkPlan
    approximates: str
    networks: Mapping[str, NetworkSparsity | None]
    inputs: Mapping[str, float]
    perplexity_before: float | None
    perplexity_prepared: float | None
    perplexity_after: float | None
    continuations: Continuations | None
    held_out: int
    skipped: Mapping[str, str]
    model_bytes_before: int
    model_bytes_after: int
    costs: Mapping[str, float]
    notes: Mapping[str, Any]
    seconds: float

    @property
    def measured(self) -> dict[str, NetworkSparsity]:
        """The networks that were measured."""
        return {name: found for name, found in self.networks.items() if found is not None}

    def statement(self) -> str:
        """One sentence on what the output is."""
        if not self.approximates:
            return "exact: what is skipped is zero, outputs are those of the dense model up to summation order"
        return (
            f"approximate: {self.approximates}; perplexity and short continuations do not show all that is lost, measure "
            "a reasoning task before use"
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON object of everything but the plan."""
        body = {f.name: copy.copy(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "plan"}
        found = {name: None if s is None else dataclasses.asdict(s) for name, s in self.networks.items()}
        generated = None if self.continuations is None else dataclasses.asdict(self.continuations)
        return body | {"networks": found, "continuations": generated, "statement": self.statement()}

    def save(self, path: str) -> None:
        """Write :meth:`to_json` to ``path``, and the plot beside it with suffix ``.png``."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1), encoding="utf-8")
        if self.measured:
            self.plot(Path(path).with_suffix(".png"))

    def plot(self, path: str | Path) -> None:
        """A PNG: aggregated sparsity over tokens beside that of independent neurons, and the density of every
        network."""
        import matplotlib

        matplotlib.use("Agg")  # no display is needed
        from matplotlib import pyplot

        found = self.measured
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
        for label, curves in (
            ("measured", [s.aggregated for s in found.values()]), ("independent neurons", [s.random for s in found.values()])
        ):  # fmt: skip
            length = min(map(len, curves))
            left.plot(range(1, length + 1), torch.tensor([c[:length] for c in curves]).mean(0).tolist(), label=label)
        left.set(xlabel="tokens", ylabel="share of neurons unused so far", xscale="log", ylim=(0, 1))
        left.legend()
        places = range(len(found))
        right.bar(places, [s.density.mean for s in found.values()], label="mean")
        right.plot(places, [s.density.p95 for s in found.values()], "k_", label="95th percentile of tokens")
        right.set(xlabel="network", ylabel="share of active neurons", ylim=(0, 1))
        right.legend()
        figure.savefig(path, dpi=100)
        pyplot.close(figure)

    def __str__(self) -> str:
        lines = [
            f"{len(self.networks)} networks, {self.statement()}",
            f"  model {self.model_bytes_before / 1e6:.1f} -> {self.model_bytes_after / 1e6:.1f} MB, {self.seconds:.1f} s",
        ]
        for name, s in self.measured.items():
            d, union = s.density, ", ".join(f"{b}: {share:.3f}" for b, share in s.union.items() if b > 1)
            told = f"  {name}: density {d.mean:.3f} (p50 {d.p50:.3f}, p95 {d.p95:.3f}, max {d.max:.3f})"
            told += f", dead {s.dead:.3f}, unused after {len(s.aggregated)} tokens {s.aggregated[-1]:.3f}"
            told += f", union over sequences {union}" if union else ""
            if (p := s.prediction) is not None:
                told += f"; selected {p.density:.3f}, recall {p.recall:.3f}, precision {p.precision:.3f}"
                told += f", missed mass {p.missed_mass:.4f}"
            lines.append(told)
        if self.inputs:
            lines.append(
                f"  {len(self.inputs)} layers read {sum(self.inputs.values()) / len(self.inputs):.3f} of their inputs"
            )
        if self.perplexity_before is not None:
            text = "held-out" if self.held_out else "calibration"
            lines.append(
                f"  perplexity on {text} text {self.perplexity_before:.2f}, prepared {self.perplexity_prepared:.2f}, "
                f"at the end {self.perplexity_after:.2f}"
            )
        if self.approximates:
            lines.append(f"  {self.continuations or 'continuations not measured: no decoder, or no calibration text'}")
        if self.measured:
            c = self.costs
            lines.append(
                f"  a token reads {c['ffn_bytes'] / 1e6:.2f} of {c['ffn_bytes_dense'] / 1e6:.2f} MB of feed-forward "
                f"weights, which are {c['phi']:.1%} of all it reads; {c['ffn_macs'] / 1e6:.2f} of "
                f"{c['ffn_macs_dense'] / 1e6:.2f} M products"
            )
        return "\n".join(lines + [f"  kept {name}: {why}" for name, why in self.skipped.items()])
