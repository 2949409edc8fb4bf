"""Users' corrections in the store: each tenant's labels, and what the tenant lets be learned.

Where they arise is `agents.corrections`, how they reach all workers' routers is `agents.label_feed`; the HTTP face is
`agents.api.labels`.
"""

import logging
import re
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

import orjson
from pydantic import TypeAdapter, ValidationError

from agents.store import Argument, Store
from agents.store_keys import LABELS_CHANGED, LABELS_VERSION, LabelKeys
from onebox.errors import BadRequest, StoreUnavailable
from onebox.labels import Label, LabelScope, LabelSource, Learning
from onebox.messages import Message

CHANNEL: Final = "onebox:labels"
LABELS_MAX: Final = 2000
MESSAGES_MAX: Final = 6
TEXT_MAX: Final = 4000
_READ_AT_ONCE: Final = 100
_MODES: Final[Mapping[bytes | None, Learning]] = {b"off": "off", b"tenant": "tenant", b"global": "global"}
_LABEL: Final = TypeAdapter(Label)
_ID: Final = re.compile(r"label_[0-9a-f]{24}")
_CURSOR: Final = re.compile(r"(\d{1,16})\.(label_[0-9a-f]{24})")
_GAP: Final = " … "
_EVER: Final = 2**53

logger = logging.getLogger(__name__)

# KEYS: labels, order. ARGV: label id, created µs, label JSON, most labels. The oldest leave, and a label stays where an
# older one of its id comes late.
_ADD: Final = """
local there = redis.call('ZSCORE', KEYS[2], ARGV[1])
if there and tonumber(there) > tonumber(ARGV[2]) then return end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
redis.call('ZADD', KEYS[2], ARGV[2], ARGV[1])
local over = redis.call('ZCARD', KEYS[2]) - tonumber(ARGV[4])
if over > 0 then
  local oldest = redis.call('ZPOPMIN', KEYS[2], over)
  for i = 1, #oldest, 2 do redis.call('HDEL', KEYS[1], oldest[i]) end
end
"""

# KEYS: labels, order. ARGV: label id, µs up to which it was created. Answers 1 if there was one.
_REMOVE: Final = """
local there = redis.call('ZSCORE', KEYS[2], ARGV[1])
if not there or tonumber(there) > tonumber(ARGV[2]) then return 0 end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
return 1
"""

# KEYS: version, changed. ARGV: tenant, channel.
_ANNOUNCE: Final = """
redis.call('ZADD', KEYS[2], redis.call('INCR', KEYS[1]), ARGV[1])
redis.call('PUBLISH', ARGV[2], ARGV[1])
"""


@dataclass(frozen=True, slots=True)
class Changes:
    """The tenants whose labels have changed, up to `version`; `anew`: the store has lost what it had, these are all."""

    version: int
    tenants: tuple[str, ...]
    anew: bool


@dataclass(frozen=True, slots=True)
class TenantLabels:
    """What one tenant has: its labels by their ids, and what it lets be learned."""

    learning: Learning
    labels: Mapping[str, Label]


