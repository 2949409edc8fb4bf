"""Admission: which run may use the engines now, which waits and how long, and which is refused at once.

A run takes a place at its first engine call and keeps it to its end. So it either waits and has none, or has one and
never waits: no two runs can wait for each other, and a plan of many steps is not queued behind newcomers in its
middle. The places themselves are `agents.places`, the part of the fleet that is this worker's `agents.shares`.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Final, Self

from agents.metrics import Metrics
from agents.places import OnWait, OpenCall, Places, Seat
from agents.shares import Register, share_of
from agents.store import Store
from onebox.errors import Overloaded, StoreUnavailable
from onebox.messages import Message
from onebox.settings import Settings

TELL_TICK_S: Final = 0.25
CHOICE: Final = "choice"

logger = logging.getLogger(__name__)


class Claim:
    """What one run has of the engines, from its start to `leave`."""

    def __init__(self, admission: "Admission", seat: Seat) -> None:
        self._admission = admission
        self._seat = seat
        self._arriving = True

    def name_step(self, step: str) -> None:
        """What the run is at: replies of one step are taken to be of like length."""
        self._seat.step = step

    async def open(
        self, model: str, messages: Sequence[Message], max_tokens: int, *, constrained: bool = False
    ) -> OpenCall:
        """An engine call that may begin now, for the caller to close; only a run's first one waits.

        Raises:
            Overloaded: the queue is full, or this tenant's part of it.
        """
        self.arrive()
        kind = CHOICE if constrained else self._seat.step
        return await self._admission.places(model).open(self._seat, kind, messages, max_tokens)

    def arrive(self) -> None:
        """The run is not one of those any more that have yet to ask."""
        if self._arriving:
            self._arriving = False
            self._admission.arriving -= 1

    def leave(self) -> None:
        """The run is over: its place is another's."""
        self.arrive()
        self._admission.leave(self._seat)


class Admission:
    """What one gateway worker lets through to the engines. Use as an async context manager.

    `fleets` tells for each model how many requests its fleet can work on now.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        store: Store,
        fleets: Mapping[str, Callable[[], int]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._interval_s = settings.share_interval_s
        self._fleets = fleets
        self._places = {name: Places(settings, metrics, fleet(), clock) for name, fleet in fleets.items()}
        self._registers = {name: Register(store, name, self._interval_s) for name in fleets}
        self._work: list[asyncio.Task[None]] = []
        self.arriving = 0  # runs that have begun and not asked for a place yet

    async def __aenter__(self) -> Self:
        self._work = [asyncio.create_task(work(), name=work.__name__) for work in (self._share, self._tell)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._work:
            task.cancel()
        await asyncio.gather(*self._work, return_exceptions=True)
        try:
            for register in self._registers.values():
                await register.leave()
        except StoreUnavailable:
            logger.info("The other workers could not be told that this one leaves; they will see")

    def check(self, tenant: str) -> None:
        """Return where a run of this tenant that came now would get a place or could wait for one.

        It is for requests that are not even read yet, so it costs next to nothing. Which model they are for is not
        known then: they pass if there is one for which they could wait.

        Raises:
            Overloaded: they would be refused.
        """
        refusal: Overloaded | None = None
        for places in self._places.values():
            try:
                places.check(tenant, self.arriving)
            except Overloaded as error:
                refusal = error
            else:
                return
        if refusal is not None:
            raise refusal

    def claim(self, tenant: str, on_wait: OnWait, *, begun: bool = False, told: int = 0) -> Claim:
        """The claim of a run that begins.

        One that has `begun` at another worker has its place without waiting; `told` is the last position it was told.
        """
        seat = Seat(tenant, on_wait, told=(told, -math.inf))
        if begun:
            next(iter(self._places.values())).take(seat)
        self.arriving += 1
        return Claim(self, seat)

    @contextmanager
    def passing(self, tenant: str) -> Iterator[Claim]:
        """The claim of something that is no run and tells nobody where it waits."""
        claim = self.claim(tenant, _untold)
        try:
            yield claim
        finally:
            claim.leave()

    def places(self, model: str) -> Places:
        """The places of a model; where there is one model only, whatever it is called."""
        found = self._places.get(model)
        return found if found is not None else next(iter(self._places.values()))

    def queue(self, model: str) -> Callable[[], int]:
        """How many runs wait for a place of the model, whenever it is called."""
        places = self.places(model)
        return lambda: places.waiting

    def leave(self, seat: Seat) -> None:
        """As `Claim.leave`."""
        if seat.home is not None:
            seat.home.give_back(seat)
        elif seat.waiter is not None:
            for places in self._places.values():
                if places.quit(seat):
                    return

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(TELL_TICK_S)
            for places in self._places.values():
                places.tell()

    async def _share(self) -> None:
        """Learn what the fleets can do and what the other workers use of them."""
        others: dict[str, Sequence[int]] = {}
        while True:
            for name, register in self._registers.items():
                places = self._places[name]
                try:
                    others[name] = await register.beat(places.used)
                except StoreUnavailable:
                    logger.debug("The store is away; the last share stays")
                except Exception:
                    logger.exception("The share of this worker could not be renewed")
                places.resize(share_of(self._fleets[name](), others.get(name, ())))
            await asyncio.sleep(self._interval_s)


def _untold(position: int, wait_s: float | None) -> None:
    """Nobody is told."""
