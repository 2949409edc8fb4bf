"""Looking for runs that lost their worker: one worker looks, all are told."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from agents.run_store import LOST_CHANNEL, RunStore
from agents.store import Store
from agents.store_keys import SEARCHER, TENANTS, RunKeys
from deploy.store import EmbeddedStore
from onebox.settings import Settings


@pytest.fixture
async def store(valkey: EmbeddedStore) -> AsyncIterator[Store]:
    # A database of its own: workers of other tests look for lost runs in the first.
    store = Store(Settings(redis_url=f"{valkey.url.removesuffix('/0')}/7"))
    yield store
    await store.transaction([("DEL", SEARCHER)])
    await store.close()


def worker(store: Store, name: str) -> RunStore:
    return RunStore(store, name, 10.0, 60)


async def tenant_with_a_lost_run(store: Store) -> str:
    tenant = f"t{secrets.token_hex(4)}"
    await store.transaction([("SADD", TENANTS, tenant)])
    await store.transaction([("ZADD", RunKeys(tenant, "").leases, 1, "resp_lost")])
    return tenant


async def test_one_worker_searches_and_another_takes_over_when_it_is_gone(store: Store) -> None:
    tenant = await tenant_with_a_lost_run(store)
    first, second = worker(store, "first"), worker(store, "second")
    assert tenant in await first.search(60)
    assert await second.search(60) == []
    assert tenant in await first.search(0.05)
    async with asyncio.timeout(10):
        while tenant not in await second.search(60):
            await asyncio.sleep(0.01)
    assert await first.search(60) == []


async def test_tenant_without_lost_runs_is_not_found(store: Store) -> None:
    tenant = await tenant_with_a_lost_run(store)
    searcher = worker(store, "first")
    assert tenant in await searcher.search(1)
    assert await searcher.take(tenant) == []  # the run is no more, and so is its lease
    assert tenant not in await searcher.search(1)


async def test_every_worker_hears_of_what_the_searcher_finds(store: Store) -> None:
    tenant = await tenant_with_a_lost_run(store)
    heard: list[bytes] = []

    async def listen() -> None:
        async with aclosing(store.listen(LOST_CHANNEL)) as messages:
            async for message in messages:
                heard.append(message)

    listeners = [asyncio.create_task(listen()) for _ in range(2)]
    searcher = worker(store, "first")
    async with asyncio.timeout(10):
        while heard.count(tenant.encode()) < 2:
            await searcher.search(1)
            await asyncio.sleep(0.05)
    for listener in listeners:
        listener.cancel()
    await asyncio.gather(*listeners, return_exceptions=True)
