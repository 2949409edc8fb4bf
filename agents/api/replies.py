"""HTTP replies: JSON, errors in OpenAI's shape, and streams that do not start before they have something to say.

A reply that works for long watches its reader: when the reader leaves, the work is cancelled and closed.
"""

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from agents.wire import error_line, error_object
from onebox.errors import Internal, OneboxError

SSE = "text/event-stream"

logger = logging.getLogger(__name__)


def json_response(value: object, status: int = 200) -> Response:
    """A JSON reply; dataclasses are objects."""
    return Response(orjson.dumps(value), status, media_type="application/json")


def error_response(error: OneboxError) -> Response:
    """The error as a whole HTTP reply."""
    headers: dict[str, str] = {}
    if error.retryable or error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s or 1.0)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(orjson.dumps(error_object(error)), error.status, headers, "application/json")


class WatchedReply(Response):
    """Base of replies that work: `_work` is cancelled when the reader leaves."""

    def __init__(self, count_error: Callable[[str], None]) -> None:
        self.background = None
        self.status_code = 200
        self._count_error = count_error
        self._began = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._guarded(scope, receive, send))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not work.done():
                work.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._work(scope, receive, send)
        except OneboxError as error:
            await self._refuse(error, scope, receive, send)
        except OSError:
            return
        except Exception:
            logger.exception("A reply failed")
            await self._refuse(
                Internal("The gateway failed: it has a defect, which the log describes."), scope, receive, send
            )

    async def _refuse(self, error: OneboxError, scope: Scope, receive: Receive, send: Send) -> None:
        self._count_error(error.code)
        if not self._began:
            await error_response(error)(scope, receive, send)
        else:
            await send({"type": "http.response.body", "body": error_line(error), "more_body": False})


class StreamReply(WatchedReply):
    """Sends pieces as they come; what fails before the first piece is a plain HTTP error."""

    def __init__(self, pieces: AsyncGenerator[bytes, None], count_error: Callable[[str], None]) -> None:
        super().__init__(count_error)
        self._pieces = pieces

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._pieces) as pieces:
            async for piece in pieces:
                if not self._began:
                    self._began = True
                    await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class JsonReply(WatchedReply):
    """Sends one JSON value once it is there."""

    def __init__(self, value: Callable[[], Awaitable[object]], count_error: Callable[[str], None]) -> None:
        super().__init__(count_error)
        self._value = value

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        await json_response(await self._value())(scope, receive, send)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]
