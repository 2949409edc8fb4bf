"""The queue before the engines: what it costs when it is empty, what it does for the small, how true its promises are.

One tenant keeps a hundred runs going at an engine with few places; another one asks single questions, as it did while
it was alone. In a queue without tenants it would wait as long as the first one does.
"""

import asyncio
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import orjson

from agents.generation import End
from agents.metrics import Metrics
from agents.places import Places, Seat
from deploy.store import prepare
from onebox.messages import user
from onebox.settings import Settings
from tests.agents.conftest import store_child
from tests.agents.processes import ADMIN_KEY, Stack, run_stack
from tests.bench import report
from tests.bench.measures import ms, percentile

PLACES = 8
CROWD = 100
TOKENS = 60
QUESTIONS = 40
PAUSE_S = 0.25
LOOPS = 20_000
SETTINGS = {
    "engine_max_ongoing": str(PLACES),
    "queue_per_place": "20",
    "scripted_ttft_ms": "20",
    "scripted_itl_ms": "5",
}


@dataclass(frozen=True, slots=True)
class Seen:
    """One run: seconds to its first text, what it was first told to wait, and what it did wait, if it had to."""

    first_s: float
    told_s: float | None
    waited_s: float | None


async def main() -> None:
    """Run it and write the section `admission`."""
    cost_us = await _cost_us()
    with tempfile.TemporaryDirectory(prefix="ob-") as folder:
        home = Path(folder)
        embedded = prepare(home)
        store = store_child(embedded, home)
        store.start()
        try:
            with run_stack(Stack(home, embedded, SETTINGS)) as stack:
                small = stack.new_key("small")
                connector = aiohttp.TCPConnector(limit=0)
                async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(60)) as http:
                    for _ in range(10):
                        await _ask(http, stack.url, small)
                    alone = await _questions(http, stack.url, small)
                    crowd: list[Seen] = []
                    at_work = [asyncio.create_task(_crowd(http, stack.url, crowd)) for _ in range(CROWD)]
                    await asyncio.sleep(5.0)
                    crowd.clear()
                    beside = await _questions(http, stack.url, small)
                    for task in at_work:
                        task.cancel()
                    await asyncio.gather(*at_work, return_exceptions=True)
        finally:
            store.stop()
    off = [abs(seen.told_s - seen.waited_s) / seen.waited_s for seen in crowd if seen.told_s and seen.waited_s]
    firsts = {name: [seen.first_s for seen in some] for name, some in (("alone", alone), ("beside", beside))}
    turn_s = (0.02 + TOKENS * 0.005) / PLACES
    rows = [
        ("a run that need not wait: CPU of its claim, call and end", f"{cost_us:.1f} µs"),
        ("single question, the box idle: first token p50 / p99", _both(firsts["alone"])),
        (f"single question beside {CROWD} runs of another tenant", _both(firsts["beside"])),
        ("a run of that tenant: first token p50 / p99", _both([seen.first_s for seen in crowd])),
        ("time between two free places, by the engine's pace", ms(turn_s)),
        ("first told wait against the real one, median error", f"{100 * percentile(off, 0.5):.0f} %"),
    ]
    load = report.load_average()
    note = f"{PLACES} places, {TOKENS} tokens a reply, one gateway worker; load average after: {load}."
    report.write_section("admission", "The queue", f"{note}\n\n{report.table(('', 'measured'), rows)}")


async def _cost_us() -> float:
    """Microseconds of CPU for a run that has a free place: claim, one call, end."""
    places = Places(Settings(), Metrics(), 64)
    prompt, end = [user("Tell me about the river. " * 20)], End("stop", 120, 60)
    began = time.process_time()
    for _ in range(LOOPS):
        seat = Seat("tenant", _untold)
        call = await places.open(seat, "chat", prompt, 2048)
        call.close(end, 60)
        places.give_back(seat)
    return (time.process_time() - began) / LOOPS * 1e6


async def _questions(http: aiohttp.ClientSession, url: str, key: str) -> list[Seen]:
    seen: list[Seen] = []
    for _ in range(QUESTIONS):
        seen.append(await _ask(http, url, key))
        await asyncio.sleep(PAUSE_S)
    return seen


async def _crowd(http: aiohttp.ClientSession, url: str, seen: list[Seen]) -> None:
    while True:
        seen.append(await _ask(http, url, ADMIN_KEY))


async def _ask(http: aiohttp.ClientSession, url: str, key: str) -> Seen:
    """Read one run to its end. Raises `RuntimeError` on anything but a stream."""
    body = {"model": "chat", "input": "Tell me about the river.", "max_output_tokens": TOKENS, "stream": True}
    headers = {"authorization": f"Bearer {key}"}
    began = time.perf_counter()
    first_s = 0.0
    told_s: float | None = None
    told_at: float | None = None
    waited_s: float | None = None
    async with http.post(f"{url}/v1/responses", json=body, headers=headers) as response:
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {await response.text()}")
        async for line in response.content:
            now = time.perf_counter()
            if line.startswith(b'data: {"type":"onebox.queued"'):
                event = orjson.loads(line[6:])["event"]
                if told_at is None:
                    told_s, told_at = event["wait_s"], now
                if event["position"] == 0:
                    waited_s = now - told_at
            elif not first_s and line.startswith(b'data: {"type":"response.output_text.delta"'):
                first_s = now - began
    return Seen(first_s, told_s, waited_s)


def _both(seconds: list[float]) -> str:
    return f"{ms(percentile(seconds, 0.5))} / {ms(percentile(seconds, 0.99))}"


def _untold(position: int, wait_s: float | None) -> None:
    """Nobody is told."""
