"""Ten times more requests than the engine can take, for a minute: what the refused and the admitted see.

Open loop: requests come at their times whatever became of those before. The engine has 16 places, and neither it nor
the gateway has a queue, so whoever is admitted is served at once; a reply takes about a second.
"""

import asyncio
import os
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from tests.bench import report
from tests.bench.measures import gateway_workers, ms, percentile, resident_mib
from tests.product import KEY, product

PLACES = 16
TOKENS = 200
TOKEN_MS = 5.0
UNLOADED = 40
OVER = 10
SECONDS = 60.0
SETTLE_S = 10.0
ENV = {
    "ONEBOX_ENGINE": "scripted",
    "ONEBOX_ENGINE_MAX_ONGOING": str(PLACES),
    "ONEBOX_ENGINE_MAX_QUEUED": "0",
    "ONEBOX_QUEUE_PER_PLACE": "0",
    "ONEBOX_SCRIPTED_ITL_MS": str(TOKEN_MS),
}


@dataclass(frozen=True, slots=True)
class Seen:
    """One request: its status, seconds to the first text or to the refusal, whether it was whole."""

    status: int
    first_s: float
    whole: bool
    clean: bool


async def main() -> None:
    """Run it and write the section `overload`."""
    capacity = PLACES / (TOKENS * TOKEN_MS / 1000)
    chance = random.Random(11)
    with tempfile.TemporaryDirectory(prefix="ob-") as folder, product(Path(folder), ENV) as ours:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120)) as http:
            for index in range(20):
                await _ask(http, ours.api_url, index)
            alone = [await _ask(http, ours.api_url, index) for index in range(UNLOADED)]
            workers = gateway_workers(ours.pid)
            await asyncio.sleep(2)
            before = resident_mib(workers)
            tasks: list[asyncio.Task[Seen]] = []
            began = time.monotonic()
            at = 0.0
            while at < SECONDS:
                await asyncio.sleep(max(0.0, began + at - time.monotonic()))
                tasks.append(asyncio.create_task(_ask(http, ours.api_url, len(tasks))))
                at += chance.expovariate(OVER * capacity)
            seen = await asyncio.gather(*tasks)
            await asyncio.sleep(SETTLE_S)
            grown = resident_mib(workers) - before
    admitted = [one for one in seen if one.status == 200]
    refused = [one for one in seen if one.status != 200]
    unloaded = [one.first_s for one in alone]
    unclean = sum(not one.clean for one in refused)
    cut = sum(not one.whole for one in admitted)
    firsts, refusals = [one.first_s for one in admitted], [one.first_s for one in refused]
    rows = [
        ("rejections that are no clean 429/503 with Retry-After", f"{unclean} of {len(refused)}", "0"),
        ("rejection, p99", ms(percentile(refusals, 0.99)), "250 ms"),
        ("first token unloaded, p50 / p99", _both(unloaded), ""),
        ("first token of the admitted, p50 / p99", _both(firsts), ""),
        ("ratio of the p50s", f"{percentile(firsts, 0.5) / percentile(unloaded, 0.5):.2f}", "2"),
        ("ratio of the p99s", f"{percentile(firsts, 0.99) / percentile(unloaded, 0.99):.2f}", "2"),
        ("replies cut after their 200", f"{cut} of {len(admitted)}", "0"),
        ("memory of the workers after, against before", f"{grown:+.0f} MiB", "64 MiB"),
    ]
    load = report.load_average()
    note = (
        f"{len(seen)} requests in {SECONDS:g} s, {OVER} times the capacity of {capacity:g} a second; the load "
        f"generator runs on the same {os.cpu_count()} cores; load average after: {load}."
    )
    report.write_section("overload", "Overload", f"{note}\n\n{report.table(('', 'measured', 'goal'), rows)}")


def _both(seconds: list[float]) -> str:
    return f"{ms(percentile(seconds, 0.5))} / {ms(percentile(seconds, 0.99))}"


async def _ask(http: aiohttp.ClientSession, url: str, index: int) -> Seen:
    body = {
        "model": "chat",
        "messages": [{"role": "user", "content": f"Go on, number {index}"}],
        "max_tokens": TOKENS,
        "stream": True,
    }
    headers = {"authorization": f"Bearer {KEY}"}
    began = time.perf_counter()
    try:
        async with http.post(f"{url}/v1/chat/completions", json=body, headers=headers) as response:
            if response.status != 200:
                error = (await response.json())["error"]
                clean = response.status in (429, 503) and "retry-after" in response.headers and bool(error["message"])
                return Seen(response.status, time.perf_counter() - began, whole=False, clean=clean)
            first_s, whole = 0.0, False
            async for line in response.content:
                if not first_s and b'"content":"' in line and b'"content":""' not in line:
                    first_s = time.perf_counter() - began
                whole = whole or line.startswith(b"data: [DONE]")
            return Seen(200, first_s, whole, clean=True)
    except (aiohttp.ClientError, TimeoutError, KeyError, ValueError):
        return Seen(0, time.perf_counter() - began, whole=False, clean=False)
