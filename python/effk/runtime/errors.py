"""What the runtime refuses."""

from __future__ import annotations


class UnsupportedModel(ValueError):
    """The runtime does not know the structure of a model; the message says what it met."""
