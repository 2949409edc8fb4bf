"""The parts of one gateway worker, put together once and passed to every handler."""

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import Request

from agents.conversations import Conversations
from agents.engine import EngineClient
from agents.execution import Executor
from agents.keys import Keys, Principal
from agents.metrics import Metrics
from agents.router import Router
from agents.runs import Runs
from agents.store import Store
from onebox.plugin import Plugin
from onebox.settings import Settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Gateway:
    """One worker's parts."""

    settings: Settings
    store: Store
    keys: Keys
    engine: EngineClient
    conversations: Conversations
    executor: Executor
    runs: Runs
    metrics: Metrics


@asynccontextmanager
async def open_gateway(
    settings: Settings, plugins: Mapping[str, Plugin], router: Router
) -> AsyncGenerator[Gateway, None]:
    """A working gateway; at its end, what still runs goes to another worker."""
    store = Store(settings)
    metrics = Metrics(os.getpid())
    warming = asyncio.create_task(_warm(router), name="warm the router")
    try:
        async with EngineClient(settings, metrics.count_continuation) as engine:
            executor = Executor(settings, plugins, router, engine, store, metrics)
            conversations = Conversations(store)
            async with Runs(settings, store, executor, conversations) as runs:
                keys = Keys(settings, store)
                yield Gateway(settings, store, keys, engine, conversations, executor, runs, metrics)
    finally:
        await warming
        await store.close()


async def _warm(router: Router) -> None:
    """Load what the first decision needs; if that fails now, the first decision says so."""
    try:
        await router.warm()
    except Exception:
        logger.exception("The router could not be warmed")


def gateway_of(request: Request) -> Gateway:
    """The worker's parts, for a handler."""
    gateway: Gateway = request.app.state.gateway
    return gateway


def principal_of(request: Request) -> Principal:
    """The caller, as the authentication found it."""
    principal: Principal = request.scope["principal"]
    return principal
