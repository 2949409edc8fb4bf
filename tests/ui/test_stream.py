import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from onebox.errors import EngineFailed
from onebox.events import Event, Progress, TextDelta
from ui.stream import Pace, Seats, coalesce


class Source:
    """Events on demand; `closed` tells whether the stream behind was left."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Event | Exception | None] = asyncio.Queue()
        self.closed = asyncio.Event()

    def put(self, *events: Event | Exception | None) -> None:
        for event in events:
            self.queue.put_nowait(event)

    async def events(self) -> AsyncGenerator[Event, None]:
        try:
            while (event := await self.queue.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self.closed.set()


def _text(batches: list[list[Event]]) -> str:
    return "".join(event.text for batch in batches for event in batch if isinstance(event, TextDelta))


async def test_first_text_comes_alone_and_later_ones_together() -> None:
    source, got = Source(), list[list[Event]]()
    source.put(TextDelta("a"))
    async with aclosing(coalesce(source.events(), Pace(0.05, 0), asyncio.Event())) as batches:
        async for batch in batches:
            got.append(batch)
            if len(got) == 1:
                source.put(*(TextDelta(letter) for letter in "bcdef"), None)
    assert _text(got) == "abcdef"
    assert [len(batch) for batch in got] == [1, 5]


async def test_progress_does_not_wait_for_the_pace() -> None:
    source, got = Source(), list[list[Event]]()
    source.put(Progress(0, 2, "a"))
    async with asyncio.timeout(5), aclosing(coalesce(source.events(), Pace(60, 0), asyncio.Event())) as batches:
        async for batch in batches:
            got.append(batch)
            source.put(*([Progress(1, 2, "b")] if len(got) == 1 else [None]))
    assert [event for batch in got for event in batch] == [Progress(0, 2, "a"), Progress(1, 2, "b")]


async def test_leaving_ends_the_stream_at_once_and_leaves_the_source() -> None:
    source, left, got = Source(), asyncio.Event(), list[list[Event]]()
    source.put(TextDelta("a"))
    async with asyncio.timeout(5), aclosing(coalesce(source.events(), Pace(60, 0), left)) as batches:
        async for batch in batches:
            got.append(batch)
            left.set()
    assert _text(got) == "a"
    assert source.closed.is_set()


async def test_closing_the_stream_early_leaves_the_source() -> None:
    source = Source()
    source.put(TextDelta("a"))
    batches = coalesce(source.events(), Pace(60, 0), asyncio.Event())
    assert await anext(batches) == [TextDelta("a")]
    await batches.aclose()
    assert source.closed.is_set()


async def test_silence_yields_empty_batches() -> None:
    source = Source()
    batches = coalesce(source.events(), Pace(0, 0), asyncio.Event(), keepalive_s=0.01)
    assert await anext(batches) == []
    await batches.aclose()
    assert source.closed.is_set()


async def test_error_of_the_source_comes_after_the_text_before_it() -> None:
    source, got = Source(), list[list[Event]]()
    source.put(TextDelta("a"), EngineFailed("broken"))

    async def read() -> None:
        async for batch in coalesce(source.events(), Pace(0.01, 0), asyncio.Event()):
            got.append(batch)

    with pytest.raises(EngineFailed, match="broken"):
        await read()
    assert _text(got) == "a"


def test_interval_grows_with_the_streams_that_run() -> None:
    pace = Pace(0.06, 0.012)
    assert pace.interval_s == 0.06
    with pace.one_more(), pace.one_more():
        assert pace.interval_s == 0.06
    running = [pace.one_more() for _ in range(30)]
    for stream in running:
        stream.__enter__()
    assert pace.interval_s == pytest.approx(0.36)
    for stream in running:
        stream.__exit__(None, None, None)
    assert pace.interval_s == 0.06


async def test_end_does_not_wait_for_the_pace() -> None:
    source, got = Source(), list[list[Event]]()
    source.put(TextDelta("a"))
    async with asyncio.timeout(5), aclosing(coalesce(source.events(), Pace(60, 0), asyncio.Event())) as batches:
        async for batch in batches:
            got.append(batch)
            if len(got) == 1:
                source.put(TextDelta("b"), None)
    assert _text(got) == "ab"


def test_a_new_stream_of_a_session_ends_the_one_before() -> None:
    seats = Seats()
    with seats.take("s") as first:
        with seats.take("s") as second:
            assert first.left.is_set()
            assert not first.stopped
            assert not second.left.is_set()
            assert seats.of("s") is second
        assert seats.of("s") is None
