"""What a client of OpenAI's API gets."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from effk.runtime import Generator

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]


def events(response: httpx2.Response) -> list[dict[str, Any]]:
    """The events of a stream, which has to end as the API says."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def test_completions(serve: Callable, generator: Generator) -> None:
    expected = generator.complete(["hello", "world"], max_new_tokens=12)
    with serve().client() as client:
        models = client.get("/v1/models").json()
        assert [model["id"] for model in models["data"]] == ["tiny"] and models["object"] == "list"
        body = {"model": "tiny", "prompt": ["hello", "world"], "max_tokens": 12, "temperature": 0}
        answer = client.post("/v1/completions", json=body).json()
        assert answer["object"] == "text_completion" and answer["model"] == "tiny"
        assert [choice["text"] for choice in answer["choices"]] == [one.text for one in expected]
        assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
        assert answer["usage"] == {"prompt_tokens": 10, "completion_tokens": 24, "total_tokens": 34}
        ids = generator.tokenizer("hello")["input_ids"]
        by_ids = client.post("/v1/completions", json={"prompt": ids, "temperature": 0}).json()
        assert by_ids["choices"][0]["text"] == generator.complete(["hello"], max_new_tokens=16)[0].text
        several = client.post("/v1/completions", json={"prompt": [ids, ids], "temperature": 0, "max_tokens": 3}).json()
        assert len(several["choices"]) == 2


def test_streams_are_the_answers_in_pieces(serve: Callable) -> None:
    with serve(interval=0.0).client() as client:
        body = {"prompt": "ab", "max_tokens": 20, "temperature": 1, "seed": 3, "n": 2}
        whole = client.post("/v1/completions", json=body).json()
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        with client.stream("POST", "/v1/completions", json=body) as response:
            got = events(response)
        texts, finishes = ["", ""], [None, None]
        for entry in got[:-1]:
            (choice,) = entry["choices"]
            texts[choice["index"]] += choice["text"]
            finishes[choice["index"]] = choice["finish_reason"]
        assert texts == [choice["text"] for choice in whole["choices"]] and texts[0] != texts[1]
        assert finishes == ["length", "length"] and len(got) > 10
        assert got[-1]["choices"] == [] and got[-1]["usage"] == whole["usage"]
        assert len({entry["id"] for entry in got}) == 1


def test_chats_go_through_the_template(serve: Callable, generator: Generator) -> None:
    prompt = "system: Be brief.\nuser: hi\nA: "
    expected = generator.complete([prompt], max_new_tokens=9)[0].text
    with serve().client() as client:
        body = {"messages": CHAT, "max_completion_tokens": 9, "temperature": 0}
        answer = client.post("/v1/chat/completions", json=body).json()
        assert answer["object"] == "chat.completion" and answer["usage"]["prompt_tokens"] == len(prompt)
        assert answer["choices"][0]["message"] == {"role": "assistant", "content": expected}
        with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
            got = events(response)
        deltas = [entry["choices"][0]["delta"] for entry in got]
        assert deltas[0]["role"] == "assistant" and deltas[-1] == {}
        assert "".join(delta.get("content", "") for delta in deltas) == expected
        assert {entry["object"] for entry in got} == {"chat.completion.chunk"}
        assert "seed" not in body and got[-1]["choices"][0]["finish_reason"] == "length"
        without = client.post("/v1/chat/completions", json={"messages": CHAT, "temperature": 0}).json()
        assert without["usage"]["total_tokens"] == 512  # what the context leaves


