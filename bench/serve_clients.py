"""Clients of `python -m bench.serve`, in a process of their own and with the standard library only, so that they take little
of the machine that is being measured: `serve_clients.py HOST PORT CLIENTS SECONDS PROMPT NEW VOCABULARY`.

Each client keeps one connection and streams one completion after the other until the time is over; then the last one is
finished. Prints one JSON object: completions, tokens, what was lost, seconds, and times to the first token.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time

END = b"0\r\n\r\n"  # the last chunk; events have no carriage returns


async def client(number: int, host: str, port: int, deadline: float, prompt: int, new: int, vocabulary: int) -> dict:
    """Completions of one client."""
    source = random.Random(number)
    tally = {"completions": 0, "tokens": 0, "first": [], "lost": []}
    reader, writer = await asyncio.open_connection(host, port)
    while time.perf_counter() < deadline:
        ids = [source.randrange(vocabulary) for _ in range(prompt)]
        body = {"prompt": ids, "max_tokens": new, "temperature": 0, "ignore_eos": True, "stream": True}
        data = json.dumps(body | {"stream_options": {"include_usage": True}}).encode()
        start = time.perf_counter()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        got = bytearray()
        while not got.endswith(END):
            part = await reader.read(1 << 16)
            if not part:
                break
            if b"data:" not in got and b"data:" in part:
                tally["first"].append(time.perf_counter() - start)
            got += part
        usage = bytes(got).rpartition(b'"completion_tokens":')[2].partition(b",")[0]
        if b"data: [DONE]" in got and usage == str(new).encode():
            tally["completions"] += 1
            tally["tokens"] += new
        else:
            tally["lost"].append(bytes(got[-300:]).decode(errors="replace"))
            if not part:
                break
    writer.close()
    return tally


async def main(host: str, port: int, clients: int, seconds: float, prompt: int, new: int, vocabulary: int) -> None:
    """All of them at once."""
    start = time.perf_counter()
    each = await asyncio.gather(
        *(client(n, host, port, start + seconds, prompt, new, vocabulary) for n in range(clients)),
    )
    took = time.perf_counter() - start
    first = sorted(one for tally in each for one in tally["first"])
    print(
        json.dumps(
            {
                "clients": clients,
                "completions": sum(tally["completions"] for tally in each),
                "tokens": sum(tally["tokens"] for tally in each),
                "lost": [text for tally in each for text in tally["lost"]],
                "seconds": took,
                "first_median": first[len(first) // 2] if first else None,
                "first_worst": first[-1] if first else None,
            }
        )
    )


if __name__ == "__main__":
    _host, _port, _clients, _seconds, *_rest = sys.argv[1:]
    asyncio.run(main(_host, int(_port), int(_clients), float(_seconds), *map(int, _rest)))
