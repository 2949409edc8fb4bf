"""Conversations of a tenant in the store: what they are and how they change.

Routes and replies pass through as values; running a turn is `agents.recording`. The HTTP face is
`agents.api.conversations`.
"""

import base64
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import orjson
from pydantic import TypeAdapter

from agents.conversation_scripts import BEGIN_TURN, END_TURN, KEEP_TURN, RATE, RENAME
from agents.store import Store
from onebox.errors import BadRequest, Conflict, NotFound, UnknownConversation
from onebox.events import Routed, Usage
from onebox.messages import Message, assistant, user

LEASE_MS: Final = 10_000
TITLE_MAX: Final = 80
HISTORY_MAX_BYTES: Final = 256 * 1024
HISTORY_MAX_MESSAGES: Final = 400
_SCAN: Final = 200
_ROUTED: Final = TypeAdapter(Routed)

State = Literal["running", "completed", "failed", "stopped"]
Mode = Literal["new", "regenerate", "edit"]
Feedback = Literal["like", "dislike"]


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a variant failed."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Variant:
    """One answer to a turn."""

    run_id: str
    text: str = ""
    task: str | None = None
    route: Routed | None = None
    state: State = "running"
    error: Fault | None = None
    usage: Usage | None = None
    feedback: Feedback | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """A user message and its answers, oldest first; `chosen` is the one that counts as history."""

    id: str
    user: str
    created: float
    variants: tuple[Variant, ...]

    @property
    def chosen(self) -> int:
        """The newest variant with text, else the newest."""
        told = [index for index, variant in enumerate(self.variants) if variant.text]
        return told[-1] if told else max(0, len(self.variants) - 1)

    @property
    def reply(self) -> str:
        """The chosen variant's text."""
        return self.variants[self.chosen].text if self.variants else ""


