"""Feed-forward networks as neurons: gate and up rows, down columns and the activation between, found by structure.

Candidates are known by the names of their layers; what the activation is, is told by what it does to numbers, and a
gated network is compared with the formula before it is taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..nn.sparse_gate import SparseGate, apply_gate
from .layers import Layer, is_conv1d, replace_module

# Layers that read the input (gate first), the layer that writes the output, the activation.
_SHAPES = (
    (("gate_proj", "up_proj"), "down_proj", "act_fn"),  # Llama, Mistral, Qwen2, Gemma-3n
    (("gate_up_proj",), "down_proj", "activation_fn"),  # Phi-3
    (("fc1",), "fc2", "activation_fn"),  # OPT
    (("dense_h_to_4h",), "dense_4h_to_h", "act"),  # Falcon, GPT-NeoX
    (("c_fc",), "c_proj", "act"),  # GPT-2
    (("intermediate.dense",), "output.dense", "intermediate.intermediate_act_fn"),  # BERT
)
_BLOCK = re.compile(r"^(.*?\b(?:layers|h|blocks|layer)\.\d+)\b")
_SMOOTH = {"silu": nn.functional.silu, "gelu": nn.functional.gelu}


@dataclass(eq=False)
class SparseNetwork:
    """One network, ``down(act(up x))`` or ``down(act(gate x) * up x)``.

    Attributes:
        name: of the innermost module around it.
        block: of the transformer block around it.
        place: where the module that computes all of it goes: the whole module of a gated network, else the first
            layer.
        silent: modules that do nothing once ``place`` computes everything.
        act: the activation's name.
        reading, down: the layers that read the input (one, or gate and up) and the one that writes the output.
        fused: the reading layer holds gate and up, gate first.
        kind: what the activation is: a gate of :mod:`effk.ops.relu_ffn`, "silu", "gelu", or "other".
        param: the gate's parameter.
    """

    name: str
    block: str
    place: str
    silent: tuple[str, ...]
    act: str
    reading: tuple[Layer, ...]
    down: Layer
    fused: bool
    kind: str
    param: Tensor | None

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers, those that read first."""
        return (*self.reading, self.down)

    @property
    def gated(self) -> bool:
        """Whether there are gate weights."""
        return self.fused or len(self.reading) == 2

    @property
    def width(self) -> int:
        """Neurons."""
        return self.down.k

    def weights(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """gate (or None) and up ``[f, d]``, down ``[d, f]``, fp32."""
        rows = [layer.weight() for layer in self.reading]
        if self.fused:
            rows = list(rows[0].chunk(2))
        return (rows[0] if self.gated else None), rows[-1], self.down.weight()

    def biases(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Those of gate, up and down, fp32."""
        each = [getattr(layer.module, "bias", None) for layer in self.layers]
        *reading, down = (None if bias is None else bias.detach().float() for bias in each)
        if self.fused:
            reading = [None, None] if reading[0] is None else list(reading[0].chunk(2))
        return (reading[0] if self.gated else None), reading[-1], down


def find_sparse_networks(model: nn.Module) -> tuple[list[SparseNetwork], dict[str, str]]:
    """The networks of ``model`` in order, and those not understood with the reason."""
    networks: list[SparseNetwork] = []
    unfit: dict[str, str] = {}
    for name, parent, (reading, down, act) in _candidates(model):
        prefix = f"{name}." if name else ""
        modules = {leaf: parent.get_submodule(leaf) for leaf in (*reading, down)}
        bad = [leaf for leaf, module in modules.items() if not (isinstance(module, nn.Linear) or is_conv1d(module))]
        block = _BLOCK.match(name)
        if bad or block is None:
            unfit[name] = f"{bad[0]} is a {type(modules[bad[0]]).__name__}" if bad else "is outside a transformer block"
            continue
        first, last = (
            [Layer.of(prefix + leaf, modules[leaf]) for leaf in reading],
            Layer.of(prefix + down, modules[down]),
        )
        fused = len(reading) == 1 and first[0].n == 2 * last.k
        kind, param = recognise(parent.get_submodule(act))
        if share := getattr(parent, "activation_sparsity", 0.0):  # Gemma-3n
            param = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(float(share))).reshape(1)
            kind = "gelu_gauss" if kind == "gelu" else "other"
        gated = fused or len(reading) == 2
        place, silent = (name, ()) if gated else (prefix + reading[0], (prefix + act, prefix + down))
        network = SparseNetwork(
            name, block.group(1), place, silent, prefix + act, tuple(first), last, fused, kind, param
        )
        if gated and (difference := _difference(parent, network, act)) > 1e-3:
            unfit[name] = f"is not down(act(gate x) * up x): relative difference {difference:.2g}"
            continue
        networks.append(network)
    return networks, unfit


def activations(model: nn.Module) -> dict[str, nn.Module]:
    """The activation modules of all networks by name, whatever the layers around them are (adapters included)."""
    found = {}
    for name, parent, (_, _, act) in _candidates(model):
        found[f"{name}.{act}" if name else act] = parent.get_submodule(act)
    return found


def recognise(act: nn.Module) -> tuple[str, Tensor | None]:
    """What an activation is, told by its values: a gate's kind and parameter, "silu", "gelu" or "other"."""
    if isinstance(act, SparseGate):
        return act.kind, act.param
    g = torch.linspace(-12, 12, 4801)
    with torch.no_grad():
        a = act(g)
    if a.shape != g.shape:
        return "other", None
    for kind in ("relu", "relu2"):
        if torch.equal(a, apply_gate(g, kind)[0]):
            return kind, None
    for kind, smooth in _SMOOTH.items():
        if torch.allclose(a, smooth(g), atol=2e-3):  # the tanh form of GELU differs from the exact one by 5e-4
            return kind, None
    return "other", None


def swap_activation(model: nn.Module, network: SparseNetwork, gate: SparseGate) -> None:
    """Put ``gate`` in the place of the network's activation; the model then trains as before."""
    replace_module(model, network.act, gate)
    network.kind, network.param = gate.kind, gate.param


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[tuple[str, ...], str, str]]]:
    for name, parent in model.named_modules():
        for shape in _SHAPES:
            if all(_has(parent, leaf) for leaf in (*shape[0], shape[1], shape[2])):
                yield name, parent, shape


def _has(parent: nn.Module, path: str) -> bool:
    for leaf in path.split("."):
        if (parent := parent._modules.get(leaf)) is None:
            return False
    return True


@torch.no_grad()
def _difference(parent: nn.Module, network: SparseNetwork, act: str) -> float:
    """Between the module and the formula, on one random token, relative."""
    x = torch.randn(1, 1, network.reading[0].k, generator=torch.Generator().manual_seed(0))
    weight = network.down.module.weight
    x = x.to(weight.device, weight.dtype)
    outputs = [layer.module(x) for layer in network.reading]
    g, u = outputs[0].chunk(2, -1) if network.fused else outputs
    function = parent.get_submodule(act)
    if network.kind == "gelu_gauss":
        param = network.param.to(x.dtype).float()  # as transformers rounds it
        a = apply_gate(g, "gelu_gauss", param)[0]
    else:
        a = function(g)
    expected, got = parent(x), network.down.module(a * u)
    tolerance = 1.0 if weight.dtype == torch.float32 else 0.05  # bf16 rounds every factor by 2^-9
    return float((expected - got).float().norm() / expected.float().norm().clamp_min(1e-30)) * tolerance
