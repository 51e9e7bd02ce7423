"""Decoding with compressed and plain models: a decoder, and what makes text of its logits.

``effk.load(dir).generate(...)`` and the ``effk`` command use it. By layers: a decoder (:func:`decoder_for`) appends
tokens to a cache and gives logits; :mod:`.sampling` chooses tokens from logits; :mod:`.batch` runs many sequences at once;
:mod:`.speculative` guesses several tokens ahead; :mod:`.generate` makes it a function from text to text.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from .errors import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .decoder import Decoder
    from .fallback import HuggingFaceDecoder
    from .generate import Generator

__all__ = ["Generator", "UnsupportedModel", "decoder_for"]


def decoder_for(model: PreTrainedModel) -> Decoder | HuggingFaceDecoder:
    """The decoder for a model; transformers' own forward, with a notice, for a model that the runtime does not know.

    Raises:
        UnsupportedModel: neither can run it.
    """
    from .decoder import Decoder
    from .fallback import HuggingFaceDecoder

    try:
        if model.device.type != "cpu":
            raise UnsupportedModel(f"runtime: model: expected its weights on cpu, got {model.device}")
        return Decoder.from_model(model)
    except UnsupportedModel as reason:
        decoder = HuggingFaceDecoder(model)
        warnings.warn(f"effk: {reason}; it runs on transformers, slower than it could", stacklevel=2)
        return decoder


def __getattr__(name: str) -> Any:
    if name == "Generator":  # when first used: it needs everything here
        from .generate import Generator

        return Generator
    raise AttributeError(f"module 'effk.runtime' has no attribute {name!r}")
