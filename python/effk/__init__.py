"""Efficient kernels: compress transformer models and run them fast on the machine at hand.

Importing the package loads the op library, so that ``torch.ops.effk.<op>`` exists, and refuses to go on when the
environment variable ``EFFK_ISA`` names a tier that this CPU does not have.

``effk.ops`` documents the operations, ``effk.nn`` has modules, ``effk.compress`` compresses models, ``effk.save`` and
``effk.load`` keep a compressed model, ``effk.runtime`` decodes with it, ``effk.isa`` chooses instruction sets.
transformers' ``from_pretrained`` loads saved models too once this package is imported.
"""

import importlib
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

torch.ops.load_library(Path(__file__).parent / "effk_ops.so")

from . import isa, ops  # noqa: E402  (both need the library)
from .hub import load, save  # noqa: E402
from .hub.late_registration import register_with_transformers  # noqa: E402

register_with_transformers()

if TYPE_CHECKING:
    from . import compress, formats, nn, runtime
    from .compress.auto import auto

__version__ = version("effk")
__all__ = ["auto", "compress", "formats", "hub", "isa", "load", "nn", "ops", "runtime", "save"]

# Imported when first used: transformers alone takes longer than everything above.
_LAZY_MODULES = ("compress", "formats", "nn", "runtime")


def __getattr__(name: str) -> Any:
    if name == "auto":
        return importlib.import_module(f"{__name__}.compress.auto").auto
    if name in _LAZY_MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module 'effk' has no attribute {name!r}")
