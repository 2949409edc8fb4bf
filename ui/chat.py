"""One exchange as the page shows it: ask, wait while the model loads, follow the reply, keep what was written.

A reply is a run of the gateway's: who leaves it leaves it running, who comes back follows it from its first event.
Yields views (`Update`) and knows neither Gradio nor HTML; `ui.page` draws them.
"""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from uuid import uuid4

from onebox.client import Client
from onebox.errors import EngineFailed, OneboxError, Timeout, Unavailable
from onebox.events import Event
from onebox.messages import user
from onebox.records import Conversation, Problem, Turn, Variant
from ui.reply import PENDING, Growing, Update, running_variant
from ui.stream import Pace, Seat, Seats, coalesce

TITLE_CHARACTERS = 60


def _new_key() -> str:
    return uuid4().hex


@dataclass(frozen=True, slots=True)
class Ask:
    """What the visitor wants. `edit` is the id of a turn to replace; `regenerate` re-answers the last turn.

    However often it is sent under one `key`, it is answered once.
    """

    conversation: str | None
    text: str = ""
    model: str = "auto"
    regenerate: bool = False
    edit: str | None = None
    key: str = field(default_factory=_new_key)


class _NotReadyError(Exception):
    """The run of an ask ended before its first word because something was not there; `again` is what to ask next."""

    def __init__(self, again: Ask, cause: Unavailable) -> None:
        super().__init__(cause.message)
        self.again = again
        self.cause = cause


