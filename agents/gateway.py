"""The parts of one gateway worker, put together once and passed to every handler."""

import asyncio
import gc
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from fastapi import Request

from agents.admission import Admission
from agents.conversations import Conversations
from agents.corrections import Corrections
from agents.engine_metrics import EngineMetrics
from agents.engines import Engines
from agents.executor import Executor
from agents.keys import Keys, Principal
from agents.label_feed import LabelFeed
from agents.labels import Labels
from agents.metrics import Metrics
from agents.router import Router
from agents.runs import Runs
from agents.shared_metrics import Place
from agents.store import Store
from agents.tracing import Tracer
from onebox.fleet_spec import read_fleet
from onebox.plugin import Plugin
from onebox.settings import Settings

# Objects made since the last collection. At Python's 700 a worker with 200 streams spends 13 % of its time on that.
GC_THRESHOLD: Final = 20_000
GC_THRESHOLD_OLDER: Final = 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Gateway:
    """One worker's parts."""

    settings: Settings
    store: Store
    keys: Keys
    engines: Engines
    conversations: Conversations
    executor: Executor
    runs: Runs
    metrics: Metrics
    engine_metrics: EngineMetrics
    tracer: Tracer
    labels: Labels
    feed: LabelFeed
    corrections: Corrections


@asynccontextmanager
async def open_gateway(
    settings: Settings, plugins: Mapping[str, Plugin], router: Router, tracer: Tracer, place: Place | None = None
) -> AsyncGenerator[Gateway, None]:
    """A working gateway; at its end, what still runs goes to another worker."""
    metrics = Metrics(place)
    store = Store(settings, metrics.count_store)
    warming = asyncio.create_task(_warm(router), name="warm the router")
    try:
        spec = read_fleet(settings)
        async with Engines(spec, metrics.count_continuation, metrics.count_away) as engines:
            fleets = {name: client.places for name, client in zip(spec.models, engines.clients(), strict=True)}
            async with Admission(settings, metrics, store, fleets) as admission:
                for name, client in zip(spec.models, engines.clients(), strict=True):
                    client.announce(admission.queue(name))
                executor = Executor(settings, plugins, router, engines, store, metrics, admission, tracer)
                conversations, labels = Conversations(store), Labels(store, settings.learning)
                async with (
                    Runs(settings, store, executor, conversations) as runs,
                    LabelFeed(store, labels, router) as feed,
                    Corrections(labels, conversations) as corrections,
                ):
                    yield Gateway(
                        settings=settings,
                        store=store,
                        keys=Keys(settings, store),
                        engines=engines,
                        conversations=conversations,
                        executor=executor,
                        runs=runs,
                        metrics=metrics,
                        engine_metrics=EngineMetrics(engines.clients()),
                        tracer=tracer,
                        labels=labels,
                        feed=feed,
                        corrections=corrections,
                    )
    finally:
        await warming
        await store.close()
        await asyncio.to_thread(tracer.close)


async def _warm(router: Router) -> None:
    """Load what the first decision needs; if that fails now, the first decision says so."""
    try:
        await router.warm()
    except Exception:
        logger.exception("The router could not be warmed")
    # What is here now stays. The collector need not look at it again, which stops every stream of the worker meanwhile.
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, GC_THRESHOLD_OLDER, GC_THRESHOLD_OLDER)


async def gateway_of(request: Request) -> Gateway:
    """The worker's parts, for a handler."""
    gateway: Gateway = request.app.state.gateway
    return gateway


async def principal_of(request: Request) -> Principal:
    """The caller, as the authentication found it."""
    principal: Principal = request.scope["principal"]
    return principal
