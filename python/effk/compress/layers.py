"""Which layers of a model can be compressed, and how they hang together.

Weights are seen as ``[N, K]`` (outputs, inputs) whatever module holds them: ``torch.nn.Linear`` stores that, the
``Conv1D`` of GPT-2 its transpose.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Names of the linear layers that read the same input inside one attention or feed-forward module (Llama, Mistral,
# Qwen2, Gemma, OPT; encoder-style attention). GPT-2 stores the first as one layer, which needs no group.
SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"))
_BLOCK = re.compile(r"^(.*?\b(?:layers|h|blocks|layer)\.\d+)\.")


@dataclass(eq=False)
class Layer:
    """A linear layer that a plan can name.

    Attributes:
        name: dotted module name in the model.
        module: ``nn.Linear`` or ``Conv1D``; None once the layer has been replaced, so that its weight can be freed.
        block: name of the transformer block that holds it, or None (for example ``lm_head``).
        input_group: equal for layers of one block that read the same input; else the layer's own name.
        transposed: whether the module stores ``[K, N]``.
        n, k: outputs and inputs.
        nbytes: bytes of the weight as the model holds it.
    """

    name: str
    module: nn.Module | None
    block: str | None
    input_group: str
    transposed: bool
    n: int
    k: int
    nbytes: int

    @classmethod
    def of(cls, name: str, module: nn.Module) -> Layer:
        """The layer that ``module`` is under ``name``."""
        transposed = is_conv1d(module)
        n, k = module.weight.shape[::-1] if transposed else module.weight.shape
        size = module.weight.numel() * module.weight.element_size()
        return cls(name, module, block_of(name), input_group(name), transposed, n, k, size)

    @property
    def bias(self) -> Tensor | None:
        """The bias of the module."""
        return self.module.bias

    def weight(self) -> Tensor:
        """The weight as detached fp32 ``[N, K]`` on its own device.

        Raises:
            ValueError: the weight holds NaN or Inf.
        """
        weight = self.module.weight.detach()
        weight = (weight.t() if self.transposed else weight).float().contiguous()
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{self.name}.weight: expected finite values, got NaN or Inf")
        return weight


def block_of(name: str) -> str | None:
    """The transformer block that holds what is called ``name``, or None."""
    block = _BLOCK.match(name)
    return block.group(1) if block else None


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' ``Conv1D``, told by its name and fields so that nothing need be imported."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(module, "weight", None) is not None


def find_layers(model: nn.Module) -> tuple[list[Layer], dict[str, str]]:
    """The model's linear layers in module order, and those that cannot be compressed with the reason.

    A weight or module used under another name too (a head tied to the embedding) is in the second: replacing one user
    would store it twice. ``Recipe.embedding_bits`` compresses both sides of such a pair.
    """
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None and parameter.dim() == 2:
                owners.setdefault(id(parameter), []).append(name)
    found: list[Layer] = []
    refused: dict[str, str] = {}
    for name, module in model.named_modules():
        if type(module) is not nn.Linear and not is_conv1d(module):
            if isinstance(module, nn.Linear):
                refused[name] = f"is a {type(module).__name__}, not a plain nn.Linear"
            continue
        sharers = [other for other in owners[id(module.weight)] if other != name]
        if sharers:
            refused[name] = f"shares its weight with {sharers[0]}"
        elif module.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            refused[name] = f"weight is {module.weight.dtype}"
        elif module.weight.numel() == 0:
            refused[name] = "weight is empty"
        else:
            found.append(Layer.of(name, module))
    return found, refused


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` at the dotted ``name`` of ``model``, where a module or a parameter is."""
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    owner._parameters.pop(leaf, None)  # PyTorch refuses a module where a parameter is
    setattr(owner, leaf, module)


def input_group(name: str) -> str:
    """The key that layers reading the same input have in common, from the layer's name; its own name when alone."""
    parent, _, leaf = name.rpartition(".")
    if "cross" in parent or "encoder_attn" in parent:  # there keys and values read the encoder, queries do not
        return name
    for members in SHARED_INPUT:
        if leaf in members:
            return f"{parent}.{'+'.join(members)}"
    return name
