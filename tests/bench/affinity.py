"""Figure 5: prefix-cache hits and evenness of load over four replicas, against vllm-router and its policies.

The same conversations of several turns go through Onebox, and through vllm-router in front of workers with the same
simulated prefix cache. What counts is counted by the caches, not timed; a replica's cache holds a third of all turns.
"""

import asyncio
import random
import secrets
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp

from onebox.sockets import free_port
from tests.bench import report
from tests.bench.load import Target, stream
from tests.bench.peers import peer_python
from tests.product import KEY, process, product

REPLICAS = 4
ROUNDS = 3
CONVERSATIONS, TURNS, STREAMS = 96, 8, 32
WORDS, TOKENS = 120, 80
THINK_S = 1.5
POLICIES = ("cache_aware", "consistent_hash", "round_robin")
CACHE_TOKENS = 48_000
SETTINGS = {
    "ONEBOX_ENGINE": "scripted",
    "ONEBOX_SCRIPTED_TTFT_MS": "5",
    "ONEBOX_SCRIPTED_ITL_MS": "3",
    "ONEBOX_SCRIPTED_CACHE_TOKENS": str(CACHE_TOKENS),
}
NAMES = ("river", "bridge", "market", "harbour", "garden", "mountain", "lantern", "orchard", "tower", "meadow")

Counts = Mapping[str, tuple[int, int, int]]  # by replica: prompt tokens found, prompt tokens asked for, replies


@dataclass(frozen=True, slots=True)
class System:
    """What is measured: where chats go, and where its replicas show their metrics with which headers."""

    target: Target
    fleet_url: str | None
    workers: tuple[str, ...]
    token: str


async def main() -> None:
    """Run it and write the section `affinity`."""
    with tempfile.TemporaryDirectory(prefix="ob-") as folder, ExitStack() as stack:
        systems = [_onebox(Path(folder), stack), *(_router(policy, Path(folder), stack) for policy in POLICIES)]
        hits: dict[str, list[float]] = {system.target.name: [] for system in systems}
        spread: dict[str, list[float]] = {system.target.name: [] for system in systems}
        for turn in range(ROUNDS):
            for system in systems if turn % 2 == 0 else reversed(systems):
                share, evenness = await _round(system, seed=turn)
                hits[system.target.name].append(share)
                spread[system.target.name].append(evenness)
    median = {name: statistics.median(shares) for name, shares in hits.items()}
    ours = median["onebox"]
    rows = [
        (name, f"{share:.1%}", f"{ours / share:.2f}x", f"± {statistics.median(spread[name]):.0%}")
        for name, share in median.items()
    ]
    load = report.load_average()
    note = (
        f"{REPLICAS} replicas, {CONVERSATIONS} conversations of {TURNS} turns, {STREAMS} at a time, a first message of "
        f"{WORDS} words, {TOKENS} tokens a reply; caches of {CACHE_TOKENS} tokens; the client sends the whole history "
        f"each time, and to the router a session id too. Medians of {ROUNDS} rounds, load average after: {load}."
    )
    table = report.table(("path", "prompt tokens found", "onebox finds", "farthest replica from an even part"), rows)
    report.write_section("affinity", "Prefix affinity", f"{note}\n\n{table}")


def _onebox(home: Path, stack: ExitStack) -> System:
    port, token = free_port(), secrets.token_hex(16)
    own = {
        "ONEBOX_ENGINE_REPLICAS": str(REPLICAS),
        "ONEBOX_ENGINE_PORT": str(port),
        "ONEBOX_INTERNAL_TOKEN": token,
    }
    ours = stack.enter_context(product(home / "home", SETTINGS | own))
    return System(Target("onebox", ours.api_url, "scripted", KEY), f"http://127.0.0.1:{port}", (), token)


def _router(policy: str, home: Path, stack: ExitStack) -> System:
    workers: list[str] = []
    for _ in range(REPLICAS):
        port = free_port()
        argv = (sys.executable, "-m", "tests.bench.scripted_openai", str(port))
        workers.append(f"http://127.0.0.1:{port}")
        stack.enter_context(process(argv, f"{workers[-1]}/health", home / f"worker-{port}.log", SETTINGS))
    port = free_port()
    argv = (
        str(peer_python()), "-m", "vllm_router.launch_router", "--worker-urls", *workers, "--policy", policy,
        "--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port()),
    )  # fmt: skip
    stack.enter_context(process(argv, f"http://127.0.0.1:{port}/health", home / f"{policy}.log"))
    return System(
        Target(f"vllm-router, {policy}", f"http://127.0.0.1:{port}", "scripted"), None, tuple(workers), "none"
    )


async def _round(system: System, seed: int) -> tuple[float, float]:
    """The share of prompt tokens found, and how far the replica with the oddest part of the replies is off."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=300)) as http:
        before = await _counts(http, system)
        places, draw = asyncio.Semaphore(STREAMS), random.Random(seed)
        await asyncio.gather(
            *(_converse(http, system.target, places, random.Random(draw.random())) for _ in range(CONVERSATIONS))
        )
        after = await _counts(http, system)
    gained = [tuple(now - then for now, then in zip(after[url], before[url], strict=True)) for url in after]
    found, asked, replies = (sum(column) for column in zip(*gained, strict=True))
    return found / asked, max(abs(one[2] * len(gained) / replies - 1) for one in gained)


async def _converse(
    http: aiohttp.ClientSession, target: Target, places: asyncio.Semaphore, draw: random.Random
) -> None:
    await asyncio.sleep(draw.uniform(0, 2 * THINK_S))
    messages: list[dict[str, str]] = []
    session = {"session_id": f"{draw.getrandbits(64):x}"}  # for the router's hash; Onebox does without
    named = target if target.name == "onebox" else replace(target, extra=(("session_params", session),))
    for _ in range(TURNS):
        words = " ".join(f"{draw.choice(NAMES)} {draw.randrange(1000)}" for _ in range(5 if messages else WORDS // 2))
        messages.append({"role": "user", "content": f"Tell me about {words}."})
        async with places:
            reply = await stream(http, named, messages, TOKENS)
        messages.append({"role": "assistant", "content": reply.text})
        await asyncio.sleep(draw.expovariate(1 / THINK_S))


async def _counts(http: aiohttp.ClientSession, system: System) -> Counts:
    headers = {"authorization": f"Bearer {system.token}"}
    urls: Sequence[str] = system.workers
    if system.fleet_url is not None:
        while len(urls) < REPLICAS:  # a replica that has just begun does not know all others yet
            async with http.get(f"{system.fleet_url}/v1/fleet", headers=headers) as response:
                urls = [record["door"] for record in (await response.json())["replicas"]]
    counts: dict[str, tuple[int, int, int]] = {}
    for url in urls:
        async with http.get(f"{url}/metrics", headers=headers) as response:
            lines = [line.rsplit(" ", 1) for line in (await response.text()).splitlines() if line[0] != "#"]
        values = {name: float(value) for name, value in lines}
        replies = sum(
            v for name, v in values.items() if name.startswith(("served_total", "onebox_engine_finished_total"))
        )
        counts[url] = (
            int(values["onebox_engine_prefix_hit_tokens_total"]),
            int(values["onebox_engine_prefix_queried_tokens_total"]),
            int(replies),
        )
    return counts
