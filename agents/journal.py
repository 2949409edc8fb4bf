"""The journal of a run: every answer its plugins got from outside, so that another worker can go on from there.

A new owner runs the plugins again from the start. Each call of theirs is answered from the journal, strictly in the
order in which the answers came the first time; when the journal is used up, the open call continues at the engine.
Writing entries to the store is `agents.run_log`; what the calls are is `agents.llm` and `agents.context`.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final, Literal

import orjson

from onebox.errors import OneboxError

STUCK_S: Final = 5.0

Kind = Literal["frame", "end", "value", "error", "model"]


class Diverged(Exception):
    """The plugins did not do again what the journal or the log says they did."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One answer to the call `key`."""

    key: str
    kind: Kind
    value: Any


class Journal:
    """Answers calls from the entries of an earlier owner, and notes the answers that come after these."""

    def __init__(self, note: Callable[[Entry], None], entries: Iterable[Entry] = ()) -> None:
        self._note = note
        self._times: Counter[str] = Counter()
        self._quick: dict[str, deque[Entry]] = {}
        self._queue: deque[Entry] = deque()
        for entry in entries:
            if entry.key.startswith("="):
                self._quick.setdefault(entry.key, deque()).append(entry)
            else:
                self._queue.append(entry)
        self._moved = asyncio.Event()

    def open(self, kind: str, *parts: object) -> str:
        """The key of a call: what it asks, and how often that was asked before."""
        digest = blake2b(repr((kind, parts)).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        self._times[digest] += 1
        return f"{digest}{self._times[digest]}"

    async def answer(self, key: str) -> Entry | None:
        """The next answer the call had; None: from here on the world answers.

        Raises:
            Diverged: the call waits for a turn that never comes.
        """
        while self._queue:
            if self._queue[0].key == key:
                entry = self._queue.popleft()
                self._moved.set()
                self._moved = asyncio.Event()
                return entry
            try:
                async with asyncio.timeout(STUCK_S):
                    await self._moved.wait()
            except TimeoutError:
                raise Diverged(f"call {key} waits behind call {self._queue[0].key}") from None
        return None

    def quick(self, name: str, value: Callable[[], Any]) -> Any:
        """A value that is there at once, such as the time: the one of the first time, else `value()`, noted."""
        key = f"={name}"
        earlier = self._quick.get(key)
        if earlier:
            return earlier.popleft().value
        entry = Entry(key, "value", value())
        self._note(entry)
        return entry.value

    def note(self, key: str, kind: Kind, value: Any) -> None:
        """Note an answer from outside before the plugin sees it."""
        self._note(Entry(key, kind, value))

    def note_error(self, key: str, error: OneboxError) -> None:
        """Note an error that would come again; one that may pass is not part of what happened."""
        if not error.retryable:
            self.note(key, "error", [error.code, error.message])

    @property
    def used_up(self) -> bool:
        """Whether every entry of the earlier owner has been asked for."""
        return not self._queue


def encode_entries(entries: Sequence[Entry]) -> bytes:
    """Entries as one value of the store's list."""
    return orjson.dumps([[entry.key, entry.kind, entry.value] for entry in entries])


def decode_entries(rows: Iterable[bytes]) -> list[Entry]:
    """The entries of all values of the store's list."""
    return [Entry(*item) for row in rows for item in orjson.loads(row)]
