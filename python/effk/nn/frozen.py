"""Buffers whose dtype is part of the format."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self


class FrozenDtypes(nn.Module):
    """A module whose ``format_buffers`` follow the device but keep their dtype.

    ``model.to(torch.bfloat16)``, ``model.half()`` and the like convert every floating-point buffer. A scale or a
    codebook entry is a stored number, not a working precision: rounding it would change the weight for good.
    """

    format_buffers: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {name: self._buffers[name] for name in self.format_buffers if self._buffers.get(name) is not None}
        for name in kept:
            self._buffers[name] = None
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = fn(buffer)
            self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name in self.format_buffers:
            own, new = self._buffers.get(name), state_dict.get(prefix + name)
            if own is not None and isinstance(new, torch.Tensor) and new.dtype != own.dtype:
                error_msgs.append(f"dtype mismatch for {prefix}{name}: expected {own.dtype}, got {new.dtype}.")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
