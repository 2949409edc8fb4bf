"""A store that takes everything and answers nothing: how long until a request or a stream is told so."""

import asyncio
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp

from deploy.store import prepare
from tests.agents.conftest import store_child
from tests.bench import report
from tests.bench.measures import ms, percentile
from tests.faults.redis_proxy import RedisProxy
from tests.product import KEY, product

ROUNDS = 5
AT_ONCE = 24


async def main() -> None:
    """Run it and write the section `blackhole`."""
    asked: list[float] = []
    streamed: list[float] = []
    statuses: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="ob-") as folder:
        home = Path(folder)
        embedded = prepare(home / "kept")
        store = store_child(embedded, home)
        store.start()
        try:
            with RedisProxy(urlsplit(embedded.url).port or 0) as proxy:
                url = urlsplit(embedded.url)
                env = {
                    "ONEBOX_ENGINE": "scripted",
                    "ONEBOX_REDIS_URL": embedded.url.replace(f":{url.port}/", f":{proxy.port}/"),
                }
                with product(home, env) as ours:
                    for _ in range(ROUNDS):
                        await _round(ours.api_url, proxy, asked, streamed, statuses)
        finally:
            store.stop()
    rows = [
        ("new request → error", ms(percentile(asked, 0.5)), ms(percentile(asked, 0.99)), "2 s p99"),
        ("running stream → error", ms(percentile(streamed, 0.5)), ms(percentile(streamed, 0.99)), "2 s p99"),
    ]
    load = report.load_average()
    note = (
        f"{len(asked)} requests and {len(streamed)} streams in {ROUNDS} black holes; answers: "
        f"{', '.join(sorted(statuses))}; load average after: {load}."
    )
    report.write_section(
        "blackhole", "A store that does not answer", f"{note}\n\n{report.table(('', 'p50', 'p99', 'goal'), rows)}"
    )


async def _round(url: str, proxy: RedisProxy, asked: list[float], streamed: list[float], statuses: set[str]) -> None:
    headers = {"authorization": f"Bearer {KEY}"}
    dark = asyncio.Event()
    began = 0.0

    def body(text: str) -> dict[str, object]:
        message = {"role": "user", "content": text}
        return {"model": "chat", "messages": [message], "max_tokens": 4000, "stream": True}

    async def stream(http: aiohttp.ClientSession, index: int) -> None:
        async with http.post(f"{url}/v1/chat/completions", json=body(f"Write, {index}"), headers=headers) as response:
            async for line in response.content:
                if b'"error"' in line and dark.is_set():
                    streamed.append(time.perf_counter() - began)
                    statuses.add("error event")

    async def ask(http: aiohttp.ClientSession, index: int) -> None:
        sent = time.perf_counter()
        async with http.post(f"{url}/v1/chat/completions", json=body(f"Hello, {index}"), headers=headers) as response:
            statuses.add(f"{response.status} {(await response.json())['error']['code']}")
            asked.append(time.perf_counter() - sent)

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=60)) as http:
        streams = [asyncio.create_task(stream(http, index)) for index in range(AT_ONCE)]
        await asyncio.sleep(0.6)
        proxy.set_link("blackhole")
        began = time.perf_counter()
        dark.set()
        await asyncio.gather(*[ask(http, index) for index in range(AT_ONCE)])
        await asyncio.gather(*streams)
        proxy.set_link("up")
    while True:
        async with aiohttp.request("GET", f"{url}/readyz") as response:
            if response.status == 200:
                break
        await asyncio.sleep(0.2)
    await asyncio.sleep(3)
