"""Who is next: waiters of all tenants, in an order in which no tenant delays another by more than its share.

Start-time fair queueing by tokens (Goyal et al. 1996; the counters are those of "Fairness in Serving LLMs", OSDI 2024):
each tenant has a level, which grows by the tokens it was served; the waiter whose turn begins at the lowest level is
next. Whoever was idle comes back at the level of those who are served, so nobody saves up turns. Values only: places,
limits and time are `agents.admission`.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Final

KNOWN_MAX: Final = 1024


@dataclass(slots=True, eq=False)
class Waiter:
    """One run in the queue. `number` tells who came first; `cost` is in tokens."""

    tenant: str
    cost: int
    number: int


@dataclass(slots=True)
class _Tenant:
    level: float = 0.0
    waiters: deque[Waiter] = field(default_factory=deque)


class FairQueue:
    """The waiters of one gateway worker."""

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant] = {}
        self._level = 0.0  # at which the last one was served
        self._waiting = 0
        self._number = 0

    def __len__(self) -> int:
        """How many wait."""
        return self._waiting

    def waiting_of(self, tenant: str) -> int:
        """How many of this tenant wait."""
        known = self._tenants.get(tenant)
        return len(known.waiters) if known is not None else 0

    def join(self, tenant: str, cost: int) -> Waiter:
        """Wait behind the others of this tenant."""
        known = self._known(tenant)
        self._number += 1
        waiter = Waiter(tenant, cost, self._number)
        known.waiters.append(waiter)
        self._waiting += 1
        return waiter

    def leave(self, waiter: Waiter) -> None:
        """Wait no longer; costs nothing."""
        self._tenants[waiter.tenant].waiters.remove(waiter)
        self._waiting -= 1

    def next(self, blocked: frozenset[str] = frozenset()) -> Waiter | None:
        """The one whose turn it is, among the tenants that are not `blocked`; it stays until `serve`."""
        turns: list[tuple[float, int, Waiter]] = []
        for name, known in self._tenants.items():
            if name in blocked:
                known.level = max(known.level, self._level)
            elif known.waiters:
                turns.append((known.level, known.waiters[0].number, known.waiters[0]))
        return min(turns, key=_turn)[2] if turns else None

    def serve(self, waiter: Waiter) -> None:
        """Take the waiter out and charge its tenant."""
        known = self._tenants[waiter.tenant]
        self._level = max(self._level, known.level)
        self.leave(waiter)
        known.level += waiter.cost

    def pass_by(self, tenant: str, cost: int) -> None:
        """Charge a tenant for a run that did not have to wait."""
        known = self._known(tenant)
        self._level = max(self._level, known.level)
        known.level += cost

    def charge(self, tenant: str, tokens: int) -> None:
        """Charge a tenant for what its runs cost beyond their first estimate; less than 0 gives some back."""
        self._known(tenant).level += tokens

    def order(self) -> list[Waiter]:
        """All waiters, the next one first."""
        turns: list[tuple[float, int, Waiter]] = []
        for known in self._tenants.values():
            begins = known.level
            for waiter in known.waiters:
                turns.append((begins, waiter.number, waiter))
                begins += waiter.cost
        return [waiter for _, _, waiter in sorted(turns, key=_turn)]

    def position(self, waiter: Waiter) -> int:
        """The waiter's place in `order`, from 1."""
        own = self._tenants[waiter.tenant]
        begins = own.level
        for other in own.waiters:
            if other is waiter:
                break
            begins += other.cost
        place = 1
        for known in self._tenants.values():
            theirs = known.level
            for other in known.waiters:
                if (theirs, other.number) >= (begins, waiter.number):
                    break
                place += 1
                theirs += other.cost
        return place

    def _known(self, tenant: str) -> _Tenant:
        """The tenant's entry; one that waits for nothing begins at the level of those who are served."""
        known = self._tenants.get(tenant)
        if known is None:
            if len(self._tenants) >= KNOWN_MAX:
                self._forget()
            known = self._tenants[tenant] = _Tenant()
        if not known.waiters:
            known.level = max(known.level, self._level)
        return known

    def _forget(self) -> None:
        """Drop the tenants whose level says nothing any more."""
        self._tenants = {
            name: known for name, known in self._tenants.items() if known.waiters or known.level > self._level
        }


def _turn(turn: tuple[float, int, Waiter]) -> tuple[float, int]:
    return turn[:2]
