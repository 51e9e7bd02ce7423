"""`python -m bench.serve`: many streaming clients against `effk serve`, beside the same work in the library alone.

Every client, and every row of the library's batch, asks for one completion after the other until the time is over and then
finishes the last. The library runs before and after the server, so that the machine's drift shows. Clients share the
machine's cores with the server; they are a process of their own that does as little as it can.
"""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
import uvicorn

import effk
from effk.cli.models import open_model
from effk.compress.passes.rtn import Rtn
from effk.runtime import Generator
from effk.runtime.batch import Batch, Sequence
from effk.runtime.text import TextStream
from effk.serve import Settings
from effk.serve.app import Server

from .timing import ForeignCpu

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[
        str, typer.Argument(help="A folder, or smollm2, which is compressed to 4 bits first.")
    ] = "smollm2",
    clients: int = 16,
    seconds: float = 60.0,
    prompt: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 32,
    new: Annotated[int, typer.Option(help="Tokens of each answer.")] = 128,
    threads: int = 2,
    cache: str = "fp16",
    interval: Annotated[float, typer.Option(help="The server's: seconds between two events of a stream.")] = (
        Settings.interval
    ),
) -> None:
    """Print one JSON object; exit with 1 if a completion was lost."""
    torch.set_num_threads(threads)
    opened = open_model(model)
    if not opened.compressed and model == "smollm2":
        effk.compress(opened.model, Rtn(bits=4, group_size=64, compute="int8"))
    generator = Generator(opened.model, opened.tokenizer, cache=cache)
    foreign = ForeignCpu()
    library = [alone(generator, clients, seconds / 6, prompt, new)]
    served = behind_server(generator, clients, seconds, prompt, new, interval)
    library.append(alone(generator, clients, seconds / 6, prompt, new))
    rate, best = served["tokens"] / served["seconds"], sum(library) / 2
    record = {
        "model": model,
        "threads": threads,
        "prompt": prompt,
        "new": new,
        "interval": interval,
        "decoder": type(generator.decoder).__name__,
    }
    record |= {"library_tokens_per_second": library, "server_tokens_per_second": rate, "share": rate / best}
    record |= {"foreign_cpu": foreign.share()} | served
    print(json.dumps(record, indent=1))
    raise typer.Exit(bool(served["lost"]))


def alone(generator: Generator, rows: int, seconds: float, prompt: int, new: int) -> float:
    """Tokens per second of the library's batch: the clients' prompts, and a text of each answer when it is there."""
    batch = Batch(generator.decoder, rows=rows, capacity=prompt + new, cache=generator.cache)
    running: dict[Sequence, tuple[random.Random, TextStream]] = {}

    def add(source: random.Random) -> None:
        ids = [source.randrange(generator.decoder.vocab_size) for _ in range(prompt)]
        sequence, text = generator.sequence(ids, max_new_tokens=new, stop_ids=frozenset())
        running[batch.add(sequence)] = source, text

    tokens, start = 0, time.perf_counter()
    for number in range(rows):
        add(random.Random(number))
    while running:
        for sequence in batch.step():
            if sequence.finish is not None:
                source, text = running.pop(sequence)
                text.finish(sequence.tokens)
                tokens += len(sequence.tokens)
                if time.perf_counter() < start + seconds:
                    add(source)
    return tokens / (time.perf_counter() - start)


def behind_server(
    generator: Generator, clients: int, seconds: float, prompt: int, new: int, interval: float
) -> dict[str, object]:
    """What the clients of a server in this process tell."""
    settings = Settings(rows=clients, context=prompt + new, queue=clients, interval=interval)
    config = uvicorn.Config(Server(generator, settings).app(), access_log=False, log_level="warning")
    http = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()
        thread = threading.Thread(target=http.run, kwargs={"sockets": [listener]})
        thread.start()
        command = [sys.executable, str(Path(__file__).parent / "serve_clients.py"), host]
        numbers = (port, clients, seconds, prompt, new, generator.decoder.vocab_size)
        try:
            done = subprocess.run([*command, *map(str, numbers)], stdout=subprocess.PIPE, check=True, text=True)
        finally:
            http.should_exit = True
            thread.join()
    return json.loads(done.stdout)


if __name__ == "__main__":
    app()
