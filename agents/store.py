"""The one door to Redis: short timeouts, one retry, and one error for every way it can be away.

It knows keys and scripts, not what they mean; that is in `agents.conversations` and `agents.keys`.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from onebox.errors import SetupError, StoreUnavailable
from onebox.settings import Settings

RETRY_AFTER_S: Final = 2.0
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


class Store:
    """A pool of connections to one Redis; every method raises `StoreUnavailable` while it is away.

    Raises:
        SetupError: no address is set, or it is none.
    """

    def __init__(self, settings: Settings) -> None:
        if settings.redis_url is None:
            raise SetupError("No store: ONEBOX_REDIS_URL is not set. Start with `python -m deploy up`, or set it.")
        url, timeout_s = settings.redis_url, settings.redis_timeout_s
        try:
            self._redis: Redis = Redis.from_url(
                url,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                # redis-py's default retry turns a 1 s timeout into 15.7 s.
                retry=Retry(NoBackoff(), 1),
                max_connections=512,
                protocol=2,
            )
        except ValueError:
            raise SetupError("ONEBOX_REDIS_URL is not an address of a Redis. Write redis://host:port/0.") from None

    async def ping(self) -> None:
        """Return once the store answers."""
        await _guard(lambda: self._redis.ping())

    async def run(self, script: str, keys: Sequence[str], args: Sequence[str | bytes | int]) -> Any:
        """The reply of a Lua script, which Redis executes as one step."""
        prepared = self._redis.register_script(script)
        return await _guard(lambda: prepared(keys=list(keys), args=list(args)))

    async def transaction(self, commands: Sequence[Sequence[str | bytes | int | float]]) -> list[Any]:
        """The replies of `commands`, executed together in one round trip."""

        async def execute() -> list[Any]:
            async with self._redis.pipeline(transaction=True) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)
                return list(await pipeline.execute())

        replies: list[Any] = await _guard(execute)
        return replies

    async def hash_get(self, key: str, field: str) -> bytes | None:
        """One field of a hash."""
        value: bytes | None = await _guard(lambda: self._redis.hget(key, field))
        return value

    async def hash_set(self, key: str, field: str, value: str | bytes) -> None:
        """Set one field of a hash."""
        await _guard(lambda: self._redis.hset(key, field, value))

    async def close(self) -> None:
        """Close every connection."""
        await self._redis.aclose()


async def _guard(operation: Callable[[], Any]) -> Any:
    try:
        result = operation()
        return await result if isinstance(result, Awaitable) else result
    except _AWAY as error:
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
