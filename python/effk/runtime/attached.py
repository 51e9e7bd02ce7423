"""``model.generate`` of loaded models: transformers' arguments and results, effk's runtime.

What is not known here (beams, custom processors, ...) goes to transformers' own ``generate``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import decoder_for
from .batch import ROWS, Batch, generate_all
from .batch import Sequence as Running
from .errors import UnsupportedModel
from .limits import Limits, stop_ids
from .sampling import Sampling
from .text import TextStream

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

# Of a generation config: what is handled below, and what does not change the tokens.
_HANDLED = {
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p",
    "repetition_penalty", "eos_token_id", "pad_token_id", "bos_token_id", "num_return_sequences", "stop_strings",
    "use_cache", "transformers_version", "_from_model_config",
}  # fmt: skip


class Runtime:
    """The ``generate`` of one model, with a decoder made when it is first needed and again when the weights are others.

    A copy of the model gets one of its own: decoders cannot be copied.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self._decoder, self._made_for = model, None, None

    @property
    def decoder(self) -> Any:
        """The model's decoder, new if a weight was replaced or written to since it was made."""
        if self._decoder is None or tuple(_states(self.model)) != self._made_for:
            self._decoder = None  # the memory of one suffices
            self._decoder = decoder_for(self.model)
            self._made_for = tuple(_states(self.model))  # now: a decoder moves weights
        return self._decoder

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return generate(self.model, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtime:
        return Runtime(copy.deepcopy(self.model, memo))

    def __reduce__(self) -> tuple[type, tuple[PreTrainedModel]]:
        return Runtime, (self.model,)


def attach(model: PreTrainedModel) -> PreTrainedModel:
    """Make ``model.generate`` use the runtime; returns the model."""
    model.generate = Runtime(model)
    return model


def attached_decoder(model: PreTrainedModel) -> Any:
    """The decoder of a model with a runtime, else a new one."""
    runtime = vars(model).get("generate")
    return runtime.decoder if isinstance(runtime, Runtime) else decoder_for(model)


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    streamer: Any = None,
    **kwargs: Any,
) -> Tensor:
    """As ``GenerationMixin.generate`` of transformers.

    Args:
        model: made by :func:`effk.load`.
        inputs: token ids int64 ``[B, T]``, also as ``input_ids``; with an ``attention_mask`` where prompts are padded.
        generation_config: defaults; those of the model come after it.
        streamer: gets the prompt and each token, with one prompt.
        kwargs: fields of the generation config, ``attention_mask``, ``tokenizer`` (for ``stop_strings``). Others are passed on
            to transformers' own ``generate``. When sampling, seeds come from PyTorch's generator.

    Returns:
        int64 ``[B * num_return_sequences, T + new]``: prompts and what follows them, padded.
    """
    call = dict(kwargs, inputs=inputs, generation_config=generation_config, streamer=streamer)
    ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
    mask, tokenizer = kwargs.pop("attention_mask", None), kwargs.pop("tokenizer", None)
    wanted = _settings(model, generation_config, kwargs)
    if wanted is None or not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] == 0:
        return _transformers(model, call)
    try:
        decoder = model.generate.decoder
    except UnsupportedModel:
        return _transformers(model, call)
    count, length = int(wanted.get("num_return_sequences") or 1), ids.shape[1]
    if streamer is not None and len(ids) * count > 1:
        raise ValueError(f"generate: streamer: expected one sequence, got {len(ids) * count}")
    pad = wanted.get("pad_token_id")
    if "eos_token_id" in wanted:
        ends = wanted["eos_token_id"]
        ends = frozenset(ends if isinstance(ends, (list, tuple)) else [ends])
    else:
        ends = stop_ids(model)
    if mask is None:
        padded = pad is not None and pad not in ends
        mask = ids != pad if padded else torch.ones_like(ids)
    limits, sampling = _limits(wanted, length, ends, decoder.max_positions), _sampling(wanted)
    strings = wanted.get("stop_strings") or ()
    if strings and tokenizer is None:
        raise ValueError("generate: stop_strings: expected the tokenizer as well (tokenizer=...), got none")

    sequences = []
    for row, real in zip(ids, mask, strict=True):
        prompt = row[real.bool()].tolist()
        for _ in range(count):
            seeded = sampling
            if sampling["temperature"]:
                seeded = sampling | {"seed": int(torch.randint(1 << 62, (1,)))}
            sequence = Running(prompt, Sampling(**seeded), limits)
            sequence.watch = _watch(streamer, strings, tokenizer)
            sequences.append(sequence)
    if streamer is not None:
        streamer.put(ids.cpu())
    rows = min(ROWS, len(sequences))
    generate_all(Batch(decoder, rows=rows, capacity=length + limits.max_new_tokens), sequences)
    if streamer is not None:
        streamer.end()
    longest = max(len(sequence.tokens) for sequence in sequences)
    fill = pad if pad is not None else min(ends, default=0)
    new = torch.tensor([sequence.tokens + [fill] * (longest - len(sequence.tokens)) for sequence in sequences])
    return torch.cat([ids.repeat_interleave(count, 0), new.to(ids)], dim=1)


