"""Relufication: a smooth activation becomes a ReLU (stage 1), normalised inputs pass one too (stage 2), and zeros are
skipped.

Mirzadeh et al., "ReLU Strikes Back", 2023 (arXiv:2310.04564). The published recovery took 30 and 50 B tokens of
pre-training text; ``model_steps`` of distillation here are a beginning, and newer models trained on far more tokens
do not get their reasoning back by 5 to 30 B. A model of one's own trainer: :func:`swap_activations`, train it, then
this recipe, which takes gates as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...nn.input_sparse_linear import InputSparseLinear
from ...nn.relu_ffn import SparseFFN
from ...nn.relu_norm import ReluNorm
from ...nn.sparse_gate import SparseGate
from ...ops.relu_ffn import GATES
from ..activation import ActivationHandler, ActivationRecipe, Session, exact_rows, pack_network
from ..density_losses import DensityLoss
from ..layers import Layer, find_layers, replace_module
from ..recover import recover_model
from ..registry import register
from ..solvers.cett import cett_threshold
from ..sparse_networks import SparseNetwork, find_sparse_networks, swap_activation

ACTIVATIONS = ("relu", "relu2", "shifted_relu", "fatrelu")
_SAMPLE = 1 << 22  # values that a quantile is taken of


@dataclass(frozen=True, kw_only=True)
class Relufy(ActivationRecipe):
    """Activations with zeros; networks that have them already are only packed.

    Attributes:
        activation: "relu", "relu2", "shifted_relu" (``max(g - b, 0)``) or "fatrelu" (g above a threshold, else 0).
        sparsity: shifted_relu: b is this quantile of the network's pre-activations on calibration text.
        threshold: fatrelu's; None: the largest at which what is left out stays below ``cett`` of the output.
        cett: ``|sum of the contributions left out| / |y|``, mean over tokens (Luo et al., 2411.02335).
        stage: 2 also puts a ReLU behind the norms whose outputs the attention and the network read, and skips zero
            inputs of q, k, v.
        density_weight: of the DEFT loss during ``model_steps``.
    """

    name: ClassVar[str] = "relufy"
    version: ClassVar[int] = 1

    activation: str = "relu"
    sparsity: float = 0.9
    threshold: float | None = None
    cett: float = 0.2
    stage: int = 1
    density_weight: float = 0.0

    def check(self) -> None:
        super().check()
        self._expect("activation", self.activation in ACTIVATIONS, f"one of {ACTIVATIONS}")
        self._expect("sparsity", 0 < self.sparsity < 1, "a share in (0, 1)")
        self._expect("threshold", self.threshold is None or self.threshold >= 0, "None, 0 or more")
        self._expect("cett", 0 < self.cett < 1, "a share in (0, 1)")
        self._expect("stage", self.stage in (1, 2), "1 or 2")
        self._expect("density_weight", self.density_weight >= 0, "0 or more")
        if self.density_weight:
            self._expect("model_steps", self.model_steps > 0, "more than 0 with density_weight")

    @property
    def calibrated(self) -> bool:
        """Whether the gate's parameter comes from calibration text."""
        return self.activation == "shifted_relu" or (self.activation == "fatrelu" and self.threshold is None)


@register(Relufy)
class RelufyHandler(ActivationHandler):
    def needs_calibration(self, recipe: Relufy) -> bool:
        return recipe.calibrated or recipe.stage == 2 or recipe.model_steps > 0

    def exact(self, recipe: Relufy) -> str:
        return ""

    def refuses(self, network: SparseNetwork, recipe: Relufy) -> str:
        return "its activation is not understood" if network.kind == "other" else ""

    def prepare(self, session: Session) -> None:
        recipe: Relufy = session.recipe
        swapped = [network for network in session.networks if network.kind not in GATES]
        teacher = copy.deepcopy(session.model).requires_grad_(False) if recipe.model_steps else None
        session.notes["activations_before"] = {n.name: n.kind for n in session.networks}
        params = _parameters(session, swapped) if recipe.calibrated else {}
        for network in swapped:
            own = recipe.for_layer(network.name)
            gate = SparseGate(
                own.activation, params.get(network.name, own.threshold if own.activation == "fatrelu" else None)
            )
            swap_activation(session.model, network, gate)
        session.notes["params"] = {name: float(torch.as_tensor(p).mean()) for name, p in params.items()}
        if recipe.stage == 2:
            session.notes["relu_norms"] = insert_relu_behind_norms(
                session.model, session.networks, session.fitted[0][:1, :8]
            )
        if teacher is not None:
            model = session.model
            with DensityLoss(model, "deft") as loss:
                recover_model(
                    model, teacher, [p for p in model.parameters() if p.requires_grad], session.fitted,
                    recipe.model_steps, recipe.model_rate, recipe.seed, session.progress,
                    extra=(lambda: recipe.density_weight * loss.value()) if recipe.density_weight else None,
                )  # fmt: skip

    def convert(
        self, session: Session, network: SparseNetwork, options: Mapping[str, Any], x: Tensor | None
    ) -> SparseFFN:
        return pack_network(network, options)

    def finish(self, session: Session) -> None:
        if session.recipe.stage == 2:
            for name, module in _projections(session).items():
                replace_module(session.model, name, module.eval())


