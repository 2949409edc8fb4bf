"""The way to the engine fleet: the doors of its replicas, and its ingress for when these are not known or not reached.

Knows connections, tokens and the errors that answers stand for, not what a reply is; that is `agents.engine`. Which
door a request goes to is `agents.doors`. Every answer of a replica names its door, the replica's own address, and any
replica tells who else is in the fleet.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from random import choice, sample, shuffle
from types import TracebackType
from typing import Any, Final, Self

import aiohttp
import orjson
from yarl import URL

from agents.doors import WAYS_MAX, Doors
from onebox.errors import ModelLoading, OneboxError, Overloaded, Unauthorized, Unavailable, from_code
from onebox.settings import Settings

REPLICA_HEADER: Final = "x-onebox-replica"
AFFINITY_HEADER: Final = "x-onebox-affinity"
FREE_HEADER: Final = "x-onebox-if-free"
LOADING_RETRY_S: Final = 5.0
UNAVAILABLE_RETRY_S: Final = 2.0
SEARCHES: Final = 3
ROSTER_S: Final = 1.0  # between two looks at the roster while there is traffic
ROSTER_IDLE_S: Final = 10.0
TRAFFIC_S: Final = 10.0  # after the last request there is none any more
PROVE_AGAIN_S: Final = 2.0
PROBES_MAX: Final = 32
HEALTH_PATH: Final = "/-/healthz"  # of Serve's ingress itself; unlike any other request it wakes no replica

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
        self._doors = Doors()
        self._probes = asyncio.Semaphore(PROBES_MAX)
        self._proving: dict[str, asyncio.Task[bool]] = {}
        self._following: asyncio.Task[None] | None = None
        self._asked_at = float("-inf")
        self._traffic = asyncio.Event()
        self.queued: Callable[[], int] = int  # runs that wait here for a place of this fleet
        self.may_sleep = settings.replica_bounds[0] == 0

    async def __aenter__(self) -> Self:
        self._open_session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4.0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._settings.connect_timeout_s),
            headers=self._headers,
            auto_decompress=False,
        )
        self._following = asyncio.create_task(self._follow(), name="follow the fleet")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = [*self._proving.values(), *filter(None, (self._following,))]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._session.close()

    async def begin(
        self, body: bytes, affinity: str | None, door: str | None, heading: Callable[[str | None], None]
    ) -> tuple[aiohttp.ClientResponse, str | None]:
        """The reply of a replica that took a generation, and its door, which has to be left with `leave`.

        It is the replica at `door` where one is given, else the one that suits the affinity key and has room.
        `heading` hears each door before it is tried; None is the ingress.

        Raises:
            OneboxError: as `open` does.
        """
        self._note_traffic()
        headers = {AFFINITY_HEADER: affinity} if affinity is not None else {}
        ways = (door,) if door is not None else self._doors.choose(affinity) if self._settings.engine_doors else ()
        refused: OneboxError | None = None
        # Views are a second old: a replica without a free place says so, and another may have one. Where none has, the
        # first that said so is asked again, to wait there.
        tries = [(way, len(ways) > 1) for way in ways]
        for way, if_free in tries:
            heading(way)
            self._doors.enter(way)
            try:
                asked = headers | {FREE_HEADER: "1"} if if_free else headers
                response = await self._session.post(f"{way}/v1/generate", data=body, headers=asked)
                if response.status == 200:
                    self._learn(response)
                    self._seen_ready = True
                    return response, self._settle(affinity, way)
                refused = await self._refusal(response)
            except aiohttp.ClientError as error:
                logger.info("A replica could not be reached at its door: %s", type(error).__name__)
                self._doors.forget(way)
                self._doors.leave(way)
                continue
            except BaseException:
                self._doors.leave(way)
                raise
            self._doors.leave(way)
            if not refused.retryable:
                raise refused
            if isinstance(refused, Unavailable):
                self._doors.forget(way)
            elif isinstance(refused, Overloaded) and if_free:
                self._doors.fill(way)
                tries.append((way, False))
        if isinstance(refused, Overloaded) or door is not None:
            raise refused or self._absent(None)
        heading(None)
        response, found = await self.open("POST", "/v1/generate", body, headers=headers)
        self._doors.enter(found)
        return response, self._settle(affinity, found)

    def leave(self, door: str | None) -> None:
        """The reply from there is over."""
        self._doors.leave(door)

    async def open(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        first: Sequence[str] = (),
    ) -> tuple[aiohttp.ClientResponse, str | None]:
        """A replica's 200, for the caller to read and close, and its door.

        The doors to try `first` are followed by the ingress, and that by any door.

        Raises:
            OneboxError: the answer of a replica that refuses, or that none can be reached.
        """
        refused: OneboxError | None = None
        for way in self._ways(first):
            try:
                response = await self._session.request(method, way + path, data=body, headers=headers)
            except aiohttp.ClientError as error:
                self._doors.forget(way)
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
        first = self._doors.choose(None) if self._settings.engine_doors else ()
        try:
            async with asyncio.timeout(timeout_s):
                response, _ = await self.open(method, path, body, first=first)
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
        payload = await self.read_door(door, method, path, body, timeout_s)
        return None if payload is None else _object(payload)

    async def read_door(self, door: str, method: str, path: str, body: bytes | None, timeout_s: float) -> bytes | None:
        """What the replica at `door` answers; None where it refuses, is silent or away."""
        try:
            async with asyncio.timeout(timeout_s):
                async with self._session.request(method, door + path, data=body) as response:
                    payload = await response.read()
                    return payload if response.status == 200 else None
        except (aiohttp.ClientError, TimeoutError):
            return None

    async def ingress_answers(self, timeout_s: float) -> bool:
        """Whether the ingress itself does, whatever becomes of the replicas behind it."""
        origin = str(URL(self._url).origin())
        return await self.read_door(origin, "GET", HEALTH_PATH, None, timeout_s) is not None

    async def metrics(self, timeout_s: float) -> Mapping[str, str]:
        """The exposition of each replica that answers, by its door; of any one where no door can be reached."""
        doors = [door.url for door in self._doors.usable()] or self.doors()
        pages = await asyncio.gather(*(self.read_door(door, "GET", "/metrics", None, timeout_s) for door in doors))
        found = {door: page.decode() for door, page in zip(doors, pages, strict=True) if page is not None}
        if found or self.may_sleep:
            return found
        page = await self.read_door(self._url, "GET", "/metrics", None, timeout_s)
        return {} if page is None else {self._url: page.decode()}

    async def lives(self, door: str) -> bool:
        """Whether the replica answers at its door; one that never could be reached there has the benefit of doubt."""
        alive = await self.ask_door(door, "GET", "/healthz", None, self._settings.engine_probe_timeout_s) is not None
        self._doors.prove(door, answers=alive)
        known = self._doors.get(door)
        return alive or known is None or not known.reached

    async def another(self, lost: str) -> str | None:
        """The door of a replica that answers now and is not the one at `lost`; None where none was found."""
        timeout_s = self._settings.engine_probe_timeout_s
        others = [door for door in (*self._doors.choose(None), *self.doors()) if door != lost]
        others = list(dict.fromkeys(others))[: 2 * WAYS_MAX]
        answers = await asyncio.gather(*(self.ask_door(door, "GET", "/healthz", None, timeout_s) for door in others))
        if alive := [door for door, answer in zip(others, answers, strict=True) if answer is not None]:
            return choice(alive)  # not the idlest: many replies may have been lost at once
        for _ in range(0 if self.may_sleep else SEARCHES):
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
        return self._doors.recent()

    def places(self) -> int:
        """Requests that the replicas in the roster can work on at a time; 0 where there is none."""
        return sum(door.places for door in self._doors.listed())

    def forget(self, door: str) -> None:
        """Do not go there before it is heard of again."""
        self._doors.forget(door)

    @property
    def _session(self) -> aiohttp.ClientSession:
        assert self._open_session is not None, "Fleet is used outside its context"
        return self._open_session

    def _ways(self, first: Sequence[str]) -> Iterator[str]:
        """These doors, the ingress, then each other door, the one that was used longest ago first."""
        yield from first
        yield self._url
        for door in self.doors():
            if door not in first:
                self._doors.turn(door)
                yield door

    def _learn(self, response: aiohttp.ClientResponse) -> str | None:
        """The door of the replica that answers, noted; None where it was no replica that answered."""
        door = response.headers.get(REPLICA_HEADER)
        if door is not None and self._doors.hear(door):
            self._prove(door)
        return door

    def _prove(self, door: str) -> None:
        """Find out in the background whether this gateway can reach the door: a firewall may be in between."""
        if door not in self._proving:
            task = asyncio.create_task(self._try(door), name="try a replica's door")
            self._proving[door] = task
            task.add_done_callback(lambda _: self._proving.pop(door, None))

    async def _try(self, door: str) -> bool:
        async with self._probes:
            return await self.lives(door)

    def _settle(self, affinity: str | None, door: str | None) -> str | None:
        """The door, which has the prefix of this key now."""
        if affinity is not None and door is not None:
            self._doors.place(affinity, door)
        return door

    def _note_traffic(self) -> None:
        self._asked_at = time.monotonic()
        self._traffic.set()

    async def _follow(self) -> None:
        """Keep the roster: each second while there is traffic, and at once when it begins."""
        while True:
            try:
                await self._read_roster()
            except Exception:  # the loop has to outlive a replica of another version
                logger.exception("The roster of the fleet is not usable")
            for door in self._doors.unproved(time.monotonic() - PROVE_AGAIN_S):
                self._prove(door)
            if time.monotonic() - self._asked_at < TRAFFIC_S or self.queued():
                await asyncio.sleep(ROSTER_S)
                continue
            self._traffic.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(ROSTER_IDLE_S if self._seen_ready else ROSTER_S):
                    await self._traffic.wait()

    async def _read_roster(self) -> None:
        """Hear from some replica who is in the fleet."""
        path = f"/v1/fleet?queued={self.queued()}"
        usable = [door.url for door in self._doors.usable()]
        shuffle(usable)
        others = [door for door in self.doors() if door not in usable]
        for door in (usable + sample(others, len(others)))[:WAYS_MAX]:
            timeout_s = self._settings.engine_probe_timeout_s
            answer = await self.ask_door(door, "GET", path, None, timeout_s)
            self._doors.prove(door, answers=answer is not None)
            if answer is not None:
                self._doors.list(answer.get("replicas", ()))
                return
        if self.may_sleep:  # by the ingress it would be a request that wakes the fleet
            return
        with suppress(OneboxError):
            answer = await self.ask("GET", path, None, self._settings.engine_probe_timeout_s)
            self._doors.list(answer.get("replicas", ()))

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
