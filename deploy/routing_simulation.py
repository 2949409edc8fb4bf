"""Routing over more replicas than one machine runs: the gateway's own choice of doors, in simulated time.

Conversations come and go; each turn goes to a random gateway, which knows its own requests and what the fleet's roster
told it a while ago, and `agents.doors` chooses. Replicas only count. So what is simulated is how well old and partial
views spread the load, and keep a conversation where its prefix is cached.
"""

import heapq
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Final, Literal

from agents.doors import Doors
from agents.fleet import ROSTER_S
from serving.roster import FRESH_PER_REPLICA_S, FRESH_S
from serving.work import PLACED_FRESH_S

Policy = Literal["by key", "without a key", "at random"]
POLICIES: Final[tuple[Policy, ...]] = ("by key", "without a key", "at random")

TURNS: Final = 4.0  # of a conversation, mean
THINK_S: Final = 15.0  # between two turns, mean
WARM_UP_S: Final = 120.0
MEASURED_S: Final = 60.0
SAMPLE_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class Traffic:
    """What comes in: so large a share of all replicas' places busy, with replies of this many seconds, mean."""

    replicas: int
    gateways: int
    places: int
    busy_share: float
    reply_s: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it went.

    `same`: share of turns, but for first ones, that met the replica of the turn before. `peak`: the most loaded
    replica's load over the mean, 99th percentile over time. `full`: share of turns that met no free place.
    """

    same: float
    peak: float
    full: float


@dataclass(slots=True)
class _Replica:
    running: int = 0
    seen: set[str] = field(default_factory=set)
    placed: deque[tuple[float, str]] = field(default_factory=deque)


class Simulation:
    """One run in simulated time; the same seed gives the same outcome."""

    def __init__(self, traffic: Traffic, policy: Policy, seed: int = 7) -> None:
        self._traffic = traffic
        self._policy: Policy = policy
        self._chance = random.Random(seed)
        self._replicas = {f"replica-{index}": _Replica() for index in range(traffic.replicas)}
        self._urls = list(self._replicas)
        self._roster: list[dict[str, Any]] = []
        self._roster_at = -math.inf
        self._gateways = [Doors(seed + number) for number in range(traffic.gateways)]
        self._last: dict[str, str] = {}  # where each conversation's last turn went
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = count()
        self._turns = self._later = self._same = self._full = 0
        self._peaks: list[float] = []

    def run(self) -> Outcome:
        """Play it to the end."""
        self._schedule_arrivals()
        for gateway in self._gateways:
            self._follow(gateway)
        self._at(WARM_UP_S, self._sample)
        while self._events and self._events[0][0] < WARM_UP_S + MEASURED_S:
            now, _, happen = heapq.heappop(self._events)
            happen(now)
        peaks = sorted(self._peaks)
        return Outcome(
            self._same / max(1, self._later), peaks[int(0.99 * (len(peaks) - 1))], self._full / max(1, self._turns)
        )

    def _at(self, when: float, happen: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), happen))

    def _schedule_arrivals(self) -> None:
        traffic = self._traffic
        turns_per_s = traffic.replicas * traffic.places * traffic.busy_share / traffic.reply_s
        when = 0.0
        for number in count():
            when += self._chance.expovariate(turns_per_s / TURNS)
            if when >= WARM_UP_S + MEASURED_S:
                return
            key = f"conversation-{number}"
            self._at(when, lambda now, key=key: self._turn(now, key))  # type: ignore[misc]  # a default binds the key

    def _follow(self, gateway: Doors) -> None:
        def look(now: float) -> None:
            gateway.list(self._told(now))
            self._at(now + ROSTER_S, look)

        gateway.list(self._told(0.0))
        for url in self._urls:
            gateway.prove(url, answers=True)
        self._at(self._chance.uniform(0, ROSTER_S), look)

    def _told(self, now: float) -> list[dict[str, Any]]:
        """The roster as a replica tells it: as old as `serving.roster` lets it be."""
        if now - self._roster_at > FRESH_S + FRESH_PER_REPLICA_S * len(self._replicas):
            self._roster_at = now
            self._roster = [self._record(now, url, replica) for url, replica in self._replicas.items()]
        return self._roster

    def _record(self, now: float, url: str, replica: _Replica) -> dict[str, Any]:
        while replica.placed and replica.placed[0][0] < now - PLACED_FRESH_S:
            replica.placed.popleft()
        return {
            "door": url,
            "running": replica.running,
            "waiting": 0,
            "capacity": self._traffic.places,
            "placed": [key for _, key in replica.placed],
        }

    def _turn(self, now: float, key: str) -> None:
        gateway = self._chance.choice(self._gateways)
        url = self._choose(gateway, key)
        replica = self._replicas[url]
        if now >= WARM_UP_S:
            self._turns += 1
            self._full += replica.running >= self._traffic.places
            if key in self._last:
                self._later += 1
                self._same += self._last[key] == url
        self._last[key] = url
        if key not in replica.seen:
            replica.seen.add(key)
            replica.placed.append((now, key))
        replica.running += 1
        gateway.enter(url)

        def end(now: float) -> None:
            replica.running -= 1
            gateway.leave(url)
            if self._chance.random() < 1 - 1 / TURNS:
                self._at(now + self._chance.expovariate(1 / THINK_S), lambda again: self._turn(again, key))

        # Lengths of replies spread widely: a log-normal with sigma 0.8.
        mean = math.log(self._traffic.reply_s) - 0.8**2 / 2
        self._at(now + self._chance.lognormvariate(mean, 0.8), end)

    def _choose(self, gateway: Doors, key: str) -> str:
        if self._policy == "at random":
            return self._chance.choice(self._urls)
        return gateway.choose(key if self._policy == "by key" else None)[0]

    def _sample(self, now: float) -> None:
        loads = [replica.running for replica in self._replicas.values()]
        self._peaks.append(max(loads) / max(1e-9, sum(loads) / len(loads)))
        self._at(now + SAMPLE_S, self._sample)
