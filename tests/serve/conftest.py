"""A server on a real socket."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest
import torch
import uvicorn
from transformers import LlamaConfig, LlamaForCausalLM

from cli.tiny import byte_tokenizer
from effk.runtime import Generator
from effk.runtime.fallback import HuggingFaceDecoder
from effk.serve import Settings
from effk.serve.app import Server

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
)


@dataclass
class Running:
    """A server, a client for it, and the thread it runs in."""

    url: str
    server: Server
    http: uvicorn.Server
    thread: threading.Thread

    def client(self, **options: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=60, **options)

    def stop(self) -> None:
        self.http.should_exit = True
        self.thread.join(30)


class Slow:
    """A decoder that takes its time at every step, and fails when it meets a token."""

    def __init__(self, decoder: HuggingFaceDecoder, seconds: float, fails_at: int = -1) -> None:
        self.decoder, self.seconds, self.fails_at = decoder, seconds, fails_at
        self.vocab_size, self.max_positions, self.cache = decoder.vocab_size, decoder.max_positions, decoder.cache

    def step(self, runs: Any, cache: Any, logits: str = "last") -> torch.Tensor:
        time.sleep(self.seconds)
        if any(self.fails_at in ids for _, ids in runs):
            raise RuntimeError("broken")
        return self.decoder.step(runs, cache, logits)


@pytest.fixture(scope="session")
def generator() -> Generator:
    """A random Llama over bytes, of 512 positions, which never ends by itself."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=0,
    )  # fmt: skip
    made = Generator(LlamaForCausalLM(config).eval(), tokenizer)
    made.stop_ids = frozenset()
    return made


@pytest.fixture
def serve(generator: Generator) -> Iterator[Callable[..., Running]]:
    """``serve(seconds=0.01, queue=2)`` starts a server with a slow decoder and some settings."""
    started: list[Running] = []

    def start(seconds: float = 0.0, fails_at: int = -1, **settings: Any) -> Running:
        decoder = Slow(generator.decoder, seconds, fails_at)
        own = Generator(generator.model, generator.tokenizer, decoder=decoder)
        own.stop_ids = frozenset()
        server = Server(own, Settings(**{"name": "tiny"} | settings))
        http = uvicorn.Server(
            uvicorn.Config(server.app(), port=0, log_level="warning", access_log=False, timeout_graceful_shutdown=20)
        )
        thread = threading.Thread(target=http.run)
        thread.start()
        while not http.started:
            time.sleep(0.01)
        port = http.servers[0].sockets[0].getsockname()[1]
        started.append(Running(f"http://127.0.0.1:{port}", server, http, thread))
        return started[-1]

    yield start
    for one in started:
        one.stop()


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for something that is going to be true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
