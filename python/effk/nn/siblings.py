"""Layers over one input that compute together, in models that call them one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_WAITING = "_effk_sibling_products"


class SiblingProducts(nn.Module):
    """Several layers over one input in one kernel call; ``forward(x)``, from a subclass, returns all products in order.

    :meth:`attach` makes an existing model profit without a change of its code: the first layer, called with a tensor,
    computes all products and leaves the others' *on that tensor object*, where each is taken, once, when its layer is
    called with the same object. So nothing outlives the tensor, threads with their own tensors never meet, and whatever
    does not match (another tensor, an input written to in between, a second call) is computed anew. Where tensors are
    traced rather than computed (compile, export) or need gradients, every layer works alone. Inference mode counts no
    writes: there, a model must not write to x between the siblings, which none of the supported ones does.

    A layer takes part through an attribute ``_shared``, None or this module, and a method ``alone(x)``; its forward
    calls :meth:`one` when :func:`may_share` allows.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def attach(self) -> None:
        """Make the layers share their work wherever they are called (see the class)."""
        for layer in self.layers:
            object.__setattr__(layer, "_shared", self)

    def one(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The product of ``layer``: left on ``x``, or computed now, by the first layer together with the siblings'."""
        version = None if x.is_inference() else x._version
        owner, when, waiting = x.__dict__.get(_WAITING, (None, None, {}))
        if owner is self and when == version and (product := waiting.pop(id(layer), None)) is not None:
            if not waiting:
                x.__dict__.pop(_WAITING, None)  # or copying or saving x would drag this module along
            return product
        if layer is not self.layers[0]:  # computing all here again would be waste if nobody came for the others
            return layer.alone(x)
        products = {id(member): product for member, product in zip(self.layers, self(x), strict=True)}
        own = products.pop(id(layer))
        x.__dict__[_WAITING] = (self, version, products)
        return own


def may_share(x: Tensor) -> bool:
    """Whether products may be left on ``x``."""
    return not (torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()))
