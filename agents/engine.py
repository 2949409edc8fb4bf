"""The gateway's side of the engine wire: opens generations, hands their frames on, names every failure.

A reply outlives its replica: when it breaks off, the prompt and the tokens seen so far go to another one, which goes
on from there. It knows nothing of tasks, conversations or logs; how replicas are reached is `agents.fleet`, their side
of the wire `serving.protocol` and `serving.server`. It is aiohttp because a frame costs it 28 µs of CPU where httpx
takes 76 µs (32 streams, two cores).
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Literal, Self, TypeVar

import aiohttp
import orjson

from agents.course import Course, LossReason, Lost, Stopped
from agents.fleet import LOADING_RETRY_S, Fleet
from agents.generation import End, Frame, Generation, decode
from agents.watch import Watch
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


_Answer = TypeVar("_Answer")


class EngineClient:
    """The engine fleet, as everything in a gateway sees it. Use as an async context manager.

    `on_continuation` is told each time a reply goes on at another replica, and why it had to.
    """

    def __init__(self, settings: Settings, on_continuation: Callable[[LossReason], None] | None = None) -> None:
        self._settings = settings
        self._on_continuation = on_continuation
        self._fleet = Fleet(settings)
        self._watch = Watch(self._fleet, settings.engine_probe_after_s)
        self._courses: set[Course] = set()
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
        course = Course(call)
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
                except Lost as lost:
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
        except (OneboxError, Stopped) as error:
            if course.stopped:
                raise EngineFailed(STOPPED) from error
            raise
        finally:
            course.patience.close()
            self._courses.discard(course)

    async def abort(self, request_id: str) -> Receipt:
        """End the open call of this id: its replica is told, then the reader meets an error. Never raises."""
        return await self._abort([course for course in self._courses if course.call.request_id == request_id])

    async def abort_prefix(self, prefix: str) -> Receipt:
        """End every open call whose id begins so; the tokens are summed, the time is the longest."""
        return await self._abort([course for course in self._courses if course.call.request_id.startswith(prefix)])

    async def card(self) -> Card:
        """What the fleet serves; asked again each minute and after a failure."""
        # A fleet that may sleep is not woken for what is known.
        fresh = time.monotonic() - self._card_time < (math.inf if self._fleet.may_sleep else CARD_AGE_S)
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

    def announce(self, queued: Callable[[], int]) -> None:
        """Tell the fleet, from now on, how many runs wait here for a place of it."""
        self._fleet.queued = queued

    def places(self) -> int:
        """Requests that the fleet works on at a time: by its roster, or as at its start while that is not known."""
        return self._fleet.places() or self._settings.engine_replicas * self._settings.engine_max_ongoing

    async def alive(self, timeout_s: float) -> bool:
        """Whether any replica answers, however busy it is, or would be woken."""
        if self._fleet.may_sleep:
            return await self._fleet.ingress_answers(timeout_s)
        try:
            await self._fleet.ask("GET", "/healthz", None, timeout_s)
        except OneboxError:
            return False
        return True

    async def metrics(self, timeout_s: float) -> Mapping[str, str]:
        """The exposition of each replica that answers, by its door; of any one where no door can be reached."""
        return await self._fleet.metrics(timeout_s)

    async def readiness(self, timeout_s: float) -> tuple[Literal["ready", "loading", "down"], str]:
        """Whether a token can be had, and why not."""
        try:
            if self._fleet.may_sleep and await self._fleet.another("") is None:
                awake = await self._fleet.ingress_answers(timeout_s)
                return ("ready", "asleep") if awake else ("down", "The engine's ingress does not answer.")
            await self._fleet.ask("GET", "/readyz", None, timeout_s)
        except ModelLoading as error:
            return "loading", error.message
        except OneboxError as error:
            return "down", error.message
        return "ready", ""

    def _tell(self, course: Course, reason: LossReason) -> None:
        logger.warning("Reply %s lost its replica at token %d (%s)", course.call.request_id, len(course.ids), reason)
        if self._on_continuation is not None:
            self._on_continuation(reason)

    async def _abort(self, courses: Sequence[Course]) -> Receipt:
        receipts = await asyncio.gather(*map(self._abort_one, courses))
        tokens = [receipt.tokens for receipt in receipts if receipt.tokens is not None]
        freed_ms = [receipt.freed_ms for receipt in receipts if receipt.freed_ms is not None]
        return Receipt(sum(tokens) if tokens else None, max(freed_ms, default=None))

    async def _abort_one(self, course: Course) -> Receipt:
        """The call is ended even where no replica answers: the connection that it has is closed."""
        known = course.door if course.response is not None else course.heading
        doors = [known] if known is not None else self._fleet.doors()
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

    async def _reply(self, course: Course, way: str | None) -> AsyncGenerator[Frame | End, None]:
        """What one replica, the one at `way` by preference, adds to the reply.

        Raises:
            Lost: it broke off, and another replica may go on.
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
            raise Lost(
                "cut",
                EngineFailed("The engine ended the reply without saying how; what came before stands. Try again."),
            )
        finally:
            course.response = None
            self._fleet.leave(course.door)
            if not whole:
                response.close()

    async def _begin(self, course: Course, way: str | None) -> tuple[aiohttp.ClientResponse, bytes]:
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
            raise Lost("refused", error) from error

    async def _first(self, course: Course, deadline: float) -> tuple[aiohttp.ClientResponse, bytes]:
        """The first bytes of a reply.

        Where they are late and a replica is found dead, it may be the one that was asked: another is asked instead.
        """
        asking = asyncio.create_task(self._attempt(course, None, deadline))
        watching: asyncio.Task[str] | None = None
        try:
            await asyncio.wait((asking,), timeout=self._settings.engine_probe_after_s)
            if not asking.done():
                watching = asyncio.create_task(self._watch.another(course))
                await asyncio.wait((asking, watching), return_when=asyncio.FIRST_COMPLETED)
            if asking.done() or watching is None:
                return asking.result()
            asking.cancel()
            self._tell(course, "silent")
            return await self._attempt(course, watching.result(), deadline)
        finally:
            asking.cancel()
            if watching is not None:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
            await asyncio.gather(asking, return_exceptions=True)

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

    async def _patiently(self, course: Course, ask: Callable[[], Awaitable[_Answer]]) -> _Answer:
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
                await course.patience.wait(asyncio.sleep(pause_s), math.inf)
            course.heed()
            pause_s = min(2 * pause_s, longest_s)

    async def _attempt(self, course: Course, way: str | None, deadline: float) -> tuple[aiohttp.ClientResponse, bytes]:
        course.heed()
        try:
            return await course.patience.wait(self._asked(course, way), deadline - time.monotonic())
        except aiohttp.ClientError as error:
            course.heed()
            raise EngineFailed("The engine broke off the reply before its first token. Try again.") from error
        except TimeoutError:
            course.heed()
            seconds = self._settings.first_token_timeout_s
            raise Timeout(
                f"The engine sent no token within {seconds:g} s: it is overloaded or stuck. Try again later.",
                retry_after_s=LOADING_RETRY_S,
            ) from None

    async def _asked(self, course: Course, way: str | None) -> tuple[aiohttp.ClientResponse, bytes]:
        response, course.door = await self._fleet.begin(course.next_body(), course.call.affinity, way, course.head_for)
        try:
            chunk = await response.content.readany()
            if not chunk:
                raise EngineFailed("The engine ended the reply before its first token. Try again.")
        except BaseException:
            response.close()
            self._fleet.leave(course.door)
            raise
        return response, chunk

    async def _next(self, course: Course, response: aiohttp.ClientResponse) -> bytes:
        """The next bytes. A replica that is silent is watched; one that is silent for too long is lost."""
        course.heed()
        silent_s, stalled_s = self._settings.engine_probe_after_s, self._settings.stall_timeout_s
        try:
            try:
                return await course.patience.wait(response.content.readany(), min(silent_s, stalled_s))
            except TimeoutError:
                course.heed()
            return await course.patience.wait(
                self._watch.read(course, response.content.readany()), stalled_s - silent_s
            )
        except aiohttp.ClientError as error:
            raise Lost(
                "cut",
                EngineFailed(
                    "The engine broke off the reply: its process or connection ended. What came before stands. "
                    "Try again."
                ),
            ) from error
        except TimeoutError:
            course.heed()
            raise Lost(
                "stalled", EngineFailed(f"The engine fell silent for {stalled_s:g} s in mid-reply. Try again.")
            ) from None


def _decode(line: bytes) -> Frame | End:
    try:
        return decode(line)
    except OneboxError as error:
        if error.retryable:
            raise Lost("cut", error) from error
        raise


async def _read_to_end(response: aiohttp.ClientResponse) -> bool:
    """Whether the body ended properly, so that the connection can serve another call."""
    try:
        async with asyncio.timeout(0.25):
            await response.content.read()
    except (aiohttp.ClientError, TimeoutError):
        return False
    return True
