"""What all runs of a gateway worker share, and the decision which task a request is for.

The work on one run is `agents.execution`.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from agents.admission import Admission, Claim
from agents.capabilities import Pace, capabilities
from agents.engines import Engines
from agents.journal import Entry, Journal
from agents.llm import EngineLLM, Meter
from agents.metrics import Metrics
from agents.router import Router
from agents.run_store import RunRequest
from agents.store import Store
from agents.tracing import NO_TRACER, Tracer
from onebox.capabilities import Capabilities
from onebox.events import Routed
from onebox.fleet_spec import ROUTER
from onebox.messages import Message
from onebox.plugin import Plugin
from onebox.settings import Settings


@dataclass(frozen=True, slots=True)
class Executor:
    """Everything runs share in one worker."""

    settings: Settings
    plugins: Mapping[str, Plugin]
    router: Router
    engines: Engines
    store: Store
    metrics: Metrics
    admission: Admission
    tracer: Tracer = NO_TRACER
    pace: Pace = field(default_factory=Pace)

    async def decide(
        self, request: RunRequest, messages: tuple[Message, ...], meter: Meter, name: str, claim: Claim
    ) -> Routed:
        """The route of a request, without the work. `meter`, `name` and `claim` serve the engine call, if any."""
        llm: EngineLLM | None = None
        began = time.perf_counter()
        with self.tracer.span("route") as span:
            if self.settings.router_engine and request.task is None and not request.plan:
                llm = self.llm(request, meter, Journal(_unnoted), f"{name}-route", claim)
                await llm.bind(self.engines.spec.order(ROUTER))
            routed = await self.router.route(
                messages, explicit=request.task, plan=request.plan, llm=llm, tenant=request.tenant
            )
            span.note(onebox__tier=routed.tier, onebox__task=routed.task)
        self.metrics.count_route(routed.tier, routed.task, time.perf_counter() - began)
        return routed

    async def capabilities(self) -> Capabilities:
        """What this worker's gateway can do now."""
        return await capabilities(self.settings, self.plugins, self.engines, self.pace, self.router.refused)

    def llm(self, request: RunRequest, meter: Meter, journal: Journal, name: str, claim: Claim) -> EngineLLM:
        """The engine as one run sees it; `name` begins the names of its calls. It has no model before `bind`."""
        session, room = request.conversation_id, self.settings.max_tokens_default
        return EngineLLM(self.engines, meter, journal, name, request.tenant, session, room, claim, self.tracer)


def _unnoted(entry: Entry) -> None:
    """The router's calls are no part of a run's journal: its decision is in the log."""
