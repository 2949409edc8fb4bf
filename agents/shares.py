"""The fleet's capacity, divided among the gateway workers that are there.

Each worker says in the store, every `share_interval_s`, how much it uses, and hears what the others use. It may always
have its even part, and beyond that what the others leave idle: capacity is never left lying, and after a change all
are at their even parts again within an interval and the length of a reply. What exceeds the capacity meanwhile waits
in the engines' own queues.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from agents.store import Store

GATEWAYS: Final = "onebox:gateways"
SILENT_INTERVALS: Final = 4

# KEYS: gateways. ARGV: worker, places in use, how long a silent worker counts in ms. Answers what each other one uses.
_BEAT: Final = """#!lua flags=allow-oom
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('HSET', KEYS[1], ARGV[1], now .. ' ' .. ARGV[2])
local rows, others = redis.call('HGETALL', KEYS[1]), {}
for i = 1, #rows, 2 do
  if rows[i] ~= ARGV[1] then
    local at, used = string.match(rows[i + 1], '(%d+) (%d+)')
    if now - tonumber(at) > tonumber(ARGV[3]) then
      redis.call('HDEL', KEYS[1], rows[i])
    else
      others[#others + 1] = tonumber(used)
    end
  end
end
return others
"""


@dataclass(frozen=True, slots=True)
class Share:
    """One worker's places: those that it may always have, and those that it may have now."""

    workers: int
    even: int
    most: int


def share_of(places: int, others: Sequence[int]) -> Share:
    """The part of a worker besides whom `others` use so many of the fleet's places."""
    workers = len(others) + 1
    even = max(1, math.ceil(places / workers))
    return Share(workers, even, max(even, places - sum(others)))


class Register:
    """This worker's entry among the gateway workers that use one model."""

    def __init__(self, store: Store, model: str, interval_s: float) -> None:
        self._store = store
        self._key = f"{GATEWAYS}:{model}"
        self._worker = secrets.token_hex(8)
        self._silent_ms = int(SILENT_INTERVALS * interval_s * 1000)

    async def beat(self, used: int) -> list[int]:
        """Say how many places are used here; how many each other worker uses.

        Raises:
            StoreUnavailable: nobody could be told.
        """
        others: list[int] = await self._store.run(_BEAT, [self._key], [self._worker, used, self._silent_ms])
        return others

    async def leave(self) -> None:
        """Leave the capacity to the others.

        Raises:
            StoreUnavailable: they find out by themselves.
        """
        await self._store.transaction([("HDEL", self._key, self._worker)])
