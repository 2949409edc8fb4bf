"""The gateway's side of the engine wire: opens generations, hands their frames on, names every failure.

A reply outlives its replica: when it breaks off, the prompt and the tokens seen so far go to another one, which goes
on from there. It knows nothing of tasks, conversations or logs; the replica's side of the wire is `serving.protocol`
and `serving.server`. It is aiohttp because a frame costs it 28 µs of CPU where httpx takes 76 µs (32 streams, two
cores).
"""

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeVar

import aiohttp
import orjson

from onebox.errors import (
    EngineFailed,
    ModelLoading,
    OneboxError,
    Overloaded,
    Timeout,
    Unauthorized,
    Unavailable,
    from_code,
)
from onebox.events import Alternative, FinishReason, Token
from onebox.messages import Message
from onebox.plugin import Sampling
from onebox.settings import Settings

RETRY_PAUSES_S: Final = (0.05, 0.25)
PATIENT_PAUSES_S: Final = (0.05, 0.5)  # the first and the longest; each is twice the one before
CARD_AGE_S: Final = 60.0
LOADING_RETRY_S: Final = 5.0
UNAVAILABLE_RETRY_S: Final = 2.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Frame:
    """The next piece of a reply. `tokens` only where log-probabilities were asked for."""

    text: str
    ids: tuple[int, ...]
    tokens: tuple[Token, ...] = ()

    @property
    def count(self) -> int:
        """How many tokens it has."""
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class End:
    """The reply is whole. `completion_tokens` counts all of it, on however many replicas it was drawn."""

    finish: FinishReason
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Card:
    """What the fleet serves. Lengths in tokens."""

    id: str
    context_length: int


@dataclass(frozen=True, slots=True)
class Generation:
    """One engine call. `choice` constrains the reply to one of these texts.

    `resume` has the tokens of the reply that are drawn already; they count towards `max_tokens`, and the frames begin
    after them.
    """

    request_id: str
    messages: Sequence[Message]
    sampling: Sampling
    max_tokens: int
    choice: Sequence[str] | None = None
    cache_salt: str | None = None
    session: str | None = None
    resume: Sequence[int] = ()


LossReason = Literal["cut", "stalled", "silent", "refused"]
_Answer = TypeVar("_Answer")


class _Lost(Exception):
    """The replica of a reply is lost to it; another one may go on."""

    def __init__(self, reason: LossReason, error: OneboxError) -> None:
        super().__init__(reason)
        self.reason: LossReason = reason
        self.error = error


