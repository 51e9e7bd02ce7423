"""Modules that hold a weight exactly as a file does, between the building of a model and the packing of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import bitmask, quik, wq
from ..formats.bitmask import BitmaskTensor
from ..formats.quik import QuikWeight
from ..formats.wq import WqWeight
from .record import geometry_of, quik_geometry


class StoredWeight(nn.Module):
    """The canonical tensors of one compressed module as buffers of their stored names, uninitialised.

    A checkpoint loader fills them like any other tensors; :meth:`to_weight` then checks and returns the result. The
    module does not compute.
    """

    weight_type, shapes_of, geometry_of = WqWeight, staticmethod(wq.state_shapes), staticmethod(geometry_of)

    def __init__(self, fields: Mapping[str, Any], bias: int | None) -> None:
        """``fields`` is a module's entry of the record; ``bias`` the length of a bias, or None."""
        super().__init__()
        self.geometry = self.geometry_of(fields)
        shapes = self.shapes_of(self.geometry)
        self.geometry_tensors = tuple(shapes)
        for name, (shape, dtype) in shapes.items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype))
        self.register_buffer("bias", None if bias is None else torch.empty(bias))

    def to_weight(self) -> WqWeight | QuikWeight | BitmaskTensor:
        """The weight; raises ValueError if what was loaded is not legal."""
        state: dict[str, Tensor] = {name: self._buffers[name] for name in self.geometry_tensors}
        return self.weight_type.from_state(state, self.geometry)


class StoredQuikWeight(StoredWeight):
    """The same of a QUIK layer."""

    weight_type, shapes_of, geometry_of = QuikWeight, staticmethod(quik.state_shapes), staticmethod(quik_geometry)


class StoredBitmaskWeight(StoredWeight):
    """The same of a sparse layer."""

    weight_type, shapes_of, geometry_of = BitmaskTensor, staticmethod(bitmask.state_shapes), staticmethod(geometry_of)