def test_stop_strings_seeds_and_log_probabilities(serve: Callable, generator: Generator) -> None:
    options = {"max_new_tokens": 30, "temperature": 1.0, "seed": 8, "top_p": 0.9, "top": 3}
    whole = generator.complete(["xy"], **options)[0]
    stop = whole.text[12:14]
    with serve().client() as client:
        body = {"prompt": "xy", "max_tokens": 30, "seed": 8, "top_p": 0.9, "logprobs": 3, "stop": stop}
        answers = [client.post("/v1/completions", json=body).json()["choices"][0] for _ in range(2)]
        assert answers[0]["text"] == answers[1]["text"] == whole.text[: whole.text.index(stop)]
        assert answers[0]["finish_reason"] == "stop"
        values = answers[0]["logprobs"]["token_logprobs"]
        assert values == pytest.approx([value for value, _ in whole.logprobs[: len(values)]], abs=1e-4)
        assert all(len(top) <= 3 for top in answers[0]["logprobs"]["top_logprobs"])
        chat = {"messages": CHAT, "max_tokens": 4, "logprobs": True, "top_logprobs": 2, "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=chat) as response:
            got = events(response)
        content = [entry for event in got for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"]]
        assert 1 <= len(content) <= 4 and all(len(entry["top_logprobs"]) == 2 for entry in content)


def test_health_and_metrics_count(serve: Callable) -> None:
    running = serve()
    with running.client() as client:
        assert client.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}
        client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 5})
        client.post("/v1/completions", json={"prompt": []})
        metrics = client.get("/metrics").text
    assert 'effk_requests_total{path="/v1/completions",status="200"} 1.0' in metrics
    assert 'effk_requests_total{path="/v1/completions",status="400"} 1.0' in metrics
    assert "effk_generated_tokens_total 5.0" in metrics and "effk_prompt_tokens_total 3.0" in metrics
    assert 'effk_sequences_total{finish="length"} 1.0' in metrics and "effk_first_token_seconds_count 1.0" in metrics
    assert "effk_running 0.0" in metrics


BAD = {
    "no JSON": (b"{", 400, "body"),
    "no object": (b"[]", 400, "body"),
    "not UTF-8": (b'{"prompt": "\xff"}', 400, "body"),
    "no prompt": (b"{}", 400, "prompt"),
    "an empty prompt": (b'{"prompt": ""}', 400, "prompt"),
    "no prompts": (b'{"prompt": []}', 400, "prompt"),
    "a prompt of the wrong type": (b'{"prompt": {"a": 1}}', 400, "prompt"),
    "an id that is none": (b'{"prompt": [1, 9999]}', 400, "ids from 0"),
    "a negative id": (b'{"prompt": [-4]}', 400, "got -4"),
    "a number that is not finite": (b'{"prompt": "a", "temperature": NaN}', 400, "temperature"),
    "a temperature below 0": (b'{"prompt": "a", "temperature": -1}', 400, "temperature"),
    "no probability": (b'{"prompt": "a", "top_p": 0}', 400, "top_p"),
    "no tokens": (b'{"prompt": "a", "max_tokens": 0}', 400, "max_tokens"),
    "too many tokens": (b'{"prompt": "a", "max_tokens": 512}', 400, "at most 512 tokens"),
    "too many choices": (b'{"prompt": "a", "n": 100}', 400, "at most"),
    "an empty stop string": (b'{"prompt": "a", "stop": [""]}', 400, "stop"),
    "another model": (b'{"prompt": "a", "model": "gpt"}', 404, "gpt"),
    "an unsupported option": (b'{"prompt": "a", "logit_bias": {"5": 1}}', 400, "logit_bias"),
    "a huge seed": (b'{"prompt": "a", "seed": -1}', 400, "seed"),
}


def test_malformed_requests_are_refused_in_the_form_of_the_api(serve: Callable) -> None:
    with serve(body=5000).client() as client:
        for name, (body, status, text) in BAD.items():
            response = client.post("/v1/completions", content=body)
            error = response.json()["error"]
            assert response.status_code == status and text in error["message"] and error["type"], (name, error)
        chat = client.post(
            "/v1/chat/completions", json={"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}
        )
        assert chat.status_code == 400 and "messages" in chat.json()["error"]["message"]
        for content in (b'{"prompt": "' + b"a" * 6000, iter([b"a" * 3000] * 3)):  # with a declared length, and in parts
            assert client.post("/v1/completions", content=content).status_code == 413
        assert client.get("/v1/completions").status_code == 405
        assert client.get("/nothing").json()["error"]["message"].startswith("GET /nothing")
        assert client.post("/v1/completions", json={"prompt": "a", "echo": False, "user": "me"}).status_code == 200


def test_the_key_is_needed(serve: Callable) -> None:
    with serve(api_key="secret").client() as client:
        assert client.get("/v1/models").status_code == 401
        assert client.get("/v1/models", headers={"authorization": "Bearer wrong"}).status_code == 401
        assert client.get("/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200
        assert client.get("/health").status_code == 200
