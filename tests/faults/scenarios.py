"""Short flows with one certain fault each, in which a certain mistake must show.

Each needs a `LightBox` of its own settings and leaves the users' attempts for the judge. They are what the mutants of
`tests.faults.mutants` are tried on; the storm finds the same and more, but takes minutes.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import aiohttp
import psutil

from tests.faults import snapshot
from tests.faults.box import TENANT, Box, kill, pause, resume
from tests.faults.checker import Report, check
from tests.faults.clients import Reader, Storefront, users
from tests.faults.history import Attempt, Kind
from tests.faults.redis_proxy import Command, Match, Trap
from tests.faults.scripts import runs
from tests.faults.undisturbed import Undisturbed

LEASE_S: Final = 2.0
QUICK: Final = {"lease_s": str(LEASE_S), "lease_renew_s": "0.5", "scripted_itl_ms": "25"}
DONE_WITHIN_S: Final = 60.0
ENOUGH_RUNS: Final = 8

Play = Callable[[Box, Storefront], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Scenario:
    """A flow and the settings it needs."""

    play: Play
    settings: dict[str, str] = field(default_factory=lambda: dict(QUICK))


async def judge(box: Box, scenario: Scenario) -> Report:
    """Play it and have the store and the users' views checked."""
    front = Storefront(box.api_url, box.headers)
    await scenario.play(box, front)
    box.proxy.disarm()
    await asyncio.to_thread(snapshot.wait_until_quiet, box.direct)
    taken, asked = await asyncio.to_thread(snapshot.read, box, front.attempts)
    expected = await snapshot.expectations(asked, Undisturbed())
    return check(front.attempts, taken, expected.get)


async def worker_dies_with_a_write_on_its_way(box: Box, front: Storefront) -> None:
    """The worker is killed before its append reaches the store: no user may have seen what was in it."""
    victims: list[psutil.Process | None] = []

    def strike(command: Command) -> None:
        victims.append(box.worker_of(command))
        if victims[-1] is not None:
            kill(victims[-1])

    async def faults() -> None:
        for appends in (20, 60):
            trap = box.proxy.trap(Trap("drop_before", runs("APPEND"), skip=appends, then=strike))
            await asyncio.to_thread(trap.sprung.wait, 10)

    await _crowd(front, 8, 3, ("responses",), faults())


async def paused_owner_comes_back(box: Box, front: Storefront) -> None:
    """A worker is paused for longer than its leases and wakes while another goes on with its runs."""

    async def faults() -> None:
        owner = await _busiest(box)
        pause(owner)
        try:
            async with asyncio.timeout(DONE_WITHIN_S):
                await _taken_over(box)
            await asyncio.sleep(0.4)
        finally:
            resume(owner)

    await _crowd(front, 10, 1, ("responses",), faults())


async def message_is_sent_again(box: Box, front: Storefront) -> None:
    """The connection breaks after the run was stored and before the user heard of it; they send again."""

    async def faults() -> None:
        await asyncio.sleep(0)

    await _crowd(front, 6, 2, ("resender",), faults())


async def engine_is_full(box: Box, front: Storefront) -> None:
    """More chats than the engine has room for: those refused are told so by a status, not within a 200."""

    async def faults() -> None:
        await asyncio.sleep(0)

    await _crowd(front, 6, 1, ("chat_keyed",), faults())


async def engine_dies(box: Box, front: Storefront) -> None:
    """Each replica is killed once with replies on it."""

    async def faults() -> None:
        for number in range(2):
            await asyncio.sleep(1.2)
            kill(box.victims("replica")[number % 2])

    await _crowd(front, 8, 1, ("responses",), faults())


async def message_is_sent_twice_while_the_store_is_mute(box: Box, front: Storefront) -> None:
    """The store runs the start of a run and its answers are lost; the user, impatient, sends again meanwhile."""
    for number in range(3):
        attempt = Attempt(number, "responses", "chat", f"Tell me about rain {number}", 60, f"key-mute-{number}", None)
        front.attempts.append(attempt)
        box.proxy.trap(Trap("lose_reply", _of_one_run("BEGIN_RUN"), times=2))
        async with aiohttp.ClientSession(front.url, headers=front.headers) as http:
            first, second = Reader(http, front, attempt), Reader(http, front, attempt)
            sent = asyncio.create_task(first.read())
            while not await asyncio.to_thread(_stored_key, box, attempt.key):
                await asyncio.sleep(0.02)
            with suppress(TimeoutError):
                async with asyncio.timeout(DONE_WITHIN_S):
                    await asyncio.gather(sent, second.read())


SCENARIOS: Final[dict[str, Scenario]] = {
    # Several tokens to an event: another worker cuts the same text elsewhere, so an event it repeats is seen.
    "a worker dies with a write on its way": Scenario(
        worker_dies_with_a_write_on_its_way, QUICK | {"scripted_itl_ms": "6"}
    ),
    "a paused owner comes back": Scenario(paused_owner_comes_back, QUICK | {"scripted_itl_ms": "40"}),
    "a message is sent again": Scenario(message_is_sent_again),
    "the engine is full": Scenario(
        engine_is_full, QUICK | {"engine_max_ongoing": "1", "engine_max_queued": "0", "queue_per_place": "0"}
    ),
    "the engine dies": Scenario(engine_dies),
    "a message is sent twice while the store is mute": Scenario(message_is_sent_twice_while_the_store_is_mute),
}


def _of_one_run(script: str) -> Match:
    """Matches the script for the first run it is seen with."""
    begins, found = runs(script), list[bytes]()

    def match(command: Command) -> bool:
        if not begins(command):
            return False
        run = command.arguments[3 + int(command.arguments[2])]
        found.append(run)
        return run == found[0]

    return match


def _stored_key(box: Box, key: str | None) -> bool:
    return bool(box.direct.exists(f"onebox:{{{TENANT}}}:idempotency:{key}"))


async def _busiest(box: Box) -> psutil.Process:
    """The worker that owns most runs, once eight are running."""
    while True:
        running = await asyncio.to_thread(snapshot.running, box.direct)
        owners = Counter(
            int(owner.split(b"-")[0])
            for run in running
            if (owner := box.direct.hget(f"{snapshot.RUNS}{run}", "owner")) is not None
        )
        if owners.total() >= ENOUGH_RUNS:
            return psutil.Process(owners.most_common(1)[0][0])
        await asyncio.sleep(0.05)


async def _taken_over(box: Box) -> None:
    """Return once a run goes on elsewhere."""
    while True:
        for run in await asyncio.to_thread(snapshot.running, box.direct):
            epoch = box.direct.hget(f"{snapshot.RUNS}{run}", "epoch")
            if epoch is not None and int(epoch) > 1:
                return
        await asyncio.sleep(0.05)


async def _crowd(
    front: Storefront, count: int, turns: int, kinds: Sequence[Kind], faults: Awaitable[None], seed: int = 5
) -> None:
    """Users who send `turns` messages each while `faults` happen."""
    crowd = [asyncio.create_task(user.live(turns)) for user in users(count, seed, front, kinds)]
    try:
        await faults
        async with asyncio.timeout(DONE_WITHIN_S):
            await asyncio.gather(*crowd)
    except TimeoutError:
        pass  # the judge finds those that hang
    finally:
        for task in crowd:
            task.cancel()
        with suppress(asyncio.CancelledError, aiohttp.ClientError):
            await asyncio.gather(*crowd, return_exceptions=True)
