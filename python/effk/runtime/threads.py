"""The threads that operations compute with belong to the thread that calls them."""

from __future__ import annotations

import ctypes

_SOFT = 1  # omp_pause_soft: keeps settings, such as numbers of threads


def release_threads() -> None:
    """Give the calling thread's OpenMP workers back; the next parallel operation in it starts new ones.

    For a thread that loaded or compressed a model before another thread decodes with it. Every thread that calls operations
    has workers of its own, and libgomp counts them all: with more of them than cores, those who wait for each other go to
    sleep at once instead of spinning. A step of SmolLM2, which has hundreds of such places, then took 17 ms instead of 10
    (16 sequences, two threads on two cores), with a third of the machine idle. Does nothing where the OpenMP runtime lacks
    ``omp_pause_resource_all`` (OpenMP 5.0, section 3.6.2).
    """
    pause = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
    if pause is not None:
        pause(_SOFT)
