"""The ASGI app of one engine replica: the server side of `serving.protocol`, the same for every engine.

It authenticates, admits, streams and aborts; it knows neither Ray (`serving.deployment` mounts it) nor what generates
(`serving.engine`). The gateway's side of the wire is `agents.engine`.
"""

import asyncio
import hmac
import math
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from logging import getLogger
from typing import TypeVar
from uuid import uuid4

import orjson
from pydantic import BaseModel, ValidationError
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from onebox import logs
from onebox.errors import (
    BadRequest,
    BodyTooLarge,
    Conflict,
    Internal,
    NotFound,
    OneboxError,
    Unauthorized,
    Unavailable,
)
from onebox.settings import Settings
from serving.engine import Batch, Engine
from serving.meters import Meters
from serving.protocol import (
    AFFINITY_HEADER,
    CONTENT_TYPE,
    FREE_HEADER,
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
from serving.roster import Load, Record
from serving.work import RETRY_AFTER_S, Reply, Work

CANARY_TIMEOUT_S = 2.0
CANARY_FRESH_S = 1.0
BUSY_FRESH_S = 10.0
MEASURED_TOKENS = 8
ABORT_TIMEOUT_S = 2.0
CHARS_PER_TOKEN = 4  # of a request's body, for an estimate

_AFFINITY = AFFINITY_HEADER.encode()
_FREE = FREE_HEADER.encode()
_QUEUED = re.compile(rb"queued=(\d{1,7})")
_log = getLogger(__name__)
_Model = TypeVar("_Model", bound=BaseModel)
_Handler = Callable[[Scope, Receive, Send], Awaitable[Response | None]]
_Replicas = Callable[[], Awaitable[Sequence[Record]]]


async def _alone() -> Sequence[Record]:
    return ()


class ReplicaApp:
    """The ASGI app around a running engine. `door` is the replica's own address, which every answer gives.

    `replicas` lists the fleet; a replica that knows of none lists nobody, and its gateway keeps to the ingress.

    Raises:
        ValueError: there is no internal token; a replica never serves strangers.
    """

    def __init__(
        self, engine: Engine, settings: Settings, door: str | None = None, replicas: _Replicas = _alone
    ) -> None:
        if settings.internal_token is None:
            raise ValueError("internal_token is not set")
        self._engine = engine
        self._door = door or ""
        self._replicas = replicas
        self._headers = [] if door is None else [(REPLICA_HEADER.encode(), door.encode())]
        self._expected = f"Bearer {settings.internal_token.get_secret_value()}".encode()
        self._body_max_bytes = settings.body_max_bytes
        self._work = Work(settings)
        self._leaving = False
        self._tokens_per_s: float | None = None
        self._progressed_at = -math.inf
        self._canary_at = -math.inf
        self._canary = asyncio.Lock()
        self._meters = Meters(self.load)
        self._routes: dict[tuple[str, str], _Handler] = {
            ("POST", "/v1/generate"): self._generate,
            ("POST", "/v1/abort"): self._abort,
            ("POST", "/v1/tokenize"): self._tokenize,
            ("GET", "/v1/model"): self._model,
            ("GET", "/v1/fleet"): self._fleet,
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
            # An ingress that serves several models hands the path on with the model's prefix in front.
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            handler = self._routes.get((scope["method"], path))
            if handler is None:
                raise NotFound(f"There is no {scope['method']} {scope['path']!r} here; see serving/protocol.py.")
            response = await handler(scope, receive, outbox)
        except OneboxError as error:
            await self._fail(error, scope, receive, outbox)
        except Exception:
            _log.exception("request failed")
            await self._fail(Internal("The engine replica has a defect; its log says more."), scope, receive, outbox)
        else:
            if response is not None:
                await response(scope, receive, outbox)

    async def at_door(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The same for requests that come straight here: of them a replica that is leaving takes no new ones.

        Those that come through the ingress it still takes, for that learns of the leave a little later.
        """
        if self._leaving and scope["type"] == "http" and scope["path"] == "/v1/generate":
            error = Unavailable("This replica is leaving the fleet. Ask another one.", retry_after_s=RETRY_AFTER_S)
            await _error_response(error)(scope, receive, _Outbox(send, self._headers))
            return
        await self(scope, receive, send)

    def leave(self) -> None:
        """Take nothing new at the door from now on."""
        self._leaving = True

    def stay(self) -> None:
        """Take new requests at the door again."""
        self._leaving = False

    async def emptied(self, timeout_s: float) -> bool:
        """Whether the last reply ended in time."""
        return await self._work.done(timeout_s)

    @property
    def begun(self) -> int:
        """Generations since the start."""
        return self._work.begun

    @property
    def queued(self) -> int:
        """Runs that wait at gateways, which told this replica."""
        return self._work.queued()

    def load(self) -> Load:
        """How much this replica has to do."""
        return self._work.load(self._door, self._engine.kv_use(), draining=self._leaving)

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
        given = _header(scope, b"authorization")
        if not hmac.compare_digest(given, self._expected):
            raise Unauthorized("The internal token is missing or wrong. Engines answer their gateway only.")

    async def _fail(self, error: OneboxError, scope: Scope, receive: Receive, outbox: "_Outbox") -> None:
        self._meters.failed.labels(error.code).inc()
        if not outbox.started:
            await _error_response(error)(scope, receive, outbox)
        elif not outbox.finished:
            line = encode_line(Error(error.code, error.message, error.retryable))
            await outbox({"type": "http.response.body", "body": line, "more_body": False})

    async def _generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._work.reply(if_free=bool(_header(scope, _FREE))) as reply:
            body = await self._read(receive)
            request = _parse(GenerateRequest, body)
            reply.prompt_tokens = len(body) // CHARS_PER_TOKEN
            self._work.place(_header(scope, _AFFINITY).decode("latin-1"))
            logs.bind(request=request.request_id)
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
        if reply.stopped:
            raise Conflict("The reply was stopped at its gateway's wish. Ask again if it is wanted after all.")

    async def _abort(self, scope: Scope, receive: Receive, send: Send) -> Response:
        started = time.monotonic()
        request_id = _parse(AbortRequest, await self._read(receive)).request_id
        replies = self._work.of(request_id)
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

    async def _stream(self, request: GenerateRequest, send: Send, reply: Reply) -> None:
        """Sends the reply. The status line waits for the engine's first output."""
        started = time.monotonic()
        last: Batch | None = None
        async with aclosing(self._engine.generate(request)) as batches:
            first, asked_at = True, started
            async for batch in batches:
                now = self._progressed_at = time.monotonic()
                if first:
                    self._meters.first_frame.observe(now - started)
                    await send(_head())
                reply.tokens += self._count(batch)
                if isinstance(batch[-1], End):
                    last = batch
                    break
                await send({"type": "http.response.body", "body": _encode(batch), "more_body": True})
                tick_s = self._work.tick_s()
                if first or now - asked_at < tick_s:  # an engine slower than that needs no pause
                    await asyncio.sleep(tick_s - time.monotonic() % tick_s if tick_s else 0)
                first, asked_at = False, time.monotonic()
        if last is None:
            raise Internal("The engine ended a reply without saying so.")
        self._work.give_back(reply)
        await send({"type": "http.response.body", "body": _encode(last), "more_body": False})

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

    async def _tokenize(self, scope: Scope, receive: Receive, send: Send) -> Response:
        request = _parse(TokenizeRequest, await self._read(receive))
        reply = await asyncio.to_thread(self._engine.tokenize, request)
        return Response(orjson.dumps(reply.model_dump()), media_type="application/json")

    async def _model(self, scope: Scope, receive: Receive, send: Send) -> Response:
        card = self._engine.model_card().model_copy(update={"tokens_per_s": self._tokens_per_s})
        return Response(card.model_dump_json(), media_type="application/json")

    async def _fleet(self, scope: Scope, receive: Receive, send: Send) -> Response:
        if told := _QUEUED.fullmatch(scope.get("query_string", b"")):
            self._work.note_queued(int(told[1]))
        return Response(orjson.dumps({"replicas": await self._replicas()}), media_type="application/json")

    async def _healthz(self, scope: Scope, receive: Receive, send: Send) -> Response:
        await self._engine.check()
        return Response(b'{"healthy":true}', media_type="application/json")

    async def _readyz(self, scope: Scope, receive: Receive, send: Send) -> Response:
        await self._engine.check()
        async with self._canary:
            now = time.monotonic()
            busy = bool(self._work) and now - self._progressed_at < BUSY_FRESH_S
            if not busy and now - self._canary_at > CANARY_FRESH_S:
                await self._draw_canary()
        return Response(b'{"ready":true}', media_type="application/json")

    async def _metrics(self, scope: Scope, receive: Receive, send: Send) -> Response:
        body = self._meters.text() + self._engine.metrics()
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
            # Random tokens: greedy ones repeat themselves, and drafts would make the speed look better than it is.
            sampling=WireSampling(max_tokens=tokens, temperature=1, seed=0, ignore_eos=True),
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


def _header(scope: Scope, name: bytes) -> bytes:
    """The value of the request's first header of this name; empty where it has none."""
    return next((value for key, value in scope["headers"] if key == name), b"")


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
