"""Text files of the command line, and the token windows cut from texts."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..compress.evaluate import token_windows
from .models import Opened

_BATCH = 8  # calibration sequences that run at once: bounds the memory of their attention and hidden states


def read_text(option: str, path: Path) -> str:
    """The text of a file.

    Raises:
        ValueError: no such file, or not UTF-8; names the ``option`` that gave the path.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{option}: expected a text file, got {str(path)!r}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{option}: expected UTF-8 text, got {str(path)!r}: {error.reason}") from None


def check_windows(options: tuple[str, str], length: int, count: int) -> None:
    """Refuse, before anything is loaded, windows that cannot be; ``options`` are the names of the two options."""
    if length < 2:
        raise ValueError(f"{options[0]}: expected at least 2 tokens, got {length}")
    if count < 1:
        raise ValueError(f"{options[1]}: expected at least 1, got {count}")


def check_positions(option: str, opened: Opened, length: int) -> None:
    """Refuse windows longer than the positions that the model has."""
    limit = getattr(opened.model.config, "max_position_embeddings", None)
    if isinstance(limit, int) and length > limit:
        raise ValueError(f"{option}: expected at most the model's {limit} positions, got {length}")


def calibration_batches(opened: Opened, text: str, sequences: int, length: int) -> list[Tensor]:
    """``sequences`` windows of ``length`` tokens, evenly spread over ``text``, in batches for ``effk.compress``.

    Raises:
        ValueError: no tokenizer, or a text of fewer tokens.
    """
    windows = token_windows(opened.need_tokenizer("calibration"), text, length, sequences, spread=True)
    return list(windows.split(_BATCH))
