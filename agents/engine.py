"""The gateway's side of the engine wire: opens generations, hands their frames on, names every failure.

A reply outlives its replica: when it breaks off, the prompt and the tokens seen so far go to another one, which goes
on from there. It knows nothing of tasks, conversations or logs; how replicas are reached is `agents.fleet`, their side
of the wire `serving.protocol` and `serving.server`. It is aiohttp because a frame costs it 28 µs of CPU where httpx
takes 76 µs (32 streams, two cores).
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Literal, Self, TypeVar

import aiohttp
import orjson

from agents.fleet import LOADING_RETRY_S, Fleet
from agents.generation import End, Frame, Generation, decode, encode
from onebox.errors import EngineFailed, ModelLoading, OneboxError, Overloaded, Timeout, Unavailable
from onebox.messages import Message
from onebox.settings import Settings

RETRY_PAUSES_S: Final = (0.05, 0.25)
PATIENT_PAUSES_S: Final = (0.05, 0.5)  # the first and the longest; each is twice the one before
CARD_AGE_S: Final = 60.0
ABORT_TIMEOUT_S: Final = 1.0
STOPPED: Final = "The reply was stopped. Ask again if it is wanted after all."

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Card:
    """What the fleet serves. Lengths in tokens."""

    id: str
    context_length: int


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of aborted calls: the tokens drawn, and the time until the engine itself was rid of them.

    None where there was no such call, or no replica that could tell.
    """

    tokens: int | None
    freed_ms: float | None


LossReason = Literal["cut", "stalled", "silent", "refused"]
_Answer = TypeVar("_Answer")


class _Lost(Exception):
    """The replica of a reply is lost to it; another one may go on."""

    def __init__(self, reason: LossReason, error: OneboxError) -> None:
        super().__init__(reason)
        self.reason: LossReason = reason
        self.error = error


class _Stopped(Exception):
    """Somebody aborted the call."""


class _Course:
    """How far one call has got and where it is: what an abort from another task needs to know."""

    __slots__ = ("attempts", "call", "door", "ids", "limit", "response", "resumed", "stopped")

    def __init__(self, call: Generation) -> None:
        self.call = call
        self.ids = list(call.resume)
        self.resumed = len(self.ids)  # of these, by the attempt at work
        self.attempts = 0
        self.door: str | None = None
        self.response: aiohttp.ClientResponse | None = None
        self.limit: asyncio.Timeout | None = None  # of whatever the call waits for
        self.stopped = False

    @property
    def wire_id(self) -> str:
        """Each attempt has an id of its own, for the one before may still be ending."""
        return f"{self.call.request_id}.{self.attempts}" if self.attempts > 1 else self.call.request_id

    def next_body(self) -> bytes:
        """The request for what follows."""
        self.attempts += 1
        self.resumed = len(self.ids)
        return encode(self.call, self.ids, self.wire_id)

    def heed(self) -> None:
        """Raises `_Stopped` once the call is aborted."""
        if self.stopped:
            raise _Stopped

    def stop(self) -> None:
        """End the call, whatever it waits for."""
        self.stopped = True
        if self.response is not None:
            self.response.close()
        if self.limit is not None:
            with contextlib.suppress(RuntimeError):  # that wait is over
                self.limit.reschedule(0.0)


