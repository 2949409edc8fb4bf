"""The log of a run on its owner: events wait in an outbox, go to the store in batches, and only then to readers.

One writer per worker sends what all its runs have pending in one round trip, so a synced write is shared by many runs.
A batch that the store did not acknowledge is sent again as it was; the scripts know one they have done. Which events
there are is `agents.execution`; readers are `agents.tails`.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from typing import Any, Final

from agents.journal import Entry, encode_entries
from agents.run_store import Ending, RunRequest, RunStore
from agents.store import Call
from agents.store_keys import RunKeys
from agents.tails import Tail, weigh
from onebox.errors import StoreUnavailable
from onebox.events import Event, TextDelta, encode
from onebox.settings import Settings

AWAY_PAUSE_S: Final = 0.1
EVENT_BYTES: Final = 16_384

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Flight:
    """A batch on its way; it is sent until the store answers."""

    call: Call
    events: tuple[Event, ...]
    entries: int
    last: bool


class RunLog:
    """The log of one run; made by `LogWriter.open`. `on_stop` and `on_lost` are called from the writer."""

    def __init__(
        self,
        writer: "LogWriter",
        request: RunRequest,
        epoch: int,
        stored: tuple[int, int],
        tail: Tail,
        on_stop: Callable[[], None],
        on_lost: Callable[[], None],
    ) -> None:
        self.request = request
        self.epoch = epoch
        self.keys = RunKeys(request.tenant, request.run_id)
        self.tail = tail
        self.due = inf  # when it is to be written
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._writer = writer
        self._events_stored, self._entries_stored = stored
        self._on_stop = on_stop
        self._on_lost = on_lost
        self._events: list[Event] = []
        self._entries: list[Entry] = []
        self._bytes = 0
        self._room = asyncio.Event()
        self._room.set()
        self._ending: Ending | None = None
        self._flight: _Flight | None = None
        self._text_began = False
        self._closed = False

    @property
    def pending(self) -> bool:
        """Whether something waits for the store."""
        return bool(self._flight or self._events or self._entries or self._ending)

    @property
    def ending(self) -> bool:
        """Whether the last events are logged, stored or not."""
        return self._ending is not None or self.ended.done()

    def put(self, *events: Event) -> None:
        """Log events, which stay together; the run's first text at once, others with what comes meanwhile."""
        if self._closed or self._ending is not None:
            return
        urgent = False
        for event in events:
            self._events.append(event)
            self._grow(weigh(event))
            if not self._text_began and type(event) is TextDelta:
                self._text_began = urgent = True
        self._writer.schedule(self, urgent=urgent)

    def note(self, entry: Entry) -> None:
        """Keep an answer that the plugins got; it is stored with or before the events that follow from it."""
        if self._closed or self._ending is not None:
            return
        self._entries.append(entry)
        value = entry.value
        self._grow(2 * len(value[0]) + 16 * len(value[1]) if entry.kind == "frame" else 256)
        self._writer.schedule(self, urgent=False)

    async def room(self) -> None:
        """Return once the outbox has room: a store that lags slows the engine down."""
        if not self._room.is_set():
            await self._room.wait()

    def end(self, events: Sequence[Event], ending: Ending) -> None:
        """Log the last events; `ended` is done once they are stored."""
        if self._closed or self._ending is not None:
            return
        self._events += events
        self._ending = ending
        self._room.set()
        self._writer.schedule(self, urgent=True)

    def freeze(self) -> None:
        """Send what is there now; of what comes later only the end counts."""
        self._writer.schedule(self, urgent=True)

    def close(self) -> None:
        """Forget the rest: the run is another's, or given up here."""
        self._closed = True
        self._flight, self._ending = None, None
        self._events, self._entries = [], []
        self._room.set()
        self._writer.drop(self)
        self.tail.close()
        if not self.ended.done():
            self.ended.cancel()

    def board(self) -> Call | None:
        """The batch to send now; the one before where it was not acknowledged."""
        if self._flight is None and not self.pending:
            return None
        if self._flight is None:
            events, entries = tuple(_merged(self._events)), self._entries
            lines = [encode(event) for event in events]
            stored = (self._events_stored, self._entries_stored)
            store, ending = self._writer.store, self._ending
            if ending is not None:
                call = store.end_call(self.keys, self.epoch, stored[0], self.request, lines, ending)
            else:
                journal = encode_entries(entries) if entries else b""
                call = store.append_call(self.keys, self.epoch, stored, lines, journal)
            self._flight = _Flight(call, events, 1 if entries else 0, ending is not None)
            self._events, self._entries, self._bytes = [], [], 0
            self._room.set()
        self.due = inf
        return self._flight.call

    def land(self, reply: Any, sent: float, now: float) -> None:
        """Take the store's answer to the batch that was sent at `sent`."""
        flight = self._flight
        if flight is None or self._closed:
            return
        if isinstance(reply, StoreUnavailable):
            self._wait_for_store(sent, now)
            return
        self.tail.away_since = None
        if reply == b"lost":
            logger.warning("Run %s belongs to another worker now", self.request.run_id)
            self._on_lost()
            return
        self._flight = None
        self._events_stored += len(flight.events)
        self._entries_stored += flight.entries
        self.tail.publish(flight.events)
        if flight.last:
            self._finish()
            return
        if reply == b"1":
            self._on_stop()
        if self._events or self._entries or self._ending is not None:
            self._writer.schedule(self, urgent=self._ending is not None)
        else:
            self._writer.drop(self)

    def skip(self) -> None:
        """Show what waits without storing it; only for a log that is switched off."""
        events, ending = tuple(self._events), self._ending
        self._events, self._entries, self._bytes = [], [], 0
        self._room.set()
        self.tail.publish(events)
        if ending is not None and not self._closed:
            self._finish()

    def _finish(self) -> None:
        self._closed = True
        self._writer.drop(self)
        self.tail.close()
        self.ended.set_result(None)

    def _wait_for_store(self, sent: float, now: float) -> None:
        since = self.tail.away_since or sent
        self.tail.miss_store(since)
        self.due = now + AWAY_PAUSE_S
        if now - since > self._writer.patience_s:
            logger.warning("Run %s is given up here: the store has been away for too long", self.request.run_id)
            self._on_lost()

    def _grow(self, size: int) -> None:
        self._bytes += size
        if self._bytes > self._writer.outbox_bytes:
            self._room.clear()


