"""What several module tests use."""

from __future__ import annotations

import pytest
from torch import Tensor


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Every preparation of a spectrum by a cache, recorded."""
    from effk.nn import spectrum_cache

    calls: list[tuple] = []
    real = spectrum_cache._prepare

    def count(*arguments: object) -> Tensor:
        calls.append(arguments[1:])
        return real(*arguments)

    monkeypatch.setattr(spectrum_cache, "_prepare", count)
    return calls
