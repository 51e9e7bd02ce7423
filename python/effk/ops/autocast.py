"""Autocast for operations of the library: the dispatcher reaches a kernel of the autocast key before autograd's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("effk", "IMPL")


def cast_arguments(name: str, places: Sequence[int] = (0,)) -> None:
    """Under autocast, the arguments at ``places`` of ``torch.ops.effk.<name>`` take its dtype; the others stay.

    fp64 stays too (and is an error of the operation), as in PyTorch.
    """
    op = getattr(torch.ops.effk, name).default
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

        def autocast(*arguments: Any, device: str = device) -> Any:
            dtype = torch.get_autocast_dtype(device)
            cast = [to(a, dtype) if i in places and a is not None else a for i, a in enumerate(arguments)]
            with torch.autocast(device, enabled=False):
                return op(*cast)

        _library.impl(name, autocast, key)


def to(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t`` as autocast hands it on."""
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t