class LogWriter:
    """Writes the logs of all runs of one worker. `run` is its loop."""

    def __init__(self, store: RunStore, settings: Settings) -> None:
        self.store = store
        self.patience_s = settings.store_patience_s
        self.outbox_bytes = settings.reader_buffer_bytes
        self._enabled = settings.log_enabled
        self._interval_s = settings.log_interval_ms / 1000
        self._pending: dict[RunLog, None] = {}
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def open(
        self,
        request: RunRequest,
        epoch: int,
        stored: tuple[int, int],
        tail: Tail,
        on_stop: Callable[[], None],
        on_lost: Callable[[], None],
    ) -> RunLog:
        """The log of a run of this worker, behind `stored` = (events, journal entries)."""
        return RunLog(self, request, epoch, stored, tail, on_stop, on_lost)

    def schedule(self, log: RunLog, *, urgent: bool) -> None:
        """Write `log` at once, or with all others at the next tick."""
        if not self._enabled:
            log.skip()
            return
        if not urgent and log.due < inf:
            return  # it goes with what waits already
        now = asyncio.get_running_loop().time()
        due = now if urgent or self._interval_s == 0 else (now // self._interval_s + 1) * self._interval_s
        if log not in self._pending or due < log.due:
            log.due = min(due, log.due)
            self._pending[log] = None
            self._idle.clear()
            self._wake.set()

    def drop(self, log: RunLog) -> None:
        """Nothing of `log` is left to write."""
        self._pending.pop(log, None)
        log.due = inf
        if not self._pending:
            self._idle.set()

    async def run(self) -> None:
        """Write until cancelled."""
        clock = asyncio.get_running_loop().time
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._pending:
                now = clock()
                due = [log for log in self._pending if log.due <= now]
                if due:
                    await self._write(due)
                    continue
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(log.due for log in self._pending) - now):
                        await self._wake.wait()
                self._wake.clear()

    async def flush(self, timeout_s: float) -> None:
        """Return once nothing is pending, or after `timeout_s`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()

    async def _write(self, logs: Sequence[RunLog]) -> None:
        boarded = [(log, call) for log in logs if (call := log.board()) is not None]
        for log in logs:
            if not log.pending:
                self.drop(log)
        if not boarded:
            return
        replies: list[Any]
        sent = asyncio.get_running_loop().time()
        try:
            replies = await self.store.run_all([call for _, call in boarded])
        except StoreUnavailable as error:
            replies = [error] * len(boarded)
        except Exception as error:
            logger.exception("The store refused a batch of %d runs", len(boarded))
            replies = [StoreUnavailable(str(error))] * len(boarded)
        now = asyncio.get_running_loop().time()
        for (log, _), reply in zip(boarded, replies, strict=True):
            log.land(reply, sent, now)


def _merged(events: Sequence[Event]) -> list[Event]:
    """The events, with neighbouring pieces of text made one as long as that stays small."""
    merged: list[Event] = []
    pieces: list[TextDelta] = []
    size = 0
    for event in events:
        if type(event) is TextDelta:
            pieces.append(event)
            size += weigh(event)
            if size < EVENT_BYTES:
                continue
        if pieces:
            merged.append(_joined(pieces))
            pieces, size = [], 0
        if type(event) is not TextDelta:
            merged.append(event)
    if pieces:
        merged.append(_joined(pieces))
    return merged


def _joined(pieces: Sequence[TextDelta]) -> TextDelta:
    if len(pieces) == 1:
        return pieces[0]
    return TextDelta(
        "".join(piece.text for piece in pieces), tuple(token for piece in pieces for token in piece.tokens)
    )
