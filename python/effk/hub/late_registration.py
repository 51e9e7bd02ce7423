"""Register with transformers when, and only if, the program imports it.

``import effk`` must make ``AutoModelForCausalLM.from_pretrained`` understand our models, whichever of the two packages
is imported first, but transformers' quantisation modules take over a second to import and many programs need none.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

_TRIGGER = "transformers.quantizers.auto"  # every from_pretrained imports it; it owns the registration functions


def register_with_transformers() -> None:
    """Register now if transformers' quantisers are imported, else as soon as they are."""
    if _TRIGGER in sys.modules:
        importlib.import_module("effk.hub.quantizer")
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the trigger module where the other finders do, and adds a step after its execution."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """The original loader, followed by our registration."""

    def __init__(self, original: importlib.abc.Loader) -> None:
        self.original = original

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.original.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.original.exec_module(module)
        importlib.import_module("effk.hub.quantizer")
