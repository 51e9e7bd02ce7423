"""Tensors made from others that do not change: kept as long as those live, made anew once they are written to."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Place = tuple[Hashable, ...]


class _Entry(NamedTuple):
    versions: tuple[int, ...]
    storages: tuple[Any, ...]  # weak references to those of all sources but the first
    made: Tensor

    @property
    def orphaned(self) -> bool:
        return any(storage() is None for storage in self.storages)


class DerivedCache:
    """``make(*sources, *how)`` with a memory: spectra of filters, packed forms of weights.

    An entry belongs to the storage of the first source, so that a fresh view of one parameter in each call finds it,
    and dies with that storage. Within it the key is where the sources lie (address, shape, strides, dtype) and ``how``;
    that another source still is the same storage is checked, so tensors that share an address do not collide. PyTorch's
    version counter tells of writes, with gradients or without: an optimizer's step, ``w.mul_(2)``, ``load_state_dict``.
    Not counted, and so not noticed, are writes through ``w.data`` and numpy views: call :meth:`clear` after those.
    Tensors made in inference mode have no counter; from them everything is made anew.
    """

    def __init__(self, make: Callable[..., Tensor], kept: int) -> None:
        """
        Args:
            make: takes the sources and then ``how``; called without gradients.
            kept: results for one source, of different ``how``; beyond, the one not used for longest goes.
        """
        self._make, self._kept = make, kept
        self._owners: dict[int, tuple[Any, OrderedDict[Place, _Entry]]] = {}
        self._lock = threading.RLock()  # reentrant: collecting garbage inside the lock may run a callback

    def get(self, sources: tuple[Tensor, ...], *how: Hashable) -> Tensor:
        """``make(*sources, *how)``, from memory where possible."""
        if any(t.is_inference() or type(t) not in (Tensor, torch.nn.Parameter) for t in sources):
            return self._fresh(sources, how)
        versions = tuple(t._version for t in sources)
        where = tuple((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in sources)
        place = (where, how)
        owner, *others = (t.untyped_storage() for t in sources)
        with self._lock:
            entries = self._entries_of(owner)
            for old in [p for p, e in entries.items() if (p[0] == where and e.versions != versions) or e.orphaned]:
                del entries[old]
            known = entries.get(place)
            if known is not None and all(r() is s for r, s in zip(known.storages, others, strict=True)):
                entries.move_to_end(place)
                return known.made
        made = self._fresh(sources, how)
        with self._lock:
            entries = self._entries_of(owner)
            entries[place] = _Entry(versions, tuple(map(weakref.ref, others)), made)
            entries.move_to_end(place)
            while len(entries) > self._kept:
                entries.popitem(last=False)
        return made

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._owners.clear()

    def __len__(self) -> int:
        return sum(len(entries) for _, entries in self._owners.values())

    def __reduce__(self) -> tuple[Any, ...]:
        return DerivedCache, (self._make, self._kept)  # a copy of a module has tensors of its own

    def _fresh(self, sources: tuple[Tensor, ...], how: tuple[Hashable, ...]) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():  # what inference mode makes could not be used in training
            return self._make(*sources, *how)

    def _entries_of(self, storage: torch.UntypedStorage) -> OrderedDict[Place, _Entry]:
        name = id(storage)
        entry = self._owners.get(name)
        if entry is None or entry[0]() is not storage:
            cache = weakref.ref(self)

            def forget(reference: Any) -> None:
                if (alive := cache()) is not None:
                    with alive._lock:
                        if (entry := alive._owners.get(name)) is not None and entry[0] is reference:
                            del alive._owners[name]

            entry = self._owners[name] = (weakref.ref(storage, forget), OrderedDict())
        return entry[1]
