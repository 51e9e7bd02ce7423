"""``effk generate``: text from a model."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import torch
import typer

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
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Generate text with MODEL."""
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens: expected at least 1, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"--temperature: expected 0 or a positive number, got {temperature}")
    wanted = parse_dtype(dtype)
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise ValueError("--prompt: expected some text, got none")
    opened = open_model(model, wanted)
    ids = encode(opened, text, chat=chat)
    check_positions("--max-new-tokens and prompt", opened, ids.shape[1] + max_new_tokens)
    options = {"do_sample": True, "temperature": temperature} if temperature else {}
    torch.manual_seed(seed)
    start = time.perf_counter()
    new = generate_ids(opened.model, ids, max_new_tokens, **options)
    seconds = time.perf_counter() - start
    answer = opened.need_tokenizer("generate").decode(new, skip_special_tokens=True)
    record = {
        "model": model,
        "prompt": text,
        "text": answer,
        "prompt_tokens": ids.shape[1],
        "new_tokens": len(new),
        "seconds": seconds,
        "tokens_per_second": len(new) / seconds,
    }
    result(record, as_json, answer)
    say(f"{len(new)} tokens, {len(new) / seconds:.1f} a second, reading the prompt of {ids.shape[1]} included")


def encode(opened: Opened, text: str, *, chat: bool) -> torch.Tensor:
    """Token ids int64 ``[1, length]`` of a prompt, in the chat template if wanted and there is one."""
    tokenizer = opened.need_tokenizer("text")
    if chat and getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(text)["input_ids"]
    return torch.tensor([ids], dtype=torch.int64)
