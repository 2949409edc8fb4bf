"""Runs of this worker and the way to everybody's: start, follow, stop, take over.

A run is executed by the worker that holds its lease and read on any. Its states and keys are `agents.run_store`, the
work is `agents.execution`, reading is `agents.readers`.
"""

import asyncio
import logging
import os
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Any, Final

from agents.conversations import Conversations, history
from agents.execution import Before, Execution
from agents.executor import Executor
from agents.journal import decode_entries
from agents.readers import Readers
from agents.run_log import LogWriter, RunLog
from agents.run_store import (
    CHANNEL,
    LOST_CHANNEL,
    Idempotency,
    Revision,
    RunRecord,
    RunRequest,
    RunStore,
    TurnRequest,
    new_run_id,
    unknown_run,
)
from agents.store import Store
from agents.tails import Tail
from onebox.errors import Internal, OneboxError, Overloaded, StoreUnavailable, Unavailable
from onebox.events import Accepted, Event, Terminal, is_terminal
from onebox.messages import Message
from onebox.settings import Settings

__all__ = ["Idempotency", "RunRecord", "RunRequest", "Runs", "Started", "TurnRequest", "new_run_id"]

SEARCH_S: Final = 0.8
SEARCH_FOR_S: Final = 1.0  # a searcher that is late gives way to another
LISTEN_AGAIN_S: Final = 0.2
STOP_WAIT_S: Final = 1.0
STOP_FORCED_S: Final = 5.0
SETTLE_PAUSES_S: Final = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
EPOCHS_MAX: Final = 16
RELEASE_S: Final = 2.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Started:
    """A run that is stored since `created`, in seconds since 1970.

    `joined`: somebody else started it, with the same idempotency key. `background`: it goes on when its reader leaves.
    """

    run_id: str
    tenant: str
    joined: bool
    background: bool
    conversation_id: str | None
    turn_id: str | None
    created: float


