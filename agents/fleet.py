"""The way to the engine fleet: its ingress, and the doors of its replicas for when the ingress will not do.

Knows connections, tokens and the errors that answers stand for, not what a reply is; that is `agents.engine`. Every
answer of a replica names its door, the replica's own address. Doors lead to one certain replica, which the ingress
cannot, and around the ingress while it is away.
"""

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping
from random import choice
from types import TracebackType
from typing import Any, Final, Self

import aiohttp
import orjson

from onebox.errors import ModelLoading, OneboxError, Overloaded, Unauthorized, Unavailable, from_code
from onebox.settings import Settings

REPLICA_HEADER: Final = "x-onebox-replica"
DOORS_MAX: Final = 16
DOOR_AGE_S: Final = 60.0
LOADING_RETRY_S: Final = 5.0
UNAVAILABLE_RETRY_S: Final = 2.0
SEARCHES: Final = 3

logger = logging.getLogger(__name__)


class Fleet:
    """A pool of connections to the fleet behind `settings.engine_url`. Use as an async context manager."""

    def __init__(self, settings: Settings) -> None:
        self._url = settings.engine_url.rstrip("/")
        self._settings = settings
        self._headers = {"content-type": "application/json"}
        if settings.internal_token is not None:
            self._headers["authorization"] = f"Bearer {settings.internal_token.get_secret_value()}"
        self._open_session: aiohttp.ClientSession | None = None
        self._seen_ready = False
        self._doors: dict[str, float] = {}  # when each was last heard of; the first in line is tried first
        self._proven: dict[str, bool] = {}  # whether a door can be reached from here
        self._proving: set[asyncio.Task[None]] = set()

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
        for task in self._proving:
            task.cancel()
        await asyncio.gather(*self._proving, return_exceptions=True)
        await self._session.close()

    async def open(
        self, method: str, path: str, body: bytes | None = None, *, door: str | None = None
    ) -> tuple[aiohttp.ClientResponse, str | None]:
        """A replica's 200, for the caller to read and close, and its door: of the replica at `door` where one is given.

        Raises:
            OneboxError: the answer of a replica that refuses, or that none can be reached.
        """
        refused: OneboxError | None = None
        for way in (door,) if door is not None else self._ways():
            try:
                response = await self._session.request(method, way + path, data=body)
            except aiohttp.ClientError as error:
                self.forget(way)
                logger.info("Engine connection failed: %s", type(error).__name__)
                continue
            found = self._learn(response)
            if response.status == 200:
                self._seen_ready = True
                return response, found
            refused = await self._refusal(response)
            by_replica = found is not None or isinstance(refused, Overloaded)
            if not refused.retryable or (way == self._url and by_replica):
                raise refused
        raise refused or self._absent(None)

    async def ask(self, method: str, path: str, body: bytes | None, timeout_s: float) -> Mapping[str, Any]:
        """The JSON a replica answers, whichever it is.

        Raises:
            OneboxError: as `open` does, or no answer came in time.
        """
        try:
            async with asyncio.timeout(timeout_s):
                response, _ = await self.open(method, path, body)
                async with response:
                    payload = await response.read()
        except aiohttp.ClientError:
            raise self._absent(None) from None
        except TimeoutError:
            raise Unavailable(
                f"The engine did not answer within {timeout_s:g} s. Try again.", retry_after_s=UNAVAILABLE_RETRY_S
            ) from None
        return _object(payload)

    async def ask_door(
        self, door: str, method: str, path: str, body: bytes | None, timeout_s: float
    ) -> Mapping[str, Any] | None:
        """The JSON the replica at `door` answers; None where it refuses, is silent or away."""
        try:
            async with asyncio.timeout(timeout_s):
                async with self._session.request(method, door + path, data=body) as response:
                    payload = await response.read()
                    return _object(payload) if response.status == 200 else None
        except (aiohttp.ClientError, TimeoutError):
            return None

    async def lives(self, door: str) -> bool:
        """Whether the replica answers at its door; one that never could be reached there has the benefit of doubt."""
        if await self.ask_door(door, "GET", "/healthz", None, self._settings.engine_probe_timeout_s) is not None:
            self._proven[door] = True
            return True
        return not self._proven.get(door, False)

    async def another(self, lost: str) -> str | None:
        """The door of a replica that answers now and is not the one at `lost`; None where none was found."""
        timeout_s = self._settings.engine_probe_timeout_s
        others = [door for door in self.doors() if door != lost]
        answers = await asyncio.gather(*(self.ask_door(door, "GET", "/healthz", None, timeout_s) for door in others))
        if alive := [door for door, answer in zip(others, answers, strict=True) if answer is not None]:
            return choice(alive)
        for _ in range(SEARCHES):
            try:
                async with asyncio.timeout(timeout_s):
                    response, found = await self.open("GET", "/healthz")
                    response.release()
            except (OneboxError, TimeoutError):
                continue
            if found is not None and found != lost:
                return found
        return None

    def doors(self) -> list[str]:
        """The doors heard of lately."""
        oldest = time.monotonic() - DOOR_AGE_S
        return [door for door, heard in self._doors.items() if heard >= oldest]

    def forget(self, door: str) -> None:
        """Do not go there before it is heard of again."""
        self._doors.pop(door, None)

    @property
    def _session(self) -> aiohttp.ClientSession:
        assert self._open_session is not None, "Fleet is used outside its context"
        return self._open_session

    def _ways(self) -> Iterator[str]:
        """The ingress, then each door, the one that was used longest ago first."""
        yield self._url
        for door in self.doors():
            if door in self._doors:
                self._doors[door] = self._doors.pop(door)
                yield door

    def _learn(self, response: aiohttp.ClientResponse) -> str | None:
        """The door of the replica that answers, noted; None where it was no replica that answered."""
        door = response.headers.get(REPLICA_HEADER)
        if door is None:
            return None
        if door not in self._doors:
            while len(self._doors) >= DOORS_MAX:
                del self._doors[min(self._doors, key=self._doors.__getitem__)]
            if door not in self._proven:
                self._prove(door)
        self._doors[door] = time.monotonic()
        return door

    def _prove(self, door: str) -> None:
        """Find out in the background whether this gateway can reach the door: a firewall may be in between."""
        self._proven = {known: proven for known, proven in self._proven.items() if known in self._doors}
        self._proven[door] = False
        task = asyncio.create_task(self._try(door), name="try a replica's door")
        self._proving.add(task)
        task.add_done_callback(self._proving.discard)

    async def _try(self, door: str) -> None:
        await self.lives(door)

    async def _refusal(self, response: aiohttp.ClientResponse) -> OneboxError:
        """The error a non-200 answer stands for; Serve's own answers while no replica is up are no JSON."""
        retry_after_s = _seconds(response.headers.get("retry-after"))
        try:
            async with response:
                told = orjson.loads(await response.read())["error"]
            error = from_code(str(told["code"]), str(told["message"]), retry_after_s=retry_after_s)
        except aiohttp.ClientError:
            return self._absent(retry_after_s)
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


def _object(payload: bytes) -> Mapping[str, Any]:
    try:
        reply = orjson.loads(payload)
    except orjson.JSONDecodeError:
        return {}
    return reply if isinstance(reply, dict) else {}


def _seconds(header: str | None) -> float | None:
    try:
        return float(header) if header is not None else None
    except ValueError:
        return None
