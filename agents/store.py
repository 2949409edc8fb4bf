"""The one door to Redis: short timeouts, one retry, and one error for every way it can be away.

It knows keys and scripts, not what they mean; that is in `agents.conversations` and `agents.keys`.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from hashlib import sha1
from typing import Any, Final

from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from onebox.errors import SetupError, StoreUnavailable
from onebox.settings import Settings

RETRY_AFTER_S: Final = 2.0
TRIES: Final = 2
# Redis answers these while it cannot take a write (disk full, replica, no memory, starting).
_AWAY: Final = (
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    exceptions.ReadOnlyError,
    exceptions.OutOfMemoryError,
    exceptions.ClusterDownError,
    exceptions.MasterDownError,
)
_AWAY_PREFIXES: Final = ("MISCONF", "NOREPLICAS", "BUSY")
_LISTEN_S: Final = 1.0

Argument = str | bytes | int


@dataclass(frozen=True, slots=True)
class Call:
    """One execution of a script."""

    script: str
    keys: Sequence[str]
    args: Sequence[Argument]


class Store:
    """A pool of connections to one Redis; every method raises `StoreUnavailable` while it is away.

    Raises:
        SetupError: no address is set, or it is none.
    """

    def __init__(self, settings: Settings) -> None:
        if settings.redis_url is None:
            raise SetupError("No store: ONEBOX_REDIS_URL is not set. Start with `python -m deploy up`, or set it.")
        url, timeout_s = settings.redis_url, settings.redis_timeout_s
        self._limit_s = TRIES * timeout_s
        try:
            self._redis: Redis = Redis.from_url(
                url,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                # redis-py's default retry turns a 1 s timeout into 15.7 s.
                retry=Retry(NoBackoff(), TRIES - 1),
                max_connections=512,
                protocol=2,
            )
        except ValueError:
            raise SetupError("ONEBOX_REDIS_URL is not an address of a Redis. Write redis://host:port/0.") from None

    async def ping(self) -> None:
        """Return once the store answers."""
        await _guard(lambda: self._redis.ping(), self._limit_s)

    async def run(self, script: str, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        """The reply of a Lua script, which Redis executes as one step."""
        (reply,) = await self.run_all([Call(script, keys, args)])
        return reply

    async def run_all(self, calls: Sequence[Call]) -> list[Any]:
        """The replies of several scripts, sent in one round trip; others' commands may come in between.

        A call that the store refused for now, e.g. for lack of memory, answers a `StoreUnavailable`; alone, it raises.
        """
        replies = await _guard(lambda: self._evaluate(calls), self._limit_s)
        away = [reply for reply in replies if isinstance(reply, StoreUnavailable)]
        if away and len(calls) == 1:
            raise away[0]
        return list(replies)

    async def _evaluate(self, calls: Sequence[Call]) -> list[Any]:
        replies = await self._pipe([("EVALSHA", _digest(call.script), call) for call in calls])
        missing = [index for index, reply in enumerate(replies) if isinstance(reply, exceptions.NoScriptError)]
        if missing:  # the server has restarted since, or never saw the script
            again = await self._pipe([("EVAL", calls[index].script, calls[index]) for index in missing])
            for index, reply in zip(missing, again, strict=True):
                replies[index] = reply
        return [_checked(reply) for reply in replies]

    async def _pipe(self, commands: Sequence[tuple[str, str, Call]]) -> list[Any]:
        async with self._redis.pipeline(transaction=False) as pipeline:
            for name, script, call in commands:
                pipeline.execute_command(name, script, len(call.keys), *call.keys, *call.args)
            return list(await pipeline.execute(raise_on_error=False))

    async def listen(self, channel: str) -> AsyncGenerator[bytes, None]:
        """The messages published to `channel`; one sent while the store is away is lost."""
        subscriber = self._redis.pubsub(ignore_subscribe_messages=True)
        try:
            await _guard(lambda: subscriber.subscribe(channel), self._limit_s)
            while True:
                message = await _guard(lambda: subscriber.get_message(timeout=_LISTEN_S), None)
                if message is not None:
                    yield message["data"]
        finally:
            await subscriber.aclose()  # type: ignore[no-untyped-call]  # untyped in redis-py

    async def transaction(self, commands: Sequence[Sequence[str | bytes | int | float]]) -> list[Any]:
        """The replies of `commands`, executed together in one round trip."""

        async def execute() -> list[Any]:
            async with self._redis.pipeline(transaction=True) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)
                return list(await pipeline.execute())

        replies: list[Any] = await _guard(execute, self._limit_s)
        return replies

    async def hash_get(self, key: str, field: str) -> bytes | None:
        """One field of a hash."""
        value: bytes | None = await _guard(lambda: self._redis.hget(key, field), self._limit_s)
        return value

    async def hash_set(self, key: str, field: str, value: str | bytes) -> None:
        """Set one field of a hash."""
        await _guard(lambda: self._redis.hset(key, field, value), self._limit_s)

    async def close(self) -> None:
        """Close every connection."""
        await self._redis.aclose()


_DIGESTS: dict[str, str] = {}


def _digest(script: str) -> str:
    """What Redis calls a script by."""
    digest = _DIGESTS.get(script)
    if digest is None:
        digest = _DIGESTS[script] = sha1(script.encode(), usedforsecurity=False).hexdigest()
    return digest


def _checked(reply: Any) -> Any:
    """A reply; a refusal that will pass as a `StoreUnavailable`. Raises any other error."""
    if not isinstance(reply, exceptions.RedisError):
        return reply
    if isinstance(reply, _AWAY) or str(reply).startswith(_AWAY_PREFIXES):
        return _away()
    raise reply


async def _guard(operation: Callable[[], Any], limit_s: float | None) -> Any:
    """The result of `operation`; what a new connection needs counts towards `limit_s` too."""
    try:
        async with asyncio.timeout(limit_s):
            result = operation()
            return await result if isinstance(result, Awaitable) else result
    except (*_AWAY, TimeoutError) as error:
        raise _away() from error
    except exceptions.ResponseError as error:
        if str(error).startswith(_AWAY_PREFIXES):
            raise _away() from error
        raise


def _away() -> StoreUnavailable:
    return StoreUnavailable(
        "The conversation store does not answer, so nothing was changed. It is reconnected by itself. Try again.",
        retry_after_s=RETRY_AFTER_S,
    )