def _transformers(model: PreTrainedModel, call: dict[str, Any]) -> Any:
    return type(model).generate(model, **{name: value for name, value in call.items() if value is not None})


def _settings(
    model: PreTrainedModel, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
) -> dict[str, Any] | None:
    """What the call, its config and the model's config ask for, in this order; None if something is not known here."""
    wanted: dict[str, Any] = {}
    for config in (model.generation_config, generation_config):
        if config is not None:
            wanted |= {name: value for name, value in config.to_dict().items() if value is not None}
    wanted |= kwargs
    neutral = model.generation_config._get_default_generation_params()
    known = all(
        name in _HANDLED or value is None or value is False or (name in neutral and neutral[name] == value)
        for name, value in wanted.items()
    )
    return wanted if known and wanted.get("use_cache", True) else None


def _limits(wanted: dict[str, Any], length: int, ends: frozenset[int], positions: int) -> Limits:
    """Lengths count the padded prompt, as in transformers, whose default is 20 new tokens."""
    new = wanted.get("max_new_tokens")
    if new is None:
        new = wanted["max_length"] - length if wanted.get("max_length") is not None else min(20, positions - length)
    if new < 1:
        raise ValueError(f"generate: max_new_tokens: expected room for one token after {length}, got {new}")
    least = wanted.get("min_new_tokens")
    if least is None:
        least = (wanted.get("min_length") or 0) - length
    ends = frozenset(token for token in ends if token is not None)
    return Limits(max_new_tokens=new, min_new_tokens=min(max(least, 0), new), stop_ids=ends)


def _sampling(wanted: dict[str, Any]) -> dict[str, Any]:
    """Arguments of :class:`Sampling`; transformers takes the 50 likeliest tokens unless told otherwise."""

    def value(name: str, default: Any) -> Any:
        return default if wanted.get(name) is None else wanted[name]

    options = {"temperature": 0.0, "repetition_penalty": value("repetition_penalty", 1.0)}
    if value("do_sample", False):
        options |= {"temperature": value("temperature", 1.0), "top_k": value("top_k", 50)}
        options |= {"top_p": value("top_p", 1.0), "min_p": value("min_p", 0.0)}
    return options


def _watch(streamer: Any, strings: Any, tokenizer: Any) -> Any:
    text = TextStream(tokenizer, [strings] if isinstance(strings, str) else strings) if strings else None
    if text is None and streamer is None:
        return None

    def watch(token: int) -> bool:
        if streamer is not None:
            streamer.put(torch.tensor([token]))
        if text is not None:
            text.add(token)
        return text is not None and text.stopped

    return watch


def _states(model: PreTrainedModel) -> Iterator[tuple[int, int]]:
    """Where each weight is and how often it was written to."""
    for group in (model.parameters(), model.buffers()):
        for tensor in group:
            yield tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
