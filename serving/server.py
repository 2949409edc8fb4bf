"""The ASGI app of one engine replica: the server side of `serving.protocol`, the same for every engine.

It authenticates, admits, streams and aborts; it knows neither Ray (`serving.deployment` mounts it) nor what generates
(`serving.engine`). The gateway's side of the wire is `agents.engine`.
"""

import asyncio
import hmac
import math
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from logging import getLogger
from typing import TypeVar
from uuid import uuid4

import orjson
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ValidationError
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from onebox.errors import (
    BadRequest,
    BodyTooLarge,
    Conflict,
    Internal,
    NotFound,
    OneboxError,
    Overloaded,
    Unauthorized,
    Unavailable,
)
from onebox.settings import Settings
from serving.engine import Batch, Engine
from serving.protocol import (
    CONTENT_TYPE,
    REPLICA_HEADER,
    AbortReply,
    AbortRequest,
    End,
    Error,
    GenerateRequest,
    TokenizeRequest,
    WireSampling,
    encode_line,
)

CANARY_TIMEOUT_S = 2.0
CANARY_FRESH_S = 1.0
BUSY_FRESH_S = 10.0
MEASURED_TOKENS = 8
RETRY_AFTER_S = 1.0
ABORT_TIMEOUT_S = 2.0

_log = getLogger(__name__)
_Model = TypeVar("_Model", bound=BaseModel)
_Handler = Callable[[Receive, Send], Awaitable[Response | None]]


