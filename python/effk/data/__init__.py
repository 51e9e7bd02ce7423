"""Fixed texts for calibrating and for measuring: two disjoint, well separated pieces of the Jargon File 4.4.7.

The File is an alphabetical glossary, so the pieces share style and markup but no entries. It is in the public domain;
origin and changes are in ``LICENSE`` beside the texts.
"""

from __future__ import annotations

import hashlib
from importlib import resources

SHA256 = {
    "evaluation": "2f20f21ebfc40f75dfb628cecb93ec0ca6ea4252be5720f09d76115bf4f6bb83",
    "calibration": "ff666de110e6c771874582c6999ccdcd497289c09dd51fcb8c866554ff461200",
}


def evaluation_text() -> str:
    """199,373 characters on which perplexity is measured; nothing may be tuned on them."""
    return _text("evaluation")


def calibration_text() -> str:
    """259,757 characters for calibration, 440,000 characters away from the evaluation text."""
    return _text("calibration")


def _text(name: str) -> str:
    """The text, checked against its hash: figures from another text would not be comparable."""
    content = resources.files(__name__).joinpath(f"{name}.txt").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256[name]:
        raise ValueError(f"{name}.txt: expected SHA-256 {SHA256[name]}, got {digest}: the package was modified")
    return content.decode("utf-8")
