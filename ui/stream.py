"""Streams between gateway and page: coalesced in time, one per browser session.

Gradio pays about half a millisecond of CPU per update whatever its size, so a stream sends its first text at once and
then at intervals that grow with the number of streams of this process. Nothing here knows Gradio or HTTP.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager, suppress

from onebox.events import Event, TextDelta


class Pace:
    """How often the streams of this process may update their pages."""

    def __init__(self, floor_s: float = 0.06, per_stream_s: float = 0.012) -> None:
        self._floor_s = floor_s
        self._per_stream_s = per_stream_s
        self._active = 0

    @property
    def interval_s(self) -> float:
        """Seconds between two updates of one stream, at the present load."""
        return max(self._floor_s, self._per_stream_s * self._active)

    @contextmanager
    def one_more(self) -> Iterator[None]:
        """Count a stream while it runs."""
        self._active += 1
        try:
            yield
        finally:
            self._active -= 1


class Seat:
    """One browser session before one reply. To leave it ends the stream; to stop also asks for the reply's own end."""

    def __init__(self) -> None:
        self.left = asyncio.Event()
        self.interrupted = asyncio.Event()
        self.stopped = False
        self.run_id: str | None = None

    def leave(self) -> None:
        """End the stream; the reply goes on."""
        self.left.set()
        self.interrupted.set()

    def stop(self) -> None:
        """Note that the visitor wants the reply to end; who has its run must cancel it."""
        self.stopped = True
        self.interrupted.set()


class Seats:
    """The seat of each browser session. A new one ends the stream of the one before."""

    def __init__(self) -> None:
        self._taken: dict[str, Seat] = {}

    @contextmanager
    def take(self, session: str) -> Iterator[Seat]:
        """A seat for as long as the stream lasts."""
        self.leave(session)
        mine = self._taken[session] = Seat()
        try:
            yield mine
        finally:
            if self._taken.get(session) is mine:
                del self._taken[session]

    def of(self, session: str) -> Seat | None:
        """The session's seat, while a stream of it runs."""
        return self._taken.get(session)

    def leave(self, session: str) -> None:
        """End the session's stream, if one runs."""
        seat = self._taken.get(session)
        if seat is not None:
            seat.leave()


async def coalesce(
    events: AsyncGenerator[Event, None], pace: Pace, left: asyncio.Event, keepalive_s: float = 1.0
) -> AsyncGenerator[list[Event], None]:
    """The events in batches: the first text and the end at once, the rest per `pace`; an empty batch after
    `keepalive_s` of silence, which gives the reader a chance to notice that its own reader is gone.

    Ends when `events` ends or `left` is set; either way, and when closed early, `events` has been closed on return.
    Raises what `events` raises, after what came before it.
    """
    buffer: list[Event] = []
    wake = asyncio.Event()

    async def read() -> None:
        try:
            async with aclosing(events):
                async for event in events:
                    buffer.append(event)
                    wake.set()
        finally:
            wake.set()

    reader = asyncio.create_task(read())
    leaver = asyncio.create_task(left.wait())
    leaver.add_done_callback(lambda _: wake.set())
    started = False
    try:
        with pace.one_more():
            while not left.is_set():
                with suppress(TimeoutError):
                    await asyncio.wait_for(wake.wait(), keepalive_s)
                wake.clear()
                batch, buffer = buffer, []
                if batch or not reader.done():
                    yield batch
                if reader.done() and not buffer:
                    break
                if started := started or any(isinstance(event, TextDelta) for event in batch):
                    await asyncio.wait({leaver, reader}, timeout=pace.interval_s, return_when=asyncio.FIRST_COMPLETED)
            if buffer:
                yield buffer
            if reader.done() and not reader.cancelled():
                reader.result()
    finally:
        leaver.cancel()
        reader.cancel()
        await asyncio.gather(reader, leaver, return_exceptions=True)
