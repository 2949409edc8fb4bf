"""Which replica a request goes to: the doors that a gateway knows, how loaded each is, and the choice among them.

Requests of one key stay together, for that is where their prefix is cached. A new key goes to the less loaded of the
two doors that its hash names (rendezvous hashing), and stays there until that door is far above its part of the load;
what other gateways have placed is in the fleet's roster. So few keys move when replicas come and go, and gateways that
know nothing of each other mostly agree. No I/O happens here; the connections are `agents.fleet`.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from random import Random
from typing import Any, Final

HEARD_MAX: Final = 16  # doors known from answers alone
AGE_S: Final = 60.0
KEYS_MAX: Final = 16_384
WAYS_MAX: Final = 3
FEW: Final = 4  # so many doors are all looked at for a request without a key
BOUND: Final = 1.5  # a door may have this many times its even part of the load before keys leave it
CACHE_FULL: Final = 0.95  # a replica takes nothing more while this share of its KV cache is in use
FREE_SHARE: Final = 8  # below this part of its places in use no door is too loaded


@dataclass(slots=True)
class Door:
    """One replica. `own` counts this gateway's open requests there, `told` all of them by the roster."""

    url: str
    heard_at: float
    listed: bool = False
    reached: bool = False  # at any time, from here
    usable: bool = False  # now
    proved_at: float = -math.inf
    capacity: int = 1
    kv_use: float = 0.0
    told: int = 0
    own_when_told: int = 0
    own: int = 0

    @property
    def load(self) -> int:
        """Requests there, as far as one can know here."""
        return max(0, self.told - self.own_when_told) + self.own

    @property
    def places(self) -> int:
        """Requests it can work on: those it has and no more while its KV cache is full."""
        return self.capacity if self.kv_use < CACHE_FULL else min(self.capacity, max(1, self.told))


class Doors:
    """All doors of one fleet. A seed makes its choices repeatable."""

    def __init__(self, seed: int | None = None) -> None:
        self._chance = Random(seed)
        self._doors: dict[str, Door] = {}
        self._places: OrderedDict[str, str] = OrderedDict()  # affinity key to door

    def get(self, url: str) -> Door | None:
        """What is known of a door."""
        return self._doors.get(url)

    def recent(self) -> list[str]:
        """The doors heard of lately, the one that was used longest ago first."""
        oldest = time.monotonic() - AGE_S
        return [url for url, door in self._doors.items() if door.heard_at >= oldest]

    def listed(self) -> list[Door]:
        """Those in the roster, reachable from here or not."""
        return [door for door in self._doors.values() if door.listed]

    def usable(self) -> list[Door]:
        """Those that requests are spread over: in the roster, and reachable from here."""
        return [door for door in self._doors.values() if door.listed and door.usable]

    def unproved(self, since: float) -> list[str]:
        """The listed doors that cannot be used and were not tried since then."""
        return [door.url for door in self._doors.values() if door.listed and not door.usable and door.proved_at < since]

    def hear(self, url: str) -> bool:
        """Note an answer from there; whether the door is new."""
        door, now = self._doors.get(url), time.monotonic()
        if door is not None:
            door.heard_at = now
            return False
        unlisted = [door for door in self._doors.values() if not door.listed and not door.own]
        if len(unlisted) >= HEARD_MAX:
            del self._doors[min(unlisted, key=lambda door: door.heard_at).url]
        self._doors[url] = Door(url, now)
        return True

    def turn(self, url: str) -> None:
        """Put it last in line."""
        if url in self._doors:
            self._doors[url] = self._doors.pop(url)

    def prove(self, url: str, *, answers: bool) -> None:
        """Note whether it answered when it was tried."""
        if (door := self._doors.get(url)) is not None:
            door.usable, door.proved_at = answers, time.monotonic()
            door.reached = door.reached or answers

    def forget(self, url: str) -> None:
        """Do not go there before it is heard of again."""
        if (door := self._doors.get(url)) is not None:
            door.usable, door.heard_at = False, -math.inf

    def list(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Take over the fleet's roster: who serves, how much each has to do, what has been placed where."""
        now = time.monotonic()
        told = {str(record["door"]): record for record in records if not record.get("draining")}
        for url, door in self._doors.items():
            if door.listed and url not in told:
                door.listed, door.heard_at = False, -math.inf
        for url, record in told.items():
            door = self._doors.setdefault(url, Door(url, now))
            door.listed = True
            door.capacity = max(1, int(record["capacity"]))
            door.kv_use = float(record.get("kv_use", 0.0))
            door.told = int(record["running"]) + int(record["waiting"])
            door.own_when_told = door.own
            if door.usable:
                door.heard_at = now
            for key in record.get("placed", ()):
                if self._places.get(key) not in told:
                    self.place(key, url)

    def fill(self, url: str) -> None:
        """It has no place left, whatever the roster said."""
        if (door := self._doors.get(url)) is not None:
            door.told = max(door.told, door.capacity - door.own + door.own_when_told)

    def enter(self, url: str | None) -> None:
        """A request of this gateway goes there."""
        if url is not None and (door := self._doors.get(url)) is not None:
            door.own += 1

    def leave(self, url: str | None) -> None:
        """It is over."""
        if url is not None and (door := self._doors.get(url)) is not None:
            door.own = max(0, door.own - 1)

    def place(self, key: str, url: str) -> None:
        """The requests of this key belong there from now on."""
        self._places[key] = url
        self._places.move_to_end(key)
        if len(self._places) > KEYS_MAX:
            self._places.popitem(last=False)

    def choose(self, key: str | None) -> Sequence[str]:
        """The doors to try for a request, the best first; empty where the ingress is the only way."""
        doors = self.usable()
        if not doors:
            return ()
        by_load = sorted(doors, key=lambda door: door.load / door.capacity)
        if key is None and len(doors) > FEW:
            # Through views as old as a roster the idlest door is every gateway's at once; of two at random it is not.
            pair = sorted(self._chance.sample(doors, 2), key=lambda door: door.load / door.capacity)
            return list(dict.fromkeys(door.url for door in (*pair, *by_load)))[:WAYS_MAX]
        if key is None:
            return [door.url for door in by_load[:WAYS_MAX]]
        first = self._door_of(key, doors, by_load[0])
        self.place(key, first.url)  # for those that come before this one is answered
        return [first.url, *(door.url for door in by_load if door is not first)][:WAYS_MAX]

    def _door_of(self, key: str, doors: Sequence[Door], idlest: Door) -> Door:
        placed = self._doors.get(self._places.get(key, ""))
        room = sum(door.load for door in doors) + 1
        capacity = sum(door.capacity for door in doors)

        def has_room(door: Door) -> bool:
            even = room * door.capacity / capacity
            most = max(math.ceil(BOUND * even), door.capacity // FREE_SHARE)
            return door.load < min(most, door.capacity)

        if placed is not None and placed.listed and placed.usable and has_room(placed):
            return placed
        ranked = sorted(doors, key=lambda door: _rank(key, door.url), reverse=True)
        pair = [door for door in ranked if door is not placed][:2] or ranked
        less = min(pair, key=lambda door: door.load / door.capacity)
        return less if has_room(less) else idlest


def _rank(key: str, url: str) -> bytes:
    return blake2b(f"{key}\n{url}".encode(), digest_size=8).digest()
