"""Efficient kernels: compress transformer models and run them fast on the machine at hand.

Importing the package loads the op library, so that ``torch.ops.effk.<op>`` exists, and refuses to go on when the
environment variable ``EFFK_ISA`` names a tier that this CPU does not have.

``effk.ops`` documents the operations, ``effk.nn`` has modules, ``effk.compress`` compresses models, ``effk.load`` brings
a compressed model back, ``effk.isa`` chooses instruction sets.
"""

import importlib
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

torch.ops.load_library(Path(__file__).parent / "effk_ops.so")

from . import isa, ops  # noqa: E402  (both need the library)

if TYPE_CHECKING:
    from . import compress, formats, hub, nn
    from .hub import load

__version__ = version("effk")
__all__ = ["compress", "formats", "hub", "isa", "load", "nn", "ops"]

# Imported when first used: transformers alone takes longer than everything above.
_LAZY_MODULES = ("compress", "formats", "hub", "nn")


def __getattr__(name: str) -> Any:
    if name in _LAZY_MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "load":
        from .hub import load

        return load
    raise AttributeError(f"module 'effk' has no attribute {name!r}")
