"""Competitors. Each module has `backends(shape, threads)`; what cannot run here says why instead of vanishing."""

from __future__ import annotations

from ..backend import Field, Missing
from ..shapes import Shape
from . import ggml, onnxruntime, openvino, torch_linear, torch_lowbit

MODULES = (torch_linear, torch_lowbit, onnxruntime, openvino, ggml)


def competitors(shape: Shape, threads: int) -> Field:
    """Every competitor of wq_linear for this shape, and those that are missing with their reasons."""
    out = Field()
    for module in MODULES:
        for entry in module.backends(shape, threads):
            (out.missing if isinstance(entry, Missing) else out.backends).append(entry)
    return out
