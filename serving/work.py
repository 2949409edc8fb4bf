"""What one replica has to do: the replies that are being answered or wait, and how much that is.

The app that answers them is `serving.server`; what the fleet learns of it is `serving.roster`.
"""

import asyncio
import math
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Final

from onebox.errors import Overloaded
from onebox.settings import Settings
from serving.roster import Load

RETRY_AFTER_S: Final = 1.0
TICKS_MAX: Final = 6  # times `engine_coalesce_ms` between two frames of a reply at most
PLACED_MAX: Final = 4096
PLACED_FRESH_S: Final = 5.0
QUEUED_FRESH_S: Final = 1.0  # as often as a gateway with traffic says how many wait there, each time to one replica


@dataclass(slots=True, eq=False)
class Reply:
    """A reply being answered or waiting; `freed` once the engine's generator is closed."""

    request_id: str = ""
    stream: asyncio.Task[None] | None = None
    prompt_tokens: int = 0  # an estimate
    tokens: int = 0
    has_place: bool = True
    stopped: bool = False
    freed: asyncio.Event = field(default_factory=asyncio.Event)

    def stop(self) -> None:
        """End it."""
        if self.stream is not None and not self.stream.done():
            self.stopped = True
            self.stream.cancel()


class Work:
    """The replies of one replica."""

    def __init__(self, settings: Settings) -> None:
        self._coalesce_s = settings.engine_coalesce_ms / 1000
        self._frames_per_s = settings.engine_frames_per_s
        self._max_ongoing = settings.engine_max_ongoing
        self._capacity = settings.engine_max_ongoing + settings.engine_max_queued
        self._replies: set[Reply] = set()
        self._taken = 0  # replies that have a place
        self._idle = asyncio.Event()
        self._idle.set()
        self._placed: OrderedDict[str, float] = OrderedDict()  # affinity keys and when each came here first
        self._queued: deque[tuple[float, int]] = deque()  # when gateways said how many wait there, and how many
        self.begun = 0  # generations since the start

    def __bool__(self) -> bool:
        return bool(self._replies)

    @contextmanager
    def reply(self, *, if_free: bool = False) -> Iterator[Reply]:
        """A new reply, for as long as it is worked on. `if_free`: only where it need not wait.

        Raises:
            Overloaded: there is no place for it.
        """
        most = self._max_ongoing if if_free else self._capacity
        if self._taken >= most:
            raise Overloaded(
                f"All {most} places of this engine are taken. Try again shortly.", retry_after_s=RETRY_AFTER_S
            )
        self.begun += 1
        reply = Reply()
        self._replies.add(reply)
        self._taken += 1
        self._idle.clear()
        try:
            yield reply
        finally:
            self.give_back(reply)
            self._replies.remove(reply)
            if not self._replies:
                self._idle.set()
            reply.freed.set()

    def give_back(self, reply: Reply) -> None:
        """Take the reply's place for another, before a gateway can see the end and send the next one."""
        self._taken -= reply.has_place
        reply.has_place = False

    def of(self, request_id: str) -> list[Reply]:
        """The replies to a request."""
        return [reply for reply in self._replies if reply.request_id == request_id]

    def place(self, key: str) -> None:
        """Note the affinity key of a request where it is new here."""
        if not key or key in self._placed:
            return
        self._placed[key] = time.monotonic()
        if len(self._placed) > PLACED_MAX:
            self._placed.popitem(last=False)

    def note_queued(self, runs: int) -> None:
        """Note that so many wait at some gateway for a place of the fleet."""
        self._queued.append((time.monotonic(), runs))

    def queued(self) -> int:
        """How many wait at the gateways that said so to this replica lately."""
        while self._queued and self._queued[0][0] < time.monotonic() - QUEUED_FRESH_S:
            self._queued.popleft()
        return sum(runs for _, runs in self._queued)

    def tick_s(self) -> float:
        """The time between two frames of a reply. All replies' frames leave together, and cost their reader less so."""
        wanted = len(self._replies) / (self._frames_per_s * self._coalesce_s) if self._coalesce_s else 0.0
        return self._coalesce_s * min(max(1, math.ceil(wanted)), TICKS_MAX)

    def load(self, door: str, kv_use: float, *, draining: bool) -> Load:
        """How much it is."""
        replies, fresh = self._taken, time.monotonic() - PLACED_FRESH_S
        return Load(
            door=door,
            running=min(replies, self._max_ongoing),
            waiting=max(0, replies - self._max_ongoing),
            capacity=self._max_ongoing,
            kv_use=round(kv_use, 4),
            tokens=sum(reply.prompt_tokens + reply.tokens for reply in self._replies),
            draining=draining,
            placed=tuple(key for key, _ in takewhile(lambda one: one[1] >= fresh, reversed(self._placed.items()))),
        )

    async def done(self, timeout_s: float) -> bool:
        """Whether the last reply ended in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
