"""One exchange as the page shows it: ask, wait while the model loads, follow the reply, keep what was written.

Yields views (`Update`) and knows neither Gradio nor HTML; `ui.page` draws them.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from onebox.client import Client
from onebox.errors import OneboxError, Unavailable
from onebox.events import Accepted, Check, Completed, Event, Failed, Progress, Routed, Stopped, TextDelta, Usage
from onebox.messages import user
from onebox.records import Conversation, Problem, Turn, Variant
from ui.stream import Pace, Stops, coalesce

PENDING = "pending"
TITLE_CHARACTERS = 60


@dataclass(frozen=True, slots=True)
class Ask:
    """What the visitor wants. `edit` is the id of a turn to replace; `regenerate` re-answers the last turn."""

    conversation: str | None
    text: str = ""
    model: str = "auto"
    regenerate: bool = False
    edit: str | None = None


@dataclass(frozen=True, slots=True)
class Update:
    """The page's new state. `conversation` None: leave what is shown. `waiting_s`: seconds spent on a model that
    is loading. `unsent`: the message went nowhere and belongs back in the box."""

    conversation: Conversation | None
    running: bool
    progress: Progress | None = None
    checks: tuple[Check, ...] = ()
    waiting_s: int | None = None
    problem: Problem | None = None
    unsent: bool = False
    cut: bool = False


@dataclass(slots=True)
class _Reply:
    """The reply as it grows; its text is joined once per update."""

    pieces: list[str] = field(default_factory=list)
    variant: Variant = field(default_factory=lambda: Variant(PENDING, "", state="running"))
    progress: Progress | None = None
    checks: tuple[Check, ...] = ()
    cut: bool = False

    def take(self, events: Sequence[Event]) -> None:
        for event in events:
            match event:
                case TextDelta(text=text):
                    self.pieces.append(text)
                    self.progress = None
                case Accepted(run_id=run_id):
                    self.variant = replace(self.variant, run_id=run_id)
                case Routed():
                    self.variant = replace(self.variant, route=event, task=event.task)
                case Progress():
                    self.progress = event
                case Check():
                    self.checks += (event,)
                case Usage():
                    self.variant = replace(self.variant, usage=event)
                case Completed(finish=finish):
                    self.variant = replace(self.variant, state="completed")
                    self.cut = finish == "length"
                case Stopped():
                    self.variant = replace(self.variant, state="stopped")
                case Failed(code=code, message=message):
                    self.variant = replace(self.variant, state="failed", error=Problem(code, message))
                case _:
                    pass
        self.variant = replace(self.variant, text="".join(self.pieces))


class Chat:
    """Exchanges of all sessions of one page process."""

    def __init__(
        self, client: Client, pace: Pace, stops: Stops, *, poll_s: float = 1.0, wait_limit_s: float = 600.0
    ) -> None:
        self._client = client
        self._pace = pace
        self._stops = stops
        self._poll_s = poll_s
        self._wait_limit_s = wait_limit_s

    async def answer(self, session: str, ask: Ask) -> AsyncGenerator[Update, None]:
        """Views of the exchange, the last one with `running` False. Closing it stops the engine."""
        waited_from: float | None = None
        with self._stops.running(session) as stop:
            while True:
                base: Conversation | None = None
                try:
                    base, turn, ask = await self._prepare(ask, again=waited_from is not None)
                    async with aclosing(self._follow(session, ask, base, turn, stop)) as updates:
                        async for update in updates:
                            yield update
                    return
                except OneboxError as error:
                    waited_from = waited_from or time.monotonic()
                    if not isinstance(error, Unavailable) or time.monotonic() - waited_from > self._wait_limit_s:
                        yield self._refused(ask, base, error)
                        return
                async with aclosing(self._wait(ask, base, waited_from, stop)) as waits:
                    async for update in waits:
                        yield update
                if stop.is_set():
                    if self._stops.is_current(session, stop):
                        yield Update(base, running=False, unsent=not ask.regenerate)
                    return

    async def _prepare(self, ask: Ask, *, again: bool) -> tuple[Conversation, Turn, Ask]:
        """The conversation before this exchange, the turn to be answered, and the request to send."""
        if ask.conversation is None:
            title = " ".join(ask.text.split())[:TITLE_CHARACTERS]
            made = Conversation(await self._client.create_conversation(title), title)
            return made, _asked(ask), replace(ask, conversation=made.id)
        base = await self._client.conversation(ask.conversation)
        if again and not ask.regenerate and base.turns:
            last = base.turns[-1]
            if last.user == ask.text and not any(variant.text for variant in last.variants):
                ask = replace(ask, regenerate=True, edit=None)
        if ask.regenerate:
            *before, last = base.turns
            return replace(base, turns=tuple(before)), last, ask
        if ask.edit is not None:
            kept = [turn.id for turn in base.turns]
            at = kept.index(ask.edit) if ask.edit in kept else len(kept)
            ask = ask if ask.edit in kept else replace(ask, edit=None)
            base = replace(base, turns=base.turns[:at])
        return base, _asked(ask), ask

    async def _follow(
        self, session: str, ask: Ask, base: Conversation, turn: Turn, stop: asyncio.Event
    ) -> AsyncGenerator[Update, None]:
        reply = _Reply()

        def view(*, running: bool) -> Update:
            variants = (*(v for v in turn.variants if v.run_id not in (PENDING, reply.variant.run_id)), reply.variant)
            shown = replace(turn, variants=variants, chosen=len(variants) - 1)
            conversation = replace(base, turns=(*base.turns, shown))
            return Update(conversation, running, reply.progress, reply.checks, cut=reply.cut)

        yield view(running=True)
        events = self._client.stream(
            [] if ask.regenerate else [user(ask.text)],
            model=ask.model,
            conversation=base.id,
            regenerate=ask.regenerate,
            edit=ask.edit,
        )
        async with aclosing(coalesce(events, self._pace, stop)) as batches:
            async for batch in batches:
                reply.take(batch)
                if reply.variant.state == "running":
                    yield view(running=True)
        if reply.variant.state == "running":
            reply.variant = replace(reply.variant, state="stopped")
        if not self._stops.is_current(session, stop):
            return
        yield await self._settled(view(running=False), reply.variant)

    async def _settled(self, update: Update, mine: Variant) -> Update:
        """The stored conversation, whose turn and run ids later actions need; what we saw where it lags behind."""
        assert update.conversation is not None
        try:
            stored = await self._client.conversation(update.conversation.id)
        except OneboxError:
            return update
        if not stored.turns:
            return update
        last = stored.turns[-1]
        variants = tuple(mine if v.run_id == mine.run_id and v.state == "running" else v for v in last.variants)
        if mine.run_id not in {variant.run_id for variant in variants}:
            variants = (*variants, mine)
        turn = replace(last, variants=variants, chosen=len(variants) - 1)
        return replace(update, conversation=replace(stored, turns=(*stored.turns[:-1], turn)))

    async def _wait(
        self, ask: Ask, base: Conversation | None, since: float, stop: asyncio.Event
    ) -> AsyncGenerator[Update, None]:
        """A view per poll until the box is ready, the limit is over or the visitor stops."""
        view = None if base is None else replace(base, turns=(*base.turns, _asked(ask)))
        while not stop.is_set() and time.monotonic() - since < self._wait_limit_s:
            yield Update(view, running=True, waiting_s=int(time.monotonic() - since))
            try:
                await asyncio.wait_for(stop.wait(), self._poll_s)
            except TimeoutError:
                if (await self._client.readiness()).ready:
                    return

    def _refused(self, ask: Ask, base: Conversation | None, error: OneboxError) -> Update:
        problem = Problem(error.code, error.message)
        if base is None or ask.regenerate:
            return Update(None, running=False, problem=problem, unsent=bool(ask.text))
        failed = Variant(PENDING, "", state="failed", error=problem)
        turn = replace(_asked(ask), variants=(failed,))
        return Update(replace(base, turns=(*base.turns, turn)), running=False)


def _asked(ask: Ask) -> Turn:
    return Turn(PENDING, ask.text, time.time(), (Variant(PENDING, "", state="running"),))
