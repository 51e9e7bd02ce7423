"""Where the tests of CUDA operations run them: on a GPU, or emulated on the CPU in one of three orders of threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

import effk

EMULATION = Path(effk.__file__).parent / "effk_emu.so"
ORDERS = ("fwd", "rev", "7", "gpu")


class Backend:
    """Where the ops live and where their tensors must be."""

    def __init__(self, name: str) -> None:
        self.device = "cuda" if name == "gpu" else "cpu"
        if name != "gpu":
            torch.ops.load_library(EMULATION)
        self.ops: Any = torch.ops.effk if name == "gpu" else torch.ops.effk_emu

    def move(self, *tensors: Tensor | None) -> list[Tensor | None]:
        return [None if t is None else t.to(self.device) for t in tensors]


Kind = TypeVar("Kind", bound=Backend)


def offered(order: str, monkeypatch: pytest.MonkeyPatch, kind: type[Kind]) -> Iterator[Kind]:
    """The backend of one of ``ORDERS``, or a skip that says what is missing."""
    if order == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        yield kind("gpu")
        return
    if "EFFK_TEST_GPU_ONLY" in os.environ or not EMULATION.exists():
        pytest.skip("the emulated kernels were not built (an editable install with nvcc builds them)")
    monkeypatch.setenv("CUEMU_ORDER", order)
    yield kind("emulated")
