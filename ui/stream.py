"""Streams between gateway and page: coalesced in time, stoppable by session.

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


class Stops:
    """The running stream of each browser session. A new one ends the one before."""

    def __init__(self) -> None:
        self._running: dict[str, asyncio.Event] = {}

    @contextmanager
    def running(self, session: str) -> Iterator[asyncio.Event]:
        """The event that tells this stream to end."""
        self.stop(session)
        mine = asyncio.Event()
        self._running[session] = mine
        try:
            yield mine
        finally:
            if self._running.get(session) is mine:
                del self._running[session]

    def is_current(self, session: str, event: asyncio.Event) -> bool:
        """Whether no later stream has taken the session over."""
        return self._running.get(session) is event

    def stop(self, session: str) -> bool:
        """End the session's stream; False where none runs."""
        event = self._running.get(session)
        if event is None:
            return False
        event.set()
        return True


async def coalesce(
    events: AsyncGenerator[Event, None], pace: Pace, stop: asyncio.Event, keepalive_s: float = 1.0
) -> AsyncGenerator[list[Event], None]:
    """The events in batches: the first text at once, later ones per `pace`; an empty batch after `keepalive_s` of
    silence, which gives the reader a chance to notice that its own reader is gone.

    Ends when `events` ends or `stop` is set; either way, and when closed early, `events` has been closed on return.
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
    stopper = asyncio.create_task(stop.wait())
    stopper.add_done_callback(lambda _: wake.set())
    started = False
    try:
        with pace.one_more():
            while not stop.is_set():
                with suppress(TimeoutError):
                    await asyncio.wait_for(wake.wait(), keepalive_s)
                wake.clear()
                batch, buffer = buffer, []
                if batch or not reader.done():
                    yield batch
                if reader.done() and not buffer:
                    break
                if started := started or any(isinstance(event, TextDelta) for event in batch):
                    with suppress(TimeoutError):
                        await asyncio.wait_for(asyncio.shield(stopper), pace.interval_s)
            if buffer:
                yield buffer
            if reader.done() and not reader.cancelled():
                reader.result()
    finally:
        stopper.cancel()
        reader.cancel()
        await asyncio.gather(reader, stopper, return_exceptions=True)
