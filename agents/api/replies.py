"""HTTP replies: JSON, errors in OpenAI's shape, and streams that do not start before they have something to say.

A reply that works for long watches its reader: when the reader leaves, the work is cancelled and closed. A stream that
is silent is kept alive by comments; a reader who takes nothing is dropped.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Final

import orjson
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from agents.patience import Patience
from agents.wire import error_line, error_object
from onebox.errors import Internal, OneboxError, from_code
from onebox.events import Failed
from onebox.settings import Settings

# A comment without the blank line that ends an event: OpenAI's client takes `: ping` and a blank line, once it has seen
# an `id:`, for an event without data, and fails.
PING: Final = b": ping\n"

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


def error_of(failed: Failed) -> OneboxError:
    """The error that ended a run."""
    error = from_code(failed.code, failed.message, retry_after_s=failed.retry_after_s)
    error.param = failed.param
    return error


class WatchedReply(Response):
    """Base of replies that work: `_work` is cancelled when the reader leaves."""

    def __init__(self, count_error: Callable[[str], None]) -> None:
        self.background = None
        self.status_code = 200
        self._count_error = count_error

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
        await error_response(error)(scope, receive, send)


class StreamReply(WatchedReply):
    """Sends pieces as they come; what fails before the first piece is a plain HTTP error.

    An empty piece begins the stream without anything to show yet. A reader who takes nothing for `reader_stall_s` is
    dropped: the pieces are closed, and the connection ends without an end of the stream.
    """

    def __init__(
        self, pieces: AsyncGenerator[bytes, None], count_error: Callable[[str], None], settings: Settings
    ) -> None:
        super().__init__(count_error)
        self._pieces = pieces
        self._patience = Patience()
        self._ping_s = settings.ping_s
        self._stall_s = settings.reader_stall_s
        self._began = False
        self._busy = False
        self._moved = 0.0

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        pings = asyncio.create_task(self._keep_alive(send))
        try:
            async with aclosing(self._pieces) as pieces:
                async for piece in pieces:
                    if not self._began:
                        self._began = True
                        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
                    await self._send(send, piece)
            await self._send(send, b"", last=True)
        except _Stalled:
            logger.info("A reader took nothing for %g s and was dropped", self._stall_s)
        finally:
            self._patience.close()
            pings.cancel()
            await asyncio.gather(pings, return_exceptions=True)

    async def _send(self, send: Send, piece: bytes, *, last: bool = False) -> None:
        self._busy = True
        try:
            message: Message = {"type": "http.response.body", "body": piece, "more_body": not last}
            await self._patience.wait(send(message), self._stall_s)
        except TimeoutError:
            raise _Stalled from None
        self._busy = last
        self._moved = time.monotonic()

    async def _keep_alive(self, send: Send) -> None:
        while True:
            silent_s = time.monotonic() - self._moved
            if self._busy or not self._began:
                silent_s = 0.0
            elif silent_s >= self._ping_s:
                await send({"type": "http.response.body", "body": PING, "more_body": True})
                self._moved = time.monotonic()
                silent_s = 0.0
            await asyncio.sleep(self._ping_s - silent_s)

    async def _refuse(self, error: OneboxError, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._began:
            await super()._refuse(error, scope, receive, send)
            return
        self._count_error(error.code)
        with suppress(_Stalled):
            await self._send(send, error_line(error), last=True)


class _Stalled(Exception):
    """The reader takes nothing."""


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
