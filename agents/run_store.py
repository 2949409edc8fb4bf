"""Runs in the store: what is kept of one, and the typed side of `agents.run_scripts`.

Nothing here executes or waits; `agents.run_log` batches the appends and `agents.runs` decides.
"""

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import orjson
from pydantic import TypeAdapter

from agents.conversations import Mode, Turn, Variant, assemble, dump_variant, title_of
from agents.run_scripts import APPEND, BEGIN_RUN, END_RUN, FORGET, LOST, PAGE, RENEW, REPLAN, SEARCH, STOP, TAKE, UNDO
from agents.store import Argument, Call, Store
from agents.store_keys import SEARCHER, TENANTS, ConversationKeys, RunKeys, idempotency_key
from onebox.errors import Conflict, IdempotencyMismatch, NotFound, StoreUnavailable, UnknownConversation, UnknownRun
from onebox.events import Event, Routed, decode
from onebox.messages import Message
from onebox.plugin import Sampling

RunState = Literal["running", "completed", "failed", "stopped"]
Revision = Literal["kept", "begun", "ended"]

CHANNEL: Final = "onebox:worker:"
LOST_CHANNEL: Final = "onebox:lost"
SEARCHED_AT_ONCE: Final = 256
TAKEN_AT_ONCE: Final = 32
APPENDS_AT_ONCE: Final = 64
KEEP_OUT_S: Final = 120
PAGE_BYTES: Final = 32_768


@dataclass(frozen=True, slots=True)
class RunRequest:
    """What to run. `task` None lets the router decide; `raw` hands the messages to an engine as they are.

    `plan` has the tasks of a plan that the caller has chosen. `model` is the model or adapter that a raw request names;
    None where there is only one.

    A turn of a conversation has only the new message here: its history is the conversation's. `extra` is kept with the
    run for whoever asked; `background` runs go on when nobody reads them. `traceparent` is the span of who asked.
    """

    run_id: str
    tenant: str
    messages: tuple[Message, ...]
    task: str | None = None
    raw: bool = False
    params: Mapping[str, object] = field(default_factory=dict)
    sampling: Sampling = field(default_factory=Sampling)
    conversation_id: str | None = None
    routed: Routed | None = None
    background: bool = False
    model: str | None = None
    plan: tuple[str, ...] = ()
    idempotency_key: str | None = None
    extra: Mapping[str, object] = field(default_factory=dict)
    traceparent: str | None = None


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """Which turn of the request's conversation the run answers; `edited` is the turn that `text` replaces."""

    mode: Mode
    text: str
    edited: str | None = None


@dataclass(frozen=True, slots=True)
class Idempotency:
    """The caller's name for a request, and what it said then."""

    key: str
    body_hash: str