class Runs:
    """One worker's part in all runs. Use as an async context manager: it works from entering to leaving."""

    def __init__(self, settings: Settings, store: Store, executor: Executor, conversations: Conversations) -> None:
        self._settings = settings
        self._executor = executor
        self._conversations = conversations
        self._events_of = store.listen
        worker = f"{os.getpid()}-{secrets.token_hex(6)}"
        self._store = RunStore(store, worker, settings.lease_s, settings.log_keep_s)
        self._writer = LogWriter(self._store, settings)
        self._executions: dict[tuple[str, str], Execution] = {}
        self._readers = Readers(self._store, settings.reader_buffer_bytes)
        self._tasks: set[asyncio.Task[None]] = set()
        self._loops: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Runs":
        for work in (self._writer.run, self._renew, self._search, self._rescue, self._listen):
            self._loops.append(asyncio.create_task(work(), name=work.__name__))
        return self

    async def __aexit__(self, *_: object) -> None:
        """Give what still runs to other workers."""
        await self._writer.flush(RELEASE_S)
        calls = [
            self._store.renew_call(tenant, run_id, execution.log.epoch, release=True)
            for (tenant, run_id), execution in self._executions.items()
        ]
        for execution in list(self._executions.values()):
            execution.abandon()
        with suppress(StoreUnavailable):
            if calls:
                await self._store.run_all(calls)
        for task in (*self._loops, *self._tasks):
            task.cancel()
        await asyncio.gather(*self._loops, *self._tasks, return_exceptions=True)
        await self._readers.close()

    async def start(
        self, request: RunRequest, turn: TurnRequest | None = None, idempotency: Idempotency | None = None
    ) -> Started:
        """Store a run and begin to execute it, or join the one that the key has.

        Raises:
            Overloaded: there is no room for it, nor a run to join.
            OneboxError: as `RunStore.begin`; then there is no run.
        """
        if idempotency is not None:
            request = replace(request, idempotency_key=idempotency.key)
            try:
                self._executor.admission.check(request.tenant)
            except Overloaded:
                if not await self._store.is_known(request.tenant, idempotency):
                    raise
        if (traceparent := self._executor.tracer.traceparent()) is not None:
            request = replace(request, traceparent=traceparent)
        messages, turn_id, created = request.messages, None, time.time()
        conversation_id = request.conversation_id if turn is not None else None
        if self._settings.log_enabled or turn is not None:
            try:
                begun = await self._store.begin(request, turn, idempotency)
            except StoreUnavailable:
                self._spawn(self._settle(request, turn))
                raise
            if begun.joined:
                place = (begun.conversation_id, begun.turn_id, begun.created)
                return Started(begun.run_id, request.tenant, True, True, *place)
            turn_id, created = begun.turn_id, begun.created
            if turn is not None:
                messages = history(begun.turns)
        tail = Tail(self._settings.reader_buffer_bytes)
        tail.publish([Accepted(request.run_id, conversation_id, turn_id)])
        self._execute(request, messages, 1, created, Before(), tail)
        durable = request.background or request.idempotency_key is not None
        return Started(request.run_id, request.tenant, False, durable, conversation_id, turn_id, created)

    async def attend(self, started: Started) -> AsyncGenerator[tuple[int, Event], None]:
        """All events of a run that was just started. Whoever leaves early stops it, unless others have an interest.

        Raises:
            OneboxError: as `follow`; the run goes on.
        """
        whole = started.background or started.joined
        try:
            async with aclosing(self.follow(started.tenant, started.run_id)) as events:
                async for number, event in events:
                    whole = whole or is_terminal(event)
                    yield number, event
        except OneboxError:
            whole = True
            raise
        finally:
            if not whole:
                self._leave(started.tenant, started.run_id)

    def follow(self, tenant: str, run_id: str, after: int = -1) -> AsyncGenerator[tuple[int, Event], None]:
        """The events numbered above `after`, as they come, up to the terminal one.

        Raises:
            UnknownRun: there is no such run, or no more.
            StoreUnavailable: the store has been away for too long; come back with the last number seen.
        """
        return self._readers.follow(tenant, run_id, after)

    async def events(self, tenant: str, run_id: str) -> list[Event]:
        """The log so far.

        Raises:
            UnknownRun: there is no such run.
        """
        events, _ = await self._store.log(tenant, run_id)
        if not events:
            raise unknown_run(run_id)
        return events

    async def record(self, tenant: str, run_id: str) -> RunRecord:
        """The run as it is; the request of a turn has the whole history that it answers.

        Raises:
            UnknownRun: there is no such run.
        """
        record = await self._store.record(tenant, run_id)
        return replace(record, request=replace(record.request, messages=await self._messages(record)))

    async def stop(self, tenant: str, run_id: str) -> Terminal:
        """Stop a run wherever it is; its terminal event, which is a receipt if this stopped it.

        Raises:
            UnknownRun: there is no such run.
            Unavailable: it could not be stopped now; it will be.
        """
        execution = self._executions.get((tenant, run_id))
        if execution is not None:
            execution.stop()
        else:
            await self._store.stop(tenant, run_id)
        try:
            return await self._terminal(tenant, run_id, STOP_WAIT_S)
        except TimeoutError:
            pass
        if (tenant, run_id) not in self._executions:  # its worker is dead or stuck
            for name, epoch in await self._store.take(tenant, run_id):
                await self._take_over(tenant, name, epoch)
        try:
            return await self._terminal(tenant, run_id, STOP_FORCED_S)
        except TimeoutError:
            raise Unavailable(
                "The run does not end yet: a part of the server is stuck. It is stopped as soon as that is replaced.",
                retry_after_s=1.0,
            ) from None

    async def replan(self, tenant: str, run_id: str, plan: Sequence[str], begun: int) -> Revision:
        """Let a run, on whatever worker, go on with another plan, unless more than `begun` of its steps have begun.

        Raises:
            UnknownRun: there is no such run.
        """
        return await self._store.replan(tenant, run_id, plan, begun)

    async def delete(self, tenant: str, run_id: str) -> None:
        """Remove a run's log; one that runs is stopped first.

        Raises:
            UnknownRun: there is no such run.
        """
        if not await self._store.forget(tenant, run_id):
            await self.stop(tenant, run_id)
            await self._store.forget(tenant, run_id)

    def stop_quietly(self, tenant: str, run_id: str) -> None:
        """Stop a run if there is one, in the background."""

        async def stop() -> None:
            with suppress(OneboxError):
                await self.stop(tenant, run_id)

        self._spawn(stop())

    def _execute(
        self,
        request: RunRequest,
        messages: tuple[Message, ...],
        epoch: int,
        created: float,
        before: Before,
        tail: Tail,
        stored_entries: int = 0,
    ) -> Execution:
        key = (request.tenant, request.run_id)

        def open_log(on_stop: Callable[[], None], on_lost: Callable[[], None]) -> RunLog:
            return self._writer.open(request, epoch, (tail.next, stored_entries), tail, on_stop, on_lost)

        execution = Execution(self._executor, request, messages, created, before, open_log)
        self._executions[key] = execution
        self._readers.own(key, tail)

        async def work() -> None:
            try:
                await execution.run()
            finally:
                if self._executions.get(key) is execution:
                    del self._executions[key]
                self._readers.disown(key, tail)

        self._spawn(work())
        return execution

    def _leave(self, tenant: str, run_id: str) -> None:
        """The reader who asked for the run is gone: stop it, if nobody else ever read it."""
        execution = self._executions.get((tenant, run_id))
        if execution is not None and execution.log.tail.ever_read <= 1:
            execution.stop()

    async def _terminal(self, tenant: str, run_id: str, timeout_s: float) -> Terminal:
        async with asyncio.timeout(timeout_s), aclosing(self.follow(tenant, run_id)) as events:
            async for _, event in events:
                if is_terminal(event):
                    assert isinstance(event, Terminal)
                    return event
        raise TimeoutError

    async def _messages(self, record: RunRecord) -> tuple[Message, ...]:
        """What a run answers."""
        if record.conversation_id is None or record.turn_id is None:
            return record.request.messages
        turns = await self._conversations.turns_until(record.tenant, record.conversation_id, record.turn_id)
        return history(turns) if turns else record.request.messages

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._settings.lease_renew_s)
            held = list(self._executions.items())
            if not held or not self._settings.log_enabled:
                continue
            calls = [self._store.renew_call(*key, execution.log.epoch) for key, execution in held]
            try:
                replies = await self._store.run_all(calls)
            except StoreUnavailable:
                continue
            for (_, execution), reply in zip(held, replies, strict=True):
                if reply == b"1":
                    execution.stop()
                elif reply == b"lost" and not execution.log.ending:
                    execution.abandon()

    async def _search(self) -> None:
        """Look for runs whose owner is gone, if no other worker does so now."""
        while self._settings.log_enabled:
            try:
                for tenant in await self._store.search(SEARCH_FOR_S):
                    await self._take_lost(tenant)
            except StoreUnavailable:
                pass
            except Exception:
                logger.exception("Lost runs could not be looked for")
            await asyncio.sleep(SEARCH_S)

    async def _rescue(self) -> None:
        """Take a part of the runs that another worker has found to be lost."""
        while self._settings.log_enabled:
            with suppress(StoreUnavailable):
                async with aclosing(self._events_of(LOST_CHANNEL)) as tenants:
                    async for tenant in tenants:
                        await self._take_lost(tenant.decode())
            await asyncio.sleep(LISTEN_AGAIN_S)

    async def _take_lost(self, tenant: str) -> None:
        """Go on with runs of a tenant as long as there are some that nobody has."""
        try:
            while taken := await self._store.take(tenant):
                for run_id, epoch in taken:
                    with suppress(StoreUnavailable):  # its lease ends again
                        await self._take_over(tenant, run_id, epoch)
        except StoreUnavailable:
            pass
        except Exception:
            logger.exception("Runs of other workers could not be taken over")

    async def _take_over(self, tenant: str, run_id: str, epoch: int) -> None:
        """Go on with a run whose owner is gone."""
        record = await self._store.record(tenant, run_id)
        events, journal = await self._store.log(tenant, run_id)
        refusal: OneboxError | None = None
        if epoch > EPOCHS_MAX:
            refusal = Internal(
                f"The run was given up: {epoch - 1} server processes ended while they worked on it. Its text is kept."
            )
        held = self._executions.get((tenant, run_id))
        if held is not None:
            held.abandon()
        logger.warning("Run %s goes on here, as epoch %d", run_id, epoch)
        self._executor.metrics.takeovers.inc()
        tail = Tail(self._settings.reader_buffer_bytes, len(events))
        before = Before(events, decode_entries(journal), taken_over=True, refusal=refusal)
        messages = await self._messages(record)
        execution = self._execute(record.request, messages, epoch, record.created, before, tail, len(journal))
        if record.stopping:
            execution.stop()

    async def _settle(self, request: RunRequest, turn: TurnRequest | None) -> None:
        """Make sense of a start whose answer never came, so that sending it again does not double it.

        With an idempotency key the run is executed: whoever asks again joins it. Without, it is taken back, unless it
        replaced a turn, which cannot be brought back.
        """
        keep = request.idempotency_key is not None or (turn is not None and turn.mode == "edit")
        for pause_s in SETTLE_PAUSES_S:
            with suppress(StoreUnavailable):
                if not keep:
                    await self._store.undo(request)
                    return
                for run_id, epoch in await self._store.take(request.tenant, request.run_id):
                    await self._take_over(request.tenant, run_id, epoch)
                    return
            await asyncio.sleep(pause_s)

    async def _listen(self) -> None:
        """Stop runs of this worker when another one is asked to."""
        while True:
            with suppress(StoreUnavailable):
                async with aclosing(self._events_of(CHANNEL + self._store.worker)) as messages:
                    async for message in messages:
                        for (_, run_id), execution in list(self._executions.items()):
                            if run_id == message.decode():
                                execution.stop()
            await asyncio.sleep(LISTEN_AGAIN_S)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
