"""The parts of one gateway worker, put together once and passed to every handler."""

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from fastapi import Request

from agents.conversations import BegunTurn, Conversations
from agents.engine import EngineClient
from agents.keys import Keys, Principal
from agents.metrics import Metrics
from agents.recording import END_RETRY_PAUSES_S, Recording
from agents.router import Router
from agents.runs import Executor
from agents.store import Store
from onebox.plugin import Plugin
from onebox.settings import Settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Gateway:
    """One worker's parts. `tasks` owns the writes that outlive their request."""

    settings: Settings
    store: Store
    keys: Keys
    engine: EngineClient
    conversations: Conversations
    executor: Executor
    metrics: Metrics
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def record(self, begun: BegunTurn) -> Recording:
        """The record of a run of this turn."""
        return Recording(self.conversations, begun, self.tasks)


@asynccontextmanager
async def open_gateway(
    settings: Settings, plugins: Mapping[str, Plugin], router: Router
) -> AsyncGenerator[Gateway, None]:
    """A working gateway; at its end, what still has to be stored is stored."""
    store = Store(settings)
    metrics = Metrics(os.getpid())
    warming = asyncio.create_task(_warm(router), name="warm the router")
    try:
        async with EngineClient(settings) as engine:
            executor = Executor(settings, plugins, router, engine, store, metrics)
            gateway = Gateway(settings, store, Keys(settings, store), engine, Conversations(store), executor, metrics)
            yield gateway
            if gateway.tasks:
                await asyncio.wait(gateway.tasks, timeout=sum(END_RETRY_PAUSES_S))
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
