"""The ASGI application: routes, limits and errors. Decoding happens in :class:`Worker`; nothing here waits for it but by
``await``."""

from __future__ import annotations

import asyncio
import copy
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..runtime.batch import Batch, Sequence
from ..runtime.generate import Generator
from ..runtime.text import TextStream
from ..runtime.threads import release_threads
from .answers import DONE, Chat, Completions, LogProbs, event, failure
from .metrics import Metrics
from .requests import ChatRequest, CompletionRequest
from .settings import Settings
from .worker import QueueFull, Stopped, Worker

_LOG = logging.getLogger(__name__)
_CLOSED = 499  # a client that went away; in metrics only
_GRACE = 30.0  # seconds beyond the timeout for a client to read what is there


class Refusal(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
        self.status, self.body = status, failure(message, kind, code)
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Job:
    """The sequences of one request."""

    def __init__(self, pairs: list[tuple[Sequence, TextStream]], copies: int) -> None:
        self.sequences = [sequence for sequence, _ in pairs]
        self.pairs, self.copies = pairs, copies
        self.changed = asyncio.Event()
        self.expired, self.timer = False, None

    def expire(self) -> None:
        """The time is over."""
        self.expired = True
        self.changed.set()

    async def change(self) -> None:
        """Wait for tokens or an end.

        Raises:
            TimeoutError: the time is over.
        """
        await self.changed.wait()
        self.changed.clear()
        if self.expired:
            raise TimeoutError

    def logprobs(self, index: int, start: int = 0) -> LogProbs | None:
        """Of the tokens of one sequence from ``start`` on; None if not asked for."""
        sequence = self.sequences[index]
        if sequence.top is None:
            return None
        ready = sequence.logprobs[start:]
        return [(token, *entry) for token, entry in zip(sequence.tokens[start:], ready, strict=False)]

    def usage(self) -> dict[str, int]:
        """Numbers of tokens; a prompt counts once, whatever the number of its choices."""
        prompt = sum(len(sequence.prompt) for sequence in self.sequences[:: self.copies])
        new = sum(len(sequence.tokens) for sequence in self.sequences)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


class Server:
    """A model being served; :meth:`app` is the application.

    Args:
        generator: with a tokenizer.
        settings: limits.
    """

    def __init__(self, generator: Generator, settings: Settings) -> None:
        if generator.tokenizer is None:
            raise ValueError("serve: generator: expected one with a tokenizer, got none")
        self.generator, self.settings = generator, settings
        self.batch = Batch(
            generator.decoder,
            rows=settings.rows,
            capacity=settings.context,
            cache=generator.cache,
            drafter=generator.drafter,
        )
        self.metrics = Metrics(self.batch)
        self.worker = Worker(self.batch, settings.rows, settings.queue, self._deliver, settings.interval)
        release_threads()  # those with which the model was loaded
        self._jobs: dict[Sequence, Job] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        # Encoding a long prompt takes tenths of seconds; one thread, as tokenizers keep state, and not that of decoding.
        self._encoder = ThreadPoolExecutor(1, "effk-encode")
        self._encoding = Generator.encode.__get__(_with_tokenizer(generator, copy.deepcopy(generator.tokenizer)))

    def app(self) -> Starlette:
        """The ASGI application; its lifespan starts and stops the decoding thread."""
        routes = [
            Route("/v1/models", self._counted(self.models), methods=["GET"]),
            Route("/v1/completions", self._counted(self.completions), methods=["POST"]),
            Route("/v1/chat/completions", self._counted(self.chat), methods=["POST"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/metrics", self.show_metrics, methods=["GET"]),
        ]
        handlers = {HTTPException: _http_error}
        return Starlette(routes=routes, lifespan=self._lifespan, exception_handlers=handlers)

    # Routes

    async def models(self, request: Request) -> Response:
        entry = {"id": self.settings.name, "object": "model", "created": 0, "owned_by": "effk"}
        return JSONResponse({"object": "list", "data": [entry | {"context_length": self.batch.capacity}]})

    async def health(self, request: Request) -> Response:
        """200 while requests are taken."""
        sound = self.worker.failure is None and self._loop is not None
        state = {"status": "ok" if sound else "failed"}
        state |= {"running": len(self.batch.running), "waiting": len(self.batch.waiting)}
        return JSONResponse(state, 200 if sound else 503)

    async def show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, CompletionRequest, Completions)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, ChatRequest, Chat)

    # One request

    async def _answer(self, request: Request, kind: type, form: type[Completions]) -> Response:
        try:
            wanted = kind.model_validate_json(await self._body(request))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise Refusal(400, f"{where or 'body'}: {first['msg']}") from None
        if wanted.model is not None and wanted.model != self.settings.name:
            raise Refusal(404, f"model: expected {self.settings.name!r}, got {wanted.model!r:.200}", "model_not_found")
        if (name := wanted.unsupported()) is not None:
            raise Refusal(400, f"{name}: this server does not support it", "unsupported_parameter")
        job = await self._submit(wanted)
        answer = form(self.settings.name, self._token_text)
        if wanted.stream:
            usage = wanted.stream_options is not None and wanted.stream_options.include_usage
            return EventStream(self._events(job, answer, usage), self.settings.timeout + _GRACE)
        try:
            await self._unless_gone(request, self._ended(job))
        except TimeoutError:
            raise Refusal(504, f"the request took more than {self.settings.timeout:g} s", "timeout") from None
        finally:
            self._forget(job)
        choices = []
        for index, (sequence, text) in enumerate(job.pairs):
            self._expect_sound(sequence)
            choices.append(answer.choice(index, text.finish(sequence.tokens), sequence.finish, job.logprobs(index)))
        return JSONResponse(answer.whole(choices, job.usage()))

    async def _submit(self, wanted: Any) -> Job:
        """Queue what a request asks for."""
        count = len(wanted.prompts()) * wanted.n
        if count > self.settings.rows:
            raise Refusal(400, f"prompts and n: expected at most {self.settings.rows} sequences, got {count}")
        loop, pairs = asyncio.get_running_loop(), []
        try:
            for prompt in wanted.prompts():
                ids = await loop.run_in_executor(self._encoder, self._encoding, prompt)
                length = wanted.length or max(1, self.batch.capacity - len(ids))
                for number in range(wanted.n):
                    seed = None if wanted.seed is None else wanted.seed + number
                    options = wanted.options() | {"max_new_tokens": length, "seed": seed, "top": wanted.top}
                    pairs.append(self.generator.sequence(ids, **options))
            if not pairs:
                raise Refusal(400, "prompt: expected at least one, got none")
            job = Job(pairs, wanted.n)
            self._jobs |= dict.fromkeys(job.sequences, job)
            try:
                self.worker.submit(job.sequences)
            except BaseException:
                self._forget(job)
                raise
            job.timer = loop.call_later(self.settings.timeout, job.expire)
            return job
        except QueueFull as full:
            raise Refusal(429, str(full), "queue_full", retry_after=str(full.retry_after)) from None
        except Stopped as stopped:
            raise Refusal(503, str(stopped), "unavailable", retry_after="30") from None
        except ValueError as error:
            code = "context_length_exceeded" if "tokens together" in str(error) else None
            raise Refusal(400, str(error), code) from None

    async def _ended(self, job: Job) -> None:
        while any(sequence.finish is None for sequence in job.sequences):
            await job.change()

    async def _events(self, job: Job, answer: Completions, usage: bool) -> AsyncIterator[bytes]:
        """Server-sent events of a job; tokens share one if they come within ``settings.interval`` or the client reads slowly."""
        count = len(job.pairs)
        given, told, open_ = [0] * count, [0] * count, set(range(count))
        try:
            yield b"".join(answer.first(index) for index in range(count))
            while open_:
                await job.change()
                events = []
                for index in sorted(open_):
                    sequence, text = job.pairs[index]
                    finish = sequence.finish  # before the text: what came later waits for the next turn
                    if finish is None:
                        text.follow(sequence.tokens)
                    else:
                        text.finish(sequence.tokens)
                    whole = text.text
                    if len(whole) > given[index]:
                        logprobs = job.logprobs(index, told[index])
                        told[index] += len(logprobs or ())
                        events.append(answer.piece(index, whole[given[index] :], logprobs))
                        given[index] = len(whole)
                    if finish is not None:
                        self._expect_sound(sequence)
                        events.append(answer.last(index, finish))
                        open_.remove(index)
                if events:
                    yield b"".join(events)
            yield (answer.usage(job.usage()) if usage else b"") + DONE
        except TimeoutError:
            message = f"the request took more than {self.settings.timeout:g} s"
            yield event(failure(message, "server_error", "timeout"))
        except Refusal as refusal:
            yield event(refusal.body)
        finally:
            self._forget(job)

    def _forget(self, job: Job) -> None:
        """A request is over; what of it still runs ends."""
        if job.timer is not None:
            job.timer.cancel()
        for sequence in job.sequences:
            self._jobs.pop(sequence, None)
        running = [sequence for sequence in job.sequences if sequence.finish is None]
        if running:
            self.worker.cancel(running)

    def _expect_sound(self, sequence: Sequence) -> None:
        if sequence.finish == "error":
            _LOG.error("a sequence failed", exc_info=sequence.error)
            raise Refusal(500, "decoding this prompt failed", "internal_error")
        if sequence.finish == "cancelled":
            raise Refusal(503, "the server stopped before the answer was complete", "unavailable")

    # Around requests

    def _counted(self, route: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """A route of ``/v1``: needs the key, turns refusals into answers, and is counted."""

        async def call(request: Request) -> Response:
            try:
                self._authorise(request)
                response = await route(request)
            except Refusal as refusal:
                response = JSONResponse(refusal.body, refusal.status, refusal.headers)
            except ClientDisconnect:
                response = Response(status_code=_CLOSED)
            except Exception:
                _LOG.exception("a request failed")
                response = JSONResponse(failure("the server made a mistake", "server_error", "internal_error"), 500)
            self.metrics.requests.labels(request.url.path, response.status_code).inc()
            return response

        return call

    def _authorise(self, request: Request) -> None:
        if self.settings.api_key is None:
            return
        shown = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(shown, f"Bearer {self.settings.api_key}".encode()):
            raise Refusal(401, "expected the server's key as 'Authorization: Bearer KEY'", "invalid_api_key")

    async def _body(self, request: Request) -> bytes:
        try:
            return await asyncio.wait_for(self._read(request), self.settings.timeout)
        except asyncio.TimeoutError:
            raise Refusal(408, "the body did not come in time", "timeout", connection="close") from None

    async def _read(self, request: Request) -> bytes:
        limit, body = self.settings.body, bytearray()
        declared = request.headers.get("content-length", "")
        large = declared.isdigit() and int(declared) > limit
        if not large:
            async for part in request.stream():
                body += part
                if large := len(body) > limit:
                    break
        if large:
            raise Refusal(413, f"body: expected at most {limit} bytes", "body_too_large", connection="close")
        return bytes(body)

    async def _unless_gone(self, request: Request, work: Any) -> None:
        """Await ``work`` while the client is there.

        Raises:
            ClientDisconnect: it went away first.
        """
        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request.receive))
        try:
            await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientDisconnect
        finally:
            await _dismiss(task, gone)

    def _token_text(self, token: int) -> str:
        return self.generator.tokenizer.decode([token])

    def _deliver(self, changed: list[Sequence], ended: list[Sequence]) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._notify, changed, ended)

    def _notify(self, changed: list[Sequence], ended: list[Sequence]) -> None:
        for sequence in changed:
            if (job := self._jobs.get(sequence)) is not None:
                job.changed.set()
        for sequence in ended:
            self.metrics.count(sequence)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self._loop = asyncio.get_running_loop()
        self.worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.worker.stop)
            self._encoder.shutdown(wait=False)


class EventStream(Response):
    """Server-sent events until they end, the client goes away, or ``limit`` seconds have passed."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], limit: float) -> None:
        self.status_code, self.background = 200, None
        self.events, self.limit = events, limit
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task, gone = asyncio.ensure_future(self._send(send)), asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((task, gone), timeout=self.limit, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _dismiss(task, gone)
            await self.events.aclose()

    async def _send(self, send: Send) -> None:
        with suppress(OSError):  # what a server raises when the client is gone
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for chunk in self.events:
                if chunk:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    """Returns when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _dismiss(task: asyncio.Future[Any], gone: asyncio.Future[Any]) -> None:
    """Cancel both, and pass on the error of ``task``."""
    for one in (task, gone):
        one.cancel()
    results = await asyncio.gather(task, gone, return_exceptions=True)
    if isinstance(results[0], Exception):
        raise results[0]


async def _http_error(request: Request, error: HTTPException) -> Response:
    body = failure(f"{request.method} {request.url.path}: {error.detail}", "invalid_request_error")
    return JSONResponse(body, error.status_code, error.headers)


def _with_tokenizer(generator: Generator, tokenizer: Any) -> Generator:
    twin = copy.copy(generator)
    twin.tokenizer = tokenizer
    return twin