@dataclass(frozen=True, slots=True)
class Summary:
    """A conversation without its turns. Times in seconds since 1970."""

    id: str
    title: str
    created: float
    updated: float
    turns: int


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation, whole."""

    summary: Summary
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class BegunTurn:
    """A turn that is stored and whose run owns the conversation; `messages` is what the run answers."""

    tenant: str
    conversation_id: str
    turn_id: str
    run_id: str
    messages: tuple[Message, ...]


class Conversations:
    """All tenants' conversations in one store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def create(self, tenant: str, title: str) -> Summary:
        """A new, empty conversation; an empty `title` is filled from the first message."""
        identifier, now = f"conv_{secrets.token_hex(12)}", _now()
        keys = _Keys(tenant, identifier)
        await self._store.transaction(
            [
                ("HSET", keys.conversation, "title", title, "created", now, "updated", now, "turns", 0),
                ("ZADD", keys.index, now, identifier),
            ]
        )
        return Summary(identifier, title, now / 1e6, now / 1e6, 0)

    async def page(self, tenant: str, limit: int, cursor: str | None, query: str) -> tuple[list[Summary], str | None]:
        """Up to `limit` conversations, last changed first, whose title contains `query`, and the next page's cursor."""
        after = _read_cursor(cursor) if cursor else None
        found: list[Summary] = []
        needle = query.casefold()
        top: str | int = after[0] if after else "+inf"
        offset = 0
        while True:
            (rows,) = await self._store.transaction(
                [("ZREVRANGEBYSCORE", _index(tenant), top, "-inf", "WITHSCORES", "LIMIT", offset, _SCAN)]
            )
            places = [(int(score), name.decode()) for name, score in zip(rows[::2], rows[1::2], strict=True)]
            fresh = [name for score, name in places if after is None or (score, name) < after]
            for summary in await self._summaries(tenant, fresh):
                if summary is None or needle not in summary.title.casefold():
                    continue
                if len(found) == limit:
                    return found, _write_cursor(found[-1])
                found.append(summary)
            if len(places) < _SCAN:
                return found, None
            offset += len(places)

    async def get(self, tenant: str, identifier: str) -> Conversation:
        """The whole conversation. A variant whose worker died while it ran is shown as failed."""
        keys = _Keys(tenant, identifier)
        head, turns, order, variants, feedback, lock = await self._store.transaction(
            [
                ("HGETALL", keys.conversation),
                ("LRANGE", keys.turns, 0, -1),
                ("HGETALL", keys.order),
                ("HGETALL", keys.variants),
                ("HGETALL", keys.feedback),
                ("GET", keys.lock),
            ]
        )
        summary = _summary(identifier, _pairs(head))
        if summary is None:
            raise _unknown(identifier)
        running = lock.decode() if lock else None
        return Conversation(summary, _assemble(turns, order, variants, _pairs(feedback), running))

    async def rename(self, tenant: str, identifier: str, title: str) -> None:
        """Set the title."""
        if not await self._store.run(RENAME, [_Keys(tenant, identifier).conversation], [title]):
            raise _unknown(identifier)

    async def delete(self, tenant: str, identifier: str) -> None:
        """Remove the conversation with everything it holds; what still runs in it ends unrecorded."""
        keys = _Keys(tenant, identifier)
        replies = await self._store.transaction(
            [
                ("DEL", keys.conversation),
                ("DEL", keys.turns, keys.order, keys.variants, keys.lock, keys.feedback),
                ("ZREM", keys.index, identifier),
            ]
        )
        if not replies[0]:
            raise _unknown(identifier)

    async def rate(self, tenant: str, identifier: str, run_id: str, value: Feedback | None) -> None:
        """Keep or clear a variant's feedback."""
        keys = _Keys(tenant, identifier)
        if not await self._store.run(RATE, [keys.variants, keys.feedback], [run_id, value or ""]):
            raise NotFound(f"Run {run_id!r} is not part of conversation {identifier!r}. Reload the conversation.")

    async def begin_turn(
        self, tenant: str, identifier: str, run_id: str, mode: Mode, text: str, edited: str | None
    ) -> BegunTurn:
        """Store the user's turn and take the conversation for `run_id`, in one step and one round trip.

        Raises:
            Conflict: another run has it; its lease ends ten seconds after its worker dies.
            UnknownConversation: there is none, or of another tenant.
            NotFound: the turn to edit or to answer again is not there.
        """
        keys, now = _Keys(tenant, identifier), _now()
        turn_id = f"turn_{secrets.token_hex(8)}"
        turn = orjson.dumps({"id": turn_id, "user": text, "created": now})
        reply = await self._store.run(
            BEGIN_TURN,
            [keys.conversation, keys.turns, keys.order, keys.variants, keys.lock, keys.index, keys.feedback],
            [
                run_id,
                LEASE_MS,
                now,
                mode,
                turn_id,
                turn,
                _dump(Variant(run_id)),
                _title(text),
                edited or "",
                identifier,
            ],
        )
        outcome = reply[0].decode()
        if outcome == "unknown":
            raise _unknown(identifier)
        if outcome == "busy":
            raise Conflict(
                "A reply is still running in this conversation. Stop it or wait for its end.", retry_after_s=1.0
            )
        if outcome == "empty":
            raise NotFound("This conversation has no turn to answer again. Send a message first.")
        if outcome == "no_turn":
            raise NotFound(f"Turn {edited!r} is not part of this conversation. Reload the conversation.", param="edit")
        turns = _assemble(reply[1], reply[2], reply[3], {}, run_id)
        return BegunTurn(tenant, identifier, turns[-1].id, run_id, _history(turns))

    async def keep_turn(self, begun: BegunTurn, variant: Variant | None) -> bool:
        """Renew the run's lease and, if given, store what its variant has so far; False if the run lost the turn."""
        keys = _Keys(begun.tenant, begun.conversation_id)
        value = _dump(variant) if variant is not None else b""
        return bool(await self._store.run(KEEP_TURN, [keys.variants, keys.lock], [begun.run_id, LEASE_MS, value]))

    async def end_turn(self, begun: BegunTurn, variant: Variant) -> None:
        """Store the variant as it ended and free the conversation."""
        keys = _Keys(begun.tenant, begun.conversation_id)
        await self._store.run(
            END_TURN,
            [keys.variants, keys.lock, keys.conversation, keys.index],
            [begun.run_id, _dump(variant), _now(), begun.conversation_id],
        )

    async def _summaries(self, tenant: str, names: Sequence[str]) -> Sequence[Summary | None]:
        if not names:
            return []
        rows = await self._store.transaction([("HGETALL", _Keys(tenant, name).conversation) for name in names])
        return [_summary(name, _pairs(row)) for name, row in zip(names, rows, strict=True)]


