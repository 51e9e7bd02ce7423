"""Clients of `python -m bench.serve`, in a process of their own and with the standard library only, so that they take little
of the machine that is being measured: `serve_clients.py HOST PORT CLIENTS SECONDS PROMPT NEW VOCABULARY`.

Each client keeps one connection and streams one completion after the other until the time is over; then the last one is
finished. The process sleeps POLL seconds between looks at its sockets: clients that read each event at once would be woken, and
take a core from the kernels, for every one of them. Prints one JSON object: completions, tokens, events, what was lost,
seconds, seconds of CPU that the clients took themselves, and times to the first token (as coarse as POLL).
"""

from __future__ import annotations

import json
import random
import selectors
import socket
import sys
import time

END = b"0\r\n\r\n"  # the last chunk; events have no carriage returns
POLL = 0.01


class Client:
    """One connection and the completion that it waits for."""

    def __init__(self, number: int, host: str, port: int, prompt: int, new: int, vocabulary: int) -> None:
        self.random, self.host, self.prompt, self.new, self.vocabulary = (
            random.Random(number), host, prompt, new, vocabulary
        )  # fmt: skip
        self.socket = socket.create_connection((host, port))
        self.got, self.start, self.begun = bytearray(), 0.0, False
        self.completions, self.events = 0, 0
        self.first: list[float] = []
        self.lost: list[str] = []

    def ask(self) -> None:
        """Send the next request."""
        ids = [self.random.randrange(self.vocabulary) for _ in range(self.prompt)]
        body = {"prompt": ids, "max_tokens": self.new, "temperature": 0, "ignore_eos": True, "stream": True}
        data = json.dumps(body | {"stream_options": {"include_usage": True}}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {self.host}\r\ncontent-length: {len(data)}\r\n\r\n"
        self.got.clear()
        self.start, self.begun = time.perf_counter(), False
        self.socket.sendall(head.encode() + data)

    def read(self) -> bool:
        """Take what is there; True when the answer is complete, or lost."""
        part = self.socket.recv(1 << 16)
        if not self.begun and b"data:" in part:
            self.begun = True
            self.first.append(time.perf_counter() - self.start)
        self.got += part
        if part and not self.got.endswith(END):
            return False
        got = bytes(self.got)
        usage = got.rpartition(b'"completion_tokens":')[2].partition(b",")[0]
        if b"data: [DONE]" in got and usage == str(self.new).encode():
            self.completions += 1
            self.events += got.count(b"data: {")
        else:
            self.lost.append(got[-300:].decode(errors="replace"))
        return True


def main(host: str, port: int, clients: int, seconds: float, prompt: int, new: int, vocabulary: int) -> None:
    """All of them at once."""
    start = time.perf_counter()
    each = [Client(number, host, port, prompt, new, vocabulary) for number in range(clients)]
    with selectors.DefaultSelector() as selector:
        for one in each:
            selector.register(one.socket, selectors.EVENT_READ, one)
            one.ask()
        while selector.get_map():
            for key, _ in selector.select():
                one = key.data
                if one.read():
                    if time.perf_counter() < start + seconds and not one.lost:
                        one.ask()
                    else:
                        selector.unregister(one.socket)
                        one.socket.close()
            time.sleep(POLL)
    took = time.perf_counter() - start
    first = sorted(seconds for one in each for seconds in one.first)
    record = {
        "clients": clients,
        "completions": sum(one.completions for one in each),
        "tokens": sum(one.completions for one in each) * new,
        "events": sum(one.events for one in each),
        "clients_cpu_seconds": time.process_time(),
        "lost": [text for one in each for text in one.lost],
        "seconds": took,
        "first_median": first[len(first) // 2] if first else None,
        "first_worst": first[-1] if first else None,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    _host, _port, _clients, _seconds, *_rest = sys.argv[1:]
    main(_host, int(_port), int(_clients), float(_seconds), *map(int, _rest))
