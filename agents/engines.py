"""The models behind a gateway: a client for each, which of them a task gets, and which answer at the moment.

A model that does not answer is passed over for those that may stand in for it, and looked after until it answers
again. One client is `agents.engine`; what models there are is `onebox.fleet_spec`; whether a run may still change its
model is `agents.llm`'s to know.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Final, Literal, Self

from agents.course import LossReason
from agents.engine import Card, EngineClient, Receipt
from agents.generation import End, Frame, Generation
from onebox.errors import OneboxError, Unavailable, UnknownModel
from onebox.fleet_spec import DEFAULT, SINGLE, FleetSpec, Target
from onebox.messages import Message

LOOK_EVERY_S: Final = 1.0
LOOK_TIMEOUT_S: Final = 3.0
ALIVE_TIMEOUT_S: Final = 2.0

State = Literal["ready", "loading", "down"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Served:
    """What answers the calls of a run: the name of a model or an adapter, and the tokens of context it has.

    The name is empty where there is one model, which needs none.
    """

    name: str
    context_length: int


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether every task has a model that answers, and how each model is. `model` is the one of ordinary messages."""

    state: State
    detail: str
    model: str | None
    models: Mapping[str, State]


class Engines:
    """All models of a fleet, as everything in a gateway sees them. Use as an async context manager.

    `on_continuation` is told of each reply that goes on at another replica, `on_away` of each of several models that is
    found not to answer.
    """

    def __init__(
        self,
        spec: FleetSpec,
        on_continuation: Callable[[LossReason], None] | None = None,
        on_away: Callable[[str], None] | None = None,
    ) -> None:
        self.spec = spec
        self._on_away = on_away
        self.targets = spec.targets()
        self._clients = {name: EngineClient(model.settings, on_continuation) for name, model in spec.models.items()}
        self._absent: dict[str, asyncio.Task[None]] = {}  # models that do not answer, and who looks after them
        self._open = AsyncExitStack()

    async def __aenter__(self) -> Self:
        for name, client in self._clients.items():
            await self._open.enter_async_context(client)
            self._look_after(name)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        looking = list(self._absent.values())
        for task in looking:
            task.cancel()
        await asyncio.gather(*looking, return_exceptions=True)
        await self._open.aclose()

    def clients(self) -> Iterable[EngineClient]:
        """The client of each model."""
        return self._clients.values()

    def model_of(self, name: str) -> str:
        """The model that answers to a name."""
        return self._target(name).model

    async def choose(self, names: Sequence[str]) -> Served:
        """The first of these names whose model answers.

        Raises:
            OneboxError: none does; this is what the preferred one said.
        """
        said: list[OneboxError] = []
        for name in sorted(names, key=lambda name: self._target(name).model in self._absent):
            try:
                card = await self._client(name).card()
            except Unavailable as error:
                self.pass_over(name)
                said.insert(0 if name == names[0] else len(said), error)
            else:
                return Served(name, card.context_length)
        raise said[0]

    def pass_over(self, name: str) -> None:
        """Prefer other models until the one that answers to `name` is ready again."""
        model = self._target(name).model
        if self.spec.several and model not in self._absent:
            logger.warning("Model %r does not answer", model)
            if self._on_away is not None:
                self._on_away(model)
        self._look_after(model)

    async def generate(self, name: str, call: Generation, *, wary: bool) -> AsyncGenerator[Frame | End, None]:
        """The reply of what has this name. `wary`: do not wait for the first token of a model that has no replica left.

        Raises:
            OneboxError: as `EngineClient.generate`.
        """
        adapter = self._target(name).adapter
        client = self._client(name)
        items = client.generate(call if adapter is None else replace(call, adapter=adapter))
        async with aclosing(items):
            if wary:
                yield await _first(items, client)
            async for item in items:
                yield item

    async def count_tokens(self, name: str, messages: Sequence[Message]) -> int:
        """Tokens of the prompt as the model of this name has them, chat template included."""
        return await self._client(name).count_tokens(messages)

    async def card(self, name: str) -> Card:
        """What the model of this name is."""
        return await self._client(name).card()

    async def abort_prefix(self, prefix: str) -> Receipt:
        """End every open call whose id begins so, whichever model it is at."""
        receipts = await asyncio.gather(*(client.abort_prefix(prefix) for client in self._clients.values()))
        tokens = [receipt.tokens for receipt in receipts if receipt.tokens is not None]
        freed_ms = [receipt.freed_ms for receipt in receipts if receipt.freed_ms is not None]
        return Receipt(sum(tokens) if tokens else None, max(freed_ms, default=None))

    async def readiness(self, timeout_s: float) -> Readiness:
        """Whether a message of any kind sent now would be answered."""
        asked = await asyncio.gather(*(client.readiness(timeout_s) for client in self._clients.values()))
        states: dict[str, State] = {name: state for name, (state, _) in zip(self._clients, asked, strict=True)}
        if not self.spec.several:
            (state, detail), model = asked[0], None
            if state == "ready":
                try:
                    model = (await self._clients[SINGLE].card()).id
                except OneboxError as error:
                    state, detail = "down", error.message
            return Readiness(state, detail, model, {})
        orders = {task: self.spec.order(task) for task in (DEFAULT, *self.spec.tasks)}
        up = {name for name, target in self.targets.items() if states[target.model] == "ready"}
        without = [task for task, order in orders.items() if up.isdisjoint(order)]
        model = next((name for name in orders[DEFAULT] if name in up), None)
        if not without:
            return Readiness("ready", "", model, states)
        loading = any(states[self._target(name).model] == "loading" for task in without for name in orders[task])
        away = ", ".join(f"{name!r} is {state}" for name, state in states.items() if state != "ready")
        detail = f"No model answers for {', '.join(map(repr, without))}: {away}."
        return Readiness("loading" if loading else "down", detail, model, states)

    def _target(self, name: str) -> Target:
        target = self.targets.get(name)
        if target is not None:
            return target
        if not self.spec.several:
            return self.targets[SINGLE]
        known = ", ".join(map(repr, self.targets))
        raise UnknownModel(f"Model {name!r} is not served any more; known: {known}. Ask again.", param="model")

    def _client(self, name: str) -> EngineClient:
        return self._clients[self._target(name).model]

    def _look_after(self, model: str) -> None:
        if self.spec.several and model not in self._absent:
            self._absent[model] = asyncio.create_task(self._until_ready(model), name=f"look after {model}")

    async def _until_ready(self, model: str) -> None:
        """Returns once the model answers, which then is preferred as before."""
        while True:
            state, _ = await self._clients[model].readiness(LOOK_TIMEOUT_S)
            if state == "ready":
                break
            await asyncio.sleep(LOOK_EVERY_S)
        logger.info("Model %r answers", model)
        del self._absent[model]


async def _first(items: AsyncGenerator[Frame | End, None], client: EngineClient) -> Frame | End:
    """The first item, unless meanwhile no replica of the model answers any more."""

    async def draw() -> Frame | End:
        return await anext(items)

    drawing = asyncio.create_task(draw())
    try:
        while True:
            await asyncio.wait((drawing,), timeout=LOOK_EVERY_S)
            if drawing.done():
                return drawing.result()
            if not await client.alive(ALIVE_TIMEOUT_S) and not drawing.done():
                raise Unavailable(
                    "The model has no replica that answers; it is restarted by itself. Try again shortly."
                )
    finally:
        drawing.cancel()
        await asyncio.gather(drawing, return_exceptions=True)
