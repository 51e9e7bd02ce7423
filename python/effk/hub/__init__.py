"""Compressed models on disk, and their place in transformers."""

from .checkpoint import load, save

__all__ = ["load", "save"]
