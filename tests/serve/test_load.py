"""Many clients, full queues, clients that leave, time that runs out, and the end of the server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx2

from effk.runtime import Generator
from serve.conftest import until


def stream(url: str, prompt: str, tokens: int) -> str:
    """The text of a streamed completion that must arrive whole."""
    text, finish = "", None
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    with httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                choice = json.loads(line[6:])["choices"][0]
                text, finish = text + choice["text"], choice["finish_reason"] or finish
    assert finish == "length"
    return text


def test_many_clients_at_once_get_what_each_would_get_alone(serve: Callable, generator: Generator) -> None:
    prompts = [chr(97 + n % 26) * (1 + n % 7) for n in range(40)]
    expected = [one.text for one in generator.complete(prompts, max_new_tokens=15)]
    running = serve(rows=8, queue=64)
    with ThreadPoolExecutor(40) as pool:
        got = list(pool.map(lambda prompt: stream(running.url, prompt, 15), prompts))
    assert got == expected
    assert not running.server._jobs and not running.server.batch.running


def test_tokens_within_the_interval_share_an_event(serve: Callable, generator: Generator) -> None:
    (expected,) = generator.complete(["abc"], max_new_tokens=40)
    for interval, least, most in ((0.0, 20, 41), (60.0, 3, 3)):
        running = serve(seconds=0.01, interval=interval)
        body = {"prompt": "abc", "max_tokens": 40, "temperature": 0, "stream": True}
        lines = httpx2.post(f"{running.url}/v1/completions", json=body, timeout=60).text.splitlines()
        choices = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
        assert "".join(choice["text"] for choice in choices) == expected.text
        # The first token and the end wait for nothing; the loop may be late for a few.
        assert least <= len(choices) <= most and choices[0]["text"] == generator.tokenizer.decode(expected.tokens[:1])
        assert choices[-1]["finish_reason"] == "length"


def test_a_full_queue_says_so_and_serves_again(serve: Callable) -> None:
    running = serve(seconds=0.05, rows=1, queue=2)
    with running.client() as client, ThreadPoolExecutor(12) as pool:
        body = {"prompt": "a", "max_tokens": 8}
        responses = list(
            pool.map(lambda _: httpx2.post(f"{running.url}/v1/completions", json=body, timeout=60), range(12))
        )
        codes = sorted(response.status_code for response in responses)
        assert set(codes) == {200, 429} and codes.count(200) >= 3
        for response in responses:
            if response.status_code == 429:
                assert 1 <= int(response.headers["retry-after"]) <= 60
                assert "waiting" in response.json()["error"]["message"]
        assert client.post("/v1/completions", json=body).status_code == 200


def test_a_client_that_leaves_frees_its_row(serve: Callable) -> None:
    running = serve(seconds=0.02, rows=1)
    batch = running.server.batch
    for streams in (True, False):
        body = json.dumps({"prompt": "a", "max_tokens": 400, "stream": streams})
        leaving = threading.Thread(target=_leave, args=(running.url, body, lambda: bool(batch.running)))
        leaving.start()
        until(lambda: bool(batch.running))
        leaving.join()
        until(lambda: not batch.running)
        until(lambda: not running.server._jobs)
    with running.client() as client:
        assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
        lines = client.get("/metrics").text.splitlines()
        assert 'effk_sequences_total{finish="cancelled"} 2.0' in lines, [
            line for line in lines if line.startswith("effk_seq")
        ]


def _leave(url: str, body: str, begun: Callable[[], bool]) -> None:
    """Send a request on a bare socket, and close it once decoding has begun."""
    import socket

    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall((head + body).encode())
        until(begun)


def test_requests_that_take_too_long_end(serve: Callable) -> None:
    running = serve(seconds=0.05, timeout=0.5)
    with running.client() as client:
        body = {"prompt": "a", "max_tokens": 200}
        late = client.post("/v1/completions", json=body)
        assert late.status_code == 504 and "0.5 s" in late.json()["error"]["message"]
        streamed = client.post("/v1/completions", json=body | {"stream": True}).text
        last = json.loads(streamed.strip().splitlines()[-1][6:])
        assert last["error"]["code"] == "timeout" and streamed.count("data:") > 1
    until(lambda: not running.server.batch.running)


def test_a_failing_sequence_is_reported_to_its_client_only(serve: Callable, generator: Generator) -> None:
    (bad,) = generator.tokenizer("\x00")["input_ids"]
    running = serve(seconds=0.01, fails_at=bad)
    with ThreadPoolExecutor(4) as pool, running.client() as client:
        good = [pool.submit(stream, running.url, "ab", 20) for _ in range(3)]
        assert client.post("/v1/completions", json={"prompt": "a\x00b"}).status_code == 500
        streamed = client.post("/v1/completions", json={"prompt": "a\x00b", "stream": True}).text
        assert "internal_error" in streamed and "[DONE]" not in streamed
        assert all(future.result() for future in good)


def test_the_event_loop_answers_while_the_model_works(serve: Callable) -> None:
    running = serve(seconds=0.5)
    with running.client() as client, ThreadPoolExecutor(1) as pool:
        future = pool.submit(client.post, "/v1/completions", json={"prompt": "a", "max_tokens": 4})
        until(lambda: bool(running.server.batch.running))
        answered = 0
        while not future.done():
            with running.client() as other:
                assert other.get("/health").json()["running"] <= 1
            answered += 1
        assert answered > 6  # in four steps of half a second: more than one a step


def test_stopping_finishes_what_runs(serve: Callable) -> None:
    running = serve(seconds=0.03, rows=2)
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(stream, running.url, "abc", 20) for _ in range(3)]  # one of them waits for a row
        until(lambda: len(running.server._jobs) == 3)
        running.stop()
        assert len({future.result() for future in futures}) == 1
    assert not running.thread.is_alive() and not running.server.worker._thread.is_alive()
    try:
        httpx2.get(running.url)
        raise AssertionError("the server still answers")
    except httpx2.ConnectError:
        pass


def test_a_decoding_thread_that_dies_is_noticed(serve: Callable) -> None:
    running = serve(seconds=0.02)
    with ThreadPoolExecutor(1) as pool, running.client() as client:
        future = pool.submit(client.post, "/v1/completions", json={"prompt": "a", "max_tokens": 400})
        until(lambda: bool(running.server.batch.running))
        running.server.batch._pieces = None  # a mistake where none can be a sequence's
        assert future.result().status_code == 503
        assert client.get("/health").status_code == 503
        again = client.post("/v1/completions", json={"prompt": "a"})
        assert again.status_code == 503 and "failed" in again.json()["error"]["message"]
