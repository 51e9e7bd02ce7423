"""What several module tests use."""

from __future__ import annotations

import pytest
from torch import Tensor

from effk.nn.derived_cache import DerivedCache


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Everything that a cache makes (spectra, packed weights), recorded by what it was made for."""
    calls: list[tuple] = []
    real = DerivedCache._fresh

    def count(cache: DerivedCache, sources: tuple, how: tuple) -> Tensor:
        calls.append(how)
        return real(cache, sources, how)

    monkeypatch.setattr(DerivedCache, "_fresh", count)
    return calls
