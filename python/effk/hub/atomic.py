"""Files that are either the old one or the new one, whatever happens in between."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

TEMPORARY_SUFFIX = ".effk-tmp"


def write_temporary(directory: Path, write: Callable[[Path], None]) -> Path:
    """Let ``write(path)`` fill a new file in ``directory``, push it to the disk and return its path.

    The file has a name that no reader looks for; rename it with :func:`publish`. On any error it is removed.

    Raises:
        OSError: what ``write`` or the disk said, with the directory; a full disk is named as such.
    """
    handle, name = tempfile.mkstemp(suffix=TEMPORARY_SUFFIX, dir=directory)
    os.close(handle)
    path = Path(name)
    try:
        write(path)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(path, 0o666 & ~_umask())  # mkstemp makes private files; a model is as public as its directory
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        if isinstance(error, Exception):
            raise OSError(f"save: {directory}: expected to write a file, got: {error}; nothing was replaced") from error
        raise
    return path


def publish(temporary: Path, final: Path) -> None:
    """Give ``temporary`` its final name in one step, replacing a file of that name, and push the change to the disk."""
    os.replace(temporary, final)
    sync_directory(final.parent)


def sync_directory(directory: Path) -> None:
    """Push the directory's entries to the disk, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