class Chat:
    """Exchanges of all sessions of one page process."""

    def __init__(
        self, client: Client, pace: Pace, seats: Seats, *, poll_s: float = 1.0, wait_limit_s: float = 600.0
    ) -> None:
        self._client = client
        self._pace = pace
        self._seats = seats
        self._poll_s = poll_s
        self._wait_limit_s = wait_limit_s

    async def answer(self, session: str, ask: Ask) -> AsyncGenerator[Update, None]:
        """Views of the exchange, the last one with `running` False; none of that kind if the session left it.

        Closing it leaves the reply running.
        """
        waited_from: float | None = None
        with self._seats.take(session) as seat:
            while True:
                base: Conversation | None = None
                error: OneboxError
                try:
                    base, turn, ask = await self._prepare(ask)
                    async with aclosing(self._exchange(ask, base, turn, seat)) as updates:
                        async for update in updates:
                            yield update
                    return
                except _NotReadyError as failed:
                    ask, error = failed.again, failed.cause
                except OneboxError as met:
                    if not isinstance(met, EngineFailed | Timeout | Unavailable):
                        yield self._refused(ask, base, met)
                        return
                    error = met
                waited_from = waited_from or time.monotonic()
                if time.monotonic() - waited_from > self._wait_limit_s:
                    yield self._refused(ask, base, error)
                    return
                async with aclosing(self._wait(ask, base, waited_from, seat)) as waits:
                    async for update in waits:
                        yield update
                if seat.interrupted.is_set():
                    if not seat.left.is_set():
                        yield Update(base, running=False, unsent=not ask.regenerate)
                    return

    async def watch(self, session: str, conversation: str) -> AsyncGenerator[Update, None]:
        """Views of the reply that is being written in a conversation, as of `answer`, from what it has so far."""
        with self._seats.take(session) as seat:
            try:
                stored = await self._client.conversation(conversation)
            except OneboxError as error:
                yield Update(None, running=False, problem=Problem(error.code, error.message))
                return
            running = running_variant(stored)
            if running is None:
                yield Update(stored, running=False)
                return
            *before, turn = stored.turns
            base = replace(stored, turns=tuple(before))
            seat.run_id = running.run_id
            reply = Growing()
            async with aclosing(self._follow(running.run_id, reply, seat)) as grown:
                async for _ in grown:
                    if len(reply.variant.text) >= len(running.text):
                        yield reply.update(base, turn)
            if not seat.left.is_set():
                yield await self._settled(reply.update(base, turn), reply.variant)

    def leave(self, session: str) -> None:
        """End the session's stream; the reply goes on."""
        self._seats.leave(session)

    async def stop(self, session: str, conversation: str | None) -> None:
        """End the reply of the session's stream, or where none runs here, the one of the conversation."""
        seat = self._seats.of(session)
        run_id: str | None = None
        if seat is not None:
            seat.stop()
            run_id = seat.run_id
        elif conversation:
            running = running_variant(await self._client.conversation(conversation))
            run_id = running.run_id if running else None
        if run_id is not None:
            await self._client.cancel(run_id)

    async def _prepare(self, ask: Ask) -> tuple[Conversation, Turn, Ask]:
        """The conversation before this exchange, the turn to be answered, and the request to send."""
        if ask.conversation is None:
            title = " ".join(ask.text.split())[:TITLE_CHARACTERS]
            made = Conversation(await self._client.create_conversation(title), title)
            return made, _asked(ask), replace(ask, conversation=made.id)
        base = await self._client.conversation(ask.conversation)
        if ask.regenerate:
            *before, last = base.turns
            return replace(base, turns=tuple(before)), last, ask
        if ask.edit is not None:
            kept = [turn.id for turn in base.turns]
            at = kept.index(ask.edit) if ask.edit in kept else len(kept)
            ask = ask if ask.edit in kept else replace(ask, edit=None)
            base = replace(base, turns=base.turns[:at])
        return base, _asked(ask), ask

    async def _exchange(self, ask: Ask, base: Conversation, turn: Turn, seat: Seat) -> AsyncGenerator[Update, None]:
        reply = Growing()
        yield reply.update(base, turn)
        started = await self._client.start(
            [] if ask.regenerate else [user(ask.text)],
            model=ask.model,
            conversation=base.id,
            regenerate=ask.regenerate,
            edit=ask.edit,
            idempotency_key=ask.key,
        )
        seat.run_id = started.run_id
        if seat.stopped:
            await self._client.cancel(started.run_id)
        if started.turn is not None and not ask.regenerate:
            # A message sent for the second time is in the conversation already.
            before = tuple(known for known in base.turns if known.id != started.turn)
            base, turn = replace(base, turns=before), replace(turn, id=started.turn)
        async with aclosing(self._follow(started.run_id, reply, seat)) as grown:
            async for _ in grown:
                yield reply.update(base, turn)
        if seat.left.is_set():
            return
        if (missing := reply.unavailable()) is not None:
            edit = None if ask.regenerate else started.turn
            raise _NotReadyError(replace(ask, edit=edit, key=_new_key()), missing)
        yield await self._settled(reply.update(base, turn), reply.variant)

    async def _follow(self, run_id: str, reply: Growing, seat: Seat) -> AsyncGenerator[None, None]:
        """Grows `reply` and yields after each step but the last; ends with the run or when the seat is left."""
        try:
            async with aclosing(coalesce(self._events(run_id), self._pace, seat.left)) as batches:
                async for batch in batches:
                    reply.take(batch)
                    if reply.running:
                        yield
        except OneboxError as error:
            reply.fail(error)

    async def _events(self, run_id: str) -> AsyncGenerator[Event, None]:
        async with aclosing(self._client.follow(run_id, patience_s=self._wait_limit_s)) as events:
            async for _, event in events:
                yield event

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
        self, ask: Ask, base: Conversation | None, since: float, seat: Seat
    ) -> AsyncGenerator[Update, None]:
        """A view per poll until the box is ready, the limit is over or the visitor has enough of it."""
        view = None if base is None else replace(base, turns=(*base.turns, _asked(ask)))
        while not seat.interrupted.is_set() and time.monotonic() - since < self._wait_limit_s:
            yield Update(view, running=True, waiting_s=int(time.monotonic() - since))
            with suppress(TimeoutError):
                await asyncio.wait_for(seat.interrupted.wait(), self._poll_s)
                return
            if (await self._client.readiness()).ready:
                return

    def _refused(self, ask: Ask, base: Conversation | None, error: OneboxError) -> Update:
        """Nothing was stored: the message goes back to the box."""
        return Update(base, running=False, problem=Problem(error.code, error.message), unsent=bool(ask.text))


def _asked(ask: Ask) -> Turn:
    return Turn(PENDING, ask.text, time.time(), (Variant(PENDING, "", state="running"),))