def swap_activations(model: nn.Module, activation: str = "relu", param: float | None = None) -> list[str]:
    """Replace the smooth activations of all networks in place, for training; returns the networks' names."""
    changed = []
    for network in find_sparse_networks(model)[0]:
        if network.kind not in GATES and network.kind != "other":
            swap_activation(model, network, SparseGate(activation, param))
            changed.append(network.name)
    return changed


@torch.no_grad()
def insert_relu_behind_norms(model: nn.Module, networks: list[SparseNetwork], ids: Tensor) -> list[str]:
    """Wrap, once each, the norms whose very output a network or attention projections of its block read; their
    names."""
    readers = {layer.name for network in networks for layer in network.reading}
    blocks = {network.block for network in networks}
    readers |= {layer.name for layer in find_layers(model)[0] if layer.block in blocks and _is_query(layer)}
    outputs: dict[int, tuple[str, Tensor]] = {}  # by identity; the tensor is kept so that no other takes its number
    found: dict[str, None] = {}
    handles = []
    for name, module in model.named_modules():
        if name in readers:
            handles.append(
                module.register_forward_pre_hook(
                    lambda m, args: found.update({outputs[id(args[0])][0]: None}) if id(args[0]) in outputs else None
                )
            )
        elif "norm" in type(module).__name__.lower() and not isinstance(module, ReluNorm):
            handles.append(
                module.register_forward_hook(lambda m, args, out, name=name: outputs.update({id(out): (name, out)}))
            )
    try:
        model(ids)
    finally:
        for handle in handles:
            handle.remove()
    names = [name for name, _ in model.named_modules() if name in found]
    for name in names:
        replace_module(model, name, ReluNorm(model.get_submodule(name)))
    return names


def _is_query(layer: Layer) -> bool:
    return layer.name.rpartition(".")[2] in (
        "q_proj",
        "k_proj",
        "v_proj",
        "query_key_value",
        "c_attn",
        "query",
        "key",
        "value",
    )


def _projections(session: Session) -> dict[str, InputSparseLinear]:
    """q, k and v of the blocks whose norms got a ReLU; only zeros of their inputs are left out."""
    blocks = {name.rpartition(".")[0] for name in session.notes["relu_norms"]}
    done = {}
    for layer in find_layers(session.model)[0]:
        if layer.block in blocks and _is_query(layer):
            weight, recipe = layer.weight(), session.recipe
            rows = recipe.rows or exact_rows(weight)
            done[layer.name] = InputSparseLinear.from_weight(weight, layer.module.bias, None, rows, recipe.group)
    return done


@torch.no_grad()
def _parameters(session: Session, networks: list[SparseNetwork]) -> dict[str, Tensor]:
    """The gate's parameter of every network from its pre-activations in the model as it is."""
    inputs: dict[str, list[Tensor]] = {network.name: [] for network in networks}
    handles = [
        network.reading[0].module.register_forward_pre_hook(
            lambda m, args, seen=inputs[network.name]: seen.append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for network in networks
    ]
    try:
        for batch in session.fitted:
            session.model(batch)
    finally:
        for handle in handles:
            handle.remove()
    params = {}
    for network in networks:
        own: Relufy = session.recipe.for_layer(network.name)
        x = torch.cat(inputs.pop(network.name)).float()
        gate, up, down = network.weights()
        bg, bu, _ = network.biases()
        g = nn.functional.linear(x, up if gate is None else gate, bu if gate is None else bg)
        if own.activation == "shifted_relu":
            flat = g.flatten()
            flat = flat[:: -(-flat.numel() // _SAMPLE)]
            params[network.name] = flat.kthvalue(max(1, round(own.sparsity * flat.numel()))).values.reshape(1)
        elif own.activation == "fatrelu" and own.threshold is None:
            factor = 1.0 if gate is None else nn.functional.linear(x, up, bu)
            h = g.relu() * factor
            eps = cett_threshold(h, down, own.cett)
            # |h_i| |W_i| < eps as a test of the gate alone needs |u_i|: its root mean square stands for it.
            scale = down.norm(dim=0) * (1.0 if gate is None else factor.square().mean(0).sqrt())
            params[network.name] = eps / scale.clamp_min(1e-12)
    return params
