"""The door to Redis: scripts that are asked for at once share round trips and keep their replies apart."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from agents.store import Store
from deploy.store import EmbeddedStore
from onebox.errors import StoreUnavailable
from onebox.settings import Settings
from onebox.sockets import free_port

ECHO = "return ARGV[1]"


class Trips:
    """Counts round trips."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, kind: str, seconds: float, failed: bool) -> None:
        self.count += 1


@pytest.fixture
async def counted(valkey: EmbeddedStore) -> AsyncIterator[tuple[Store, Trips]]:
    trips = Trips()
    store = Store(Settings(redis_url=valkey.url), trips)
    yield store, trips
    await store.close()


async def test_scripts_asked_for_at_once_share_round_trips_and_get_their_own_replies(
    counted: tuple[Store, Trips],
) -> None:
    store, trips = counted
    replies = await asyncio.gather(*(store.run(ECHO, [], [str(number)]) for number in range(100)))
    assert replies == [str(number).encode() for number in range(100)]
    assert trips.count < 20


async def test_script_alone_is_one_round_trip(counted: tuple[Store, Trips]) -> None:
    store, trips = counted
    for number in range(3):
        assert await store.run(ECHO, [], [number]) == str(number).encode()
    assert trips.count == 3


async def test_caller_that_leaves_takes_nobody_along(counted: tuple[Store, Trips]) -> None:
    store, _ = counted
    asking = [asyncio.create_task(store.run(ECHO, [], [str(number)])) for number in range(20)]
    await asyncio.sleep(0)
    for task in asking[::2]:
        task.cancel()
    replies = await asyncio.gather(*asking, return_exceptions=True)
    assert replies[1::2] == [str(number).encode() for number in range(1, 20, 2)]
    assert all(isinstance(reply, asyncio.CancelledError) for reply in replies[::2])


async def test_every_caller_is_told_that_the_store_is_away() -> None:
    store = Store(Settings(redis_url=f"redis://127.0.0.1:{free_port()}/0"))
    replies = await asyncio.gather(*(store.run(ECHO, [], ["x"]) for _ in range(10)), return_exceptions=True)
    assert all(isinstance(reply, StoreUnavailable) for reply in replies)
    await store.close()


async def test_worker_that_is_busy_for_longer_than_the_limit_does_not_take_the_store_for_away(
    valkey: EmbeddedStore,
) -> None:
    store = Store(Settings(redis_url=valkey.url, redis_timeout_s=0.1))
    await store.ping()
    asking = [asyncio.create_task(store.run(ECHO, [], [str(number)])) for number in range(3)]
    await asyncio.sleep(0)
    for _ in range(3):
        time.sleep(0.25)  # as when hundreds of runs begin at once
        await asyncio.sleep(0)
    assert await asyncio.gather(*asking) == [b"0", b"1", b"2"]
    await store.close()
