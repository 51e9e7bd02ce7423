"""What every test file may use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from effk import isa

# A CPU with BF16 dot products also runs as one without them, which is another machine in the field.
TIERS = [*isa.supported(), "avx512vnni-bf16"] if isa.bf16() else isa.supported()


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every tier of this CPU in turn, forced."""
    name = request.param
    with isa.use(name.removesuffix("-bf16"), bf16=not name.endswith("-bf16")):
        yield name


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Each test draws the same random numbers in whatever order and process it runs."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The problems are small: waking a second thread costs more than it brings, and on a busy machine much more.

    A test of threads sets their number itself and need not restore it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