class Labels:
    """All tenants' labels in one store. `default` is what is learned where a tenant has not chosen."""

    def __init__(self, store: Store, default: Learning, most: int = LABELS_MAX) -> None:
        self._store = store
        self._default: Learning = default
        self._most = most
        self._unannounced: set[str] = set()

    async def learning(self, tenant: str) -> Learning:
        """What the tenant lets be learned."""
        (raw,) = await self._store.transaction([("GET", LabelKeys(tenant).learning)])
        return self._mode(raw)

    async def set_learning(self, tenant: str, learning: Learning) -> None:
        """Keep the tenant's choice. With "off" its labels stay and are not used."""
        async with self._told(tenant):
            await self._store.transaction([("SET", LabelKeys(tenant).learning, learning)])

    async def add(self, tenant: str, label: Label) -> None:
        """Keep a label in the place of an older one of the same id; a newer one stays."""
        keys = LabelKeys(tenant)
        args: list[Argument] = [label.id, _micros(label), _LABEL.dump_json(label), self._most]
        async with self._told(tenant):
            await self._store.run(_ADD, [keys.labels, keys.order], args)

    async def remove(self, tenant: str, identifier: str, until: float | None = None) -> bool:
        """Undo a label, unless it was created after `until`; False where there is none."""
        keys = LabelKeys(tenant)
        async with self._told(tenant):
            args: list[Argument] = [identifier, _EVER if until is None else round(until * 1e6)]
            return bool(await self._store.run(_REMOVE, [keys.labels, keys.order], args))

    async def get(self, tenant: str, identifier: str) -> Label | None:
        """One label; None where there is none that can be read."""
        raw = await self._store.hash_get(LabelKeys(tenant).labels, identifier)
        return _parsed(tenant, identifier, raw) if raw is not None else None

    async def page(self, tenant: str, limit: int, cursor: str | None) -> tuple[list[Label], str | None]:
        """Up to `limit` labels, newest first, and the next page's cursor.

        Raises:
            BadRequest: the cursor is not one of ours.
        """
        after = _read_cursor(cursor) if cursor else None
        places = [place for place in reversed(await self._places(tenant)) if after is None or place < after]
        found = await self._read(tenant, [name for _, name in places[:limit]])
        if len(places) <= limit:
            return found, None
        created, name = places[limit - 1]
        return found, f"{created}.{name}"

    async def all(self, tenant: str) -> list[Label]:
        """Every label, oldest first."""
        return await self._read(tenant, [name for _, name in await self._places(tenant)])

    async def changes(self, since: int) -> Changes:
        """What has changed since a version; 0 is before the first change."""
        version, changed = await self._changed(since)
        if version >= since:
            return Changes(version, changed, anew=False)
        return Changes(*await self._changed(0), anew=True)

    async def load(self, tenant: str, known: Mapping[str, Label]) -> TenantLabels:
        """The tenant's labels; those that are `known` and unchanged are not read again."""
        mode = await self.learning(tenant)
        places = await self._places(tenant)
        kept = {name: known[name] for created, name in places if name in known and _micros(known[name]) == created}
        fresh = await self._read(tenant, [name for _, name in places if name not in kept])
        return TenantLabels(mode, kept | {label.id: label for label in fresh})

    async def announce(self) -> None:
        """Tell all workers of the changes made here; those that cannot be told now are told at the next call."""
        # Taken out first: a change that is made while the script runs is one more to be told.
        untold, self._unannounced = self._unannounced, set()
        try:
            with suppress(StoreUnavailable):
                for tenant in tuple(untold):
                    await self._store.run(_ANNOUNCE, [LABELS_VERSION, LABELS_CHANGED], [tenant, CHANNEL])
                    untold.discard(tenant)
        finally:
            self._unannounced |= untold

    @asynccontextmanager
    async def _told(self, tenant: str) -> AsyncGenerator[None, None]:
        """Around a write, which all workers are told of; of one that failed too, for it may have been made."""
        try:
            yield
        finally:
            self._unannounced.add(tenant)
        await self.announce()

    async def _changed(self, since: int) -> tuple[int, tuple[str, ...]]:
        version, names = await self._store.transaction(
            [("GET", LABELS_VERSION), ("ZRANGEBYSCORE", LABELS_CHANGED, f"({since}", "+inf")]
        )
        return int(version or 0), tuple(name.decode() for name in names)

    async def _places(self, tenant: str) -> list[tuple[int, str]]:
        """When each label was made, in µs, and its id, oldest first."""
        (rows,) = await self._store.transaction([("ZRANGE", LabelKeys(tenant).order, 0, -1, "WITHSCORES")])
        return [(int(score), name.decode()) for name, score in zip(rows[::2], rows[1::2], strict=True)]

    async def _read(self, tenant: str, names: Sequence[str]) -> list[Label]:
        """These labels; one that was removed meanwhile, or cannot be read, is left out."""
        found: list[Label] = []
        for start in range(0, len(names), _READ_AT_ONCE):
            some = names[start : start + _READ_AT_ONCE]
            (rows,) = await self._store.transaction([("HMGET", LabelKeys(tenant).labels, *some)])
            parsed = [_parsed(tenant, *row) for row in zip(some, rows, strict=True) if row[1] is not None]
            found += [label for label in parsed if label is not None]
        return found

    def _mode(self, raw: bytes | None) -> Learning:
        return _MODES.get(raw, self._default)


def new_label(
    tenant: str,
    source: LabelSource,
    messages: Sequence[Message],
    plan: Sequence[str],
    was: Sequence[str],
    scope: LabelScope,
    run_id: str | None = None,
    created: float | None = None,
) -> Label:
    """A label for the last user message of `messages`, of now where it is not said when it was `created`.

    Its id is made of the tenant and the messages, so that the same message has one label, however often it is
    corrected.
    """
    asked = max(index for index, message in enumerate(messages) if message.role == "user")
    kept = tuple(Message(said.role, _cut(said.text)) for said in messages[: asked + 1][-MESSAGES_MAX:])
    said = orjson.dumps([tenant, [[message.role, message.text] for message in kept]])
    identifier = f"label_{sha256(said).hexdigest()[:24]}"
    made = created if created is not None else now()
    return Label(identifier, made, source, kept, tuple(plan), tuple(was), scope, run_id)


def now() -> float:
    """When a label of this moment is created: the seconds since 1970, in whole µs."""
    return time.time_ns() // 1000 / 1e6


def is_label_id(identifier: str) -> bool:
    """Whether there can be a label of this id."""
    return _ID.fullmatch(identifier) is not None


def _parsed(tenant: str, identifier: str, raw: bytes) -> Label | None:
    """A label as it is stored; None of one that cannot be read."""
    try:
        return _LABEL.validate_json(raw)
    except ValidationError:  # whose text is not logged: it has the user's words
        logger.warning(
            "Label %s of tenant %r is left out: this version cannot read its record. A newer one may have written it",
            identifier,
            tenant,
        )
        return None


def _cut(text: str) -> str:
    """A text of at most `TEXT_MAX` characters: of a longer one the beginning and the end."""
    if len(text) <= TEXT_MAX:
        return text
    room = TEXT_MAX - len(_GAP)
    return f"{text[: room // 2]}{_GAP}{text[-(room - room // 2) :]}"


def _micros(label: Label) -> int:
    return round(label.created * 1e6)


def _read_cursor(cursor: str) -> tuple[int, str]:
    found = _CURSOR.fullmatch(cursor)
    if found is None:
        raise BadRequest(f"Cursor {cursor!r} is not one of ours. Take 'next' of the page before.", param="cursor")
    return int(found[1]), found[2]