@dataclass(frozen=True, slots=True)
class Begun:
    """A stored run. `joined`: the key belongs to this earlier one. `turns` ends with the turn to answer."""

    run_id: str
    joined: bool
    conversation_id: str | None
    turn_id: str | None
    created: float
    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run as it is now. Times in seconds since 1970."""

    run_id: str
    tenant: str
    state: RunState
    created: float
    conversation_id: str | None
    turn_id: str | None
    request: RunRequest
    epoch: int = 1
    stopping: bool = False


@dataclass(frozen=True, slots=True)
class Ending:
    """How a run ends: its state, its variant if it is a turn, and whether its idempotency key may be used again."""

    state: RunState
    variant: Variant | None
    retry: bool = False


_REQUEST: Final = TypeAdapter(RunRequest)


def new_run_id() -> str:
    """A name nobody can guess."""
    return f"resp_{secrets.token_hex(24)}"


class RunStore:
    """All tenants' runs, as one worker sees them."""

    def __init__(self, store: Store, worker: str, lease_s: float, keep_s: int) -> None:
        self._store = store
        self.worker = worker
        self._lease_ms = int(lease_s * 1000)
        self._keep_s = keep_s
        self._tenants: set[str] = set()

    async def begin(self, request: RunRequest, turn: TurnRequest | None, idempotency: Idempotency | None) -> Begun:
        """Store the run, its turn, its lease and event 0 in one step.

        Raises:
            Conflict: another run has the conversation.
            UnknownConversation: there is none, or of another tenant.
            NotFound: the turn to edit or to answer again is not there.
            IdempotencyMismatch: the key was used with another body.
            StoreUnavailable: nothing is stored, or will be taken back (`undo`).
        """
        tenant, run_id = request.tenant, request.run_id
        if tenant not in self._tenants:
            await self._store.transaction([("SADD", TENANTS, tenant)])
            self._tenants.add(tenant)
        keys, now = RunKeys(tenant, run_id), time.time_ns() // 1000
        names = [keys.run, keys.events, keys.leases, idempotency_key(tenant, request.idempotency_key)]
        args: list[Argument] = [
            run_id,
            self.worker,
            self._lease_ms,
            self._keep_s,
            now,
            _REQUEST.dump_json(request),
            int(request.background),
            idempotency.body_hash if idempotency else "",
            keys.prefix,
        ]
        if turn is not None:
            assert request.conversation_id is not None, "a turn belongs to a conversation"
            of = ConversationKeys(tenant, request.conversation_id)
            names += [of.conversation, of.turns, of.order, of.variants, of.lock, of.index, of.feedback]
            turn_id = f"turn_{secrets.token_hex(8)}"
            row = orjson.dumps({"id": turn_id, "user": turn.text, "created": now})
            variant = dump_variant(Variant(run_id))
            args += [turn.mode, turn_id, row, variant, title_of(turn.text), turn.edited or ""]
            args.append(request.conversation_id)
        reply = await self._store.run(BEGIN_RUN, names, args)
        outcome = reply[0].decode()
        if outcome == "joined":
            conversation_id, turn_id = reply[2].decode(), reply[3].decode()
            created = int(reply[4]) / 1e6
            return Begun(reply[1].decode(), True, conversation_id or None, turn_id or None, created)
        if outcome != "ok":
            raise _refusal(outcome, request.conversation_id or "", turn)
        if turn is None:
            return Begun(run_id, False, None, None, now / 1e6)
        turns = assemble(reply[2], reply[3], reply[4], {})
        return Begun(run_id, False, request.conversation_id, reply[1].decode(), now / 1e6, turns)

    async def is_known(self, tenant: str, idempotency: Idempotency) -> bool:
        """Whether a run has this key."""
        return await self._store.hash_get(idempotency_key(tenant, idempotency.key), "run") is not None

    async def undo(self, request: RunRequest) -> None:
        """Take back a `begin` whose answer never came, whether it has happened, will happen late, or never does."""
        keys = RunKeys(request.tenant, request.run_id)
        names = [keys.run, keys.events, keys.journal, keys.leases]
        names.append(idempotency_key(request.tenant, request.idempotency_key))
        if request.conversation_id is not None:
            of = ConversationKeys(request.tenant, request.conversation_id)
            names += [of.conversation, of.turns, of.order, of.variants, of.lock]
        await self._store.run(UNDO, names, [request.run_id, self.worker, KEEP_OUT_S])

    def append_call(
        self, keys: RunKeys, epoch: int, stored: tuple[int, int], events: Sequence[bytes], journal: bytes
    ) -> Call:
        """The append of `events` and one journal entry behind `stored` = (events, journal entries)."""
        args: list[Argument] = [self.worker, epoch, *stored, journal, len(events), *events]
        return Call(APPEND, [keys.run, keys.events, keys.journal], args)

    def end_call(
        self, keys: RunKeys, epoch: int, stored: int, request: RunRequest, events: Sequence[bytes], ending: Ending
    ) -> Call:
        """The last append, with all that ends with it."""
        names = [keys.run, keys.events, keys.journal, keys.leases]
        names.append(idempotency_key(request.tenant, request.idempotency_key))
        variant = b""
        if request.conversation_id is not None and ending.variant is not None:
            of = ConversationKeys(request.tenant, request.conversation_id)
            names += [of.conversation, of.variants, of.lock, of.index]
            variant = dump_variant(ending.variant)
        args: list[Argument] = [
            self.worker,
            epoch,
            stored,
            request.run_id,
            ending.state,
            time.time_ns() // 1000,
            self._keep_s,
            int(ending.retry),
            int(request.idempotency_key is not None),
            variant,
            request.conversation_id or "",
            *events,
        ]
        return Call(END_RUN, names, args)

    def renew_call(self, tenant: str, run_id: str, epoch: int, *, release: bool = False) -> Call:
        """The renewal of a lease; `release` gives the run to whoever takes it."""
        keys = RunKeys(tenant, run_id)
        lease_ms = 0 if release else self._lease_ms
        return Call(RENEW, [keys.run, keys.leases], [run_id, self.worker, epoch, lease_ms])

    async def run_all(self, calls: Sequence[Call]) -> list[Any]:
        """The replies of prepared calls, in one round trip; a refusal for now is a `StoreUnavailable` among them.

        Appends of one tenant go as one script: at 16 runs that is a third of the CPU on either side.
        """
        batches = _batches(calls)
        answers = await self._store.run_all([_joined([calls[index] for index in batch]) for batch in batches])
        replies: list[Any] = [None] * len(calls)
        for batch, answer in zip(batches, answers, strict=True):
            appended = calls[batch[0]].script is APPEND and isinstance(answer, list)
            for index, reply in zip(batch, answer if appended else [answer] * len(batch), strict=True):
                replies[index] = reply
        return replies

    async def search(self, for_s: float) -> list[str]:
        """The tenants with runs whose lease is over, of which every worker is told on the channel `LOST_CHANNEL`.

        One worker at a time searches, for `for_s` after it began; another one's answer is empty.
        """
        if not await self._store.run(SEARCH, [SEARCHER], [self.worker, int(for_s * 1000)]):
            return []
        (names,) = await self._store.transaction([("SMEMBERS", TENANTS)])
        tenants = sorted(name.decode() for name in names)
        lost: list[str] = []
        for start in range(0, len(tenants), SEARCHED_AT_ONCE):
            some = tenants[start : start + SEARCHED_AT_ONCE]
            calls = [Call(LOST, [RunKeys(tenant, "").leases], [tenant, LOST_CHANNEL]) for tenant in some]
            replies = await self._store.run_all(calls)
            lost += [tenant for tenant, reply in zip(some, replies, strict=True) if reply == 1]
        return lost

    async def take(self, tenant: str, run_id: str = "") -> list[tuple[str, int]]:
        """Become the owner of runs whose lease is over, or of `run_id` whatever its lease: ids and new epochs."""
        keys = RunKeys(tenant, run_id)
        args: list[Argument] = [keys.prefix, self.worker, self._lease_ms, TAKEN_AT_ONCE, run_id]
        reply = await self._store.run(TAKE, [keys.leases], args)
        return [(name.decode(), int(epoch)) for name, epoch in zip(reply[::2], reply[1::2], strict=True)]

    async def stop(self, tenant: str, run_id: str) -> None:
        """Ask the owner of a run to stop it; nothing happens to one that has ended.

        Raises:
            UnknownRun: there is none.
        """
        if await self._store.run(STOP, [RunKeys(tenant, run_id).run], [run_id, CHANNEL]) == b"unknown":
            raise unknown_run(run_id)

    async def replan(self, tenant: str, run_id: str, plan: Sequence[str], begun: int) -> Revision:
        """Keep another plan for a run to go on with, unless more than `begun` of its steps have begun.

        Raises:
            UnknownRun: there is none.
        """
        state = await self._store.run(REPLAN, [RunKeys(tenant, run_id).run], [",".join(plan), begun])
        if state == b"unknown":
            raise unknown_run(run_id)
        if state == b"begun":
            return "begun"
        return "kept" if state == b"running" else "ended"

    async def forget(self, tenant: str, run_id: str) -> bool:
        """Remove a run that has ended; False where it still runs.

        Raises:
            UnknownRun: there is none.
        """
        keys = RunKeys(tenant, run_id)
        state = await self._store.run(FORGET, [keys.run, keys.events, keys.journal], [])
        if state == b"unknown":
            raise unknown_run(run_id)
        return bool(state != b"running")

    async def record(self, tenant: str, run_id: str) -> RunRecord:
        """The run as it is.

        Raises:
            UnknownRun: there is none.
        """
        (row,) = await self._store.transaction([("HGETALL", RunKeys(tenant, run_id).run)])
        values = {name.decode(): value for name, value in row.items()}
        if "request" not in values:
            raise unknown_run(run_id)
        return RunRecord(
            run_id,
            tenant,
            values["state"].decode(),
            int(values["created"]) / 1e6,
            values["conversation"].decode() or None,
            values["turn"].decode() or None,
            _REQUEST.validate_json(values["request"]),
            int(values["epoch"]),
            values["stop"] == b"1",
        )

    async def page(self, tenant: str, run_id: str, start: int) -> tuple[list[Event], str | None]:
        """Some events from number `start`, and the state of the run; None where there is none."""
        keys = RunKeys(tenant, run_id)
        state, raw = await self._store.run(PAGE, [keys.run, keys.events], [start, PAGE_BYTES])
        return [decode(line) for line in raw], state.decode() if state and state != b"void" else None

    async def log(self, tenant: str, run_id: str) -> tuple[list[Event], list[bytes]]:
        """All events and all journal entries of a run."""
        keys = RunKeys(tenant, run_id)
        events, journal = await self._store.transaction(
            [("LRANGE", keys.events, 0, -1), ("LRANGE", keys.journal, 0, -1)]
        )
        return [decode(line) for line in events], list(journal)


