"""A process that saves models on command and can be killed while it does; used by ``test_interrupted_saves.py``.

Started as ``python saving_process.py DIRECTORY``; reads commands from standard input and answers each with one line:

* ``loop``: fork a child that saves one model and the other over ``DIRECTORY`` for ever; answers its process id.
* ``step I``: fork a child that saves the second model and vanishes, without any clean-up, right before its I-th
  operation on a file of ``DIRECTORY``; answers its exit status (0: it came to the end).
* ``reap``: wait for the killed child; answers ``reaped``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch

import effk
from small_models import Nearest, small_model

VANISHED = 9
FILE_EVENTS = ("open", "os.rename", "os.remove", "os.chmod", "os.mkdir", "tempfile.mkstemp")


def model_of(bits: int) -> torch.nn.Module:
    """The first (4 bits) and the second (2 bits) model."""
    model = small_model("llama")
    effk.compress(model, Nearest(bits=bits, embedding_bits=8))
    return model


def fork(work: Callable[[], None]) -> int:
    """Run ``work`` in a child; safe because this process computes with one thread only."""
    if pid := os.fork():
        return pid
    work()
    os._exit(0)


def vanish_before(step: int, directory: str) -> None:
    """Leave the process at the ``step``-th file operation that concerns ``directory``."""
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event in FILE_EVENTS and directory in str(arguments[0]):
            count += 1
            if count == step:
                os._exit(VANISHED)

    sys.addaudithook(hook)


def main(directory: str) -> None:
    torch.set_num_threads(1)
    first, second = model_of(4), model_of(2)
    print("ready", flush=True)

    def loop() -> None:
        while True:
            effk.save(second, directory)
            effk.save(first, directory)

    def step(index: int) -> None:
        vanish_before(index, directory)
        effk.save(second, directory)

    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "loop":
            print(fork(loop), flush=True)
        elif command == "step":
            pid = fork(lambda index=int(arguments[0]): step(index))
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        else:
            os.wait()
            print("reaped", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
