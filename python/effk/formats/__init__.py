"""Stored forms of compressed weights and their packing."""

from .wq import WqWeight

__all__ = ["WqWeight"]
