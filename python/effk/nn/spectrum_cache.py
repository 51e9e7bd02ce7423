"""Spectra of filters that do not change: kept as long as the filter lives, and prepared anew once it is written to."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from ..ops import fftconv as op

KEPT_PER_FILTER = 4  # sequence lengths in turn; beyond, the one not used for longest goes


class SpectrumCache:
    """``fftconv_prepare`` with a memory.

    An entry belongs to the storage of k, so that a fresh view of one parameter in each call finds it, and dies with
    that storage. Within it the key is where k lies (address, shape, strides, dtype) and what it was prepared for
    (n_fft, mode, scheme): two filters that share an address do not collide. PyTorch's version counter tells of writes:
    an optimizer's step, ``k.mul_(2)``, ``load_state_dict``. Not counted, and so not noticed, are writes through
    ``k.data`` and numpy views: call :meth:`clear` after those. Tensors made in inference mode have no counter and are
    not cached.
    """

    def __init__(self) -> None:
        self._filters: dict[int, tuple[Any, OrderedDict[tuple, tuple[int, Tensor]]]] = {}
        self._lock = threading.RLock()  # reentrant: collecting garbage inside the lock may run a callback

    def spectrum(self, k: Tensor, taps: int, n_fft: int, mode: str, scheme: str) -> Tensor:
        """The spectrum of the first ``taps`` taps of k, from memory where possible."""
        if k.is_inference() or type(k) not in (Tensor, torch.nn.Parameter):
            return _prepare(k, taps, n_fft, mode, scheme)
        version = k._version
        place = (k.data_ptr(), k.shape, k.stride(), k.dtype, taps, n_fft, mode, scheme)
        with self._lock:
            spectra = self._spectra_of(k.untyped_storage())
            for other in [other for other, (when, _) in spectra.items() if when != version and other[:4] == place[:4]]:
                del spectra[other]
            if (known := spectra.get(place)) is not None:
                spectra.move_to_end(place)
                return known[1]
        spec = _prepare(k, taps, n_fft, mode, scheme)
        with self._lock:
            spectra = self._spectra_of(k.untyped_storage())
            spectra[place] = (version, spec)
            while len(spectra) > KEPT_PER_FILTER:
                spectra.popitem(last=False)
        return spec

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._filters.clear()

    def __len__(self) -> int:
        return sum(len(spectra) for _, spectra in self._filters.values())

    def _spectra_of(self, storage: torch.UntypedStorage) -> OrderedDict[tuple, tuple[int, Tensor]]:
        name = id(storage)
        entry = self._filters.get(name)
        if entry is None or entry[0]() is not storage:
            cache = weakref.ref(self)

            def forget(reference: Any) -> None:
                if (alive := cache()) is not None:
                    with alive._lock:
                        if (entry := alive._filters.get(name)) is not None and entry[0] is reference:
                            del alive._filters[name]

            entry = self._filters[name] = (weakref.ref(storage, forget), OrderedDict())
        return entry[1]


def _prepare(k: Tensor, taps: int, n_fft: int, mode: str, scheme: str) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():  # a spectrum from inference mode could not be used in training
        return torch.ops.effk.fftconv_prepare(op.as_filter(k[..., :taps]), n_fft, mode, scheme)
