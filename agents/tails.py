"""The end of a run's log in memory, for its readers on this worker: one copy, however many they are.

A reader keeps nothing but its place. One that falls behind what is kept here reads the store; a slow one costs no
memory. Who fills a tail is `agents.run_log` on the owner, and `agents.runs` elsewhere.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence

from onebox.errors import OneboxError
from onebox.events import Event, TextDelta

ROW_BYTES = 160
TOKEN_BYTES = 400
RIVAL_BYTES = 160
PAGES = 4


class Tail:
    """The newest events of one run, at most `limit_bytes` of them. `next` is the number of the event to come."""

    def __init__(self, limit_bytes: int, start: int = 0) -> None:
        self._limit = limit_bytes
        self._rows: deque[tuple[int, Event, int]] = deque()
        self._bytes = 0
        self._waiting: list[asyncio.Future[None]] = []
        self.next = start
        self.closed = False
        self.error: OneboxError | None = None
        self.away_since: float | None = None
        self.readers = 0
        self.ever_read = 0
        self._pages: OrderedDict[int, Sequence[Event]] = OrderedDict()
        self._fetching = asyncio.Lock()

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

    async def page(self, place: int, fetch: Callable[[int], Awaitable[Sequence[Event]]]) -> Sequence[Event]:
        """Older events from number `place`, from the store by `fetch`; readers who are at the same place share them."""
        async with self._fetching:
            page = self._pages.get(place)
            if page is None:
                page = self._pages[place] = await fetch(place)
                if len(self._pages) > PAGES:
                    self._pages.popitem(last=False)
            return page

    def close(self, error: OneboxError | None = None) -> None:
        """Nothing more comes from here; without an error the run is over or goes on at another worker."""
        self.closed = True
        self.error = error
        self._wake()

    def miss_store(self, since: float) -> None:
        """The store has been away since then, on the loop's clock; readers look whether that is too long."""
        self.away_since = since
        self._wake()

    async def wait(self) -> None:
        """Return at the next change."""
        news: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(news)
        await news

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for news in waiting:
            if not news.done():
                news.set_result(None)


def weigh(event: Event) -> int:
    """About how many bytes of memory an event takes."""
    if type(event) is TextDelta:
        if not event.tokens:
            return ROW_BYTES + 2 * len(event.text)
        tokens = sum(TOKEN_BYTES + RIVAL_BYTES * len(token.top) for token in event.tokens)
        return ROW_BYTES + 2 * len(event.text) + tokens
    return 2 * ROW_BYTES
