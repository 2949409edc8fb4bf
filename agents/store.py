"""The one door to Redis: short timeouts, one retry, and one error for every way it can be away.

It knows keys and scripts, not what they mean; that is in `agents.conversations` and `agents.keys`.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from hashlib import sha1
from math import inf
from typing import Any, Final

import hiredis
from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from agents.patience import Patience
from onebox.errors import SetupError, StoreUnavailable
from onebox.settings import Settings

RETRY_AFTER_S: Final = 2.0
TRIES: Final = 2
TOGETHER_S: Final = 0.002  # a script waits no longer than this for the round trip before it
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

    `on_trip` is told of each round trip: its kind, its seconds, and whether it failed.

    Raises:
        SetupError: no address is set, or it is none.
    """

    def __init__(self, settings: Settings, on_trip: Callable[[str, float, bool], None] | None = None) -> None:
        if settings.redis_url is None:
            raise SetupError("No store: ONEBOX_REDIS_URL is not set. Start with `python -m deploy up`, or set it.")
        url, self._limit_s = settings.redis_url, settings.redis_timeout_s
        self._on_trip = on_trip
        self._under_way = 0
        self._waiting: list[tuple[Call, asyncio.Future[Any]]] = []
        self._trips: set[asyncio.Task[None]] = set()
        try:
            self._redis: Redis = Redis.from_url(
                url,
                # Limits are kept, and lost connections tried again, by `_guard`: redis-py's limits would count the
                # time in which this worker did not look, and its default retry turns a 1 s timeout into 15.7 s.
                socket_timeout=None,
                socket_connect_timeout=None,
                retry=Retry(NoBackoff(), 0),
                max_connections=512,
                protocol=2,
            )
        except ValueError:
            raise SetupError("ONEBOX_REDIS_URL is not an address of a Redis. Write redis://host:port/0.") from None

    async def ping(self) -> None:
        """Return once the store answers."""
        await self._trip("ping", lambda: self._redis.ping())

    async def run(self, script: str, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        """The reply of a Lua script, which Redis executes as one step.

        Those asked for while another one is under way leave together behind it: under load, runs share their round
        trips and the syncs to disk.
        """
        call, loop = Call(script, keys, args), asyncio.get_running_loop()
        if self._under_way:
            if not self._waiting:
                loop.call_later(TOGETHER_S, self._leave)
            reply: asyncio.Future[Any] = loop.create_future()
            self._waiting.append((call, reply))
            return await reply
        self._under_way += 1
        try:
            return (await self.run_all([call]))[0]
        finally:
            self._under_way -= 1
            self._leave()

    def _leave(self) -> None:
        """Send those that wait for the round trip before them."""
        if self._waiting:
            trip = asyncio.create_task(self._carry(self._waiting))
            self._waiting = []
            self._trips.add(trip)
            trip.add_done_callback(self._trips.discard)

    async def _carry(self, calls: Sequence[tuple[Call, "asyncio.Future[Any]"]]) -> None:
        self._under_way += 1
        try:
            answers = await self.run_all([call for call, _ in calls])
        except Exception as error:
            answers = [error] * len(calls)
        finally:
            self._under_way -= 1
            self._leave()
        for (_, reply), answer in zip(calls, answers, strict=True):
            if reply.done():
                continue  # who asked has left
            if isinstance(answer, Exception):
                reply.set_exception(answer)
            else:
                reply.set_result(answer)

    async def run_all(self, calls: Sequence[Call]) -> list[Any]:
        """The replies of several scripts, sent in one round trip; others' commands may come in between.

        A call that the store refused for now, e.g. for lack of memory, answers a `StoreUnavailable`; alone, it raises.
        """
        replies = await self._trip("script", lambda: self._evaluate(calls))
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
        # Not redis-py's pipeline, which packs in Python: 27 µs a command instead of 110.
        words: list[Any] = [(name, script, len(call.keys), *call.keys, *call.args) for name, script, call in commands]
        packed = b"".join(map(hiredis.pack_command, words))
        pool = self._redis.connection_pool
        connection = await pool.get_connection()  # type: ignore[no-untyped-call]  # untyped in redis-py
        try:
            await connection.send_packed_command(packed)
            return [await _reply(connection) for _ in commands]
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        finally:
            await pool.release(connection)

    async def listen(self, channel: str) -> AsyncGenerator[bytes, None]:
        """The messages published to `channel`; one sent while the store is away is lost."""
        subscriber = self._redis.pubsub(ignore_subscribe_messages=True)
        try:
            await _guard(lambda: subscriber.subscribe(channel), self._limit_s)
            while True:
                message = await _guard(lambda: subscriber.get_message(timeout=_LISTEN_S), inf)
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

        replies: list[Any] = await self._trip("transaction", execute)
        return replies

    async def hash_get(self, key: str, field: str) -> bytes | None:
        """One field of a hash."""
        value: bytes | None = await self._trip("get", lambda: self._redis.hget(key, field))
        return value

    async def hash_set(self, key: str, field: str, value: str | bytes) -> None:
        """Set one field of a hash."""
        await self._trip("set", lambda: self._redis.hset(key, field, value))

    async def close(self) -> None:
        """Close every connection."""
        await self._redis.aclose()

    async def _trip(self, kind: str, operation: Callable[[], Any]) -> Any:
        """The result of `operation`, a round trip."""
        began = time.perf_counter()
        failed = False
        try:
            return await _guard(operation, self._limit_s)
        except StoreUnavailable:
            failed = True
            raise
        finally:
            if self._on_trip is not None:
                self._on_trip(kind, time.perf_counter() - began, failed)


_DIGESTS: dict[str, str] = {}


def _digest(script: str) -> str:
    """What Redis calls a script by."""
    digest = _DIGESTS.get(script)
    if digest is None:
        digest = _DIGESTS[script] = sha1(script.encode(), usedforsecurity=False).hexdigest()
    return digest


async def _reply(connection: AbstractConnection) -> Any:
    """The next reply, or the error that it is."""
    try:
        return await connection.read_response()
    except exceptions.ResponseError as error:
        return error


def _checked(reply: Any) -> Any:
    """A reply; a refusal that will pass as a `StoreUnavailable`. Raises any other error."""
    if not isinstance(reply, exceptions.RedisError):
        return reply
    if isinstance(reply, _AWAY) or str(reply).startswith(_AWAY_PREFIXES):
        return _away()
    raise reply


async def _guard(operation: Callable[[], Any], limit_s: float) -> Any:
    """The result of `operation`, tried again where it is late or its connection breaks.

    A try takes `limit_s` at most, with what a new connection needs.
    """
    patience = Patience()
    try:
        for left in range(TRIES - 1, -1, -1):
            try:
                result = operation()
                return await patience.wait(result, limit_s) if isinstance(result, Awaitable) else result
            except (TimeoutError, exceptions.ConnectionError):
                if not left:
                    raise
    except (*_AWAY, TimeoutError) as error:
        raise _away() from error
    except exceptions.ResponseError as error:
        if str(error).startswith(_AWAY_PREFIXES):
            raise _away() from error
        raise
    finally:
        patience.close()


def _away() -> StoreUnavailable:
    return StoreUnavailable(
        "The conversation store does not answer, so nothing was changed. It is reconnected by itself. Try again.",
        retry_after_s=RETRY_AFTER_S,
    )
