"""The places of one model in one gateway worker: who has one, who waits for one, and whose turn is next.

A run's `Seat` is its claim. It takes a place with its first engine call and keeps it to its end; calls beyond the one
that the place covers are let in at once and counted, so that newcomers wait for them. Who is next is
`agents.fair_queue`, how many places there are `agents.shares`, what a call costs `agents.estimates`.
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from agents.estimates import Estimate, Estimates
from agents.fair_queue import FairQueue, Waiter
from agents.generation import End
from agents.metrics import Metrics
from agents.shares import Share, share_of
from onebox.errors import Overloaded, RateLimited
from onebox.messages import Message
from onebox.settings import Settings

TELL_PAUSE_S: Final = 1.0
LEARNING: Final = 0.1
# Whoever passed `check` has been told 200 by the time it asks for a place. Others may have come in between, or another
# worker may use more of the fleet now: the queue is longer for them, up to so many times its length.
LATE: Final = 2
RETRY_RANGE_S: Final = (1.0, 60.0)

OnWait = Callable[[int, float | None], None]


@dataclass(slots=True, eq=False)
class Seat:
    """One run's claim on the engines.

    `on_wait` is told its position in the queue, from 1, and the seconds to go; position 0 when its turn has come.
    `step` names what the run is at; replies of one step are taken to be of like length.
    """

    tenant: str
    on_wait: OnWait
    step: str = ""
    home: "Places | None" = None  # where it has its place
    held_since: float = 0.0
    calls: int = 0  # at work there; the place covers one of them
    waiter: Waiter | None = None
    entered: asyncio.Event | None = None
    told: tuple[int, float] = (0, -math.inf)  # the last position, and when


@dataclass(slots=True)
class OpenCall:
    """An engine call at work. `at_home`: its run has its place there too."""

    places: "Places"
    seat: Seat
    estimate: Estimate
    at_home: bool

    def close(self, end: End | None, drawn: int) -> None:
        """The call is over, whole or with `drawn` tokens."""
        self.places.close(self, end, drawn)


class Places:
    """The places of one model. `share` is set from outside, as workers and replicas come and go."""

    def __init__(
        self, settings: Settings, metrics: Metrics, fleet: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self._share = share_of(fleet, ())
        self._queue = FairQueue()
        self._estimates = Estimates()
        self._seats: dict[Waiter, Seat] = {}
        self._holding: Counter[str] = Counter()
        self._used = 0
        self._held_s: float | None = None

    @property
    def used(self) -> int:
        """How many are in use."""
        return self._used

    @property
    def waiting(self) -> int:
        """Runs in the queue."""
        return len(self._queue)

    @property
    def share(self) -> Share:
        """This worker's part of the fleet."""
        return self._share

    def resize(self, share: Share) -> None:
        """Go by another share from now on."""
        self._share = share
        self._admit()

    def check(self, tenant: str, arriving: int) -> None:
        """Return where one more run of this tenant would get a place or could wait, besides `arriving` ones.

        Raises:
            Overloaded: it would be refused.
        """
        pending = self._used + len(self._queue) + arriving
        if pending < self._share.most and not len(self._queue):
            return
        self._check_tenant(tenant, 1)
        if pending >= self._share.most + self._queue_most():
            raise self._full()

    async def open(self, seat: Seat, kind: str, messages: Sequence[Message], max_tokens: int) -> OpenCall:
        """A call that may begin now, for the caller to close.

        Raises:
            Overloaded: the queue is far longer than `check` lets it become, or this tenant's part of it.
        """
        estimate = self._estimates.call(kind, messages, max_tokens)
        if seat.home is None:
            await self._enter(seat, estimate.cost)
        else:
            self._queue.charge(seat.tenant, estimate.cost)
        at_home = seat.home is self
        if not at_home or seat.calls:
            self._used += 1
        seat.calls += at_home
        return OpenCall(self, seat, estimate, at_home)

    def close(self, call: OpenCall, end: End | None, drawn: int) -> None:
        """As `OpenCall.close`."""
        seat, estimate = call.seat, call.estimate
        spent = estimate.prompt + drawn
        if end is not None:
            spent = end.prompt_tokens + end.completion_tokens
            self._estimates.learn(estimate, end)
        self._queue.charge(seat.tenant, spent - estimate.cost)
        seat.calls -= call.at_home
        if not call.at_home or seat.calls:
            self._used -= 1
        self._admit()

    def take(self, seat: Seat) -> None:
        """Give the seat a place, free or not."""
        seat.home = self
        seat.held_since = self._clock()
        self._used += 1
        self._holding[seat.tenant] += 1

    def give_back(self, seat: Seat) -> None:
        """Take the seat's place, for those who wait."""
        held_s = self._clock() - seat.held_since
        self._held_s = held_s if self._held_s is None else self._held_s + LEARNING * (held_s - self._held_s)
        seat.home = None
        self._used -= 1
        self._holding[seat.tenant] -= 1
        if not self._holding[seat.tenant]:
            del self._holding[seat.tenant]
        self._admit()

    def quit(self, seat: Seat) -> bool:
        """Take the seat out of the queue; False where it is not in it."""
        if seat.waiter not in self._seats:
            return False
        self._queue.leave(seat.waiter)
        self._forget(seat, seat.waiter)
        return True

    def tell(self) -> None:
        """Tell those who wait where they are, where that has changed, once a second at most."""
        now = self._clock()
        for position, waiter in enumerate(self._queue.order(), 1):
            seat = self._seats[waiter]
            told, at = seat.told
            if told != position and now - at >= TELL_PAUSE_S:
                self._tell_one(seat, position)

    async def _enter(self, seat: Seat, cost: int) -> None:
        """Return once the seat has a place."""
        if seat.entered is not None:  # another call of the run waits already
            await seat.entered.wait()
            self._queue.charge(seat.tenant, cost)
            return
        if not len(self._queue) and self._used < self._share.most and seat.tenant not in self._blocked():
            self._queue.pass_by(seat.tenant, cost)
            self.take(seat)
            if seat.told[0]:  # an earlier owner of the run has told that it waits
                seat.on_wait(0, 0.0)
            return
        self._check_tenant(seat.tenant, LATE)
        if len(self._queue) >= LATE * self._queue_most():
            raise self._full()
        began = self._clock()
        seat.entered = asyncio.Event()
        seat.waiter = waiter = self._queue.join(seat.tenant, cost)
        self._seats[waiter] = seat
        self._metrics.admission_waiting.inc()
        self._admit()  # those who wait may all be of tenants that are at their limit
        if waiter in self._seats:
            self._tell_one(seat, self._queue.position(waiter))
        await seat.entered.wait()
        self._metrics.admission_wait_s.observe(self._clock() - began)

    def _admit(self) -> None:
        """Give free places to those whose turn it is."""
        while len(self._queue) and self._used < self._share.most:
            waiter = self._queue.next(self._blocked())
            if waiter is None:
                return
            seat = self._seats[waiter]
            self._queue.serve(waiter)
            self._forget(seat, waiter)
            self.take(seat)
            seat.on_wait(0, 0.0)
            assert seat.entered is not None, "who waits has an event to wait for"
            seat.entered.set()

    def _forget(self, seat: Seat, waiter: Waiter) -> None:
        del self._seats[waiter]
        seat.waiter = None
        self._metrics.admission_waiting.dec()

    def _blocked(self) -> frozenset[str]:
        """The tenants that have as many places as one may."""
        limit = self._part(self._settings.tenant_max_running)
        if not limit:
            return frozenset()
        return frozenset(tenant for tenant, held in self._holding.items() if held >= limit)

    def _check_tenant(self, tenant: str, times: int) -> None:
        limit = times * self._part(self._settings.tenant_max_queued)
        if limit and self._queue.waiting_of(tenant) >= limit:
            self._metrics.count_refusal("tenant")
            raise RateLimited(
                f"{self._settings.tenant_max_queued} of your replies wait already, which is as many as one tenant may "
                "have. Wait for some of them to end.",
                retry_after_s=self._retry_s(self._queue.waiting_of(tenant)),
            )

    def _full(self) -> Overloaded:
        self._metrics.count_refusal("queue")
        return Overloaded(
            "Every engine is busy and the queue before them is full. Try again later.",
            retry_after_s=self._retry_s(len(self._queue)),
        )

    def _part(self, limit: int) -> int:
        """A worker's even part of a limit that is for all of them."""
        return math.ceil(limit / self._share.workers)

    def _queue_most(self) -> int:
        return math.ceil(self._settings.queue_per_place * self._share.even)

    def _wait_s(self, position: int) -> float | None:
        """Seconds until so many places are given back, if runs keep theirs as long as they did lately."""
        if self._held_s is None:
            return None
        return position * self._held_s / max(1, min(self._used, self._share.most))

    def _retry_s(self, waiting: int) -> float:
        lowest, highest = RETRY_RANGE_S
        return min(highest, max(lowest, self._wait_s(waiting + 1) or lowest))

    def _tell_one(self, seat: Seat, position: int) -> None:
        wait_s = self._wait_s(position)
        seat.told = (position, self._clock())
        seat.on_wait(position, round(wait_s, 1) if wait_s is not None else None)
