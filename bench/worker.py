"""Processes of their own for functions whose speed depends on the state of the C library's allocator.

glibc gives blocks above a threshold (128 KiB, growing to 32 MiB as such blocks are freed) back to the system at once,
and the top of the heap above another one; the next call then takes page faults for the same memory again, unless a
hole is left from something larger. So each function runs in a fresh process, forked from one that has imported
everything and done nothing, with the allocator as a user gets it (`DEFAULT`) or set to keep all memory (`TUNED`).
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import resource
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from .timing import ForeignCpu, times

# No block from mmap, nothing returned below 2^46 bytes, the heap grown by 64 MiB at a time.
TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 46), "MALLOC_TOP_PAD_": str(64 << 20)}
DEFAULT: Mapping[str, str] = {}


class Worker:
    """Runs functions that `maker` ("module:function") makes: `maker(*args)` returns what is then called, or None.

    RuntimeError with the message of whatever the other side raises.
    """

    def __init__(self, maker: str, threads: int, environment: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._child: int | None = None
        with only(environment):
            self._process = context.Process(target=serve, args=(theirs, maker, threads), daemon=True)
            self._process.start()
        theirs.close()
        ForeignCpu.OWN.add(self._process.pid)

    def load(self, *args: Any) -> bool:
        """Makes the function that the calls below are about, in a new process; False when there is none."""
        self.release()
        self._child, there = self._ask("load", *args)
        ForeignCpu.OWN.add(self._child)
        return there

    def release(self) -> None:
        """Ends the process of the function."""
        if self._child is not None:
            ForeignCpu.OWN.discard(self._child)
            self._child = None
            self._ask("release")

    def result(self) -> tuple[Any, ...]:
        """Of one call, as NumPy arrays."""
        return self._ask("result")

    def series(self, seconds: float, warm_up: bool) -> list[float]:
        """Seconds of each call, taken there; for `timing.Contender`."""
        return self._ask("series", seconds, warm_up)

    def faults(self) -> int:
        """Page faults a call in the latest series."""
        return self._ask("faults")

    def close(self) -> None:
        """Ends everything."""
        self.release()
        ForeignCpu.OWN.discard(self._process.pid)
        self._pipe.close()
        self._process.join()

    def _ask(self, what: str, *args: Any) -> Any:
        self._pipe.send((what, args))
        ok, answer = self._pipe.recv()
        if not ok:
            raise RuntimeError(answer)
        return answer


@contextmanager
def only(environment: Mapping[str, str]) -> Iterator[None]:
    """Within, the environment has these allocator settings and no others."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        del os.environ[name]
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def serve(pipe: Connection, maker: str, threads: int) -> None:
    """The process that forks one for every function; it must start no thread itself."""
    import torch

    torch.set_num_threads(threads)
    module, _, name = maker.partition(":")
    make = getattr(importlib.import_module(module), name)
    while True:
        try:
            _, args = pipe.recv()
        except EOFError:
            os._exit(0)  # without the libraries' farewells, which take a second
        child = os.fork()
        if child == 0:
            perform(pipe, make, args)
            os._exit(0)
        os.waitpid(child, 0)


def perform(pipe: Connection, make: Callable[..., Callable[[], Any] | None], args: tuple[Any, ...]) -> None:
    """The forked process: one function until it is released."""
    call: Callable[[], Any] | None = None
    faults = 0

    def series(seconds: float, warm_up: bool) -> list[float]:
        nonlocal faults
        if warm_up:
            call()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        taken = times(call, seconds)
        faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // len(taken)
        return taken

    def load() -> tuple[int, bool]:
        nonlocal call
        call = make(*args)
        return os.getpid(), call is not None

    answers: dict[str, Callable[..., Any]] = {
        "result": lambda: as_arrays(call()),
        "series": series,
        "faults": lambda: faults,
        "release": lambda: None,
    }
    what, given = "load", ()
    while True:
        try:
            answer = load() if what == "load" else answers[what](*given)
            pipe.send((True, answer))
        except Exception as error:
            pipe.send((False, f"{type(error).__name__}: {error}"))
            if what == "load":
                return
        if what == "release":
            return
        try:
            what, given = pipe.recv()
        except EOFError:
            return


def as_arrays(result: Any) -> tuple[Any, ...]:
    """Tensors as NumPy arrays, which are sent as plain bytes."""
    return tuple(t.detach().numpy() for t in (result if isinstance(result, tuple) else (result,)))
