"""The store after a storm, read past the proxy and, for conversations, through the API as a user would."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import httpx
import orjson
import redis

from onebox.events import Event, decode
from onebox.messages import Message, assistant, user
from tests.faults.box import TENANT, Box
from tests.faults.history import Attempt, Snapshot, StoredRun, StoredTurn, StoredVariant
from tests.faults.undisturbed import RAW_MODEL, Undisturbed

RUNS: Final = f"onebox:{{{TENANT}}}:run:"
QUIET_WITHIN_S: Final = 30.0
LATE_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Asked:
    """What a stored run was asked."""

    model: str
    messages: tuple[Message, ...]
    max_tokens: int
    key: str | None


def wait_until_quiet(store: redis.Redis, within_s: float = QUIET_WITHIN_S) -> float:
    """Seconds until no stored run was running any more; `within_s` where that did not come true."""
    began = time.monotonic()
    while time.monotonic() - began < within_s:
        if not running(store):
            return time.monotonic() - began
        time.sleep(0.2)
    return within_s


def running(store: redis.Redis) -> list[str]:
    """The runs that have no end yet."""
    return [run for run in run_ids(store) if store.hget(f"{RUNS}{run}", "state") == b"running"]


def run_ids(store: redis.Redis) -> list[str]:
    """All stored runs."""
    found = []
    for key in store.scan_iter(match=f"{RUNS}*", count=1000, _type="HASH"):
        name = key.decode().removeprefix(RUNS)
        if ":" not in name:
            found.append(name)
    return sorted(found)


def read(
    box: Box, attempts: Sequence[Attempt], late_s: float = LATE_S, meanwhile: Callable[[], None] | None = None
) -> tuple[Snapshot, dict[str, Asked]]:
    """The snapshot, and what each run was asked. Logs are read twice, `late_s` apart, `meanwhile` in between."""
    store = box.direct
    rows = {run: {k.decode(): v for k, v in store.hgetall(f"{RUNS}{run}").items()} for run in run_ids(store)}
    rows = {run: row for run, row in rows.items() if row.get("state") != b"void"}
    first = {run: _log(store, run) for run in rows}
    if meanwhile is not None:
        meanwhile()
    time.sleep(late_s)
    turns = {name: _conversation(box, name) for name in {a.conversation for a in attempts if a.conversation}}
    stored, asked = {}, {}
    for run, row in rows.items():
        request = orjson.loads(row["request"])
        conversation = row["conversation"].decode() or None
        stored[run] = StoredRun(
            run,
            row["state"].decode(),
            int(row["epoch"]),
            conversation,
            request["idempotency_key"],
            first[run],
            _log(store, run),
        )
        messages = tuple(Message(each["role"], each["text"]) for each in request["messages"])
        if conversation is not None:
            messages = _history(turns.get(conversation, ()), run) or messages
        model = RAW_MODEL if request["raw"] else str(request["task"])
        asked[run] = Asked(model, messages, int(request["sampling"]["max_tokens"] or 0), request["idempotency_key"])
    keys = {}
    for attempt in attempts:
        owner = store.hget(f"onebox:{{{TENANT}}}:idempotency:{attempt.key}", "run") if attempt.key else None
        if attempt.key and owner:
            keys[attempt.key] = owner.decode()
    leases = frozenset(name.decode() for name in store.zrange(f"onebox:{{{TENANT}}}:leases", 0, -1))
    return Snapshot(stored, turns, keys, leases), asked


async def expectations(asked: dict[str, Asked], oracle: Undisturbed) -> dict[str, str]:
    """The undisturbed text of every run."""
    return {
        run: await oracle.text(each.model, each.messages, each.max_tokens)
        for run, each in asked.items()
        if each.model != "None" and each.max_tokens
    }


def _log(store: redis.Redis, run: str) -> tuple[Event, ...]:
    lines: Any = store.lrange(f"{RUNS}{run}:events", 0, -1)
    return tuple(decode(line) for line in lines)


def _conversation(box: Box, name: str) -> tuple[StoredTurn, ...]:
    answer = httpx.get(f"{box.api_url}/v1/conversations/{name}", headers=box.headers, timeout=20, trust_env=False)
    if answer.status_code == 404:
        return ()
    answer.raise_for_status()
    return tuple(
        StoredTurn(
            turn["user"],
            tuple(StoredVariant(each["run_id"], each["state"], each["text"]) for each in turn["variants"]),
        )
        for turn in answer.json()["turns"]
    )


def _history(turns: Sequence[StoredTurn], run: str) -> tuple[Message, ...]:
    """What the run was asked: the answered turns before its own, and its question."""
    messages: list[Message] = []
    for turn in turns:
        if any(variant.run_id == run for variant in turn.variants):
            return (*messages, user(turn.user))
        if turn.variants and turn.variants[-1].text:
            messages += (user(turn.user), assistant(turn.variants[-1].text))
    return ()
