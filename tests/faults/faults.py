"""Faults: drawn from a seed, so that a storm can be had again, and done to a box.

The schedule is pure: same seed, same faults with the same pauses and lengths. Which process is hit is the drawn index
among those that live at that moment. Every fault is undone by itself; `Injector.calm` undoes what is left.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import psutil
import redis

from tests.faults.box import Box, Role, kill, pause, resume
from tests.faults.redis_proxy import Command, Trap

Act = Literal[
    "kill",
    "pause",
    "long pause",
    "slow",
    "held",
    "blackhole",
    "refused",
    "cut",
    "drop reply",
    "lose reply",
    "drop command",
    "full",
    "disk full",
    "disconnect",
]
ON_PROCESSES: Final = frozenset({"kill", "pause", "long pause"})
DOUBLE_SHARE: Final = 0.15
VICTIM_WITHIN_S: Final = 6.0
TINY: Final = "1mb"

# (act, role) to weight. A killed supervisor takes everything with it and half a minute to be back.
WEIGHTS: Final[dict[tuple[Act, Role | None], float]] = {
    ("kill", "replica"): 20,
    ("kill", "gateway"): 18,
    ("kill", "page"): 3,
    ("kill", "store"): 8,
    ("kill", "controller"): 3,
    ("kill", "ingress"): 3,
    ("kill", "supervisor"): 1,
    ("pause", "replica"): 5,
    ("pause", "gateway"): 5,
    ("pause", "store"): 4,
    ("pause", "page"): 1,
    ("pause", "controller"): 1,
    ("pause", "ingress"): 2,
    ("pause", "supervisor"): 1,
    ("long pause", "replica"): 1,
    ("long pause", "gateway"): 2,
    ("slow", None): 4,
    ("held", None): 4,
    ("blackhole", None): 4,
    ("refused", None): 3,
    ("cut", None): 5,
    ("drop reply", None): 6,
    ("lose reply", None): 3,
    ("drop command", None): 3,
    ("full", None): 3,
    ("disk full", None): 2,
    ("disconnect", None): 8,
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: `after_s` the one before, on the `index`-th process of `role`, for `length_s`; `size` in 0..1."""

    number: int
    act: Act
    role: Role | None
    after_s: float
    length_s: float
    index: int
    size: float

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.act} {self.role}" if self.role else self.act


@dataclass(frozen=True, slots=True)
class Injected:
    """A fault that was done. `at` is monotonic; `outage` says that it took the whole product away."""

    fault: Fault
    at: float


def draw(seed: int, roles: Sequence[Role], pause_s: float) -> Iterator[Fault]:
    """The endless schedule of a seed; `pause_s` is the mean time between faults, but for double ones."""
    lot = random.Random(seed)
    kinds = [kind for kind in WEIGHTS if kind[1] is None or kind[1] in roles]
    number = 0
    while True:
        (act, role), *_ = lot.choices(kinds, [WEIGHTS[kind] for kind in kinds])
        double = lot.random() < DOUBLE_SHARE
        after_s = lot.uniform(0.0, 0.4) if double else lot.uniform(0.5, 1.5) * pause_s / (1 - DOUBLE_SHARE)
        length_s = lot.uniform(11.0, 13.0) if act == "long pause" else lot.uniform(0.3, 2.5)
        yield Fault(number, act, role, after_s, length_s, lot.randrange(8), lot.random())
        number += 1


@dataclass
class Injector:
    """Does faults to a box. `cut_clients` breaks a share of the users' connections."""

    box: Box
    cut_clients: Callable[[float], int]
    done: list[Injected] = field(default_factory=list)
    skipped: int = 0
    _ends: set[asyncio.Task[None]] = field(default_factory=set)
    _paused: set[psutil.Process] = field(default_factory=set)

    async def inject(self, fault: Fault) -> bool:
        """Do it; whether there was something to do it to."""
        if fault.act in ON_PROCESSES:
            assert fault.role is not None
            victim = await self._victim(fault.role, fault.index)
            if victim is None:
                self.skipped += 1
                return False
            self.done.append(Injected(fault, time.monotonic()))
            self._hit(fault, victim)
            return True
        self.done.append(Injected(fault, time.monotonic()))
        await self._disturb(fault)
        return True

    async def calm(self) -> None:
        """Undo everything that is still going on."""
        for task in self._ends:
            task.cancel()
        await asyncio.gather(*self._ends, return_exceptions=True)
        for process in self._paused:
            resume(process)
        self.box.disk.free()
        await asyncio.to_thread(self.box.proxy.disarm)
        for _ in range(100):
            try:
                await asyncio.to_thread(self.box.direct.config_set, "maxmemory", "0")
                return
            except redis.RedisError:
                await asyncio.sleep(0.1)
        raise RuntimeError("the store did not come back")

    async def _victim(self, role: Role, index: int) -> psutil.Process | None:
        deadline = time.monotonic() + VICTIM_WITHIN_S
        while True:
            found = await asyncio.to_thread(self.box.victims, role)
            if found:
                return found[index % len(found)]
            if time.monotonic() > deadline:
                return None
            await asyncio.sleep(0.1)

    def _hit(self, fault: Fault, victim: psutil.Process) -> None:
        if fault.act == "kill":
            self._paused.discard(victim)
            kill(victim)
            return
        pause(victim)
        self._paused.add(victim)

        def end() -> None:
            resume(victim)
            self._paused.discard(victim)

        self._later(fault.length_s, end)

    async def _disturb(self, fault: Fault) -> None:
        proxy, box = self.box.proxy, self.box
        match fault.act:
            case "slow":
                proxy.set_delay(0.02 + 0.3 * fault.size)
                self._later(fault.length_s, lambda: proxy.set_delay(0.0))
            case "held" | "blackhole" | "refused":
                await asyncio.to_thread(proxy.set_link, fault.act)
                self._later(fault.length_s, lambda: proxy.set_link("up"))
            case "cut":
                await asyncio.to_thread(proxy.cut)
            case "drop reply":
                proxy.trap(Trap("drop_reply", writes, times=1 + int(4 * fault.size)))
            case "lose reply":
                proxy.trap(Trap("lose_reply", writes, times=1 + int(2 * fault.size)))
            case "drop command":
                proxy.trap(Trap("drop_before", writes, times=1 + int(4 * fault.size)))
            case "full":
                await self._configure(TINY)
                self._later(fault.length_s, lambda: self._configure_now("0"))
            case "disk full" if box.disk.real:
                await asyncio.to_thread(box.disk.fill)
                self._later(fault.length_s, box.disk.free)
            case "disk full":
                proxy.trap(Trap("oom", writes, times=20))
            case "disconnect":
                self.cut_clients(0.1 + 0.9 * fault.size)

    async def _configure(self, maxmemory: str) -> None:
        await asyncio.to_thread(self._configure_now, maxmemory)

    def _configure_now(self, maxmemory: str) -> None:
        for _ in range(20):
            try:
                self.box.direct.config_set("maxmemory", maxmemory)
                return
            except redis.RedisError:
                time.sleep(0.1)

    def _later(self, after_s: float, end: Callable[[], None]) -> None:
        async def wait() -> None:
            try:
                await asyncio.sleep(after_s)
            finally:
                await asyncio.shield(asyncio.to_thread(end))

        task = asyncio.create_task(wait())
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)


def writes(command: Command) -> bool:
    """Whether it is one of the scripts, which all writes to runs are."""
    return command.verb in {"EVALSHA", "EVAL"}
