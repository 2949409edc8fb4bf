"""Conversations of a tenant in the store: what they are and how they change.

A turn begins and ends with its run (`agents.run_scripts`), whose log has the text of a reply that still grows. The HTTP
face is `agents.api.conversations`.
"""

import base64
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import orjson
from pydantic import TypeAdapter

from agents.conversation_scripts import RATE, RENAME
from agents.store import Store
from agents.store_keys import ConversationKeys, RunKeys, conversation_index
from onebox.errors import BadRequest, NotFound, UnknownConversation
from onebox.events import Routed, Stopped, TextDelta, Usage, decode, is_terminal
from onebox.messages import Message, assistant, user

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
    receipt: Stopped | None = None


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


class Conversations:
    """All tenants' conversations in one store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def create(self, tenant: str, title: str) -> Summary:
        """A new, empty conversation; an empty `title` is filled from the first message."""
        identifier, now = f"conv_{secrets.token_hex(12)}", _now()
        keys = ConversationKeys(tenant, identifier)
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
                [("ZREVRANGEBYSCORE", conversation_index(tenant), top, "-inf", "WITHSCORES", "LIMIT", offset, _SCAN)]
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
        """The whole conversation; a variant that still runs has the text so far."""
        keys = ConversationKeys(tenant, identifier)
        head, turns, order, variants, feedback = await self._store.transaction(
            [
                ("HGETALL", keys.conversation),
                ("LRANGE", keys.turns, 0, -1),
                ("HGETALL", keys.order),
                ("HGETALL", keys.variants),
                ("HGETALL", keys.feedback),
            ]
        )
        summary = _summary(identifier, _pairs(head))
        if summary is None:
            raise _unknown(identifier)
        assembled = assemble(turns, order, variants, _pairs(feedback))
        return Conversation(summary, tuple([await self._now(tenant, turn) for turn in assembled]))

    async def turns_until(self, tenant: str, identifier: str, turn_id: str) -> tuple[Turn, ...]:
        """The turns up to `turn_id`, that one included; none where it is gone."""
        keys = ConversationKeys(tenant, identifier)
        turns, order, variants = await self._store.transaction(
            [("LRANGE", keys.turns, 0, -1), ("HGETALL", keys.order), ("HGETALL", keys.variants)]
        )
        assembled = assemble(turns, order, variants, {})
        place = next((index for index, turn in enumerate(assembled) if turn.id == turn_id), -1)
        return assembled[: place + 1]

    async def running(self, tenant: str, identifier: str) -> str | None:
        """The run that has the conversation, or had it last and left no end."""
        (holder,) = await self._store.transaction([("GET", ConversationKeys(tenant, identifier).lock)])
        return holder.decode() if holder else None

    async def _now(self, tenant: str, turn: Turn) -> Turn:
        if all(variant.state != "running" for variant in turn.variants):
            return turn
        return replace(turn, variants=tuple([await self._so_far(tenant, variant) for variant in turn.variants]))

    async def _so_far(self, tenant: str, variant: Variant) -> Variant:
        """A variant as its run's log has it."""
        if variant.state != "running":
            return variant
        events = RunKeys(tenant, variant.run_id).events
        (raw,) = await self._store.transaction([("LRANGE", events, 0, -1)])
        if not raw:
            lost = Fault("unavailable", "The reply was cut off and its log is gone. Regenerate it.")
            return replace(variant, state="failed", error=lost)
        log = [decode(line) for line in raw]
        text = "".join(event.text for event in log if isinstance(event, TextDelta))
        routed = next((event for event in log if isinstance(event, Routed)), None)
        state: State = "running"
        if is_terminal(log[-1]):  # it has ended since the variant was read
            state = "completed" if log[-1].kind == "completed" else "failed" if log[-1].kind == "failed" else "stopped"
        return replace(variant, text=text, route=routed, task=routed.task if routed else None, state=state)

    async def rename(self, tenant: str, identifier: str, title: str) -> None:
        """Set the title."""
        if not await self._store.run(RENAME, [ConversationKeys(tenant, identifier).conversation], [title]):
            raise _unknown(identifier)

    async def delete(self, tenant: str, identifier: str) -> None:
        """Remove the conversation with everything it holds; what still runs in it ends without it."""
        keys = ConversationKeys(tenant, identifier)
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
        keys = ConversationKeys(tenant, identifier)
        if not await self._store.run(RATE, [keys.variants, keys.feedback], [run_id, value or ""]):
            raise NotFound(f"Run {run_id!r} is not part of conversation {identifier!r}. Reload the conversation.")

    async def _summaries(self, tenant: str, names: Sequence[str]) -> Sequence[Summary | None]:
        if not names:
            return []
        rows = await self._store.transaction(
            [("HGETALL", ConversationKeys(tenant, name).conversation) for name in names]
        )
        return [_summary(name, _pairs(row)) for name, row in zip(names, rows, strict=True)]


def _now() -> int:
    return time.time_ns() // 1000


def title_of(text: str) -> str:
    """A title made of a message."""
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


def assemble(
    turns: Sequence[bytes],
    order: Sequence[bytes] | Mapping[bytes, bytes],
    variants: Sequence[bytes] | Mapping[bytes, bytes],
    feedback: Mapping[str, bytes],
) -> tuple[Turn, ...]:
    """The turns out of what the store has of a conversation."""
    runs_of, by_run = _pairs(order), _pairs(variants)
    assembled = []
    for raw in turns:
        turn = orjson.loads(raw)
        runs = runs_of[turn["id"]].decode().split()
        answers = tuple(_load(by_run[run], feedback.get(run)) for run in runs)
        assembled.append(Turn(turn["id"], turn["user"], turn["created"] / 1e6, answers))
    return tuple(assembled)


def history(turns: Sequence[Turn]) -> tuple[Message, ...]:
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


def dump_variant(variant: Variant) -> bytes:
    """The variant as the store has it."""
    return orjson.dumps(variant)


def _load(raw: bytes, feedback: bytes | None) -> Variant:
    value = orjson.loads(raw)
    error = value["error"]
    rating: Feedback | None = None
    if feedback is not None:
        rating = "like" if feedback == b"like" else "dislike"
    return Variant(
        run_id=value["run_id"],
        text=value["text"],
        task=value["task"],
        route=_ROUTED.validate_python(value["route"]) if value["route"] else None,
        state=value["state"],
        error=Fault(error["code"], error["message"]) if error else None,
        usage=Usage(value["usage"]["prompt_tokens"], value["usage"]["completion_tokens"]) if value["usage"] else None,
        feedback=rating,
        receipt=Stopped(**value["receipt"]) if value.get("receipt") else None,
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
