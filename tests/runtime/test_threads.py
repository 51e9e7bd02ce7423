"""Workers of threads that have stopped computing."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from effk.runtime.threads import release_threads


def workers() -> int:
    return len(os.listdir("/proc/self/task"))


def compute() -> None:
    torch.ones(1 << 20).exp_()


@pytest.mark.skipif("OpenMP" not in torch.__config__.parallel_info(), reason="PyTorch without OpenMP")
def test_a_thread_gives_its_workers_back_and_gets_new_ones() -> None:
    counts: list[int] = []

    def body() -> None:
        torch.set_num_threads(3)
        counts.append(workers())
        for _ in range(2):
            compute()
            counts.append(workers())
            release_threads()  # returns when they have left their team; the system may take a moment longer
            for _ in range(200):
                if workers() == counts[0]:
                    break
                threading.Event().wait(0.01)
            counts.append(workers())

    before = torch.get_num_threads()
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    torch.set_num_threads(before)
    idle = counts[0]
    assert counts == [idle, idle + 2, idle, idle + 2, idle]


def test_without_workers_nothing_happens() -> None:
    thread = threading.Thread(target=release_threads)
    thread.start()
    thread.join()
    compute()