class EngineClient:
    """A pool of connections to the fleet behind `settings.engine_url`. Use as an async context manager.

    `on_continuation` is told each time a reply goes on at another replica, and why it had to.
    """

    def __init__(self, settings: Settings, on_continuation: Callable[[LossReason], None] | None = None) -> None:
        self._url = settings.engine_url.rstrip("/")
        self._settings = settings
        self._on_continuation = on_continuation
        self._headers = {"content-type": "application/json"}
        if settings.internal_token is not None:
            self._headers["authorization"] = f"Bearer {settings.internal_token.get_secret_value()}"
        self._open_session: aiohttp.ClientSession | None = None
        self._card: Card | None = None
        self._card_time = 0.0
        self._seen_ready = False

    async def __aenter__(self) -> Self:
        self._open_session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4.0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._settings.connect_timeout_s),
            headers=self._headers,
            auto_decompress=False,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def generate(self, call: Generation) -> AsyncGenerator[Frame | End, None]:
        """The frames of one reply, then its `End`. Leaving the iterator early aborts the engine's work.

        A reply that has begun goes on at another replica when it loses its own, as often and as patiently as the
        settings allow; the reader sees only the time it takes.

        Raises:
            OneboxError: whatever the engine answered, after all that could help was tried.
        """
        ids = list(call.resume)
        attempts = itertools.count()
        continuations = 0
        broken: OneboxError | None = None
        while True:
            try:
                async with aclosing(self._reply(call, ids, attempts)) as items:
                    async for item in items:
                        if isinstance(item, Frame):
                            ids.extend(item.ids)
                            yield item
                        else:
                            yield End(item.finish, item.prompt_tokens, len(ids))
                return
            except _Lost as lost:
                self._card_time = 0.0
                if not ids or continuations == self._settings.engine_continuations:
                    raise lost.error from lost.__cause__
                continuations += 1
                broken = lost.error
                logger.warning("Reply %s lost its replica at token %d (%s)", call.request_id, len(ids), lost.reason)
                if self._on_continuation is not None:
                    self._on_continuation(lost.reason)
            except (Unavailable, Overloaded) as error:
                raise broken or error from error

    async def card(self) -> Card:
        """What the fleet serves; asked again each minute and after a failure."""
        fresh = time.monotonic() - self._card_time < CARD_AGE_S
        if self._card is not None and fresh:
            return self._card
        try:
            reply = await self._ask("GET", "/v1/model", None, 5.0)
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
        reply = await self._ask("POST", "/v1/tokenize", body, self._settings.stall_timeout_s)
        return int(reply["count"])

    async def readiness(self, timeout_s: float) -> tuple[Literal["ready", "loading", "down"], str]:
        """Whether a token can be had, and why not."""
        try:
            await self._ask("GET", "/readyz", None, timeout_s)
        except ModelLoading as error:
            return "loading", error.message
        except OneboxError as error:
            return "down", error.message
        return "ready", ""

    @property
    def _session(self) -> aiohttp.ClientSession:
        assert self._open_session is not None, "EngineClient is used outside its context"
        return self._open_session

    async def _reply(
        self, call: Generation, ids: Sequence[int], attempts: Iterator[int]
    ) -> AsyncGenerator[Frame | End, None]:
        """What one replica adds to the reply after `ids`.

        Raises:
            _Lost: it broke off, and another replica may go on.
        """
        if ids and len(ids) >= call.max_tokens:
            yield End("length", await self._patiently(lambda: self.count_tokens(call.messages)), len(ids))
            return
        response, chunk = await self._begin(call, ids, attempts)
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
                chunk = await self._next(response)
            raise _Lost(
                "cut",
                EngineFailed("The engine ended the reply without saying how; what came before stands. Try again."),
            )
        finally:
            if not whole:
                response.close()

    async def _begin(
        self, call: Generation, ids: Sequence[int], attempts: Iterator[int]
    ) -> tuple[aiohttp.ClientResponse, bytes]:
        """The response and its first bytes. Only a reply that has begun is worth waiting for a replica."""
        wait_s = self._settings.first_token_timeout_s
        if not ids:
            deadline = time.monotonic() + wait_s
            return await self._soon(lambda: self._attempt(_generate_body(call, ids, next(attempts)), deadline))
        try:
            return await self._patiently(
                lambda: self._attempt(_generate_body(call, ids, next(attempts)), time.monotonic() + wait_s)
            )
        except (EngineFailed, Timeout) as error:
            raise _Lost("refused", error) from error

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

    async def _patiently(self, ask: Callable[[], Awaitable[_Answer]]) -> _Answer:
        """The answer once a replica is there and has room, if that is within `engine_patience_s`."""
        until = time.monotonic() + self._settings.engine_patience_s
        pause_s, longest_s = PATIENT_PAUSES_S
        while True:
            try:
                return await ask()
            except (Unavailable, Overloaded):
                if time.monotonic() + pause_s > until:
                    raise
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, longest_s)

    async def _attempt(self, body: bytes, deadline: float) -> tuple[aiohttp.ClientResponse, bytes]:
        response: aiohttp.ClientResponse | None = None
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                response = await self._session.post(f"{self._url}/v1/generate", data=body)
                if response.status != 200:
                    raise self._refusal(response, await response.read())
                chunk = await response.content.readany()
            if not chunk:
                raise EngineFailed("The engine ended the reply before its first token. Try again.")
        except BaseException as error:
            if response is not None:
                response.close()
            if isinstance(error, aiohttp.ClientError):
                raise self._unreachable(error) from error
            if isinstance(error, TimeoutError):
                seconds = self._settings.first_token_timeout_s
                raise Timeout(
                    f"The engine sent no token within {seconds:g} s: it is overloaded or stuck. Try again later.",
                    retry_after_s=LOADING_RETRY_S,
                ) from None
            raise
        self._seen_ready = True
        return response, chunk

    async def _next(self, response: aiohttp.ClientResponse) -> bytes:
        try:
            async with asyncio.timeout(self._settings.stall_timeout_s):
                return await response.content.readany()
        except aiohttp.ClientError as error:
            raise _Lost(
                "cut",
                EngineFailed(
                    "The engine broke off the reply: its process or connection ended. What came before stands. "
                    "Try again."
                ),
            ) from error
        except TimeoutError:
            raise _Lost(
                "stalled",
                EngineFailed(
                    f"The engine fell silent for {self._settings.stall_timeout_s:g} s in mid-reply. Try again."
                ),
            ) from None

    async def _ask(self, method: str, path: str, body: bytes | None, timeout_s: float) -> Mapping[str, Any]:
        try:
            async with asyncio.timeout(timeout_s):
                async with self._session.request(method, self._url + path, data=body) as response:
                    payload = await response.read()
                    if response.status != 200:
                        raise self._refusal(response, payload)
        except aiohttp.ClientError as error:
            raise self._unreachable(error) from error
        except TimeoutError:
            raise Unavailable(
                f"The engine did not answer within {timeout_s:g} s. Try again.", retry_after_s=UNAVAILABLE_RETRY_S
            ) from None
        self._seen_ready = True
        try:
            reply = orjson.loads(payload)
        except orjson.JSONDecodeError:
            return {}
        return reply if isinstance(reply, dict) else {}

    def _refusal(self, response: aiohttp.ClientResponse, payload: bytes) -> OneboxError:
        """The error a non-200 answer stands for; Serve's own answers while no replica is up are no JSON."""
        retry_after_s = _seconds(response.headers.get("retry-after"))
        try:
            told = orjson.loads(payload)["error"]
            error = from_code(str(told["code"]), str(told["message"]), retry_after_s=retry_after_s)
        except (orjson.JSONDecodeError, KeyError, TypeError):
            if response.status == 429:
                return Overloaded("Every engine is busy and its queue is full. Try again.", retry_after_s=1.0)
            return self._absent(retry_after_s)
        if isinstance(error, Unauthorized):
            logger.error("The engine refuses the gateway's internal token")
            return Unavailable("The engine refuses the gateway's token: they were not started together. Restart both.")
        if error.retryable and error.retry_after_s is None:
            error.retry_after_s = LOADING_RETRY_S if isinstance(error, ModelLoading) else UNAVAILABLE_RETRY_S
        return error

    def _unreachable(self, error: aiohttp.ClientError) -> OneboxError:
        logger.info("Engine connection failed: %s", type(error).__name__)
        return self._absent(None)

    def _absent(self, retry_after_s: float | None) -> OneboxError:
        if not self._seen_ready:
            return ModelLoading(
                "The model is still loading: the engine has not answered yet. Try again shortly.",
                retry_after_s=retry_after_s or LOADING_RETRY_S,
            )
        return Unavailable(
            "The engine cannot be reached at the moment; it is restarted by itself. Try again shortly.",
            retry_after_s=retry_after_s or UNAVAILABLE_RETRY_S,
        )


