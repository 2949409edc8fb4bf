"""The capacity of the fleet, divided among gateway workers that come, go and fall silent."""

import asyncio

import pytest

from agents.shares import Register, Share, share_of
from agents.store import Store
from deploy.store import EmbeddedStore
from onebox.settings import Settings


def test_worker_alone_has_the_whole_fleet() -> None:
    assert share_of(64, ()) == Share(workers=1, even=64, most=64)


def test_worker_may_use_what_the_others_leave_idle() -> None:
    assert share_of(64, [10, 0]) == Share(workers=3, even=22, most=54)


def test_worker_always_has_its_even_part() -> None:
    assert share_of(64, [64]) == Share(workers=2, even=32, most=32)


def test_fleet_smaller_than_the_workers_still_gives_each_one_place() -> None:
    assert share_of(2, [1, 1, 0]).most == 1


def test_places_of_busy_workers_add_up_to_the_fleet() -> None:
    uses = [20, 5, 39]
    shares = [share_of(64, uses[:index] + uses[index + 1 :]) for index in range(3)]
    assert [share.most for share in shares] == [22, 22, 39]


@pytest.fixture
async def store(valkey: EmbeddedStore) -> Store:
    return Store(Settings(redis_url=valkey.url))


async def test_workers_hear_of_each_other_until_one_leaves(store: Store) -> None:
    one, two = Register(store, "test-leaves", 10.0), Register(store, "test-leaves", 10.0)
    assert await one.beat(3) == []
    assert await two.beat(5) == [3]
    assert await one.beat(4) == [5]
    assert await Register(store, "another-model", 10.0).beat(0) == []
    await two.leave()
    assert await one.beat(4) == []
    await one.leave()
    await store.close()


async def test_worker_that_is_silent_counts_no_more(store: Store) -> None:
    dead, living = Register(store, "test-silent", 0.02), Register(store, "test-silent", 0.02)
    await dead.beat(7)
    assert await living.beat(0) == [7]
    async with asyncio.timeout(5):
        while await living.beat(0):
            await asyncio.sleep(0.01)
    await living.leave()
    await store.close()
