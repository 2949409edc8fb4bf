"""The replicas of a fleet and how loaded they are, as any one of them can tell: what `GET /v1/fleet` answers.

Who belongs to the fleet is for Ray Serve to say: a broadcast over a deployment's handle reaches the replicas that
serve and no others, so one that has died or is about to leave is missing from the next answer. What becomes of the
answer is `agents.doors`.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Final

Record = dict[str, str | int | float | bool | list[str]]

FRESH_S: Final = 0.4
FRESH_PER_REPLICA_S: Final = 0.005  # a large fleet is asked less often: at most 200 answers a second for each asker
ASK_TIMEOUT_S: Final = 0.8

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Load:
    """One replica. `capacity` counts the requests it works on at a time; `tokens` those of prompts and replies in work.

    `placed` has the affinity keys that came to it for the first time lately, so that every gateway learns of them.
    """

    door: str
    running: int
    waiting: int
    capacity: int
    kv_use: float
    tokens: int
    draining: bool
    placed: tuple[str, ...] = ()

    def record(self) -> Record:
        """It as JSON knows it."""
        return asdict(self) | {"placed": list(self.placed)}


class Roster:
    """The fleet as one of its replicas sees it.

    `own` is the replica itself, `ask` the records of all that serve. `on_change` is told when the replica has been
    among them and is no longer, and when it is again: while Serve's controller recovers, nobody may be.
    """

    def __init__(
        self, own: Callable[[], Load], ask: Callable[[], Awaitable[Sequence[object]]], on_change: Callable[[bool], None]
    ) -> None:
        self._own = own
        self._ask = ask
        self._on_change = on_change
        self._records: list[Record] = []
        self._asked_at = float("-inf")
        self._asking = asyncio.Lock()
        self._seen = False
        self._missing = False

    async def records(self) -> list[Record]:
        """All replicas that serve. While they cannot be asked, those of the last answer."""
        async with self._asking:
            fresh_s = FRESH_S + FRESH_PER_REPLICA_S * len(self._records)
            if time.monotonic() - self._asked_at > fresh_s:
                await self._refresh()
        own = self._own()
        others = [record for record in self._records if record["door"] != own.door]
        return others if self._missing else [own.record(), *others]

    async def _refresh(self) -> None:
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                answers = await self._ask()
        except Exception as error:  # whatever Serve raises; a frozen replica is a timeout
            logger.info("The fleet could not be asked: %s", type(error).__name__)
        else:
            self._records = [answer for answer in answers if isinstance(answer, dict)]
            if len(self._records) == len(answers):
                self._note_self()
        self._asked_at = time.monotonic()

    def _note_self(self) -> None:
        listed = any(record["door"] == self._own().door for record in self._records)
        self._seen = self._seen or listed
        if self._seen and listed == self._missing:
            self._missing = not listed
            self._on_change(listed)