def _generate_body(call: Generation, ids: Sequence[int], attempt: int) -> bytes:
    """The request for what follows `ids`; each attempt has an id of its own, for the one before may still be ending."""
    sampling: dict[str, object] = {"max_tokens": call.max_tokens - len(ids)}
    drawn = call.sampling
    if drawn.temperature is not None:
        sampling["temperature"] = drawn.temperature
    if drawn.top_p is not None:
        sampling["top_p"] = drawn.top_p
    if drawn.seed is not None:
        sampling["seed"] = drawn.seed
    if drawn.stop:
        sampling["stop"] = drawn.stop
    if drawn.top_logprobs is not None:
        sampling["top_logprobs"] = drawn.top_logprobs
    body: dict[str, object] = {
        "request_id": f"{call.request_id}.{attempt}" if attempt else call.request_id,
        "messages": [{"role": message.role, "content": message.text} for message in call.messages],
        "sampling": sampling,
    }
    if ids:
        body["resume_token_ids"] = ids
    if call.choice is not None:
        body["structured"] = {"choice": list(call.choice)}
    if call.cache_salt is not None:
        body["cache_salt"] = call.cache_salt
    if call.session is not None:
        body["session"] = call.session
    return orjson.dumps(body)


def _decode(line: bytes) -> Frame | End:
    try:
        item = orjson.loads(line)
        if "text" in item:
            tokens = item.get("tokens")
            return Frame(item["text"], tuple(item["ids"]), tuple(map(_token, tokens)) if tokens else ())
        if "finish" in item:
            usage = item["usage"]
            return End(item["finish"], usage["prompt_tokens"], usage["completion_tokens"])
        error = item["error"]
        code, message = str(error["code"]), str(error["message"])
    except (orjson.JSONDecodeError, KeyError, TypeError) as fault:
        raise _Lost(
            "cut", EngineFailed("The engine sent a frame that is not of this wire's version. Update both sides.")
        ) from fault
    told = from_code(code, message)
    if told.retryable:
        raise _Lost("cut", told)
    raise told


def _token(item: Mapping[str, Any]) -> Token:
    top = tuple(Alternative(rival["text"], rival["id"], rival["logprob"]) for rival in item.get("top", ()))
    return Token(item["text"], item["id"], item["logprob"], top)


async def _read_to_end(response: aiohttp.ClientResponse) -> bool:
    """Whether the body ended properly, so that the connection can serve another call."""
    try:
        async with asyncio.timeout(0.25):
            await response.content.read()
    except (aiohttp.ClientError, TimeoutError):
        return False
    return True


def _seconds(header: str | None) -> float | None:
    try:
        return float(header) if header is not None else None
    except ValueError:
        return None
