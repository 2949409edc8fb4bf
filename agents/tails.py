"""The end of a run's log in memory, for its readers on this worker: one copy, however many they are.

A reader keeps nothing but its place. One that falls behind what is kept here reads the store; a slow one costs no
memory. Who fills a tail is `agents.run_log` on the owner, and `agents.runs` elsewhere.
"""

import asyncio
from collections import deque
from collections.abc import Iterable
from contextlib import suppress

from onebox.errors import OneboxError
from onebox.events import Event, TextDelta

ROW_BYTES = 160
TOKEN_BYTES = 400


class Tail:
    """The newest events of one run, at most `limit_bytes` of them. `next` is the number of the event to come."""

    def __init__(self, limit_bytes: int, start: int = 0) -> None:
        self._limit = limit_bytes
        self._rows: deque[tuple[int, Event, int]] = deque()
        self._bytes = 0
        self._news = asyncio.Event()
        self.next = start
        self.closed = False
        self.error: OneboxError | None = None
        self.away_since: float | None = None
        self.readers = 0
        self.ever_read = 0

    def publish(self, events: Iterable[Event]) -> None:
        """Hand stored events on."""
        for event in events:
            size = weigh(event)
            self._rows.append((self.next, event, size))
            self._bytes += size
            self.next += 1
        while self._bytes > self._limit and len(self._rows) > 1:
            self._bytes -= self._rows.popleft()[2]
        self._wake()

    def since(self, place: int) -> list[tuple[int, Event]] | None:
        """The events from number `place`; None where they are no longer here."""
        if place < self.next and (not self._rows or place < self._rows[0][0]):
            return None
        fresh: list[tuple[int, Event]] = []
        for number, event, _ in reversed(self._rows):
            if number < place:
                break
            fresh.append((number, event))
        fresh.reverse()
        return fresh

    def close(self, error: OneboxError | None = None) -> None:
        """Nothing more comes from here; without an error the run is over or goes on at another worker."""
        self.closed = True
        self.error = error
        self._wake()

    async def wait(self, timeout_s: float) -> None:
        """Return at the next change, or after `timeout_s`."""
        news = self._news
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await news.wait()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


def weigh(event: Event) -> int:
    """About how many bytes of memory an event takes."""
    if type(event) is TextDelta:
        return ROW_BYTES + 2 * len(event.text) + TOKEN_BYTES * len(event.tokens)
    return 2 * ROW_BYTES
