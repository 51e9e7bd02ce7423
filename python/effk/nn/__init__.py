"""Modules that run compressed weights on the kernels: ordinary ``nn.Module`` classes with plain buffers."""

from .wq_embedding import WqEmbedding, WqTiedHead
from .wq_linear import WqLinear, WqMultiLinear

__all__ = ["WqEmbedding", "WqLinear", "WqMultiLinear", "WqTiedHead"]
