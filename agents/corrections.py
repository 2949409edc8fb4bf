"""Where labels arise: users who choose another task, change a plan or like one of several answers.

What is noted is noted beside the reply, never before it: it delays nothing, and a store that is away loses it. A
tenant's corrections are noted one by one, so that of one message the last one stays. What a label is and where it is
kept is `agents.labels`.
"""

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from contextlib import closing
from dataclasses import replace
from types import TracebackType
from typing import Any, Final, Self
from weakref import WeakValueDictionary

from agents.conversations import Conversations, Feedback, Turn, Variant, history
from agents.labels import Labels, new_label, now
from agents.run_store import RunRecord, RunRequest
from agents.runs import Started
from onebox.errors import OneboxError, StoreUnavailable
from onebox.events import Routed
from onebox.labels import LabelSource
from onebox.messages import Message

LEAVE_S: Final = 1.0

logger = logging.getLogger(__name__)


class Corrections:
    """What this worker notes of users' corrections, of tenants that let it. Use as an async context manager."""

    def __init__(self, labels: Labels, conversations: Conversations) -> None:
        self._labels = labels
        self._conversations = conversations
        self._tasks: set[asyncio.Task[None]] = set()
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # of tenants with such tasks
        self._losing = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give what is being noted a moment."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=LEAVE_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def chosen_again(self, request: RunRequest, started: Started) -> None:
        """A turn is answered again as its user chose: a task, or a plan."""
        plan = request.plan or ((request.task,) if request.task is not None else ())
        if plan and not started.joined:
            self._spawn(request.tenant, self._chosen_again(request, started, plan, now()))

    def replanned(self, record: RunRecord, routed: Routed | None, plan: Sequence[str]) -> None:
        """The plan of a run has been changed; `routed` is what had been decided."""
        if routed is not None and routed.tier != "explicit":
            messages, was = record.request.messages, plan_of(routed)
            self._spawn(record.tenant, self._note(record.tenant, "plan", messages, plan, was, record.run_id, now()))

    def rated(self, tenant: str, conversation: str, run_id: str, value: Feedback | None) -> None:
        """An answer has been liked or not."""
        self._spawn(tenant, self._rated(tenant, conversation, run_id, value, now()))

    async def _chosen_again(self, request: RunRequest, started: Started, plan: tuple[str, ...], made: float) -> None:
        assert started.conversation_id is not None, "a turn belongs to a conversation"
        assert started.turn_id is not None, "a turn has an id"
        if await self._labels.learning(request.tenant) == "off":
            return
        turns = await self._conversations.turns_until(request.tenant, started.conversation_id, started.turn_id)
        decided = _decided(turns[-1], started.run_id) if turns else None
        if decided is not None:
            source: LabelSource = "plan" if request.plan else "reroute"
            await self._note(request.tenant, source, history(turns), plan, plan_of(decided), started.run_id, made)

    async def _rated(self, tenant: str, conversation: str, run_id: str, value: Feedback | None, made: float) -> None:
        if await self._labels.learning(tenant) == "off":
            return
        turns = (await self._conversations.get(tenant, conversation)).turns
        place = next((index for index, turn in enumerate(turns) if _variant(turn, run_id) is not None), None)
        if place is None:
            return
        rated, decided = _variant(turns[place], run_id), _decided(turns[place], run_id)
        if rated is None or rated.route is None or rated.route.tier != "explicit" or decided is None:
            return
        messages, plan, was = history(turns[: place + 1]), plan_of(rated.route), plan_of(decided)
        known = await self._labels.get(tenant, new_label(tenant, "variant", messages, plan, was, "tenant").id)
        if value != "like":
            if known is not None and known.source == "variant" and known.run_id == run_id:
                await self._labels.remove(tenant, known.id, made)
        elif plan != was and (known is None or known.plan != plan):
            await self._note(tenant, "variant", messages, plan, was, run_id, made)

    async def _note(
        self,
        tenant: str,
        source: LabelSource,
        messages: Sequence[Message],
        plan: Sequence[str],
        was: Sequence[str],
        run_id: str,
        made: float,
    ) -> None:
        """Keep a label; a correction back to what had been decided first undoes the one that there is."""
        learning = await self._labels.learning(tenant)
        if learning == "off":
            return
        label = new_label(tenant, source, messages, plan, was, learning, run_id, made)
        known = await self._labels.get(tenant, label.id)
        # What was decided since may be what the label has taught.
        first = known.was if known is not None and known.was else label.was
        if label.plan != first:
            await self._labels.add(tenant, replace(label, was=first))
        elif known is not None:
            await self._labels.remove(tenant, label.id, made)

    def _spawn(self, tenant: str, work: Coroutine[Any, Any, None]) -> None:
        """Do it after the tenant's corrections before it."""
        turn = self._turns.setdefault(tenant, asyncio.Lock())
        task = asyncio.create_task(self._guarded(turn, work), name="note a correction")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guarded(self, turn: asyncio.Lock, work: Coroutine[Any, Any, None]) -> None:
        try:
            with closing(work):  # its turn may not come before the worker leaves
                async with turn:
                    await work
            self._losing = False
        except StoreUnavailable:
            if not self._losing:
                logger.warning("The store is away, so corrections are not noted until it is back")
            self._losing = True
        except OneboxError as error:  # e.g. the conversation was deleted meanwhile
            logger.info("A correction could not be noted: %s", error.message)
        except Exception:
            logger.exception("A correction could not be noted")


def plan_of(routed: Routed) -> tuple[str, ...]:
    """The tasks of a decision in order, also where it is one."""
    return routed.plan or (routed.task,)


def _variant(turn: Turn, run_id: str) -> Variant | None:
    return next((variant for variant in turn.variants if variant.run_id == run_id), None)


def _decided(turn: Turn, other_than: str) -> Routed | None:
    """What the router has decided on the turn, first of all, at another variant than this one."""
    routes = (variant.route for variant in turn.variants if variant.run_id != other_than)
    return next((route for route in routes if route is not None and route.tier != "explicit"), None)
