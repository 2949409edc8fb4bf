"""Readers of runs on this worker, whoever executes the run: its owner fills a tail, others are fed from the store.

A reader whose tail ends before the run does goes on from the store, so it never notices that a run has moved. What is
kept in memory for them is `agents.tails`.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Final

from agents.run_store import RunStore, unknown_run
from agents.tails import Tail
from onebox.errors import Internal, StoreUnavailable
from onebox.events import Event, is_terminal

READER_PATIENCE_S: Final = 1.5
READER_WAKE_S: Final = 0.2
POLL_S: Final = 0.04
POLL_IDLE_S: Final = 0.2
POLL_IDLE_AFTER: Final = 25

Key = tuple[str, str]

logger = logging.getLogger(__name__)


class Readers:
    """The tails of all runs that are executed or read here, by tenant and run id."""

    def __init__(self, store: RunStore, buffer_bytes: int) -> None:
        self._store = store
        self._buffer_bytes = buffer_bytes
        self._tails: dict[Key, Tail] = {}
        self._feeds: set[asyncio.Task[None]] = set()

    def own(self, key: Key, tail: Tail) -> None:
        """Read the run from `tail`, which its execution fills."""
        self._tails[key] = tail

    def disown(self, key: Key, tail: Tail) -> None:
        """Nothing more comes through `tail`."""
        if self._tails.get(key) is tail:
            del self._tails[key]
        tail.close(tail.error)

    async def close(self) -> None:
        """End what feeds the tails."""
        for feed in self._feeds:
            feed.cancel()
        await asyncio.gather(*self._feeds, return_exceptions=True)

    async def follow(self, tenant: str, run_id: str, after: int = -1) -> AsyncGenerator[tuple[int, Event], None]:
        """The events numbered above `after`, as they come, up to the terminal one.

        Raises:
            UnknownRun: there is no such run, or no more.
            StoreUnavailable: the store has been away for too long; come back with the last number seen.
        """
        place = after + 1
        while True:
            tail = self._tail(tenant, run_id)
            tail.readers += 1
            tail.ever_read += 1
            try:
                async with aclosing(self._read(tenant, run_id, tail, place)) as events:
                    async for number, event in events:
                        place = number + 1
                        yield number, event
                        if is_terminal(event):
                            return
            finally:
                tail.readers -= 1
            if tail.error is not None:
                raise tail.error
            if not await self._goes_on(tenant, run_id, place):
                return

    def _tail(self, tenant: str, run_id: str) -> Tail:
        """This worker's copy of a run's newest events; of another worker's run one that is fed from the store."""
        key = (tenant, run_id)
        tail = self._tails.get(key)
        if tail is None or tail.closed:
            tail = self._tails[key] = Tail(self._buffer_bytes)
            feed = asyncio.create_task(self._feed(key, tail))
            self._feeds.add(feed)
            feed.add_done_callback(self._feeds.discard)
        return tail

    async def _read(self, tenant: str, run_id: str, tail: Tail, place: int) -> AsyncGenerator[tuple[int, Event], None]:
        """The events from `place` until the tail closes."""

        async def fetch(start: int) -> list[Event]:
            page, _ = await self._store.page(tenant, run_id, start)
            if not page:
                raise unknown_run(run_id)
            return page

        while True:
            rows = tail.since(place)
            if rows is None:
                rows = list(enumerate(await tail.page(place, fetch), place))
            for number, event in rows:
                yield number, event
                place = number + 1
            if rows:
                continue
            if tail.closed:
                return
            if tail.away_since is None:
                await tail.wait()
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(READER_WAKE_S):
                    await tail.wait()
            if tail.away_since is not None and _now() - tail.away_since > READER_PATIENCE_S:
                raise StoreUnavailable(
                    "The store does not answer, so the reply cannot be read on. It is kept. Follow it again.",
                    retry_after_s=1.0,
                )

    async def _goes_on(self, tenant: str, run_id: str, place: int) -> bool:
        """Whether there is more of a run whose tail has closed without its end."""
        page, state = await self._store.page(tenant, run_id, place)
        if state is None:
            raise unknown_run(run_id)
        return bool(page) or state == "running"

    async def _feed(self, key: tuple[str, str], tail: Tail) -> None:
        """Copy a run's log from the store while somebody reads it here."""
        tenant, run_id = key
        idle = 0
        try:
            while True:
                try:
                    page, state = await self._store.page(tenant, run_id, tail.next)
                except StoreUnavailable as error:
                    since = tail.away_since or _now()
                    tail.miss_store(since)
                    if _now() - since > READER_PATIENCE_S:
                        tail.close(error)
                        return
                    await asyncio.sleep(POLL_IDLE_S)
                    continue
                tail.away_since = None
                if state is None:
                    tail.close(unknown_run(run_id))
                    return
                if page:
                    idle = 0
                    tail.publish(page)
                    if is_terminal(page[-1]):
                        return
                    continue
                idle += 1
                if tail.readers == 0 or state != "running":
                    return
                await asyncio.sleep(POLL_S if idle < POLL_IDLE_AFTER else POLL_IDLE_S)
        except Exception:
            logger.exception("The log of %s cannot be read", run_id)
            tail.close(Internal("The run's log cannot be read: the gateway has a defect, which its log describes."))
        finally:
            self.disown(key, tail)


def _now() -> float:
    return asyncio.get_running_loop().time()
