"""``effk generate``: text from a model."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import torch
import typer

from ..runtime.errors import UnsupportedModel
from .decoding import Cache, Speculate, Threads, check_decoding, make_generator
from .models import Dtype, Model, Opened, open_model, parse_dtype
from .speed import generate_ids
from .terminal import Json, result, say
from .texts import check_positions


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The text to go on from; - reads it from stdin.")],
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens.")] = 64,
    chat: Annotated[bool, typer.Option(help="Put the prompt into the model's chat template, if it has one.")] = True,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token; else sample.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Only the so many likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Only the likeliest that reach this probability; 1: all.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Only tokens so likely, as a fraction of the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: avoid what occurred.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; can be repeated.")] = None,
    speculate: Speculate = "none",
    threads: Threads = None,
    cache: Cache = "fp16",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Generate text with MODEL, printed as it comes."""
    from ..runtime.sampling import Sampling

    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens: expected at least 1, got {max_new_tokens}")
    filters = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty, "seed": seed}
    try:
        Sampling(temperature=temperature, **filters)
    except ValueError as error:
        raise ValueError(f"--{error}".replace("_", "-", 1)) from None
    check_decoding(threads, cache, speculate)
    wanted = parse_dtype(dtype)
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise ValueError("--prompt: expected some text, got none")
    opened = open_model(model, wanted)
    ids = encode(opened, text, chat=chat)
    check_positions("--max-new-tokens and prompt", opened, len(ids) + max_new_tokens)
    try:
        generator = make_generator(opened, threads, cache, speculate)
    except UnsupportedModel as reason:
        if stop:
            raise ValueError(f"--stop: expected none for this model, got some: {reason}") from None
        options = filters | {"temperature": temperature, "do_sample": True} if temperature else {}
        record = _by_transformers(opened, ids, max_new_tokens, seed, options, reason)
        result({"model": model, "prompt": text} | record, as_json, record["text"])
        return
    start = time.perf_counter()
    options = filters | {"temperature": temperature, "max_new_tokens": max_new_tokens, "stop": stop or []}
    stream = generator.stream(ids, **options)
    for piece in stream:
        if not as_json:
            print(piece, end="", flush=True)
    seconds = time.perf_counter() - start
    sequence = stream.sequence
    new, reading = len(sequence.tokens), sequence.times["first"] - start
    decoding = (new - 1) / (sequence.times["ended"] - sequence.times["first"]) if new > 1 else None
    record = {
        "model": model,
        "prompt": text,
        "text": stream.text,
        "finish": sequence.finish,
        "prompt_tokens": len(ids),
        "new_tokens": new,
        "seconds": seconds,
        "tokens_per_second": new / seconds,
        "prompt_tokens_per_second": len(ids) / reading,
        "decoded_tokens_per_second": decoding,
        "drafted": sequence.drafted,
        "accepted": sequence.accepted,
    }
    if as_json:
        result(record, True)
        return
    print()
    say(f"prompt: {len(ids)} tokens, {len(ids) / reading:.0f} a second")
    guesses = f", {sequence.accepted} of {sequence.drafted} guesses right" if sequence.drafted else ""
    if decoding is not None:
        say(f"answer: {new} tokens, {decoding:.1f} a second{guesses}")


def encode(opened: Opened, text: str, *, chat: bool) -> list[int]:
    """Token ids of a prompt, in the chat template if wanted and there is one."""
    from ..runtime.generate import encode

    tokenizer = opened.need_tokenizer("text")
    if chat and getattr(tokenizer, "chat_template", None):
        return encode(tokenizer, [{"role": "user", "content": text}])
    return encode(tokenizer, text)


def _by_transformers(
    opened: Opened, ids: list[int], new: int, seed: int, options: dict[str, Any], reason: UnsupportedModel
) -> dict[str, Any]:
    """What transformers' own ``generate`` gives for a model that the runtime cannot run."""
    say(f"{reason}; transformers generates")
    torch.manual_seed(seed)
    options.pop("seed", None)
    start = time.perf_counter()
    tokens = generate_ids(opened.model, torch.tensor([ids]), new, **options)
    seconds = time.perf_counter() - start
    text = opened.need_tokenizer("text").decode(tokens, skip_special_tokens=True)
    counts = {"prompt_tokens": len(ids), "new_tokens": len(tokens)}
    return {"text": text} | counts | {"seconds": seconds, "tokens_per_second": len(tokens) / seconds}