def _batches(calls: Sequence[Call]) -> list[list[int]]:
    """Which calls go together: appends of one tenant, whose keys are at one place of a cluster; others alone."""
    batches: list[list[int]] = []
    filling: dict[str, list[int]] = {}
    for index, call in enumerate(calls):
        tenant = call.keys[0].partition("}")[0]
        batch = filling.get(tenant) if call.script is APPEND else None
        if batch is not None and len(batch) < APPENDS_AT_ONCE:
            batch.append(index)
            continue
        batches.append([index])
        if call.script is APPEND:
            filling[tenant] = batches[-1]
    return batches


def _joined(calls: Sequence[Call]) -> Call:
    if len(calls) == 1:
        return calls[0]
    keys = [key for call in calls for key in call.keys]
    return Call(APPEND, keys, [calls[0].args[0], *(arg for call in calls for arg in call.args[1:])])


def unknown_run(run_id: str) -> UnknownRun:
    """The error for a run that is not there."""
    return UnknownRun(
        f"Response {run_id[:80]!r} does not exist, or its log has expired. Logs are kept for a day after the end."
    )


def _refusal(outcome: str, conversation: str, turn: TurnRequest | None) -> Exception:
    if outcome == "mismatch":
        return IdempotencyMismatch(
            "This Idempotency-Key was used before with another request. Send a new key with a new request."
        )
    if outcome == "unknown":
        return UnknownConversation(
            f"Conversation {conversation!r} does not exist. List the known ones at /v1/conversations."
        )
    if outcome == "busy":
        return Conflict(
            "A reply is still running in this conversation. Stop it or wait for its end.", retry_after_s=1.0
        )
    if outcome == "empty":
        return NotFound("This conversation has no turn to answer again. Send a message first.")
    if outcome == "no_turn":
        edited = turn.edited if turn else None
        return NotFound(f"Turn {edited!r} is not part of this conversation. Reload the conversation.", param="edit")
    return StoreUnavailable("The store answered too late, so the request was taken back. Try again.", retry_after_s=1.0)
