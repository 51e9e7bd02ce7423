"""Instruction-set tiers: which there are, which this CPU has, which one kernels are chosen for.

Each tier contains the one before it: ``scalar`` (portable C++), ``avx2`` (with FMA, F16C, BMI2), ``avx512`` (F, BW, DQ,
VL), ``avx512vnni`` (with VNNI, VBMI, VBMI2, GFNI). BF16 dot products are a feature on top of the last one. The environment
variable ``EFFK_ISA`` forces a tier from the start of the process; :func:`use` does it at run time.
"""

import sys
from pathlib import Path
from types import TracebackType

from . import _C

if _error := _C.isa_environment_error():
    if Path(sys.argv[0]).name in ("effk", "-m"):  # the command, which is imported after this and cannot catch it
        print(f"effk: error: {_error}", file=sys.stderr)
        raise SystemExit(2)
    raise ImportError(_error)


def names() -> list[str]:
    """All tiers that effk knows, lowest first, whether or not this CPU has them."""
    return _C.isa_names()


def supported() -> list[str]:
    """The tiers of this CPU, lowest first."""
    return _C.isa_supported()


def active() -> str:
    """The tier that kernels are chosen for; an operation without a kernel for it uses the next lower one."""
    return _C.isa_active()


def bf16() -> bool:
    """Whether BF16 dot products are in use: the CPU has them and the active tier is ``avx512vnni``."""
    return _C.isa_bf16()


class use:
    """Force a tier for the whole process, from now on or, as a context manager, until the end of a block.

    >>> effk.isa.use("avx2")
    >>> with effk.isa.use("scalar"):
    ...     y = torch.ops.effk.wq_linear(...)

    Args:
        name: one of :func:`supported`.
        bf16: False also keeps BF16 dot products out of use, as on a CPU that has the tier without them.

    Raises:
        ValueError: the name is no tier, or not one of this CPU; nothing has changed then.
    """

    def __init__(self, name: str, bf16: bool = True) -> None:
        self._before = (_C.isa_active(), _C.isa_bf16())
        _C.isa_use(name, bf16)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _C.isa_use(*self._before)
