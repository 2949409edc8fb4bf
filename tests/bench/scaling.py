"""Figure 6: four replicas against one, and how fast a fleet grows when a queue forms and shrinks when it is gone.

The scripted engine's pace does not depend on the machine, so that a replica's few places are what limits it. All of
it goes through the whole product. The times are until a replica's process starts, which is what the decision to grow
brings about, until it serves, and until one has left the roster, by default settings.
"""

import asyncio
import secrets
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path

import aiohttp
import psutil

from onebox.sockets import free_port
from tests.bench import report
from tests.bench.load import Target, interleave, medians, stream
from tests.product import KEY, product

MOST = 4
PLACES, ITL_MS = 8, 20
TOKENS, ROUNDS = 64, 3
STREAMS = MOST * PLACES
LONG_TOKENS = 250
RETRY_S = 0.2
GROWTHS = 3
POLL_S = 0.1
REPLICA = "ray::ServeReplica"  # the title of a replica's process
SETTINGS = {
    "ONEBOX_ENGINE": "scripted",
    "ONEBOX_ENGINE_MAX_ONGOING": str(PLACES),
    "ONEBOX_SCRIPTED_ITL_MS": str(ITL_MS),
    "ONEBOX_SCRIPTED_TTFT_MS": "5",
}


async def main() -> None:
    """Run it and write the section `scaling`."""
    with tempfile.TemporaryDirectory(prefix="ob-") as folder:
        one, most = await _throughput(Path(folder))
        decided, grown, full, shrunk, cut = await _growth(Path(folder))
    rows = [
        (f"{MOST} replicas over one, tokens a second", f"{most:.0f} / {one:.0f} = {most / one:.2f}x", f"{0.9 * MOST}x"),
        ("a second replica's process starts after the queue formed", f"{decided:.1f} s", "10 s"),
        ("it serves", f"{grown:.1f} s", ""),
        (f"all {MOST} serve", f"{full:.1f} s", ""),
        ("one replica is left after the load ended", f"{shrunk:.1f} s", "60 s"),
        (f"of {MOST} replies at a time, cut while the fleet shrank", f"{cut}", "0"),
    ]
    load = report.load_average()
    note = (
        f"Replicas of {PLACES} places, {ITL_MS} ms a token, {STREAMS} streams; throughput: medians of {ROUNDS} rounds, "
        f"times: medians of {GROWTHS}; load average after: {load}."
    )
    report.write_section("scaling", "Scaling", f"{note}\n\n{report.table(('', 'measured', 'goal'), rows)}")


async def _throughput(home: Path) -> tuple[float, float]:
    """Tokens a second of one replica and of all, side by side."""
    with ExitStack() as stack:
        targets: list[Target] = []
        for replicas in (1, MOST):
            env = SETTINGS | {"ONEBOX_ENGINE_REPLICAS": str(replicas)}
            ours = stack.enter_context(product(home / f"fixed-{replicas}", env))
            targets.append(Target(f"{replicas}", ours.api_url, "scripted", KEY))
        asked = {target.name: [_asked(number) for number in range(2 * PLACES * int(target.name))] for target in targets}
        samples: dict[str, list[float]] = {target.name: [] for target in targets}
        for turn in range(ROUNDS + 1):
            for target in targets:
                streams = PLACES * int(target.name)
                seen = await interleave((target,), asked, streams, TOKENS, 1)
                if turn:  # the first is to warm up
                    samples[target.name].append(medians(seen[target.name]).tokens_per_s)
    return statistics.median(samples["1"]), statistics.median(samples[str(MOST)])


async def _growth(home: Path) -> tuple[float, float, float, float, int]:
    """Seconds until a second replica starts, two and all serve, and one is left; the replies cut meanwhile."""
    port, token = free_port(), secrets.token_hex(16)
    env = SETTINGS | {
        "ONEBOX_ENGINE_REPLICAS_MAX": str(MOST),
        "ONEBOX_ENGINE_PORT": str(port),
        "ONEBOX_INTERNAL_TOKEN": token,
    }
    timeout = aiohttp.ClientTimeout(total=600)
    with product(home / "elastic", env) as ours:
        target = Target("elastic", ours.api_url, "scripted", KEY)
        fleet = f"http://127.0.0.1:{port}/v1/fleet"
        headers = {"authorization": f"Bearer {token}"}
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as http:

            async def serving() -> int:
                async with http.get(fleet, headers=headers) as response:
                    return len((await response.json())["replicas"]) if response.status == 200 else 0

            async def started() -> int:
                return await asyncio.to_thread(_replicas, ours.pid)

            rounds = [await _grow_and_shrink(http, target, started, serving) for _ in range(GROWTHS)]
    decided, grown, full, shrunk = (statistics.median(one[index] for one in rounds) for index in range(4))
    return decided, grown, full, shrunk, sum(int(one[4]) for one in rounds)


async def _grow_and_shrink(
    http: aiohttp.ClientSession,
    target: Target,
    started: Callable[[], Awaitable[int]],
    serving: Callable[[], Awaitable[int]],
) -> tuple[float, float, float, float, float]:
    flooding = trickling = True
    cut = 0

    async def flood(number: int) -> None:
        while flooding:
            try:
                await stream(http, target, _asked(number), TOKENS)
            except RuntimeError:  # refused: more than all queues hold is asked for
                await asyncio.sleep(RETRY_S)

    async def trickle(number: int) -> None:
        nonlocal cut
        while trickling:
            try:
                reply = await stream(http, target, _asked(number), LONG_TOKENS)
                cut += reply.tokens != LONG_TOKENS
            except RuntimeError:
                cut += 1

    before = await started()
    began = time.monotonic()
    many = [asyncio.create_task(flood(number)) for number in range(STREAMS + PLACES)]
    decided = await _until(started, lambda count: count > before) - began
    grown = await _until(serving, lambda count: count >= 2) - began
    full = await _until(serving, lambda count: count == MOST) - began
    flooding = False
    await asyncio.gather(*many)
    ended = time.monotonic()
    few = [asyncio.create_task(trickle(1000 + number)) for number in range(MOST)]
    shrunk = await _until(serving, lambda count: count == 1) - ended
    trickling = False
    await asyncio.gather(*few)
    return decided, grown, full, shrunk, cut


def _replicas(launcher: int) -> int:
    """How many processes of the product are replicas, ready or not."""
    found = 0
    for child in psutil.Process(launcher).children(recursive=True):
        try:
            found += any(part.startswith(REPLICA) for part in child.cmdline())
        except psutil.Error:
            continue
    return found


async def _until(counted: Callable[[], Awaitable[int]], enough: Callable[[int], bool]) -> float:
    """The moment when there were so many replicas."""
    while not enough(await counted()):
        await asyncio.sleep(POLL_S)
    return time.monotonic()


def _asked(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Tell me about river number {number}."}]