class _Keys:
    """The Redis keys of one conversation."""

    def __init__(self, tenant: str, identifier: str) -> None:
        base = f"onebox:{{{tenant}}}:conversation:{identifier}"
        self.conversation = base
        self.turns = f"{base}:turns"
        self.order = f"{base}:order"
        self.variants = f"{base}:variants"
        self.feedback = f"{base}:feedback"
        self.lock = f"{base}:lock"
        self.index = _index(tenant)


def _index(tenant: str) -> str:
    return f"onebox:{{{tenant}}}:conversations"


def _now() -> int:
    return time.time_ns() // 1000


def _title(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= TITLE_MAX else f"{line[: TITLE_MAX - 1]}…"


def _unknown(identifier: str) -> UnknownConversation:
    return UnknownConversation(f"Conversation {identifier!r} does not exist. List the known ones at /v1/conversations.")


def _pairs(reply: Sequence[bytes] | Mapping[bytes, bytes]) -> dict[str, bytes]:
    if isinstance(reply, Mapping):
        return {key.decode(): value for key, value in reply.items()}
    return {key.decode(): value for key, value in zip(reply[::2], reply[1::2], strict=True)}


def _summary(identifier: str, row: Mapping[str, bytes]) -> Summary | None:
    if not row:
        return None
    return Summary(
        identifier, row["title"].decode(), int(row["created"]) / 1e6, int(row["updated"]) / 1e6, int(row["turns"])
    )


def _assemble(
    turns: Sequence[bytes],
    order: Sequence[bytes] | Mapping[bytes, bytes],
    variants: Sequence[bytes] | Mapping[bytes, bytes],
    feedback: Mapping[str, bytes],
    running: str | None,
) -> tuple[Turn, ...]:
    runs_of, by_run = _pairs(order), _pairs(variants)
    assembled = []
    for raw in turns:
        turn = orjson.loads(raw)
        runs = runs_of[turn["id"]].decode().split()
        answers = tuple(_load(by_run[run], feedback.get(run), running) for run in runs)
        assembled.append(Turn(turn["id"], turn["user"], turn["created"] / 1e6, answers))
    return tuple(assembled)


def _history(turns: Sequence[Turn]) -> tuple[Message, ...]:
    """The newest answered turns and the last question.

    Unanswered turns are left out, as templates want roles to alternate. More than the limits no model of today reads,
    and the engine would refuse so large a body; what fits the context is the plugin's to choose.
    """
    history = [user(turns[-1].user)]
    room = HISTORY_MAX_BYTES
    for turn in reversed(turns[:-1]):
        if not turn.reply:
            continue
        room -= len(turn.user.encode()) + len(turn.reply.encode())
        if room < 0 or len(history) + 2 > HISTORY_MAX_MESSAGES:
            break
        history += (assistant(turn.reply), user(turn.user))
    return tuple(reversed(history))


def _dump(variant: Variant) -> bytes:
    return orjson.dumps(variant)


def _load(raw: bytes, feedback: bytes | None, running: str | None) -> Variant:
    value = orjson.loads(raw)
    state, error = value["state"], value["error"]
    if state == "running" and value["run_id"] != running:
        state = "failed"
        error = {
            "code": "unavailable",
            "message": "The reply was cut off when its server process ended. Regenerate it.",
        }
    rating: Feedback | None = None
    if feedback is not None:
        rating = "like" if feedback == b"like" else "dislike"
    return Variant(
        run_id=value["run_id"],
        text=value["text"],
        task=value["task"],
        route=_ROUTED.validate_python(value["route"]) if value["route"] else None,
        state=state,
        error=Fault(error["code"], error["message"]) if error else None,
        usage=Usage(value["usage"]["prompt_tokens"], value["usage"]["completion_tokens"]) if value["usage"] else None,
        feedback=rating,
    )


def _write_cursor(last: Summary) -> str:
    return base64.urlsafe_b64encode(f"{round(last.updated * 1e6)} {last.id}".encode()).decode().rstrip("=")


def _read_cursor(cursor: str) -> tuple[int, str]:
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        score, identifier = base64.urlsafe_b64decode(padded).decode().split(" ")
        return int(score), identifier
    except ValueError:
        raise BadRequest(
            f"Cursor {cursor!r} is not one of ours. Take 'next' of the page before.", param="cursor"
        ) from None