class EngineClient:
    """The engine fleet, as everything in a gateway sees it. Use as an async context manager.

    `on_continuation` is told each time a reply goes on at another replica, and why it had to.
    """

    def __init__(self, settings: Settings, on_continuation: Callable[[LossReason], None] | None = None) -> None:
        self._settings = settings
        self._on_continuation = on_continuation
        self._fleet = Fleet(settings)
        self._courses: set[_Course] = set()
        self._card: Card | None = None
        self._card_time = 0.0

    async def __aenter__(self) -> Self:
        await self._fleet.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._fleet.__aexit__(kind, error, trace)

    async def generate(self, call: Generation) -> AsyncGenerator[Frame | End, None]:
        """The frames of one reply, then its `End`. Leaving the iterator early aborts the engine's work.

        A reply that has begun goes on at another replica when it loses its own, as often and as patiently as the
        settings allow; the reader sees only the time it takes.

        Raises:
            OneboxError: whatever the engine answered, after all that could help was tried; or `abort` ended the call.
        """
        course = _Course(call)
        self._courses.add(course)
        continuations = 0
        broken: OneboxError | None = None
        way: str | None = None
        try:
            while True:
                try:
                    async with aclosing(self._reply(course, way)) as items:
                        async for item in items:
                            if isinstance(item, Frame):
                                course.ids.extend(item.ids)
                                yield item
                            else:
                                yield End(item.finish, item.prompt_tokens, len(course.ids))
                    return
                except _Lost as lost:
                    course.heed()
                    self._card_time = 0.0
                    if not course.ids or continuations == self._settings.engine_continuations:
                        raise lost.error from lost.__cause__
                    continuations += 1
                    broken = lost.error
                    self._tell(course, lost.reason)
                    way = await self._fleet.another(course.door) if course.door is not None else None
                except (Unavailable, Overloaded) as error:
                    raise broken or error from error
        except (OneboxError, _Stopped) as error:
            if course.stopped:
                raise EngineFailed(STOPPED) from error
            raise
        finally:
            self._courses.discard(course)

    async def abort(self, request_id: str) -> Receipt:
        """End the open call of this id: its replica is told, then the reader meets an error. Never raises."""
        return await self._abort([course for course in self._courses if course.call.request_id == request_id])

    async def abort_prefix(self, prefix: str) -> Receipt:
        """End every open call whose id begins so; the tokens are summed, the time is the longest."""
        return await self._abort([course for course in self._courses if course.call.request_id.startswith(prefix)])

    async def card(self) -> Card:
        """What the fleet serves; asked again each minute and after a failure."""
        fresh = time.monotonic() - self._card_time < CARD_AGE_S
        if self._card is not None and fresh:
            return self._card
        try:
            reply = await self._fleet.ask("GET", "/v1/model", None, 5.0)
        except OneboxError:
            if self._card is not None and self._card_time > 0:
                return self._card
            raise
        self._card = Card(str(reply["id"]), int(reply["context_length"]))
        self._card_time = time.monotonic()
        return self._card

    async def count_tokens(self, messages: Sequence[Message]) -> int:
        """Tokens of the rendered prompt, chat template included."""
        body = orjson.dumps({"messages": [{"role": m.role, "content": m.text} for m in messages]})
        reply = await self._fleet.ask("POST", "/v1/tokenize", body, self._settings.stall_timeout_s)
        return int(reply["count"])

    async def readiness(self, timeout_s: float) -> tuple[Literal["ready", "loading", "down"], str]:
        """Whether a token can be had, and why not."""
        try:
            await self._fleet.ask("GET", "/readyz", None, timeout_s)
        except ModelLoading as error:
            return "loading", error.message
        except OneboxError as error:
            return "down", error.message
        return "ready", ""

    def _tell(self, course: _Course, reason: LossReason) -> None:
        logger.warning("Reply %s lost its replica at token %d (%s)", course.call.request_id, len(course.ids), reason)
        if self._on_continuation is not None:
            self._on_continuation(reason)

    async def _abort(self, courses: Sequence[_Course]) -> Receipt:
        receipts = await asyncio.gather(*map(self._abort_one, courses))
        tokens = [receipt.tokens for receipt in receipts if receipt.tokens is not None]
        freed_ms = [receipt.freed_ms for receipt in receipts if receipt.freed_ms is not None]
        return Receipt(sum(tokens) if tokens else None, max(freed_ms, default=None))

    async def _abort_one(self, course: _Course) -> Receipt:
        """The call is ended even where no replica answers: the connection that it has is closed."""
        doors = [course.door] if course.response is not None and course.door is not None else self._fleet.doors()
        body = orjson.dumps({"request_id": course.wire_id})
        course.stopped = True
        try:
            answers = await asyncio.gather(
                *(self._fleet.ask_door(door, "POST", "/v1/abort", body, ABORT_TIMEOUT_S) for door in doors)
            )
        finally:
            course.stop()
        for answer in answers:
            if answer is not None and answer.get("found"):
                return Receipt(course.resumed + answer["completion_tokens"], answer["freed_ms"])
        return Receipt(len(course.ids), None)

    async def _reply(self, course: _Course, way: str | None) -> AsyncGenerator[Frame | End, None]:
        """What one replica, the one at `way` by preference, adds to the reply.

        Raises:
            _Lost: it broke off, and another replica may go on.
        """
        call = course.call
        if course.ids and len(course.ids) >= call.max_tokens:
            tokens = await self._patiently(course, lambda: self.count_tokens(call.messages))
            yield End("length", tokens, len(course.ids))
            return
        response, chunk = await self._begin(course, way)
        course.response = response
        whole = False
        try:
            rest = b""
            while chunk:
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    item = _decode(line)
                    if type(item) is End:
                        whole = await _read_to_end(response)
                        yield item
                        return
                    yield item
                chunk = await self._next(course, response)
            raise _Lost(
                "cut",
                EngineFailed("The engine ended the reply without saying how; what came before stands. Try again."),
            )
        finally:
            course.response = None
            if not whole:
                response.close()

    async def _begin(self, course: _Course, way: str | None) -> tuple[aiohttp.ClientResponse, bytes]:
        """The response and its first bytes. Only a reply that has begun is worth waiting for a replica."""
        if not course.ids:
            deadline = time.monotonic() + self._settings.first_token_timeout_s
            return await self._soon(lambda: self._first(course, deadline))
        ways = iter((way,) if way is not None else ())

        async def ask() -> tuple[aiohttp.ClientResponse, bytes]:
            return await self._attempt(
                course, next(ways, None), time.monotonic() + self._settings.first_token_timeout_s
            )

        try:
            return await self._patiently(course, ask)
        except (EngineFailed, Timeout) as error:
            raise _Lost("refused", error) from error

    async def _first(self, course: _Course, deadline: float) -> tuple[aiohttp.ClientResponse, bytes]:
        """The first bytes of a reply.

        Where they are late and a replica is found dead, it may be the one that was asked: another is asked instead.
        """
        asking = asyncio.create_task(self._attempt(course, None, deadline))
        watching: asyncio.Task[str] | None = None
        try:
            await asyncio.wait((asking,), timeout=self._settings.engine_probe_after_s)
            if not asking.done():
                watching = asyncio.create_task(self._another_than_a_dead_one())
                await asyncio.wait((asking, watching), return_when=asyncio.FIRST_COMPLETED)
            if asking.done() or watching is None:
                return asking.result()
            self._tell(course, "silent")
            return await self._attempt(course, watching.result(), deadline)
        finally:
            asking.cancel()
            if watching is not None:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
            await asyncio.gather(asking, return_exceptions=True)

    async def _another_than_a_dead_one(self) -> str:
        """The door of a replica that lives, once one is found that does not."""
        while True:
            for door in self._fleet.doors():
                if not await self._fleet.lives(door) and (other := await self._fleet.another(door)) is not None:
                    self._fleet.forget(door)
                    return other
            await asyncio.sleep(self._settings.engine_probe_after_s)

    async def _soon(self, ask: Callable[[], Awaitable[_Answer]]) -> _Answer:
        """The answer after as many attempts as the short budget allows."""
        for pause_s in (*RETRY_PAUSES_S, None):
            try:
                return await ask()
            except (Unavailable, EngineFailed) as error:
                self._card_time = 0.0
                if pause_s is None or isinstance(error, ModelLoading):
                    raise
                logger.warning("Engine attempt failed (%s), trying again", error.code)
            await asyncio.sleep(pause_s)
        raise AssertionError("the last attempt returns or raises")

    async def _patiently(self, course: _Course, ask: Callable[[], Awaitable[_Answer]]) -> _Answer:
        """The answer once a replica is there and has room, if that is within `engine_patience_s`."""
        until = time.monotonic() + self._settings.engine_patience_s
        pause_s, longest_s = PATIENT_PAUSES_S
        while True:
            try:
                return await ask()
            except (Unavailable, Overloaded):
                if time.monotonic() + pause_s > until:
                    raise
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None) as course.limit:
                    await asyncio.sleep(pause_s)
            course.heed()
            pause_s = min(2 * pause_s, longest_s)

    async def _attempt(self, course: _Course, way: str | None, deadline: float) -> tuple[aiohttp.ClientResponse, bytes]:
        course.heed()
        response: aiohttp.ClientResponse | None = None
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())) as course.limit:
                response, course.door = await self._fleet.open("POST", "/v1/generate", course.next_body(), door=way)
                chunk = await response.content.readany()
            if not chunk:
                raise EngineFailed("The engine ended the reply before its first token. Try again.")
        except BaseException as error:
            if response is not None:
                response.close()
            if isinstance(error, aiohttp.ClientError | TimeoutError):
                course.heed()
            if isinstance(error, aiohttp.ClientError):
                raise EngineFailed("The engine broke off the reply before its first token. Try again.") from error
            if isinstance(error, TimeoutError):
                seconds = self._settings.first_token_timeout_s
                raise Timeout(
                    f"The engine sent no token within {seconds:g} s: it is overloaded or stuck. Try again later.",
                    retry_after_s=LOADING_RETRY_S,
                ) from None
            raise
        return response, chunk

    async def _next(self, course: _Course, response: aiohttp.ClientResponse) -> bytes:
        """The next bytes. A replica that is silent is watched; one that is silent for too long is lost."""
        course.heed()
        silent_s, stalled_s = self._settings.engine_probe_after_s, self._settings.stall_timeout_s
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(silent_s, stalled_s)) as course.limit:
                    return await response.content.readany()
            course.heed()
            async with asyncio.timeout(max(0.0, stalled_s - silent_s)) as course.limit:
                return await self._watched(course, response)
        except aiohttp.ClientError as error:
            raise _Lost(
                "cut",
                EngineFailed(
                    "The engine broke off the reply: its process or connection ended. What came before stands. "
                    "Try again."
                ),
            ) from error
        except TimeoutError:
            course.heed()
            raise _Lost(
                "stalled", EngineFailed(f"The engine fell silent for {stalled_s:g} s in mid-reply. Try again.")
            ) from None

    async def _watched(self, course: _Course, response: aiohttp.ClientResponse) -> bytes:
        """The next bytes, unless the replica turns out dead before and there is another one."""
        reading = asyncio.create_task(response.content.readany())
        watching = asyncio.create_task(self._until_dead(course.door))
        try:
            await asyncio.wait((reading, watching), return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                return reading.result()
            raise _Lost("silent", EngineFailed("The engine's process fell silent in mid-reply. Try again."))
        finally:
            reading.cancel()
            watching.cancel()
            await asyncio.gather(reading, watching, return_exceptions=True)

    async def _until_dead(self, door: str | None) -> None:
        """Returns once the replica at `door` does not answer and another one does."""
        while True:
            if door is not None and not await self._fleet.lives(door) and await self._fleet.another(door) is not None:
                self._fleet.forget(door)
                return
            await asyncio.sleep(self._settings.engine_probe_after_s)


def _decode(line: bytes) -> Frame | End:
    try:
        return decode(line)
    except OneboxError as error:
        if error.retryable:
            raise _Lost("cut", error) from error
        raise


async def _read_to_end(response: aiohttp.ClientResponse) -> bool:
    """Whether the body ended properly, so that the connection can serve another call."""
    try:
        async with asyncio.timeout(0.25):
            await response.content.read()
    except (aiohttp.ClientError, TimeoutError):
        return False
    return True
