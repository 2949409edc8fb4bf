"""What every request passes first: key, queue, size of the body. Pure ASGI, so streams are not wrapped.

Under overload most requests end here, unread: a refusal must cost next to nothing, or those who were let in pay for it.
A body is read here to its end, or to its limit, and handed on whole.
"""

import asyncio
import logging
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agents.api.replies import error_response
from agents.gateway import Gateway
from onebox.errors import BadRequest, BodyTooLarge, Internal, OneboxError

OPEN_PATHS: Final = frozenset({"/healthz", "/readyz", "/metrics", "/metrics/engines", "/docs", "/openapi.json"})
RUN_PATHS: Final = frozenset({"/v1/chat/completions", "/v1/responses"})
TASK_PATHS: Final = "/v1/tasks/"
BODY_TIMEOUT_S: Final = 30.0
SWALLOW_MAX_BYTES: Final = 16 * 1024 * 1024

logger = logging.getLogger(__name__)


class Entrance:
    """Lets a request in, or answers it with an error."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        gateway: Gateway = scope["app"].state.gateway
        try:
            if scope["path"] not in OPEN_PATHS:
                scope["principal"] = principal = await gateway.keys.resolve(_bearer(scope))
                if _starts_a_run(scope):
                    gateway.executor.admission.check(principal.tenant)
            body = await _read(scope, receive, gateway.settings.body_max_bytes)
        except OneboxError as error:
            gateway.metrics.count_error(error.code)
            await error_response(error)(scope, receive, send)
            return
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, _Replay(body, receive), watched_send)
        except Exception:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            if started:
                raise
            defect = Internal("The gateway failed: it has a defect, which the log describes.")
            gateway.metrics.count_error(defect.code)
            await error_response(defect)(scope, receive, send)


class _Replay:
    """A `receive` that gives the body once, then what the connection says."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._first: Message | None = {"type": "http.request", "body": body, "more_body": False}
        self._receive = receive

    async def __call__(self) -> Message:
        if self._first is not None:
            message, self._first = self._first, None
            return message
        return await self._receive()


def _starts_a_run(scope: Scope) -> bool:
    """Whether the request asks for a new run; one with an idempotency key may be for an old one, and must be read."""
    path = scope["path"]
    if scope["method"] != "POST" or not (path in RUN_PATHS or path.startswith(TASK_PATHS)):
        return False
    return header(scope, b"idempotency-key") is None


def header(scope: Scope, name: bytes) -> str | None:
    """The value of a request's first header of this name, which is in lower case."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


def _bearer(scope: Scope) -> str | None:
    scheme, _, token = (header(scope, b"authorization") or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


async def _read(scope: Scope, receive: Receive, limit: int) -> bytes:
    size = 0
    pieces: list[bytes] = []
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise BadRequest("The request broke off before its body was whole.")
                piece = message.get("body", b"")
                size += len(piece)
                if size <= limit:
                    pieces.append(piece)
                elif not message.get("more_body", False) or size > SWALLOW_MAX_BYTES:
                    raise BodyTooLarge(f"The request body exceeds {limit} bytes. Send less, or in several messages.")
                if not message.get("more_body", False):
                    return b"".join(pieces)
    except TimeoutError:
        raise BadRequest(f"The request body did not arrive within {BODY_TIMEOUT_S:g} s. Send it again.") from None