class ReplicaApp:
    """The ASGI app around a running engine. `door` is the replica's own address, which every answer gives.

    Raises:
        ValueError: there is no internal token; a replica never serves strangers.
    """

    def __init__(self, engine: Engine, settings: Settings, door: str | None = None) -> None:
        if settings.internal_token is None:
            raise ValueError("internal_token is not set")
        self._engine = engine
        self._headers = [] if door is None else [(REPLICA_HEADER.encode(), door.encode())]
        self._expected = f"Bearer {settings.internal_token.get_secret_value()}".encode()
        self._coalesce_s = settings.engine_coalesce_ms / 1000
        self._body_max_bytes = settings.body_max_bytes
        self._capacity = settings.engine_max_ongoing + settings.engine_max_queued
        self._replies: set[_Reply] = set()
        self._tokens_per_s: float | None = None
        self._progressed_at = -math.inf
        self._canary_at = -math.inf
        self._canary = asyncio.Lock()
        self._meters = _Meters()
        self._meters.running.set_function(lambda: len(self._replies))
        self._routes: dict[tuple[str, str], _Handler] = {
            ("POST", "/v1/generate"): self._generate,
            ("POST", "/v1/abort"): self._abort,
            ("POST", "/v1/tokenize"): self._tokenize,
            ("GET", "/v1/model"): self._model,
            ("GET", "/healthz"): self._healthz,
            ("GET", "/readyz"): self._readyz,
            ("GET", "/metrics"): self._metrics,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one HTTP request; the only catch-all of the replica."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] != "http":
            return
        outbox = _Outbox(send, self._headers)
        try:
            self._authenticate(scope)
            handler = self._routes.get((scope["method"], scope["path"]))
            if handler is None:
                raise NotFound(f"There is no {scope['method']} {scope['path']!r} here; see serving/protocol.py.")
            response = await handler(receive, outbox)
        except OneboxError as error:
            await self._fail(error, scope, receive, outbox)
        except Exception:
            _log.exception("request failed")
            await self._fail(Internal("The engine replica has a defect; its log says more."), scope, receive, outbox)
        else:
            if response is not None:
                await response(scope, receive, outbox)

    async def measure(self) -> None:
        """Warms the engine up and notes its speed for one stream.

        Raises:
            OneboxError: the engine cannot generate.
        """
        await self._draw(MEASURED_TOKENS)  # first use pays for lazy set-up
        started = time.monotonic()
        tokens = await self._draw(MEASURED_TOKENS)
        self._tokens_per_s = round(tokens / (time.monotonic() - started), 1)

    def _authenticate(self, scope: Scope) -> None:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if not hmac.compare_digest(given, self._expected):
            raise Unauthorized("The internal token is missing or wrong. Engines answer their gateway only.")

    async def _fail(self, error: OneboxError, scope: Scope, receive: Receive, outbox: "_Outbox") -> None:
        self._meters.failed.labels(error.code).inc()
        if not outbox.started:
            await _error_response(error)(scope, receive, outbox)
        elif not outbox.finished:
            line = encode_line(Error(error.code, error.message, error.retryable))
            await outbox({"type": "http.response.body", "body": line, "more_body": False})

    async def _generate(self, receive: Receive, send: Send) -> None:
        if len(self._replies) >= self._capacity:
            raise Overloaded(
                f"All {self._capacity} places of this engine are taken. Try again shortly.", retry_after_s=RETRY_AFTER_S
            )
        reply = _Reply()
        self._replies.add(reply)
        try:
            request = _parse(GenerateRequest, await self._read(receive))
            stream = asyncio.create_task(self._stream(request, send, reply))
            gone = asyncio.create_task(_disconnected(receive))
            reply.request_id, reply.stream = request.request_id, stream
            try:
                await asyncio.wait((stream, gone), return_when=asyncio.FIRST_COMPLETED)
                if not stream.done() or stream.cancelled():
                    self._meters.aborted.inc()
                else:
                    stream.result()
            finally:
                stream.cancel()
                gone.cancel()
                await asyncio.gather(stream, gone, return_exceptions=True)
        finally:
            self._replies.remove(reply)
            reply.freed.set()
        if reply.stopped:
            raise Conflict("The reply was stopped at its gateway's wish. Ask again if it is wanted after all.")

    async def _abort(self, receive: Receive, send: Send) -> Response:
        started = time.monotonic()
        request_id = _parse(AbortRequest, await self._read(receive)).request_id
        replies = [reply for reply in self._replies if reply.request_id == request_id]
        for reply in replies:
            reply.stop()
        freed_ms: float | None = None
        try:
            async with asyncio.timeout(ABORT_TIMEOUT_S):
                for reply in replies:
                    await reply.freed.wait()
                if replies:
                    await self._engine.settle()
                freed_ms = round((time.monotonic() - started) * 1000, 3)
        except TimeoutError:
            _log.warning("request %s is not ended after %g s", request_id, ABORT_TIMEOUT_S)
        tokens = sum(reply.tokens for reply in replies)
        answer = AbortReply(found=bool(replies), completion_tokens=tokens, freed_ms=freed_ms)
        return Response(answer.model_dump_json(), media_type="application/json")

    async def _stream(self, request: GenerateRequest, send: Send, reply: "_Reply") -> None:
        """Sends the reply. The status line waits for the engine's first output."""
        started = time.monotonic()
        async with aclosing(self._engine.generate(request)) as batches:
            first = True
            async for batch in batches:
                self._progressed_at = time.monotonic()
                if first:
                    self._meters.first_frame.observe(self._progressed_at - started)
                    await send(_head())
                    first = False
                ended = isinstance(batch[-1], End)
                await send({"type": "http.response.body", "body": _encode(batch), "more_body": not ended})
                reply.tokens += self._count(batch)
                if ended:
                    return
                if self._coalesce_s > 0:
                    await asyncio.sleep(self._coalesce_s)
        raise Internal("The engine ended a reply without saying so.")

    def _count(self, batch: Batch) -> int:
        """The batch's tokens."""
        tokens = 0
        for item in batch:
            if isinstance(item, End):
                self._meters.finished.labels(item.finish).inc()
            else:
                tokens += len(item.ids)
        self._meters.tokens.inc(tokens)
        return tokens

    async def _tokenize(self, receive: Receive, send: Send) -> Response:
        request = _parse(TokenizeRequest, await self._read(receive))
        reply = await asyncio.to_thread(self._engine.tokenize, request)
        return Response(orjson.dumps(reply.model_dump()), media_type="application/json")

    async def _model(self, receive: Receive, send: Send) -> Response:
        card = self._engine.model_card().model_copy(update={"tokens_per_s": self._tokens_per_s})
        return Response(card.model_dump_json(), media_type="application/json")

    async def _healthz(self, receive: Receive, send: Send) -> Response:
        await self._engine.check()
        return Response(b'{"healthy":true}', media_type="application/json")

    async def _readyz(self, receive: Receive, send: Send) -> Response:
        await self._engine.check()
        async with self._canary:
            now = time.monotonic()
            busy = bool(self._replies) and now - self._progressed_at < BUSY_FRESH_S
            if not busy and now - self._canary_at > CANARY_FRESH_S:
                await self._draw_canary()
        return Response(b'{"ready":true}', media_type="application/json")

    async def _metrics(self, receive: Receive, send: Send) -> Response:
        body = generate_latest(self._meters.registry) + self._engine.metrics()
        return Response(body, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _draw_canary(self) -> None:
        try:
            async with asyncio.timeout(CANARY_TIMEOUT_S):
                await self._draw(1)
        except TimeoutError:
            raise Unavailable(
                f"The engine drew no token within {CANARY_TIMEOUT_S:g} s. It is stuck or overloaded.",
                retry_after_s=RETRY_AFTER_S,
            ) from None
        self._canary_at = time.monotonic()

    async def _draw(self, tokens: int) -> int:
        request = GenerateRequest(
            request_id=f"canary-{uuid4().hex}",
            prompt_token_ids=(1,),
            sampling=WireSampling(max_tokens=tokens, temperature=0, ignore_eos=True),
        )
        drawn = 0
        async with aclosing(self._engine.generate(request)) as batches:
            async for batch in batches:
                drawn += sum(0 if isinstance(item, End) else len(item.ids) for item in batch)
        return drawn

    async def _read(self, receive: Receive) -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise BadRequest("The request body broke off.")
            body += message.get("body", b"")
            if len(body) > self._body_max_bytes:
                raise BodyTooLarge(f"The request body exceeds {self._body_max_bytes} bytes. Send less text.")
            if not message.get("more_body", False):
                return bytes(body)


@dataclass(slots=True, eq=False)
class _Reply:
    """A reply being answered or waiting; `freed` once the engine's generator is closed."""

    request_id: str = ""
    stream: asyncio.Task[None] | None = None
    tokens: int = 0
    stopped: bool = False
    freed: asyncio.Event = field(default_factory=asyncio.Event)

    def stop(self) -> None:
        """End it."""
        if self.stream is not None and not self.stream.done():
            self.stopped = True
            self.stream.cancel()


class _Meters:
    """The replica's Prometheus metrics in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.running = Gauge("onebox_engine_running", "Requests being answered or waiting", registry=self.registry)
        self.aborted = Counter("onebox_engine_aborted", "Replies whose reader left", registry=self.registry)
        self.tokens = Counter("onebox_engine_tokens", "Tokens sent", registry=self.registry)
        self.finished = Counter("onebox_engine_finished", "Whole replies by reason", ["finish"], registry=self.registry)
        self.failed = Counter("onebox_engine_failed", "Errors answered by code", ["code"], registry=self.registry)
        self.first_frame = Histogram(
            "onebox_engine_first_frame_seconds",
            "Time to the first frame",
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
            registry=self.registry,
        )


class _Outbox:
    """A `send` that adds the replica's headers and remembers how far the response has got."""

    def __init__(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        self._send = send
        self._headers = headers
        self.started = False
        self.finished = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], *self._headers]
        await self._send(message)
        if message["type"] == "http.response.start":
            self.started = True
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self.finished = True


def _head() -> Message:
    """The start of a reply; a new one each time, because Serve appends its own headers to the list it is given."""
    headers = [(b"content-type", CONTENT_TYPE.encode()), (b"cache-control", b"no-store")]
    return {"type": "http.response.start", "status": 200, "headers": headers}


def _encode(batch: Batch) -> bytes:
    return encode_line(batch[0]) if len(batch) == 1 else encode_line(batch[0]) + encode_line(batch[1])


def _parse(model: type[_Model], body: bytes) -> _Model:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise BadRequest(f"The request is not usable: {where}: {first['msg']}. Correct it.", param=where) from None


def _error_response(error: OneboxError) -> Response:
    body = {"error": {"code": error.code, "message": error.message, "retryable": error.retryable}}
    headers = {}
    if error.retryable:
        headers["retry-after"] = str(math.ceil(error.retry_after_s or RETRY_AFTER_S))
    return Response(orjson.dumps(body), error.status, headers, "application/json")


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
